"""Running statistics against two-pass NumPy in FP64."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from latentphys.data import RunningStatistics, Store, compute_statistics, create_store, homogeneous_axes, open_store
from latentphys.data.statistics import ARRAYS
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.operators import flux_of, velocity
from latentphys.sphere import Sphere

CHANNEL = Grid((6, 4, 5), (0.5, 0.25, 0.1), (("periodic",) * 2, ("periodic",) * 2, ("no_slip", "free_slip")))
BOX = Grid((6, 4, 5), (0.5, 0.25, 0.1))
DUCT = Grid((6, 4, 5), (0.5, 0.25, 0.1), (("periodic",) * 2, ("no_slip",) * 2, ("no_slip",) * 2))
CLOSED = Grid((6, 4, 5), (0.5, 0.25, 0.1), (("no_slip",) * 2,) * 3)
SCALAR = FieldSpec("pressure", "scalar", "Pa")


def flow(n: int = 7, mean: float = 2.0, spread: float = 0.3) -> np.ndarray:
    """Snapshots whose mean differs per axis and along z."""
    rng = np.random.default_rng(3)
    profile = mean * (1 + np.arange(15).reshape(3, 1, 1, 5))
    return profile + spread * rng.standard_normal((n, 3, 6, 4, 5))


def gather(values: np.ndarray, grid: Grid, chunk: int, spec: FieldSpec = VELOCITY) -> RunningStatistics:
    """Statistics by workers that see ``chunk`` snapshots each."""
    total = RunningStatistics(spec, grid)
    for start in range(0, len(values), chunk):
        worker = RunningStatistics(spec, grid)
        worker.update(values[start : start + chunk])
        total.merge(worker)
    return total


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("grid", [CHANNEL, BOX, DUCT, CLOSED], ids=["channel", "box", "duct", "closed"])
def test_chunks_and_the_whole_agree_with_numpy(grid: Grid, chunk: int) -> None:
    values = flow()
    got = gather(values, grid, chunk).summary()
    axes = (0, 2, 3, 4)
    homogeneous = tuple(2 + a for a in homogeneous_axes(grid, False))
    profile = values.mean((0, *homogeneous), keepdims=True)[0] if homogeneous else np.zeros((3, 1, 1, 1))
    area = np.array(grid.face_areas).reshape(3, 1, 1, 1)
    assert got["count"] == 7 * 120
    np.testing.assert_allclose(got["mean"], values.mean(axes), rtol=1e-12)
    np.testing.assert_allclose(got["std"], values.std(axes), rtol=1e-12)
    assert got["min"] == values.min(axes).tolist() and got["max"] == values.max(axes).tolist()
    assert np.shape(got["profile"]) == profile.shape
    np.testing.assert_allclose(got["profile"], profile, rtol=1e-12)
    np.testing.assert_allclose(got["fluctuation_std"], np.sqrt(np.mean(((values - profile) / area) ** 2)), rtol=1e-12)


@pytest.mark.parametrize(
    ("grid", "solids", "axes", "shape"),
    [
        (CHANNEL, False, (0, 1), (3, 1, 1, 5)),
        (DUCT, False, (0,), (3, 1, 4, 5)),
        (BOX, False, (0, 1, 2), (3, 1, 1, 1)),
        (BOX, True, (), (3, 1, 1, 1)),
        (CLOSED, False, (), (3, 1, 1, 1)),
    ],
)
def test_the_profile_keeps_the_inhomogeneous_directions(grid: Grid, solids: bool, axes: tuple, shape: tuple) -> None:
    assert homogeneous_axes(grid, solids) == axes
    running = RunningStatistics(VELOCITY, grid, solids)
    running.update(flow())
    profile = np.array(running.summary()["profile"])
    assert profile.shape == shape and bool(profile.any()) == bool(axes)


def test_merging_is_associative_and_commutative() -> None:
    values = flow(9)
    parts = [RunningStatistics(VELOCITY, CHANNEL) for _ in range(6)]
    for part, chunk in zip(parts, [values[:1], values[1:4], values[4:]] * 2, strict=True):
        part.update(chunk)
    a, b, c, a2, b2, c2 = parts
    b.merge(c)
    a.merge(b)
    c2.merge(a2)
    c2.merge(b2)
    for key, value in a.summary().items():
        np.testing.assert_allclose(c2.summary()[key], value, rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("grid", [CHANNEL, BOX])
def test_a_tiny_variance_about_a_huge_mean_survives(grid: Grid) -> None:
    pattern = np.where(np.indices((6, 4, 5)).sum(0) % 2, 1.0, -1.0)
    values = np.broadcast_to(1e9 + 2.0**-10 * pattern, (4, 3, 6, 4, 5))
    got = gather(values, grid, 1).summary()
    np.testing.assert_allclose(got["std"], 2.0**-10, rtol=1e-9)
    np.testing.assert_allclose(got["mean"], 1e9, rtol=1e-12)
    area = np.array(grid.face_areas)
    np.testing.assert_allclose(got["fluctuation_std"], 2.0**-10 * np.sqrt(np.mean(area**-2.0)), rtol=1e-9)


def test_fp32_snapshots_are_summed_in_fp64() -> None:
    values = flow(200, mean=1e3, spread=1.0).astype(np.float32)
    got = gather(values, CHANNEL, 50).summary()
    np.testing.assert_allclose(got["std"], values.astype(np.float64).std((0, 2, 3, 4)), rtol=1e-12)


def test_a_flux_is_measured_in_metres_per_second() -> None:
    u = torch.randn(50, 3, 6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    running = RunningStatistics(VELOCITY, BOX)
    running.update(flux_of(u, BOX))
    assert running.summary()["fluctuation_std"] == pytest.approx(1.0, rel=0.02)


def test_solids_count_open_faces_only_and_leave_no_profile() -> None:
    solid = torch.zeros(BOX.shape, dtype=torch.bool)
    solid[1:4, :2, 2:] = True
    packed, free = Geometry(BOX, solid), Geometry(BOX)
    fluxes = torch.from_numpy(flow(4))
    running = RunningStatistics(VELOCITY, BOX, has_solids=True)
    running.update(fluxes[:2], packed)
    running.update(fluxes[2:], free)
    u = velocity(fluxes, BOX)
    open_ = [u[t][g.open_faces.expand(3, -1, -1, -1)] for t, g in enumerate([packed, packed, free, free])]
    expected = torch.cat(open_).square().mean().sqrt()
    got = running.summary()
    assert got["fluctuation_std"] == pytest.approx(float(expected), rel=1e-12)
    assert not np.any(got["profile"])


def test_a_scalar_has_the_moments_of_one_component() -> None:
    """With walls its profile is a function of z; among solids, where no direction is homogeneous, its mean."""
    values = flow()[:, 0]
    got = gather(values, CHANNEL, 2, SCALAR).summary()
    profile = values.mean((0, 1, 2), keepdims=True)
    np.testing.assert_allclose(got["profile"], profile, rtol=1e-12)
    assert got["fluctuation_std"] == pytest.approx(float(np.sqrt(np.square(values - profile).mean())), rel=1e-12)
    running = RunningStatistics(SCALAR, CHANNEL, has_solids=True)
    running.update(values)
    among_solids = running.summary()
    np.testing.assert_allclose(among_solids["profile"], values.mean().reshape(1, 1, 1, 1), rtol=1e-12)
    assert among_solids["fluctuation_std"] == pytest.approx(values.std(), rel=1e-12)
    np.testing.assert_allclose([got["mean"][0], got["std"][0]], [values.mean(), values.std()], rtol=1e-12)


def test_a_store_carries_the_statistics_of_what_it_holds(tmp_path: Path) -> None:
    values = torch.from_numpy(flow(8)).reshape(2, 4, 3, 6, 4, 5)
    with create_store(
        tmp_path / "a",
        grid=CHANNEL,
        specs={"velocity": VELOCITY},
        family="channel",
        num_trajectories=2,
        times=range(4),
        dtype="float32",
    ) as out:
        for trajectory in (1, 0):
            out.write("velocity", trajectory, slice(None), values[trajectory])
    store = open_store(tmp_path / "a")
    got = store.statistics()["velocity"]
    stored = torch.stack([store.read("velocity", i, slice(None)) for i in range(2)]).double().numpy()
    np.testing.assert_allclose(got["profile"], stored.mean((0, 1, 3, 4), keepdims=True)[0, 0], rtol=1e-12)
    np.testing.assert_allclose(got["std"], stored.std((0, 1, 3, 4, 5)), rtol=1e-12)


WIND = FieldSpec("wind", "vector", "m/s")


@pytest.mark.parametrize("quadrature", ["legendre-gauss", "equiangular"])
def test_moments_on_a_sphere_are_those_of_its_surface(quadrature: str) -> None:
    """u_φ = a + b cos θ + c sin θ cos φ: mean a, variance b²/3 + c²/3, profile a + b cos θ, RMS about it c²/3."""
    sphere = Sphere(12, 24, 2.0, quadrature)  # type: ignore[arg-type]
    theta, phi = sphere.colatitudes.numpy()[:, None], sphere.longitudes.numpy()
    a, b, c = 3.0, 2.0, 0.5
    east = a + b * np.cos(theta) + c * np.sin(theta) * np.cos(phi)
    running = RunningStatistics(WIND, sphere)
    running.update(np.stack([np.zeros_like(east), east]))
    got = running.summary()
    assert homogeneous_axes(sphere, False) == (1,) and got["count"] == 12 * 24
    np.testing.assert_allclose(got["mean"], [0.0, a], atol=1e-13)
    np.testing.assert_allclose(got["std"], [0.0, math.sqrt((b**2 + c**2) / 3)], atol=1e-13)
    assert np.shape(got["profile"]) == (2, 12, 1)
    np.testing.assert_allclose(np.array(got["profile"])[1], a + b * np.cos(theta), rtol=1e-13)
    assert got["fluctuation_std"] == pytest.approx(c / math.sqrt(6), rel=1e-12)
    with pytest.raises(ValueError, match=r"'wind' of shape \(…, 2, 12, 24\), got \(3, 12, 24\)"):
        running.update(np.zeros((3, 12, 24)))


def test_a_scalar_on_a_sphere_is_weighted_by_area() -> None:
    sphere = Sphere(9, 18, quadrature="equiangular")
    running = RunningStatistics(FieldSpec("depth", "scalar", "m"), sphere)
    depth = np.broadcast_to(np.cos(sphere.colatitudes.numpy())[:, None] ** 2, (9, 18))
    running.update(depth)
    assert running.summary()["mean"] == pytest.approx([1 / 3], rel=1e-12) and depth.mean() > 0.36


@pytest.mark.parametrize(
    ("spec", "domain", "shape", "solids"),
    [
        (VELOCITY, CHANNEL, (3, 6, 4, 5), False),
        (VELOCITY, BOX, (3, 6, 4, 5), True),
        (SCALAR, CLOSED, (6, 4, 5), False),
        (WIND, Sphere(6, 12), (2, 6, 12), False),
    ],
)
def test_a_state_through_json_goes_on_bit_for_bit(spec: FieldSpec, domain: Any, shape: tuple, solids: bool) -> None:
    values = np.random.default_rng(0).standard_normal((6, *shape)) * 1e-3 + 1 / 3
    whole, first = (RunningStatistics(spec, domain, solids) for _ in range(2))
    for running in (whole, first):
        empty = RunningStatistics.from_state(json.loads(json.dumps(running.state())), spec, domain, solids)
        assert empty.state() == running.state()
        running.update(values[:3])
    text = json.dumps(first.state(), allow_nan=False)
    resumed = RunningStatistics.from_state(json.loads(text), spec, domain, solids)
    resumed.update(values[3:])
    whole.update(values[3:])
    assert resumed.state() == whole.state() and resumed.summary() == whole.summary()
    assert RunningStatistics.from_state(json.loads(text), spec, domain, solids).state() == first.state()


def test_a_state_of_something_else_is_refused() -> None:
    running = RunningStatistics(VELOCITY, CHANNEL)
    running.update(flow())
    state = running.state()
    assert set(state) == {"count", *ARRAYS}
    for wrong in ({**state, "mean": "AAAA"}, {**state, "m2": None}, {"count": 3}, {**state, "min": "%"}):
        with pytest.raises(ValueError, match="Expected the state of statistics of 'velocity' on Grid.*, got another"):
            RunningStatistics.from_state(wrong, VELOCITY, CHANNEL)
    with pytest.raises(ValueError, match="Expected the state of statistics"):
        RunningStatistics.from_state(state, VELOCITY, DUCT)


def test_a_constant_field_has_no_spread() -> None:
    for value in (0.1, 1 / 3, 1e9 + 0.1):
        running = RunningStatistics(VELOCITY, BOX)
        running.update(np.full((3, 3, 6, 4, 5), value))
        got = running.summary()
        assert max(*got["std"], got["fluctuation_std"]) < 1e-13 * value


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two fields in a box with different solids in each of five trajectories, in shards of two snapshots."""
    path = tmp_path_factory.mktemp("stored") / "a.zarr"
    rng = np.random.default_rng(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentphys.data.plan.SHARD_BYTES", 2 * 4 * 120 * 8)
        with create_store(
            path,
            grid=BOX,
            specs={"velocity": VELOCITY, "pressure": SCALAR},
            family="grains",
            num_trajectories=5,
            times=range(5),
            solid=torch.from_numpy(rng.random((5, *BOX.shape)) < 0.3),
        ) as out:
            for i in range(5):
                out.write("velocity", i, slice(None), rng.standard_normal((5, 3, *BOX.shape)) + i)
                out.write("pressure", i, slice(None), rng.standard_normal((5, *BOX.shape)) - i)
    return open_store(path)


@pytest.mark.parametrize("chosen", [None, [3, 0], [4]])
def test_a_store_and_parts_of_it_agree_with_numpy(stored: Store, chosen: list[int] | None) -> None:
    seen: list[int] = []
    got = compute_statistics(stored, chosen, progress=seen.append)
    some = list(range(5)) if chosen is None else chosen
    assert (stored.array("velocity").shards or ())[1] == 2 and sum(seen) == 2 * 5 * len(some)
    for name, axes in (("velocity", (0, 1, 3, 4, 5)), ("pressure", (0, 1, 2, 3, 4))):
        values = np.stack([stored.read(name, i, slice(None)).numpy() for i in some])
        np.testing.assert_allclose(got[name]["mean"], np.atleast_1d(values.mean(axes)), rtol=1e-12)
        np.testing.assert_allclose(got[name]["std"], np.atleast_1d(values.std(axes)), rtol=1e-12)
        assert got[name]["min"] == np.atleast_1d(values.min(axes)).tolist()
        assert got[name]["count"] == values.size // len(got[name]["mean"])
    u = [velocity(stored.read("velocity", i, slice(None)), BOX) for i in some]
    open_ = torch.cat([v[:, stored.geometry(i).open_faces].flatten() for i, v in zip(some, u, strict=True)])
    assert got["velocity"]["fluctuation_std"] == pytest.approx(float(open_.square().mean().sqrt()), rel=1e-12)
    if chosen is None:
        theirs = stored.statistics()["velocity"]["fluctuation_std"]
        assert got["velocity"]["fluctuation_std"] == pytest.approx(theirs, rel=1e-12)


def test_neither_workers_nor_scheduler_change_a_bit(stored: Store) -> None:
    expected = json.dumps(compute_statistics(stored, [4, 1, 2], num_workers=1))
    for workers in (2, 3, 5):
        assert json.dumps(compute_statistics(stored, [4, 1, 2], num_workers=workers)) == expected
    assert json.dumps(compute_statistics(stored, [4, 1, 2], "processes", num_workers=2)) == expected
    assert json.dumps(compute_statistics(stored, [1, 2, 4])) != expected  # the order does: it is part of the result


def test_what_cannot_be_measured_is_refused(stored: Store, tmp_path: Path) -> None:
    for wrong in ([5], [], [1, 1], [-1]):
        with pytest.raises(ValueError, match="Expected different trajectories from 0 to 4"):
            compute_statistics(stored, wrong)
    with pytest.raises(ValueError, match=r"fields among \['pressure', 'velocity'\] of .*, got \['u'\]"):
        compute_statistics(stored, fields=["u"])
    with pytest.raises(ValueError, match=r"a scheduler of threads \| processes \| tcp://…, got 'cluster'"):
        compute_statistics(stored, scheduler="cluster")
    copy = tmp_path / "copy.zarr"
    shutil.copytree(stored.path, copy)
    zarr.open_array(copy / "pressure", mode="r+")[2, 3, 1, 1, 1] = np.inf
    with pytest.raises(ValueError, match="finite numbers of 'pressure' .* at trajectory 2, time 3"):
        compute_statistics(open_store(copy))
    compute_statistics(open_store(copy), [0, 1, 3, 4])


LIMITED = """
import re, resource, sys
from pathlib import Path
import dask.array, dask.threaded
from latentphys.data import compute_statistics, open_store

store = open_store(sys.argv[1])
used = 1024 * int(re.search(r"VmData:\\s*(\\d+)", Path("/proc/self/status").read_text()).group(1))
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
print(compute_statistics(store, num_workers=1)["velocity"]["count"])
try:
    bytearray(3 * int(sys.argv[2]))
except MemoryError:
    print("limited")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on data segments is Linux's")
def test_a_store_larger_than_memory_is_measured(tmp_path: Path) -> None:
    """144 MB of fluxes with 40 MB to allocate; the limit is shown to hold."""
    grid = Grid((32, 32, 32), (1.0, 1.0, 1.0))
    with create_store(
        tmp_path / "a.zarr", grid=grid, specs={"velocity": VELOCITY}, family="a", num_trajectories=6, times=range(32)
    ) as out:
        for i in range(6):
            out.write("velocity", i, slice(None), np.full((32, 3, 32, 32, 32), float(i)))
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "a.zarr"), str(40 * 2**20)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [str(192 * 32**3), "limited"]


def test_misuse_is_refused() -> None:
    running = RunningStatistics(VELOCITY, BOX)
    with pytest.raises(ValueError, match="at least one snapshot of 'velocity', got none"):
        running.summary()
    with pytest.raises(ValueError, match=r"'velocity' of shape \(…, 3, 6, 4, 5\), got \(3, 6, 4, 4\)"):
        running.update(np.zeros((3, 6, 4, 4)))
    with pytest.raises(ValueError, match="Expected a box without solids.*has_solids=True"):
        running.update(flow(), Geometry(BOX, torch.eye(6, 4, dtype=torch.bool)[..., None].expand(6, 4, 5)))
    with pytest.raises(ValueError, match="statistics of the same field and box"):
        running.merge(RunningStatistics(VELOCITY, CHANNEL))
