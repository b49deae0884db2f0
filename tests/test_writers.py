"""Several writers, interruptions, full disks: the store is the one that a single undisturbed process writes."""

import multiprocessing
import os
import pickle
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import FORK
from store_files import content

from latentphys.data import Part, StoreWriter, create_store, open_store, plan
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Boundaries, Grid

CHANNEL: Boundaries = (("periodic", "periodic"), ("periodic", "periodic"), ("no_slip", "free_slip"))
GRID = Grid((4, 3, 5), (0.5, 0.25, 0.1), CHANNEL)
SPECS = {"velocity": VELOCITY, "pressure": FieldSpec("pressure", "scalar", "Pa")}
TIMES = [0.1 * t for t in range(7)]
EXTRAS = {"routing": ((3, 7, 2, 2), "int16", ("trajectory", "time", "layer", "token"))}
ORDER = ("velocity", "pressure", "routing")
SHARD = 3
SHARD_BYTES = SHARD * (4 * 60 * 8 + 8)
"""Three snapshots of every array to a shard, so that the seven of a trajectory fill two and begin a third."""


def make(path: Path, **changes: Any) -> StoreWriter:
    """A prepared store of three trajectories of seven snapshots, one of them with solids."""
    solid = np.zeros((3, 4, 3, 5), dtype=bool)
    solid[1, 1:3, 1, 2:] = True
    settings: dict[str, Any] = {
        "grid": GRID,
        "specs": SPECS,
        "family": "channel",
        "num_trajectories": 3,
        "times": TIMES,
        "parameters": {"viscosity": [1e-3, 2e-3, 3e-3]},
        "solid": solid,
        "extras": EXTRAS,
        "provenance": {"seed": 7},
        "resume": True,
    }
    return create_store(path, **{**settings, **changes})


def snapshot(name: str, trajectory: int, time: int) -> torch.Tensor:
    """What a simulation would write; routing is zero throughout, which is data too."""
    if name == "routing":
        return torch.zeros(2, 2, dtype=torch.int16)
    generator = torch.Generator().manual_seed(97 * trajectory + time)
    shape = (3, 4, 3, 5) if name == "velocity" else (4, 3, 5)
    return 10.0**trajectory * torch.randn(shape, dtype=torch.float64, generator=generator)


def write(part: Part | StoreWriter, trajectory: int, start: int = 0, stop: int = 7) -> None:
    for time in range(start, stop):
        for name in ORDER:
            part.write(name, trajectory, time, snapshot(name, trajectory, time))


def check(path: Path, reference: Path) -> None:
    open_store(path).verify()
    assert content(path) == content(reference)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.fixture(autouse=True)
def short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The store that one process writes without a break."""
    path = tmp_path_factory.mktemp("reference") / "a.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_BYTES", SHARD_BYTES)
        with make(path, resume=False) as out:
            for trajectory in range(3):
                write(out, trajectory)
    yield path


def test_every_array_has_the_same_shards_and_zeros_are_stored(reference: Path) -> None:
    store = open_store(reference)
    assert {store.array(name).shards[1] for name in ORDER} == {SHARD}  # type: ignore[index]
    assert len([f for f in (reference / "routing" / "c").rglob("*") if f.is_file()]) == 9
    assert torch.equal(store.read("velocity", 2, 6), snapshot("velocity", 2, 6))


def test_statistics_are_those_of_the_numbers(reference: Path) -> None:
    every = np.stack([[snapshot("pressure", i, t).numpy() for t in range(7)] for i in range(3)])
    pressure = open_store(reference).statistics()["pressure"]
    np.testing.assert_allclose(pressure["mean"], every.mean(), rtol=1e-12)
    np.testing.assert_allclose(pressure["std"], every.std(), rtol=1e-12)


def write_part(part: Part, trajectories: list[int]) -> None:
    for trajectory in trajectories:
        write(part, trajectory)


def test_processes_share_the_work(tmp_path: Path, reference: Path) -> None:
    with make(tmp_path / "a.zarr") as out:
        workers = [FORK.Process(target=write_part, args=(out.part(), share)) for share in ([2], [1, 0])]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=120)
        assert [worker.exitcode for worker in workers] == [0, 0] and out.complete() == [0, 1, 2]
    check(tmp_path / "a.zarr", reference)


def test_parts_share_the_work_of_a_run_that_leaves_nothing(tmp_path: Path, reference: Path) -> None:
    with make(tmp_path / "a.zarr", resume=False) as out:
        for trajectory in (2, 0):
            write(pickle.loads(pickle.dumps(out.part())), trajectory)
        write(out, 1)
    check(tmp_path / "a.zarr", reference)


def write_and_die(path: Path) -> None:
    plan.SHARD_BYTES = SHARD_BYTES
    with make(path) as out:
        part = out.part()
        write(out, 2)
        write(part, 0, stop=5)
        part.checkpoint(0)
        write(part, 0, start=5, stop=6)
        write(part, 1, stop=4)
        os.kill(os.getpid(), signal.SIGKILL)


def test_work_goes_on_after_kill_9(tmp_path: Path, reference: Path) -> None:
    path = tmp_path / "a.zarr"
    process = FORK.Process(target=write_and_die, args=(path,))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".a.zarr.partial"]
    half_written = path.with_name(".a.zarr.partial") / "store/velocity/c/1/2/0/0/0/0.1f.partial"
    half_written.parent.mkdir(parents=True)
    half_written.write_bytes(b"half")
    with make(path) as out:
        assert out.complete() == [2]
        part = out.part()
        assert [part.resume(trajectory) for trajectory in range(3)] == [3, 0, 7]
        assert torch.equal(part.read("velocity", 0, 2), snapshot("velocity", 0, 2))
        write(part, 0, start=3)
        write(part, 1)
    check(path, reference)


@pytest.mark.parametrize("seed", range(4))
def test_any_number_of_interruptions_changes_nothing(tmp_path: Path, reference: Path, seed: int) -> None:
    path, random, breaks = tmp_path / "a.zarr", np.random.default_rng(seed), 0
    while not path.exists():
        try:
            with make(path) as out:
                parts = [pickle.loads(pickle.dumps(out.part())), out.part()]
                for trajectory in random.permutation(3).tolist():
                    part = parts[random.integers(2)]
                    start = part.resume(trajectory) if random.random() < 0.8 else part.flushed(trajectory) // 7 * 7
                    assert start in (0, 3, 6, 7) and (start == 7) == (trajectory in out.complete())
                    pieces = [(name, t) for t in range(start, 7) for name in ORDER]
                    if random.random() < 0.5:
                        random.shuffle(pieces)
                    for name, time in pieces:
                        part.write(name, trajectory, time, snapshot(name, trajectory, time))
                        if random.random() < 0.3:
                            assert part.checkpoint(trajectory) == part.flushed(trajectory)
                        if random.random() < 0.08:
                            raise KeyboardInterrupt
        except KeyboardInterrupt:
            breaks += 1
            parts[0].close()  # as the end of its process would
    assert breaks
    check(path, reference)


def test_a_part_knows_what_is_on_disk(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "a.zarr") as out:
        part = out.part()
        for time in range(7):
            part.write("velocity", 0, time, snapshot("velocity", 0, time))
        assert part.flushed(0) == part.checkpoint(0) == 0  # the others are missing
        for name in ("pressure", "routing"):
            part.write(name, 0, slice(0, 4), torch.stack([snapshot(name, 0, t) for t in range(4)]))
        assert part.flushed(0) == 3 and part.first_missing(0) == ("pressure", 4)
        with pytest.raises(ValueError, match="one of the 3 snapshots on disk of trajectory 0, got 3"):
            part.read("velocity", 0, 3)
        assert part.checkpoint(0) == 3 and part.resume(0) == 3
        with pytest.raises(ValueError, match="each snapshot once, got 'velocity' at trajectory 0, time 2 again"):
            part.write("velocity", 0, 2, snapshot("velocity", 0, 2))
        write(part, 0, start=3)
        assert part.flushed(0) == part.resume(0) == 7 and part.first_missing(0) is None
        with pytest.raises(ValueError, match="each snapshot once, got 'routing' at trajectory 0, time 0 again"):
            out.write("routing", 0, 0, snapshot("routing", 0, 0))
        with pytest.raises(ValueError, match="Expected a trajectory below 3"):
            part.resume(3)
        raise KeyboardInterrupt


def test_a_trajectory_begun_anew_forgets_its_record(tmp_path: Path, reference: Path) -> None:
    path = tmp_path / "a.zarr"
    with make(path) as out:
        first, second = out.part(), out.part()
        write(first, 0, stop=3)
        assert first.checkpoint(0) == second.flushed(0) == 3
        write(second, 0, stop=1)
        assert second.flushed(0) == second.resume(0) == 0
        for trajectory in range(3):
            write(second, trajectory)
    check(path, reference)


@contextmanager
def interrupted(path: Path, **changes: Any) -> Iterator[StoreWriter]:
    """A run that ends with Ctrl-C."""
    with pytest.raises(KeyboardInterrupt), make(path, **changes) as out:
        yield out
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"times": [0.2 * t for t in range(7)]}, "times: .* there, .* here"),
        ({"family": "pipe"}, "family: 'channel' there, 'pipe' here"),
        ({"parameters": {"viscosity": [1e-3, 2e-3, 4e-3]}}, "parameter viscosity"),
        ({"parameters": {}}, "parameter viscosity.*, parameter_units"),
        ({"solid": None}, "solid: '[0-9a-f]{8}' there, None here"),
        ({"dtype": "float32"}, "array pressure, array velocity"),
        ({"grid": Grid((4, 3, 5), (0.5, 0.25, 0.2), CHANNEL)}, "grid"),
        ({"provenance": {"seed": 8}}, "provenance seed: 7 there, 8 here"),
        ({"attributes": {"title": "mine"}}, "title: None there, 'mine' here"),
    ],
)
def test_another_description_is_refused_and_costs_nothing(
    tmp_path: Path, changes: dict[str, Any], differs: str
) -> None:
    with interrupted(tmp_path / "a.zarr") as out:
        write(out, 1)
    with (
        pytest.raises(ValueError, match=rf"got another .*{differs}.*delete that folder"),
        make(tmp_path / "a.zarr", **changes),
    ):
        pass
    with interrupted(tmp_path / "a.zarr", provenance={"seed": 7, "command": "other", "time": "later"}) as out:
        assert out.complete() == [1]


def test_two_live_runs_are_refused(tmp_path: Path, reference: Path) -> None:
    path = tmp_path / "a.zarr"
    live = rf"Expected nobody else to write to .*got a live process \({os.getpid()} on .*wait for it or stop it"
    with make(path) as out:
        with pytest.raises(ValueError, match=live), make(path):
            pass
        for trajectory in range(3):
            write(out, trajectory)
    check(path, reference)


def test_workers_that_outlive_their_run_are_refused(tmp_path: Path, reference: Path) -> None:
    path = tmp_path / "a.zarr"
    with interrupted(path) as out:
        orphan, idle = (pickle.loads(pickle.dumps(out.part())) for _ in range(2))
        write(orphan, 0, stop=2)
    with pytest.raises(ValueError, match="got a live process"), make(path):
        pass
    orphan.close()
    with make(path) as out:
        for part in (orphan, idle):
            with pytest.raises(ValueError, match="part of the run that writes to .* now, got one of an earlier run"):
                write(part, 0)
        for trajectory in range(3):
            write(out, trajectory)
    check(path, reference)
    with pytest.raises(ValueError, match="Expected an unfinished store in .*, got none; write inside `with create_st"):
        write(idle, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_a_fork_does_not_let_go_of_its_parents_lock(tmp_path: Path) -> None:
    with interrupted(tmp_path / "a.zarr") as out:
        write(out, 0, stop=1)
        child = os.fork()
        if not child:
            out._end(is_finished=False)
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(ValueError, match="got a live process"), make(tmp_path / "a.zarr"):
            pass


def damage(record: Path, how: str) -> None:
    text = record.read_text()
    if how == "lost":
        record.unlink()
    elif how == "truncated":
        record.write_text(text[: len(text) // 2])
    elif how == "flipped":
        middle = text.rindex("m2") + 12
        record.write_text(text[:middle] + ("A" if text[middle] != "A" else "B") + text[middle + 1 :])
    else:
        record.write_text(how)


@pytest.mark.parametrize("how", ["lost", "truncated", "flipped", "", "[]", '{"content": 3, "checksum": 0}'])
def test_a_trajectory_with_a_damaged_record_is_written_again(tmp_path: Path, reference: Path, how: str) -> None:
    path = tmp_path / "a.zarr"
    with interrupted(path) as out:
        for trajectory in range(3):
            write(out, trajectory)
    damage(path.with_name(".a.zarr.partial") / "records" / "1.json", how)
    with make(path) as out:
        part = out.part()
        assert out.complete() == [0, 2] and part.resume(1) == 0
        write(part, 1)
    check(path, reference)


def test_a_folder_without_a_description_is_begun_anew(tmp_path: Path, reference: Path) -> None:
    path = tmp_path / "a.zarr"
    with interrupted(path) as out:
        write(out, 0)
    (path.with_name(".a.zarr.partial") / "description.json").write_text("{")
    with make(path) as out:
        assert out.complete() == []
        for trajectory in range(3):
            write(out, trajectory)
    check(path, reference)


def test_what_is_missing_is_named_and_what_is_there_stays(tmp_path: Path, reference: Path) -> None:
    path = tmp_path / "a.zarr"
    missing = "all 3 trajectories to be written, got 1 complete; .*missing is 'pressure' at trajectory 1, time 3"
    with pytest.raises(ValueError, match=missing), make(path) as out:
        write(out, 0)
        part = out.part()
        write(part, 1, stop=4)
        part.checkpoint(1)
    assert not path.exists()
    with make(path) as out:
        for trajectory in (1, 2):
            write(out, trajectory)
    check(path, reference)


@contextmanager
def full_disk(largest_file: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("resume", [False, True])
def test_a_full_disk_leaves_no_store(tmp_path: Path, reference: Path, resume: bool) -> None:
    path = tmp_path / "a.zarr"
    with pytest.raises(OSError, match="Expected to write to .*, got: File too large; make room there and run again"):  # noqa: SIM117
        with make(path, resume=resume) as out:
            write(out, 0)
            with full_disk(1000):
                write(out, 1)
    assert [p.name for p in tmp_path.iterdir()] == ([".a.zarr.partial"] if resume else [])
    with make(path, resume=resume) as out:
        assert out.complete() == ([0] if resume else [])
        for trajectory in set(range(3)) - set(out.complete()):
            write(out, trajectory)
    check(path, reference)


def test_a_disk_that_fills_up_at_the_end_costs_nothing(tmp_path: Path, reference: Path) -> None:
    path = tmp_path / "a.zarr"
    with pytest.raises(OSError, match="make room there and run again"), make(path) as out:
        for trajectory in range(3):
            write(out, trajectory)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with make(path):
        pass
    check(path, reference)


def test_the_store_that_is_replaced_stays_until_the_end(tmp_path: Path, reference: Path) -> None:
    path = tmp_path / "a.zarr"
    with make(path, family="old", resume=False) as out:
        for trajectory in range(3):
            write(out, trajectory)
    with pytest.raises(ValueError, match="Expected a new path"):
        make(path)
    with interrupted(path, overwrite=True) as out:
        write(out, 0)
    assert open_store(path).family == "old"
    with make(path, overwrite=True) as out:
        for trajectory in (1, 2):
            write(out, trajectory)
    check(path, reference)


def test_a_store_that_somebody_else_made_meanwhile_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    with pytest.raises(ValueError, match="Expected a new path, got .*, which somebody else made"), make(path) as out:
        for trajectory in range(3):
            write(out, trajectory)
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    assert [p.name for p in path.iterdir()] == ["notes.txt"]
    (path / "notes.txt").unlink()
    path.rmdir()
    with make(path) as out:
        assert out.complete() == [0, 1, 2]
    open_store(path).verify()


def test_the_rest_of_a_finished_run_does_not_count(tmp_path: Path, reference: Path) -> None:
    """A run that is killed after its store has its name and before the temporary folder is gone."""
    path, folder = tmp_path / "a.zarr", tmp_path / ".a.zarr.partial"
    with interrupted(path) as out:
        for trajectory in range(3):
            write(out, trajectory)
    (folder / "store").rename(tmp_path / "taken")
    with make(path) as out:
        assert out.complete() == []
        for trajectory in range(3):
            write(out, trajectory)
    (tmp_path / "taken").rename(path.parent.parent / f"{tmp_path.name}-taken")
    check(path, reference)
