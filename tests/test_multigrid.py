"""The multigrid preconditioner: symmetric, definite, and as fast in large and tortuous pore spaces as in small ones."""

import numpy as np
import pytest
import torch
from reference import BOUNDARIES
from scipy.ndimage import gaussian_filter
from torch import Tensor

from latentphys.families.media import sphere_pack
from latentphys.grid import Boundaries, Geometry, Grid
from latentphys.multigrid import Multigrid

CUBE = (1.0, 1.0, 1.0)


def geometry(
    kind: str,
    solid_fraction: float,
    shape: tuple[int, int, int],
    boundaries: Boundaries = BOUNDARIES["periodic"],
    spacing: tuple[float, float, float] = CUBE,
    seed: int = 0,
) -> Geometry:
    """Random voxels, spheres of ten cells, or noise with a correlation length of three cells."""
    rng = np.random.default_rng(seed)
    grid = Grid(shape, spacing, boundaries)
    if kind == "spheres":
        solid = sphere_pack(grid, 1 - solid_fraction, 10.0, rng, overlap=0.9)
    else:
        noise = rng.standard_normal(shape)
        noise = gaussian_filter(noise, 3, mode="wrap") if kind == "noise" else noise
        solid = noise < np.quantile(noise, solid_fraction)
    return Geometry(grid, torch.from_numpy(solid))


def conductance(geometry: Geometry, dtype: torch.dtype = torch.float64) -> Tensor:
    """Face area over cell size on open faces [m]."""
    grid = geometry.grid
    per_axis = [area / h for area, h in zip(grid.face_areas, grid.spacing, strict=True)]
    return geometry.open_faces.to(dtype) * torch.tensor(per_axis, dtype=dtype).reshape(3, 1, 1, 1)


def laplacian(x: Tensor, k: Tensor, sink: Tensor | None = None) -> Tensor:
    """L φ as its definition says."""
    out = torch.zeros_like(x) if sink is None else -sink * x
    for axis in range(3):
        flow = k.select(-4, axis) * (x - x.roll(1, axis - 3))
        out = out + flow.roll(-1, axis - 3) - flow
    return out


def dense(apply: object, shape: tuple[int, ...]) -> Tensor:
    """The matrix of a linear map, by applying it to all unit fields at once."""
    n = int(np.prod(shape))
    assert callable(apply)
    return apply(torch.eye(n, dtype=torch.float64).reshape(n, *shape)).reshape(n, n).T


def solve(net: Tensor, k: Tensor, sink: Tensor | None = None, tol: float = 1e-8, most: int = 100) -> tuple[Tensor, int]:
    """Preconditioned conjugate gradients; the solution and the iterations it took."""
    precondition = Multigrid(k, sink)
    x, r = torch.zeros_like(net), net.clone()
    z = precondition(r)
    p, rz = z.clone(), (r * z).sum()
    for iteration in range(most + 1):
        if r.norm() <= tol * net.norm():
            return x, iteration
        q = laplacian(p, k, sink)
        alpha = rz / (p * q).sum()
        x, r = x + alpha * p, r - alpha * q
        z = precondition(r)
        rz, before = (r * z).sum(), rz
        p = z + rz / before * p
    raise AssertionError(f"{float(r.norm() / net.norm()):.1e} after {most} iterations")


def iterations(geometry: Geometry, tol: float = 1e-8, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> int:
    """Iterations for a random right-hand side in the range of L."""
    k = conductance(geometry, dtype) * scale
    return solve(laplacian(torch.randn(geometry.grid.shape, dtype=dtype), k), k, tol=tol)[1]


BOXES = [
    ("periodic", (4, 6, 8)),
    ("closed", (5, 4, 7)),
    # On odd periodic axes the two colours meet themselves, in the cells or on coarser levels.
    ("channel", (5, 6, 7)),
    ("periodic", (3, 5, 7)),
    ("mixed", (6, 6, 2)),
]


@pytest.mark.parametrize(("boundaries", "shape"), BOXES)
@pytest.mark.parametrize("solid_fraction", [0.2, 0.6])
@pytest.mark.parametrize("has_sink", [False, True])
def test_is_symmetric_and_definite(
    boundaries: str, shape: tuple[int, int, int], solid_fraction: float, has_sink: bool
) -> None:
    k = conductance(geometry("random", solid_fraction, shape, BOUNDARIES[boundaries], (0.7, 1.3, 0.4)))
    sink = 0.3 * (torch.rand(shape) < 0.1).double() if has_sink else None
    inverse = dense(Multigrid(k, sink), shape)
    assert (inverse - inverse.T).abs().amax() < 1e-13 * inverse.abs().amax()
    matrix = dense(lambda x: laplacian(x, k, sink), shape)
    coupled = matrix.diagonal() != 0
    assert torch.equal(inverse[~coupled], torch.zeros_like(inverse[~coupled]))
    inverse, matrix = (m[coupled][:, coupled] for m in (inverse, matrix))
    values, vectors = torch.linalg.eigh(-matrix)
    flat = values < 1e-10  # a constant in each region without a sink, and no more: there it gives nothing
    assert not flat.any() or float((inverse @ vectors[:, flat]).abs().amax()) < 1e-13 * float(
        inverse.abs().amax()
    ) * len(inverse)
    root = vectors[:, ~flat] * values[~flat].sqrt()
    spectrum = torch.linalg.eigvalsh(root.T @ -inverse @ root)
    assert spectrum.amin() > 0.2 and spectrum.amax() < 1.2  # negative definite, as L is, and near its inverse


def test_solves_what_the_pseudo_inverse_solves() -> None:
    shape = (6, 5, 8)
    k = conductance(geometry("random", 0.5, shape, BOUNDARIES["channel"], (0.7, 1.3, 0.4)))
    matrix = dense(lambda x: laplacian(x, k), shape)
    net = laplacian(torch.randn(shape, dtype=torch.float64), k)
    exact = (torch.linalg.pinv(matrix, rtol=1e-12) @ net.flatten()).reshape(shape)
    solution = solve(net, k, tol=1e-13)[0]
    # They may differ by a constant in each region, which no difference across an open face shows.
    for axis in range(3):
        is_open = k[axis] > 0
        a, b = ((x - x.roll(1, axis))[is_open] for x in (solution, exact))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "solid_fraction", "most"),
    [("random", 0.1, 7), ("random", 0.4, 10), ("random", 0.6, 16), ("random", 0.65, 21), ("random", 0.8, 13)]
    + [("noise", 0.1, 7), ("noise", 0.4, 7), ("noise", 0.8, 9)]
    + [("spheres", 0.1, 7), ("spheres", 0.4, 8), ("spheres", 0.75, 9)],
)
def test_takes_few_iterations(kind: str, solid_fraction: float, most: int) -> None:
    assert iterations(geometry(kind, solid_fraction, (32, 32, 32))) <= most


@pytest.mark.parametrize(("kind", "solid_fraction"), [("random", 0.4), ("noise", 0.5), ("spheres", 0.5)])
def test_hardly_slows_down_as_the_box_grows(kind: str, solid_fraction: float) -> None:
    small, large = (iterations(geometry(kind, solid_fraction, (n, n, n))) for n in (16, 64))
    assert large <= 1.3 * small


@pytest.mark.parametrize("shape", [(33, 21, 20), (2, 31, 32), (3, 45, 9)])
@pytest.mark.parametrize("boundaries", ["periodic", "closed", "mixed"])
def test_odd_sizes_and_walls_cost_nothing(boundaries: str, shape: tuple[int, int, int]) -> None:
    assert iterations(geometry("random", 0.3, shape, BOUNDARIES[boundaries])) <= 11


@pytest.mark.parametrize("spacing", [(1, 1, 0.25), (4, 1, 1), (1, 2, 4), (0.6, 1, 1.5)])
def test_unequal_spacing_costs_nothing(spacing: tuple[float, float, float]) -> None:
    for kind in ("random", "spheres"):
        assert iterations(geometry(kind, 0.3, (24, 24, 24), spacing=spacing)) <= 10


def test_a_layered_medium_is_solved_along_its_layers() -> None:
    """Sheets of one cell that touch their neighbours nowhere: blocks across them hold pieces that must stay apart."""
    solid = torch.zeros(32, 32, 32, dtype=torch.bool)
    solid[:, :, ::2] = True
    assert iterations(Geometry(Grid((32, 32, 32), CUBE), solid)) <= 6


def test_two_combs_are_told_apart() -> None:
    """Interlocking combs of parallel channels, joined far away: close neighbours that are a long way apart."""
    solid = torch.ones(16, 33, 16, dtype=torch.bool)
    solid[:, 1:-1:2, 8] = False
    solid[0, 1:-1:4, 8:12] = solid[-1, 3:-1:4, 8:12] = False
    solid[0, 1:-1, 12] = solid[-1, 1:-1, 12] = False
    solid[:, 31, 12] = False
    assert iterations(Geometry(Grid((16, 33, 16), CUBE, BOUNDARIES["closed"]), solid)) <= 12


def test_isolated_cells_stay_at_zero_and_regions_apart() -> None:
    solid = torch.ones(8, 8, 8, dtype=torch.bool)
    solid[1, 1, 1] = solid[5, 2:4, 2] = solid[2:4, 5:7, 5:7] = False
    k = conductance(Geometry(Grid((8, 8, 8), CUBE), solid))
    r = torch.randn(8, 8, 8, dtype=torch.float64)
    z = Multigrid(k)(r)
    assert (z[solid] == 0).all()
    assert z[1, 1, 1] == 0
    r[2:4, 5:7, 5:7] = 0
    z = Multigrid(k)(r)
    assert (z[2:4, 5:7, 5:7] == 0).all()
    assert (z[5, 2:4, 2] != 0).all()


def test_nothing_coupled_gives_zero() -> None:
    k = torch.zeros(3, 4, 4, 4, dtype=torch.float64)
    assert (Multigrid(k)(torch.ones(4, 4, 4, dtype=torch.float64)) == 0).all()
    assert Multigrid(k).sizes == []


def test_a_cell_with_a_sink_alone_is_solved_exactly() -> None:
    sink = torch.zeros(4, 4, 4, dtype=torch.float64)
    sink[1, 2, 3] = 4
    z = Multigrid(torch.zeros(3, 4, 4, 4, dtype=torch.float64), sink)(torch.ones(4, 4, 4, dtype=torch.float64))
    assert z[1, 2, 3] == -0.25
    assert z.count_nonzero() == 1


@pytest.mark.parametrize("solid_fraction", [0.1, 0.5])
def test_open_sides_cost_nothing(solid_fraction: float) -> None:
    """Sinks on two opposite sides of the box, of twice the conductance of a face, and a right-hand side with a sum."""
    here = geometry("random", solid_fraction, (32, 24, 24), BOUNDARIES["closed"])
    k = conductance(here)
    sink = torch.zeros(here.grid.shape, dtype=torch.float64)
    sink[0] = sink[-1] = 2.0
    sink[here.fluid.logical_not()] = 0
    connected = (reachable(k, sink) > 0).double()
    net = torch.rand(here.grid.shape, dtype=torch.float64) * connected
    assert solve(net, k, sink)[1] <= 18


def test_a_leak_in_a_closed_region_is_found() -> None:
    """The mean of a region with one weak sink, which no smoothing finds, is solved for where one node is left of it."""
    here = geometry("noise", 0.5, (16, 16, 16), BOUNDARIES["closed"])
    k = conductance(here)
    sink = torch.zeros(here.grid.shape, dtype=torch.float64)
    sink[tuple(here.fluid.nonzero()[0])] = 1e-6
    assert solve(reachable(k, sink), k, sink)[1] <= 10


def reachable(k: Tensor, sink: Tensor) -> Tensor:
    """Where something that enters at the sinks can get, by spreading until it stays."""
    reached = (sink > 0).double()
    while True:
        more = reached.clone()
        for axis in range(3):
            is_open = k[axis] > 0
            more += is_open * reached.roll(1, axis) + (is_open * reached).roll(-1, axis)
        more = (more > 0).double()
        if torch.equal(more, reached):
            return reached
        reached = more


def test_a_batch_equals_its_samples() -> None:
    samples = [geometry(kind, 0.4, (12, 10, 9), seed=seed) for seed, kind in enumerate(("random", "noise", "random"))]
    ks = [conductance(sample) for sample in samples]
    sinks = [torch.rand(12, 10, 9, dtype=torch.float64) * sample.fluid * (i > 0) for i, sample in enumerate(samples)]
    r = torch.randn(2, 3, 12, 10, 9, dtype=torch.float64)
    batch = Multigrid(torch.stack(ks), torch.stack(sinks))(r)
    for i, (k, sink) in enumerate(zip(ks, sinks, strict=True)):
        torch.testing.assert_close(batch[:, i], Multigrid(k, sink)(r[:, i]), rtol=0, atol=1e-12)


def test_leading_axes_are_right_hand_sides() -> None:
    k = conductance(geometry("random", 0.4, (9, 8, 10)))
    r = torch.randn(2, 2, 9, 8, 10, dtype=torch.float64)
    precondition = Multigrid(k)
    together = precondition(r)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(together[i, j], precondition(r[i, j]), rtol=0, atol=1e-13)


def test_is_the_same_every_time() -> None:
    k = conductance(geometry("random", 0.4, (16, 16, 16)))
    r = torch.randn(16, 16, 16, dtype=torch.float64)
    assert torch.equal(Multigrid(k)(r), Multigrid(k)(r))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_do_not_matter(scale: float, dtype: torch.dtype) -> None:
    here, tol = geometry("random", 0.4, (16, 16, 16)), 1e-5 if dtype == torch.float32 else 1e-8
    torch.manual_seed(1)
    plain = iterations(here, tol, dtype)
    torch.manual_seed(1)
    assert iterations(here, tol, dtype, scale) == plain


@pytest.mark.parametrize("solid_fraction", [0.1, 0.6])
def test_single_precision_needs_no_more_iterations(solid_fraction: float) -> None:
    here = geometry("random", solid_fraction, (32, 32, 32))
    torch.manual_seed(1)
    double = iterations(here, 1e-5)
    torch.manual_seed(1)
    assert iterations(here, 1e-5, torch.float32) <= double + 1


def test_levels_shrink_as_the_pores_allow() -> None:
    """In an empty box by eight; where spacing is unequal first along the strong axis alone."""
    assert Multigrid(conductance(Geometry(Grid((16, 16, 16), CUBE)))).sizes == [4096, 512, 64, 8]
    assert Multigrid(conductance(Geometry(Grid((16, 16, 16), (1, 1, 0.5))))).sizes == [4096, 2048, 256, 32, 4]


@pytest.mark.usefixtures("unchecked")
class TestRefuses:
    def test_half_precision(self) -> None:
        with pytest.raises(ValueError, match="Expected conductances in FP32 or FP64, got torch.float16"):
            Multigrid(torch.ones(3, 4, 4, 4, dtype=torch.float16))

    def test_a_sink_that_is_not_the_cells(self) -> None:
        with pytest.raises(ValueError, match=r"Expected a sink of shape \(2, 4, 4, 4\) in .*32, got \(4, 4, 4\) in"):
            Multigrid(torch.ones(2, 3, 4, 4, 4), torch.zeros(4, 4, 4))

    def test_a_sink_in_another_precision(self) -> None:
        with pytest.raises(ValueError, match="in torch.float64, got .* in torch.float32; convert it first"):
            Multigrid(torch.ones(3, 4, 4, 4, dtype=torch.float64), torch.zeros(4, 4, 4))

    def test_a_right_hand_side_of_another_grid(self) -> None:
        with pytest.raises(
            ValueError, match=r"Expected a right-hand side of shape \(…, \(4, 4, 4\)\), got \(4, 4, 8\)"
        ):
            Multigrid(torch.ones(3, 4, 4, 4))(torch.zeros(4, 4, 8))
