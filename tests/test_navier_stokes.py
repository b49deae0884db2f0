"""The flow solver against closed forms, conservation laws and measured orders."""

import math

import numpy as np
import pytest
import torch
from reference import BOUNDARIES, box, order, points, poiseuille, random_flux, random_geometry, taylor_green, two_pi_box
from scipy.interpolate import CubicSpline
from torch import Tensor

from latentphys import operators
from latentphys.families import NavierStokes
from latentphys.families.navier_stokes import Force
from latentphys.grid import Boundaries, Boundary, Geometry, Grid
from latentphys.projection import project

STOKES_DRAG = {0.027: 2.008, 0.064: 2.810, 0.125: 4.292, 0.216: 7.442, 0.343: 15.4, 0.45: 28.1}
"""Drag coefficient K of simple-cubic spheres by volume fraction c (Zick & Homsy, J. Fluid Mech. 115, 1982)."""


def drag_of_spheres(fraction: float) -> float:
    """K at any fraction: a spline of ln K over the sphere radius."""
    spline = CubicSpline(np.cbrt(list(STOKES_DRAG)), np.log(list(STOKES_DRAG.values())))
    return float(np.exp(spline(np.cbrt(fraction))))


def steady(*force: float) -> Tensor:
    return torch.tensor(force, dtype=torch.float64)


def solver_of(
    geometry: Geometry, viscosity: float | Tensor, force: Force = lambda t: steady(0, 0, 0), tol: float = 1e-3
) -> NavierStokes:
    return NavierStokes(geometry, viscosity, force, dtype=torch.float64, tol=tol)


def step(solver: NavierStokes, flux: Tensor, time: float, dt: float) -> Tensor:
    return solver.step({"velocity": flux}, time, dt)["velocity"]


def advance(solver: NavierStokes, flux: Tensor, time: float, duration: float) -> Tensor:
    return solver.advance({"velocity": flux}, time, duration)["velocity"]


def stable_step(solver: NavierStokes, flux: Tensor) -> float:
    return solver.stable_step({"velocity": flux})


def rate(solver: NavierStokes, flux: Tensor) -> Tensor:
    """∂u/∂t before the projection [m/s²]."""
    fields = {"velocity": flux}
    return operators.velocity(solver.rates(fields, solver.drive(fields, 0.0))["velocity"], solver.geometry.grid)


def resting_profile(num_cells: int, viscosity: float, force: float, lid: Boundary) -> Tensor:
    """The steady profile u(z), the fixed point of the solver's step, which is affine for flows u = (u(z), 0, 0)."""
    boundaries: Boundaries = (("periodic", "periodic"), ("periodic", "periodic"), ("no_slip", lid))
    grid = Grid((2, 2, num_cells), (1.0, 1.0, 1.0 / num_cells), boundaries)
    solver = solver_of(Geometry(grid), viscosity, lambda t: steady(force, 0, 0))
    profiles = torch.zeros(num_cells + 1, 3, *grid.shape, dtype=torch.float64)
    profiles[1:, 0] = torch.eye(num_cells).reshape(num_cells, 1, 1, num_cells)
    start = operators.flux_of(profiles, grid)
    dt = stable_step(solver, 0.0 * start)
    after = operators.velocity(step(solver, start, 0.0, dt), grid)[:, 0, 0, 0]
    matrix = torch.eye(num_cells) - (after[1:] - after[0]).T
    return torch.linalg.solve(matrix, after[0])


@pytest.mark.parametrize(("lid", "depth"), [("free_slip", 1.0), ("no_slip", 0.5)])
def test_plane_poiseuille_flow_is_second_order(lid: Boundary, depth: float) -> None:
    errors = []
    for n in (8, 16, 32):
        z = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        expected = poiseuille(z, depth, 3.0, 0.1)
        errors.append(float((resting_profile(n, 0.1, 3.0, lid) - expected).abs().amax() / expected.amax()))
    assert errors[-1] < 1e-3 and all(1.9 < p < 2.1 for p in order(errors)), (errors, order(errors))


@pytest.mark.parametrize("normal", [0, 1, 2])
def test_taylor_green_decays_at_second_order(normal: int) -> None:
    viscosity, duration, errors = 0.05, 0.5, []
    for n in (8, 16, 32):
        shape = [n, n, n]
        shape[normal] = 2
        grid = two_pi_box(shape)
        start = taylor_green(grid, normal)
        end = advance(solver_of(Geometry(grid), viscosity), start[None], 0.0, duration)[0]
        expected = start * math.exp(-2 * viscosity * duration)
        errors.append(float((end - expected).norm() / start.norm()))
    assert all(1.9 < p < 2.1 for p in order(errors)), (errors, order(errors))


@pytest.mark.parametrize("solid", [False, True])
def test_runge_kutta_is_third_order_in_time(solid: bool, unchecked: None) -> None:
    """Self-convergence on one grid, with a force that changes in time, a wall and solids."""
    grid = box("channel", (6, 4, 5), (1.0, 1.0, 1.0))
    geometry = random_geometry(grid, fraction=0.2) if solid else Geometry(grid)
    start = project(random_flux(grid), geometry)

    def end(num_steps: int) -> Tensor:
        solver = solver_of(geometry, 0.1, lambda t: steady(math.cos(3 * t), math.sin(2 * t), 0), tol=1e-12)
        flux, dt = start[None], 0.4 / num_steps
        for k in range(num_steps):
            flux = step(solver, flux, k * dt, dt)
        return flux

    ends = [end(n) for n in (4, 8, 16, 32)]
    differences = [float((a - b).norm()) for a, b in zip(ends, ends[1:], strict=False)]
    assert all(2.7 < p < 3.3 for p in order(differences)), order(differences)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("solid", [False, True])
def test_advection_conserves_kinetic_energy(boundaries: str, solid: bool) -> None:
    geometry = random_geometry(box(boundaries), 2, fraction=0.25) if solid else Geometry(box(boundaries))
    flux = project(random_flux(geometry.grid, 2), geometry, tol=1e-14)
    power = operators.velocity(flux, geometry.grid) * rate(solver_of(geometry, 1e-300), flux)
    assert bool((power.sum((1, 2, 3, 4)).abs() < 1e-12 * power.abs().sum((1, 2, 3, 4))).all())


@pytest.mark.parametrize("solid", [False, True])
def test_viscosity_only_dissipates(solid: bool) -> None:
    geometry = random_geometry(box("channel"), 2, fraction=0.25) if solid else Geometry(box("channel"))
    slow = project(random_flux(geometry.grid, 2), geometry) * 1e-9
    power = operators.velocity(slow, geometry.grid) * rate(solver_of(geometry, 1.0), slow)
    assert bool((power.sum((1, 2, 3, 4)) < 0).all())


def test_the_channel_gains_the_force_and_loses_the_wall_friction() -> None:
    """d⟨u⟩/dt = f − τ/H with τ = ν u₁/(h/2) from the first cells off the bed, for any flow; the lid takes nothing."""
    grid, viscosity, force = box("channel"), 0.3, steady(1.0, -2.0, 0.0)
    flux = project(random_flux(grid, 1), Geometry(grid))
    change = rate(solver_of(Geometry(grid), viscosity, lambda t: force), flux)
    u = operators.velocity(flux, grid)[0]
    friction = viscosity * u[:2, :, :, 0].mean((-2, -1)) / (grid.spacing[2] / 2) / grid.lengths[2]
    torch.testing.assert_close(change[0, :2].mean((-3, -2, -1)), force[:2] - friction, rtol=0, atol=1e-13)
    projected = operators.mean_velocity(project(operators.flux_of(change, grid), Geometry(grid)), grid)
    torch.testing.assert_close(projected[0, :2], force[:2] - friction, rtol=0, atol=1e-13)


def test_a_periodic_box_gains_the_momentum_of_its_force_and_no_other() -> None:
    """f = (1, t, t²) and twice that: a third-order scheme integrates it exactly."""
    grid, start = box("periodic"), 0.7
    flux = project(random_flux(grid, 2), Geometry(grid))
    solver = solver_of(
        Geometry(grid), torch.tensor([0.1, 0.3]), lambda t: torch.outer(steady(1, 2), steady(1, t, t**2))
    )
    end = start + 0.5 * stable_step(solver, flux)
    after = step(solver, flux, start, end - start)
    gained = torch.outer(steady(1, 2), steady(end - start, (end**2 - start**2) / 2, (end**3 - start**3) / 3))
    before = operators.mean_velocity(flux, grid)
    torch.testing.assert_close(operators.mean_velocity(after, grid), before + gained, rtol=0, atol=1e-14)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_a_step_keeps_the_flow_solenoidal(boundaries: str) -> None:
    geometry = Geometry(box(boundaries))
    solver = solver_of(geometry, 0.05, lambda t: steady(1, 1, 1))
    flux = project(random_flux(geometry.grid, 2), geometry)
    for _ in range(20):
        flux = step(solver, flux, 0.0, stable_step(solver, flux))
    assert float(operators.div(flux, geometry.grid).abs().amax()) < 1e-14 * max(1.0, float(flux.abs().amax()))
    assert float(flux.abs().amax()) > 0.1


def test_a_batch_of_flows_is_its_flows() -> None:
    geometry = random_geometry(box("mixed"), 2)
    flux = project(random_flux(geometry.grid, 2), geometry)
    viscosity, force = torch.tensor([0.1, 0.4]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    together = step(solver_of(geometry, viscosity, lambda t: force, tol=1e-12), flux, 0.0, 0.02)
    for i in range(2):
        solver = solver_of(geometry[i], float(viscosity[i]), lambda t, i=i: force[i], tol=1e-12)  # type: ignore[misc]
        alone = step(solver, flux[i : i + 1], 0.0, 0.02)
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-7)


def growth(viscosity: float, factor: float, solid: bool) -> float:
    """Energy after against before 60 steps of `factor` times the stable length, from noise at the grid scale."""
    grid = Grid((4, 8, 2), (0.1, 1.0, 1.0))
    geometry = random_geometry(grid, fraction=0.2) if solid else Geometry(grid)
    solver = solver_of(geometry, viscosity)
    mean = torch.tensor([0.0, 1.0, 0.0]).double().reshape(3, 1, 1, 1).expand(3, *grid.shape)
    flux = project(operators.flux_of(mean + 1e-3 * torch.randn(3, *grid.shape), grid), geometry)[None]
    before, dt = float(operators.kinetic_energy(flux, grid)), factor * stable_step(solver, flux)
    for _ in range(60):
        flux = step(solver, flux, 0.0, dt)
    return float(operators.kinetic_energy(flux, grid)) / before


@pytest.mark.parametrize("solid", [False, True])
@pytest.mark.parametrize("viscosity", [1e-4, 6e-3, 1.0])
def test_the_stable_step_is_stable(viscosity: float, solid: bool, unchecked: None) -> None:
    """Limited by advection, by both at once (along other axes of an anisotropic grid), and by viscosity."""
    assert growth(viscosity, 1.0, solid) <= 1.0


@pytest.mark.parametrize(("viscosity", "factor"), [(1e-4, 2.5), (6e-3, 2.0), (1.0, 1.3)])
def test_well_beyond_the_stable_step_is_not(viscosity: float, factor: float) -> None:
    assert not growth(viscosity, factor, False) < 10.0


def test_a_flow_that_blows_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry(box("periodic"))
    monkeypatch.setattr(NavierStokes, "stable_step", lambda self, fields: 1e3)
    with pytest.raises(FloatingPointError, match=r"Expected a finite velocity, got NaN .* near t = 1e\+04 s; refine"):
        advance(NavierStokes(geometry, 1.0), random_flux(geometry.grid, 1).float(), 0.0, 1e4)


def test_open_sides_are_refused() -> None:
    grid = Grid((4, 4, 4), (1.0, 1.0, 1.0), (("inflow", "outflow"), ("no_slip", "no_slip"), ("periodic", "periodic")))
    with pytest.raises(ValueError, match="Expected a box of walls and periodic axes, got .*; drive the flow by a body"):
        NavierStokes(Geometry(grid), 0.1)


def test_a_viscosity_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"Expected a positive viscosity \[m²/s\], got 0.0"):
        NavierStokes(Geometry(box("periodic")), 0.0)


@pytest.mark.parametrize(("num_cells", "fraction"), [(16, 0.064), (16, 0.216), (18, 0.45)])
def test_drag_of_a_cubic_array_of_spheres_in_stokes_flow(num_cells: int, fraction: float, unchecked: None) -> None:
    """Permeability k = νU/f = 2a²/(9cK), with a and K of the voxelised fraction c; `unchecked` for speed."""
    grid = Grid((num_cells,) * 3, (1.0 / num_cells,) * 3)
    x, y, z = points(grid, (0.5, 0.5, 0.5))
    ball = (x - 0.5) ** 2 + (y - 0.5) ** 2 + (z - 0.5) ** 2 < (3 * fraction / (4 * math.pi)) ** (2 / 3)
    force = 1e-3
    solver = solver_of(Geometry(grid, ball), 1.0, lambda t: steady(force, 0, 0))
    flux, flow = torch.zeros(1, 3, *grid.shape, dtype=torch.float64), [0.0]
    while len(flow) < 3 or flow[-1] - flow[-2] > 0.03 * flow[-1]:
        flux = advance(solver, flux, 0.0, 0.01 / fraction**0.5)
        flow.append(float(operators.mean_velocity(flux, grid)[0, 0]))
    ratio = (flow[-1] - flow[-2]) / (flow[-2] - flow[-3])
    steady_flow = flow[-1] + (flow[-1] - flow[-2]) * ratio / (1 - ratio)
    c = float(ball.double().mean())
    radius = (3 * c / (4 * math.pi)) ** (1 / 3)
    drag = 2 * radius**2 * force / (9 * c * steady_flow)
    assert drag == pytest.approx(drag_of_spheres(c), rel=0.03)
