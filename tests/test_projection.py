"""The projection against a dense pseudo-inverse, its algebra, its gradients, and what it keeps round solids."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import BOUNDARIES, box, random_flux, random_geometry, ring
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from latentphys import operators
from latentphys.grid import Boundaries, Geometry, Grid
from latentphys.pressure import ConvergenceError
from latentphys.projection import decompose, project

CASES = [(name, solid) for name in BOUNDARIES for solid in (False, True)]


def geometry_of(boundaries: str, solid: bool, *batch: int) -> Geometry:
    return random_geometry(box(boundaries), *batch) if solid else Geometry(box(boundaries))


def metric(grid: Grid) -> Tensor:
    """Face area over cell size [m]; the weight of the kinetic-energy inner product is its inverse."""
    values = [area / h for area, h in zip(grid.face_areas, grid.spacing, strict=True)]
    return torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1, 1)


def largest(x: Tensor) -> float:
    return float(x.abs().amax())


def dense_projection(geometry: Geometry) -> np.ndarray:
    """I − B⁺B in unit-energy variables on the open faces: the null space of div, from an SVD."""
    grid = geometry.grid
    identity = torch.eye(3 * grid.num_cells, dtype=torch.float64).reshape(-1, 3, *grid.shape)
    weight = metric(grid).sqrt() * geometry.open_faces
    constraint = operators.div(identity * weight, grid).reshape(3 * grid.num_cells, -1).numpy().T
    weights = weight.flatten().numpy()
    null = np.diag((weights > 0).astype(float)) - np.linalg.pinv(constraint, rcond=1e-10) @ constraint
    inverse = np.divide(1.0, weights, out=np.zeros_like(weights), where=weights > 0)
    return weights[:, None] * null * inverse[None, :]


@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("solid", [False, True])
def test_it_is_the_dense_least_squares_solution(boundaries: str, solid: bool) -> None:
    grid = box(boundaries, (3, 4, 5))
    geometry = random_geometry(grid) if solid else Geometry(grid)
    flux = random_flux(grid)
    expected = (dense_projection(geometry) @ flux.flatten().numpy()).reshape(3, *grid.shape)
    torch.testing.assert_close(project(flux, geometry), torch.from_numpy(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("boundaries", "solid"), CASES)
def test_it_is_an_orthogonal_projection(boundaries: str, solid: bool) -> None:
    geometry = geometry_of(boundaries, solid, 2)
    flux, other = random_flux(geometry.grid, 2), random_flux(geometry.grid, 2)
    once, weight = project(flux, geometry), 1 / metric(geometry.grid)
    assert largest(once) > 0.5
    assert largest(operators.div(once, geometry.grid)) < 1e-10
    assert bool((once[~geometry.open_faces.expand_as(once)] == 0.0).all())
    torch.testing.assert_close(project(once, geometry), once, rtol=0, atol=1e-10)
    left, right = (once * other * weight).sum(), (flux * project(other, geometry) * weight).sum()
    torch.testing.assert_close(left, right, rtol=0, atol=1e-9)
    # Pythagoras: what it takes away carries no energy of what it keeps.
    removed = geometry.mask(flux) - once
    assert abs(float((removed * once * weight).sum())) < 1e-9


@pytest.mark.parametrize(("boundaries", "solid"), CASES)
def test_it_removes_gradients(boundaries: str, solid: bool) -> None:
    geometry = geometry_of(boundaries, solid)
    scalar = torch.randn(geometry.grid.shape, dtype=torch.float64)
    gradient = operators.grad(scalar, geometry.grid) * metric(geometry.grid)
    assert largest(project(gradient, geometry)) < 1e-10 * largest(gradient)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_it_keeps_curls_and_the_mean_flow(boundaries: str) -> None:
    grid = box(boundaries)
    mean = torch.tensor([1.0, -2.0, 3.0]).double() * torch.tensor(grid.periodic)
    flux = operators.curl(random_flux(grid), grid) + mean.reshape(3, 1, 1, 1)
    torch.testing.assert_close(project(flux, Geometry(grid)), flux, rtol=0, atol=1e-13)
    rough = random_flux(grid)
    kept = operators.mean_velocity(project(rough, Geometry(grid)), grid)
    expected = operators.mean_velocity(rough, grid) * torch.tensor(grid.periodic)
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-14)


def test_an_empty_sample_among_voxels_gets_what_the_direct_solver_gives() -> None:
    grid = box("mixed")
    solid = torch.stack([torch.zeros(grid.shape, dtype=torch.bool), ~random_geometry(grid).fluid])
    flux = random_flux(grid, 2)
    iterative = project(flux, Geometry(grid, solid))
    torch.testing.assert_close(iterative[0], project(flux[0], Geometry(grid)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("boundaries", ["periodic", "mixed"])
def test_a_batch_is_its_samples(boundaries: str) -> None:
    geometry = random_geometry(box(boundaries), 3)
    flux = random_flux(geometry.grid, 3) * torch.tensor([1.0, 1e-9, 1e9]).double().reshape(3, 1, 1, 1, 1)
    together = project(flux, geometry)
    for i in range(3):
        alone = project(flux[i], geometry[i])
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-11 * largest(alone))
    shared = project(flux, geometry[0])
    torch.testing.assert_close(shared[0], together[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("batch", "frames"), [((2, 1), (2, 3)), ((1, 2), (3, 2)), ((2, 1, 3), (4, 2, 2, 3)), ((1,), (3,))]
)
def test_geometries_broadcast_against_batch_axes(batch: tuple[int, ...], frames: tuple[int, ...]) -> None:
    geometry = random_geometry(box("duct"), *batch)
    flux = random_flux(geometry.grid, *frames)
    together = project(flux, geometry)
    solids = (~geometry.fluid).expand(*frames, *geometry.grid.shape)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in frames)).reshape(-1, len(frames)).tolist():
        alone = project(flux[tuple(index)], Geometry(geometry.grid, solids[tuple(index)]))
        torch.testing.assert_close(together[tuple(index)], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("solid", [False, True])
def test_single_precision(solid: bool) -> None:
    geometry = geometry_of("channel", solid)
    flux = random_flux(geometry.grid)
    single = project(flux.float(), geometry)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), project(flux, geometry), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "power"), [(torch.float32, -75), (torch.float32, 75), (torch.float64, 600)])
def test_the_size_of_the_flux_does_not_matter(dtype: torch.dtype, power: int) -> None:
    """Their squares are out of range: fluxes through micrometre pores in FP32 are about 2⁻⁶⁰ m³/s."""
    geometry = random_geometry(box("channel"))
    flux = random_flux(geometry.grid, dtype=dtype)
    scaled = project(flux * 2.0**power, geometry)
    assert torch.equal(scaled * 2.0**-power, project(flux, geometry))


@pytest.mark.parametrize("solid", [False, True])
def test_gradients(solid: bool) -> None:
    grid = box("channel", (3, 2, 3))
    geometry = random_geometry(grid) if solid else Geometry(grid)
    flux = random_flux(grid).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return project(x, geometry, tol=1e-14)

    assert gradcheck(function, (flux,))
    assert gradgradcheck(lambda x: function(x).square(), (flux,), fast_mode=True)


def test_a_warm_start_saves_iterations_and_changes_nothing() -> None:
    geometry = random_geometry(box("periodic", (8, 6, 10)), fraction=0.2)
    flux = random_flux(geometry.grid)
    cold = decompose(flux, geometry)
    near = decompose(flux + 1e-4 * random_flux(geometry.grid), geometry, guess=cold.potential)
    again = decompose(flux, geometry, guess=near.potential)
    assert 0 < again.num_iterations < cold.num_iterations
    torch.testing.assert_close(again.solenoidal, cold.solenoidal, rtol=0, atol=1e-11)
    assert decompose(flux, geometry, guess=cold.potential).num_iterations == 0


@pytest.mark.parametrize("tolerances", [(1e-1, 1e-2, 1e-3), (5e-4, 1e-7, 1e-11)])
def test_a_looser_tolerance_is_kept_and_cheaper(tolerances: tuple[float, float, float]) -> None:
    """With the empty box's solver as preconditioner, and with multigrid."""
    geometry = random_geometry(box("periodic", (8, 6, 10)), fraction=0.2)
    flux = random_flux(geometry.grid)
    before = operators.div(geometry.mask(flux), geometry.grid).norm()
    iterations = []
    for tol in tolerances:
        done = decompose(flux, geometry, tol)
        after = operators.div(done.solenoidal, geometry.grid).norm()
        assert 1e-4 * tol < float(after / before) < 1.01 * tol
        iterations.append(done.num_iterations)
    assert iterations[0] < iterations[1] < iterations[2]


def test_it_says_so_when_it_does_not_converge() -> None:
    geometry = random_geometry(box("periodic"))
    message = r"relative residual of 1.0e-12, got \d.\de-\d+ after 2 iterations in torch.float64; allow more iterations"
    with pytest.raises(ConvergenceError, match=message):
        project(random_flux(geometry.grid), geometry, max_iterations=2)


def test_separate_pores_are_solved_each_by_itself() -> None:
    """A plate divides a closed box; both chambers are then boxes of their own."""
    walls: Boundaries = (("no_slip", "no_slip"),) * 3
    solid = torch.zeros(7, 4, 5, dtype=torch.bool)
    solid[3] = True
    geometry = Geometry(Grid((7, 4, 5), (1.0, 0.5, 2.0), walls), solid)
    flux = random_flux(geometry.grid)
    got = project(flux, geometry)
    chamber = Geometry(Grid((3, 4, 5), (1.0, 0.5, 2.0), walls))
    for start in (0, 4):
        expected = project(flux[:, start : start + 3], chamber)
        torch.testing.assert_close(got[:, start : start + 3], expected, rtol=0, atol=1e-11)


def test_an_isolated_cell_is_at_rest_and_disturbs_nobody() -> None:
    solid = torch.zeros(6, 5, 4, dtype=torch.bool)
    solid[1:4, 1:4, :3] = True
    flux = random_flux(Grid((6, 5, 4), (1.0, 1.0, 1.0)))
    filled = project(flux, Geometry(Grid((6, 5, 4), (1.0, 1.0, 1.0)), solid))
    solid[2, 2, 1] = False
    hollow = project(flux, Geometry(Grid((6, 5, 4), (1.0, 1.0, 1.0)), solid))
    torch.testing.assert_close(hollow, filled, rtol=0, atol=1e-11)
    only = torch.ones(6, 5, 4, dtype=torch.bool)
    only[2, 2, 1] = False
    assert largest(project(flux, Geometry(Grid((6, 5, 4), (1.0, 1.0, 1.0)), only))) == 0.0


def vortex_through(hole: tuple[int, slice, slice], grid: Grid) -> Tensor:
    """The flux of a potential round the hole: through it, and back outside the ring."""
    potential = torch.zeros(3, *grid.shape, dtype=torch.float64)
    x, y, z = hole
    potential[1, x, y, z.start], potential[1, x, y, z.stop] = 1.0, -1.0
    potential[2, x, y.start, z], potential[2, x, y.stop, z] = -1.0, 1.0
    return operators.curl(potential, grid)


def test_flow_through_a_throat_that_a_solid_encircles_is_kept() -> None:
    geometry, hole = ring()
    start = geometry.mask(vortex_through(hole, geometry.grid))
    flux = project(start, geometry)
    through = float(flux[0][hole].sum())
    assert through > 0.3 * float(start[0][hole].sum()) > 1.0
    torch.testing.assert_close(float(project(flux, geometry)[0][hole].sum()), through)


def test_a_potential_masked_on_the_solid_loses_that_flow() -> None:
    """Why the library projects: with A = 0 on the ring, the circulation round its hole is zero."""
    geometry, hole = ring()
    solid = ~geometry.fluid
    potential = random_flux(geometry.grid)
    for axis in range(3):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        touches = solid | solid.roll(1, a) | solid.roll(1, b) | solid.roll((1, 1), (a, b))
        potential[axis][touches] = 0.0
    flux = operators.curl(potential, geometry.grid)
    assert bool((flux[~geometry.open_faces] == 0.0).all())
    assert largest(flux[0][hole]) > 0.1 and abs(float(flux[0][hole].sum())) < 1e-14


@pytest.mark.parametrize("call", [project, decompose])
def test_another_shape_or_type_is_refused(call: Callable[..., object], unchecked: None) -> None:
    geometry = random_geometry(box("periodic"))
    with pytest.raises(ValueError, match=r"Expected a field of shape .* = \(…, 3, 5, 4, 7\), got \(3, 5, 4, 6\)"):
        call(torch.zeros(3, 5, 4, 6), geometry)
    with pytest.raises(ValueError, match="Expected a flux in FP32 or FP64, got torch.float16; convert it first"):
        call(torch.zeros(3, 5, 4, 7, dtype=torch.float16), geometry)


@pytest.mark.parametrize("ratio", [1.0, 10.0, 30.0, 100.0])
def test_single_precision_in_flat_cells(ratio: float) -> None:
    """The constant of a pore space must not grow from rounding: conjugate gradients would diverge."""
    grid = Grid((8, 8, 8), (1.0, 1.0, ratio), (("no_slip",) * 2,) * 3)
    for _ in range(4):
        geometry = random_geometry(grid, fraction=0.1)
        flux = random_flux(grid, dtype=torch.float32)
        before, after = (operators.div(geometry.mask(f).double(), grid).norm() for f in (flux, project(flux, geometry)))
        assert float(after / before) < 3e-6 * max(1.0, ratio / 10)


@pytest.mark.parametrize("solid", [False, True])
def test_what_is_not_a_number_stays_so(solid: bool) -> None:
    geometry = geometry_of("channel", solid, 2)
    flux = random_flux(geometry.grid, 2)
    whole = project(flux, geometry)
    flux[0, 0, 1, 2, 3] = torch.nan
    flux[0, 0][geometry.open_faces[0, 0] if solid else geometry.open_faces[0]] = torch.nan
    broken = project(flux, geometry)
    assert bool(broken[0].isnan().any()) and bool(broken[1].isfinite().all())
    torch.testing.assert_close(broken[1], whole[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("tol", [float("nan"), -1.0, 1.0, float("inf")])
def test_a_tolerance_that_is_none_is_refused(tol: float) -> None:
    geometry = geometry_of("channel", True)
    with pytest.raises(ValueError, match="Expected a tolerance from 0 to below 1, got"):
        project(random_flux(geometry.grid), geometry, tol)


def test_a_guess_of_another_shape_is_refused(unchecked: None) -> None:
    geometry = geometry_of("channel", True)
    with pytest.raises(ValueError, match="Expected a field of shape"):
        decompose(random_flux(geometry.grid), geometry, guess=torch.zeros(7))


@pytest.mark.parametrize("solid", [False, True])
@pytest.mark.parametrize("tol", [1e-2, 1e-6])
def test_autocast_does_not_reach_it(solid: bool, tol: float) -> None:
    geometry = geometry_of("channel", solid)
    flux = random_flux(geometry.grid, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(project(flux, geometry, tol), project(flux, geometry, tol))
        inside = project(flux, geometry, tol)
    torch.testing.assert_close(inside, project(flux, geometry, tol), rtol=0, atol=1e-6)


@pytest.mark.parametrize("solid", [False, True])
def test_inference_leaves_nothing_behind_that_training_cannot_use(solid: bool) -> None:
    geometry = geometry_of("duct", solid)
    with torch.inference_mode():
        geometry.mask(project(random_flux(geometry.grid), geometry, 1e-6))
        _ = geometry.wall_distance, geometry.porosity
    flux = random_flux(geometry.grid).requires_grad_()
    (geometry.mask(project(flux, geometry, 1e-6)) * geometry.wall_distance).square().sum().backward()
    assert flux.grad is not None and bool(flux.grad.any())
