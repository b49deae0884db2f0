"""Families of flows: packs of spheres, draws, first states, and the data sets made of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import FORK

from latentphys import operators, workers
from latentphys.data import open_store
from latentphys.data.lock import FileLock
from latentphys.families import Family, Fields, NavierStokes, OpenChannel, Porous, simulate
from latentphys.families.open_channel import reichardt
from latentphys.grid import Geometry, Grid


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        (OpenChannel, {"lengths": (1.0, 1.0, 2.0)}, r"Expected a depth of 1 .* got lengths \[1.0, 1.0, 2.0\]"),
        (
            OpenChannel,
            {"reynolds": (200.0, 100.0)},
            r"range of Re_τ, two numbers with 0 < a ≤ b < inf, got \[200.0, 100.0\]",
        ),
        (OpenChannel, {"reynolds": (100.0,)}, r"range of Re_τ, two numbers with .* got \[100.0\]"),
        (Porous, {"reynolds": (0.0, 1.0)}, "Expected a range of Re, two numbers with 0 < a ≤ b < inf, got"),
    ],
)
def test_impossible_families_are_refused(family: type, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family(**arguments)


FAMILIES = [OpenChannel(reynolds=(150.0, 210.0), spin_up=0.01), Porous(spin_up=0.01)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trajectory_depends_on_the_seed_and_its_index_alone(family: Family) -> None:
    grid = family.grid((8, 8, 8))
    assert isinstance(grid, Grid)

    def drawn(seed: int, trajectory: int) -> list[np.ndarray]:
        parameters = family.draw(seed, trajectory)
        solid = family.solid(grid, parameters, seed, trajectory)
        geometry = Geometry(grid, None if solid is None else torch.from_numpy(solid))
        first = family.initial(geometry, parameters, seed, trajectory)["velocity"].numpy()
        return [*(np.asarray(p) for p in parameters.values()), geometry.fluid.numpy(), first]

    same = zip(drawn(5, 2), drawn(5, 2), strict=True)
    assert all(np.array_equal(a, b) for a, b in same)
    for other in (drawn(5, 3), drawn(6, 2)):
        assert not np.array_equal(drawn(5, 2)[0], other[0]) and not np.array_equal(drawn(5, 2)[-1], other[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_state_is_an_admissible_flow_of_the_family(family: Family) -> None:
    grid, parameters = family.grid((8, 10, 12)), family.draw(0, 0)
    assert isinstance(grid, Grid)
    solid = family.solid(grid, parameters, 0, 0)
    geometry = Geometry(grid, None if solid is None else torch.from_numpy(solid))
    flux = family.initial(geometry, parameters, 0, 0)["velocity"]
    u = operators.velocity(flux, grid)
    assert float(operators.div(flux, grid).abs().amax()) < 1e-9 * float(flux.abs().amax())
    assert bool((flux[~geometry.open_faces] == 0.0).all())
    if isinstance(family, OpenChannel):
        z = (torch.arange(12, dtype=torch.float64) + 0.5) / 12
        u[0] -= reichardt(z / parameters["viscosity"])
    speed = float(u.square().sum(0)[geometry.fluid].mean().sqrt())
    assert speed == pytest.approx(family.disturbance, rel=1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_data_set_is_exact_reproducible_and_says_where_it_comes_from(family: Family, tmp_path: Path) -> None:
    done: list[int] = []

    def made(name: str, batch_size: int) -> Path:
        return simulate(
            family,
            tmp_path / name,
            shape=(8, 6, 10),
            num_trajectories=3,
            num_frames=3,
            seed=7,
            batch_size=batch_size,
            provenance={"note": "x"},
            progress=done.append,
        )

    store, again, singly = (open_store(made(*arguments)) for arguments in (("a", 2), ("b", 2), ("c", 1)))
    assert store.family == family.name and len(store) == 3 and sum(done) == 3 * 9
    provenance = store.attributes["provenance"]
    assert provenance["seed"] == 7 and provenance["exact"] is True and provenance["note"] == "x"
    np.testing.assert_allclose(store.times, np.arange(3) * family.interval)
    assert store.parameters["force"].shape == (3, 3, 3) and store.parameters["viscosity"].shape == (3,)
    for i in range(3):
        flux, geometry = store.read("velocity", i, slice(None)), store.geometry(i)
        assert flux.dtype == torch.float64 and float(flux.abs().amax()) > 0
        assert bool((operators.div(flux, store.grid) == 0.0).all())
        assert bool((flux[:, ~geometry.open_faces] == 0.0).all())
        assert torch.equal(flux, again.read("velocity", i, slice(None)))
        # Trajectories of a batch share Δt: the physics is the same, the last bits are not.
        assert torch.equal(geometry.fluid, singly.geometry(i).fluid)
        other = singly.read("velocity", i, slice(None))
        torch.testing.assert_close(flux, other, rtol=0, atol=0.02 * float(flux.abs().amax()))
        drawn = family.draw(7, i)
        assert float(store.parameters["viscosity"][i]) == drawn["viscosity"]
    with pytest.raises(
        ValueError, match=r"Expected a new path, got .*, which exists; choose another name or overwrite"
    ):
        made("a", 2)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are there sooner than those that users get, which are spawned."""
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: FORK)


@pytest.mark.usefixtures("forked")
def test_a_data_set_does_not_depend_on_who_made_it(tmp_path: Path) -> None:
    """Two processes write what one does, bit for bit."""
    settings: dict[str, Any] = {"shape": (6, 6, 6), "num_trajectories": 3, "num_frames": 3, "batch_size": 1}
    done: list[int] = []
    alone = open_store(simulate(Porous(spin_up=0.01), tmp_path / "alone", **settings))
    shared = simulate(Porous(spin_up=0.01), tmp_path / "shared", workers=2, progress=done.append, **settings)
    assert sum(done) == 9
    assert open_store(shared).attributes["checksums"] == alone.attributes["checksums"]
    assert open_store(shared).attributes["statistics"] == alone.attributes["statistics"]
    with pytest.raises(ValueError, match="at least one worker, or the address of a dask cluster .*, got 0"):
        simulate(Porous(), tmp_path / "none", workers=0, **settings)


class Unlucky(Porous):
    """Fails in another process."""

    def initial(self, *arguments: Any) -> Fields:
        raise FloatingPointError("Expected a finite flow, got none.")


@pytest.mark.usefixtures("forked")
def test_what_fails_in_a_worker_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"shape": (6, 6, 6), "num_trajectories": 2, "num_frames": 3, "batch_size": 1}
    with pytest.raises(FloatingPointError, match="Expected a finite flow, got none"):
        simulate(Unlucky(), tmp_path / "a", workers=2, **settings)
    assert not list(tmp_path.iterdir())


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """Each of two processes is at work on a frame that takes hours; the store is free soon after ``kill -9``."""
    options = ["grid.shape=[8,8,8]", "trajectories=2", "batch_size=1", "workers=2", "family.interval=1e5"]
    command = [sys.executable, "-m", "latentphys", "simulate", "size=tiny", *options, "family.spin_up=0.0"]
    run = subprocess.Popen([*command, f"out={tmp_path / 'a.zarr'}"], start_new_session=True)
    lock = tmp_path / ".a.zarr.partial" / "parts.lock"

    def is_held() -> bool:
        try:
            FileLock(lock).close()
        except ValueError:
            return True
        return False

    try:
        waiting = time.monotonic() + 60
        while not (lock.exists() and is_held()):
            assert run.poll() is None and time.monotonic() < waiting
            time.sleep(0.1)
        run.kill()
        run.wait()
        waiting = time.monotonic() + 10
        while is_held():
            assert time.monotonic() < waiting, "a worker goes on without its parent"
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("after", [3, 7, 9])
def test_an_interrupted_data_set_goes_on_to_the_last_bit(
    family: Family, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two snapshots a shard: the run goes on from the state at the end of the last whole shard."""
    monkeypatch.setattr("latentphys.data.plan.SHARD_BYTES", 2 * 3 * 6**3 * 8)
    settings: dict[str, Any] = {"shape": (6, 6, 6), "num_trajectories": 2, "num_frames": 6, "batch_size": 2}
    whole = open_store(simulate(family, tmp_path / "whole", **settings))
    counts: list[int] = []

    def stop(num_frames: int) -> None:
        counts.append(num_frames)
        if sum(counts) >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(family, tmp_path / "a", resume=True, progress=stop, **settings)
    assert not (tmp_path / "a").exists() and (tmp_path / ".a.partial").is_dir()
    with pytest.raises(ValueError, match=r"delete that folder to begin anew"):
        simulate(family, tmp_path / "a", resume=True, seed=1, **settings)
    calls: list[float] = []
    advance = NavierStokes.advance

    def counted(solver: NavierStokes, fields: Fields, time: float, duration: float) -> Fields:
        calls.append(time)
        return advance(solver, fields, time, duration)

    monkeypatch.setattr(NavierStokes, "advance", counted)
    again: list[int] = []
    store = open_store(simulate(family, tmp_path / "a", resume=True, progress=again.append, **settings))
    kept = after // 2 // 2 * 2
    assert again[0] == 2 * kept and sum(again) == 12 and len(calls) == (6 - kept if kept else 6)
    assert store.attributes["checksums"] == whole.attributes["checksums"]
    assert store.attributes["statistics"] == whole.attributes["statistics"]
    assert not (tmp_path / ".a.partial").exists()


def test_a_data_set_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected ≥ 1 trajectory of ≥ 2 frames in batches of ≥ 1, got 1 of 1"):
        simulate(OpenChannel(), tmp_path / "a", shape=(4, 4, 4), num_trajectories=1, num_frames=1)
    assert not (tmp_path / "a").exists()
