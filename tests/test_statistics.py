"""Running statistics against two-pass NumPy in FP64."""

from pathlib import Path

import numpy as np
import pytest
import torch

from latentphys.data import RunningStatistics, create_store, homogeneous_axes, open_store
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.operators import flux_of, velocity

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


def test_a_scalar_has_moments_only() -> None:
    values = flow()[:, 0]
    got = gather(values, CHANNEL, 2, SCALAR).summary()
    assert set(got) == {"count", "mean", "std", "min", "max"}
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
