"""Stirred turbulence: the work of the force, the energy budget, exact solutions, and the developed state."""

import math

import numpy as np
import pytest
import torch
from reference import abc_flux, box, face_points, order, random_flux, random_geometry, two_pi_box
from torch import Tensor

from latentphys import operators
from latentphys.families import NavierStokes, Turbulence
from latentphys.families.family import broadband, generator
from latentphys.families.turbulence import StirredFlow
from latentphys.grid import Geometry, Grid
from latentphys.projection import project

TAYLOR_GREEN = {1.0: (0.124515, 0.5188e-3), 3.0: (0.123024, 1.1265e-3)}
"""t: E and −dE/dt of the vortex at Re = 1600, from a DNS on 512³ (Dairay et al., J. Comput. Phys. 337, 2017)."""


def stirred(
    grid: Grid, viscosity: float | Tensor = 0.02, power: float | Tensor = 1.5, **options: object
) -> StirredFlow:
    return StirredFlow(Geometry(grid), viscosity, power, dtype=torch.float64, **options)  # type: ignore[arg-type]


def taylor_green(grid: Grid) -> Tensor:
    """u = (sin x cos y cos z, −cos x sin y cos z, 0) as a flux."""
    (x, y, z), (p, q, r) = face_points(grid, 0), face_points(grid, 1)
    u, v = x.sin() * y.cos() * z.cos(), -p.cos() * q.sin() * r.cos()
    return operators.flux_of(torch.stack([u, v, torch.zeros_like(u)]), grid)


def test_the_force_works_at_the_power_and_on_large_scales_alone() -> None:
    grid, power = two_pi_box((8, 12, 10)), torch.tensor([0.7, 3.0], dtype=torch.float64)
    flow, flux = stirred(grid, power=power), project(random_flux(grid, 2), Geometry(two_pi_box((8, 12, 10))))
    force = flow.drive({"velocity": flux}, 0.0)["force"]
    work = (force * operators.velocity(flux, grid)).sum(1).mean((1, 2, 3))
    torch.testing.assert_close(work, power, rtol=1e-13, atol=0)
    assert float(operators.div(operators.flux_of(force, grid), grid).abs().amax()) < 1e-13
    modes = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in grid.shape]
    k2 = modes[0][:, None, None] ** 2 + modes[1][:, None] ** 2 + modes[2] ** 2
    found, given = (torch.fft.fftn(x, dim=(-3, -2, -1)) for x in (force, operators.velocity(flux, grid)))
    is_forced = (k2 > 0) & (k2 <= 4)
    assert float(found[..., ~is_forced].abs().amax()) < 1e-12
    found, given = found[..., is_forced], given[..., is_forced]
    factor = (found * given.conj()).sum((1, 2)) / given.abs().square().sum((1, 2))
    assert bool((factor.real > 0).all()) and float(factor.imag.abs().amax()) < 1e-12
    torch.testing.assert_close(found, factor[:, None, None] * given, rtol=0, atol=1e-11)


def test_energy_gains_the_power_and_loses_the_enstrophy() -> None:
    """dE/dt = P − ν⟨ω²⟩ to rounding, in a state with energy at every scale."""
    grid, viscosity = two_pi_box((8, 12, 10)), torch.tensor([0.02, 0.3], dtype=torch.float64)
    flow, flux = stirred(grid, viscosity, 1.5), project(random_flux(grid, 2), Geometry(two_pi_box((8, 12, 10))))
    fields = {"velocity": flux}
    change = operators.velocity(flow.rates(fields, flow.drive(fields, 0.0))["velocity"], grid)
    gained = (change * operators.velocity(flux, grid)).sum(1).mean((1, 2, 3))
    lost = viscosity * operators.vorticity(flux, grid).square().sum(1).mean((1, 2, 3))
    torch.testing.assert_close(gained, 1.5 - lost, rtol=1e-11, atol=0)


def test_a_force_that_follows_the_flow_is_third_order_in_time(unchecked: None) -> None:
    grid = two_pi_box((8, 8, 8))
    start = broadband(Geometry(grid), 2.0, -5 / 6, generator(0, 0, 1))[None]

    def end(num_steps: int) -> Tensor:
        flow, fields, dt = stirred(grid), {"velocity": start}, 0.4 / num_steps
        for k in range(num_steps):
            fields = flow.step(fields, k * dt, dt)
        return fields["velocity"]

    ends = [end(n) for n in (4, 8, 16, 32)]
    differences = [float((a - b).norm()) for a, b in zip(ends, ends[1:], strict=False)]
    assert all(2.7 < p < 3.3 for p in order(differences)), order(differences)


def test_the_energy_budget_closes_over_time(unchecked: None) -> None:
    """E(t) − E(0) = ∫ (P − ε) dt by Simpson's rule, in FP32 as in FP64."""
    grid = two_pi_box((16, 16, 16))
    start = broadband(Geometry(grid), 2.0, -5 / 6, generator(0, 0, 1))[None]
    before = float(operators.kinetic_energy(start, grid))
    for dtype in (torch.float64, torch.float32):
        flow = StirredFlow(Geometry(grid), 0.05, 1.0, dtype=dtype)
        fields, rates = flow.working({"velocity": start}), []
        for k in range(41):
            flux = fields["velocity"].double()
            rates.append(1.0 - 0.05 * float(operators.vorticity(flux, grid).square().sum(1).mean()))
            if k < 40:
                fields = flow.step(fields, 0.0, 0.01)
        gained = float(operators.kinetic_energy(flux, grid)) - before
        simpson = np.array([1, *[4, 2] * 19, 4, 1]) * 0.01 / 3
        assert gained == pytest.approx(float(simpson @ rates), abs=5e-6) and abs(gained) > 0.01


def test_the_beltrami_flow_decays_at_second_order() -> None:
    """∇×u = u: a flow whose every nonlinear term is a gradient, in three dimensions."""
    viscosity, duration, errors = 0.1, 0.5, []
    for n in (8, 16, 32):
        grid = two_pi_box((n, n, n))
        solver = NavierStokes(Geometry(grid), viscosity, dtype=torch.float64)
        end = solver.advance({"velocity": abc_flux(grid)[None]}, 0.0, duration)["velocity"][0]
        expected = abc_flux(grid) * math.exp(-viscosity * duration)
        errors.append(float((end - expected).norm() / expected.norm()))
    assert all(1.9 < p < 2.1 for p in order(errors)), (errors, order(errors))


def test_an_octant_between_slippery_walls_is_the_periodic_vortex() -> None:
    ends = []
    for n, side, name in ((12, 2 * math.pi, "periodic"), (6, math.pi, "free_slip")):
        grid = Grid((n, n, n), (side / n,) * 3, ((name, name),) * 3)  # type: ignore[arg-type]
        solver = NavierStokes(Geometry(grid), 0.01, dtype=torch.float64)
        ends.append(solver.advance({"velocity": taylor_green(grid)[None]}, 0.0, 1.5)["velocity"])
    torch.testing.assert_close(ends[0][..., :6, :6, :6], ends[1], rtol=0, atol=1e-13)


def test_the_taylor_green_vortex_before_its_peak(unchecked: None) -> None:
    """The octant at 16 and 24 cells, extrapolated to h → 0."""
    found = []
    for n in (16, 24):
        grid = Grid((n, n, n), (math.pi / n,) * 3, (("free_slip", "free_slip"),) * 3)
        solver = NavierStokes(Geometry(grid), 1 / 1600, dtype=torch.float64)
        fields, time, values = {"velocity": taylor_green(grid)[None]}, 0.0, []
        for target in TAYLOR_GREEN:
            fields = solver.advance(fields, time, target - time)
            time = target
            u = operators.velocity(fields["velocity"], grid)
            change = operators.velocity(solver.rates(fields, {})["velocity"], grid)
            values.append([0.5 * float(u.square().sum(1).mean()), -float((u * change).sum(1).mean())])
        found.append(np.array(values))
    limit = found[1] + (found[1] - found[0]) / (1.5**2 - 1)
    reference = np.array(list(TAYLOR_GREEN.values()))
    np.testing.assert_allclose(limit[:, 0], reference[:, 0], rtol=3e-4)
    np.testing.assert_allclose(limit[0, 1], reference[0, 1], rtol=2e-3)
    np.testing.assert_allclose(limit[1, 1], reference[1, 1], rtol=3e-2)


def test_turbulence_steepens_compression(unchecked: None) -> None:
    """∂u/∂x of the random first state is symmetric; of a turbulent one its skewness is negative, −0.3 to −0.5."""
    grid, skewness = two_pi_box((32, 32, 32)), []
    flow = StirredFlow(Geometry(grid), 0.05, 1.0)
    fields = flow.working({"velocity": broadband(Geometry(grid), 2.0, -5 / 6, generator(0, 0, 1))[None]})
    for _ in range(2):
        u = operators.velocity(fields["velocity"], grid)[0]
        slopes = torch.stack([u[a].roll(-1, a) - u[a] for a in range(3)]).double()
        skewness.append(float((slopes.pow(3).mean((1, 2, 3)) / slopes.square().mean((1, 2, 3)) ** 1.5).mean()))
        fields = flow.advance(fields, 0.0, 1.0)
    assert abs(skewness[0]) < 0.1 and -0.55 < skewness[1] < -0.25, skewness


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"viscosity": (0.0, 0.1)}, "Expected a range of viscosities, two numbers with 0 < a ≤ b < inf, got"),
        ({"power": 0.0}, r"Expected a finite power \[m²/s³\] > 0, got 0.0"),
    ],
)
def test_impossible_families_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Turbulence(**arguments)  # type: ignore[arg-type]


def test_impossible_boxes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected more than 4 cells along each axis, got \(8, 4, 8\)"):
        Turbulence().grid((8, 4, 8))
    with pytest.raises(ValueError, match=r"Expected forced modes from 1 to below 4, got 4"):
        StirredFlow(Geometry(two_pi_box((8, 8, 8))), 0.1, 1.0, modes=4)
    for geometry in (Geometry(box("channel")), random_geometry(box("periodic"))):
        with pytest.raises(ValueError, match="Expected a periodic box without solids, got"):
            StirredFlow(geometry, 0.1, 1.0, modes=1)


def test_the_default_family_is_broadband_and_at_rest_in_the_mean() -> None:
    family = Turbulence()
    grid, parameters = family.grid((16, 16, 16)), family.draw(3, 1)
    assert 0.01 <= parameters["viscosity"] <= 0.03 and grid.lengths == pytest.approx((2 * math.pi,) * 3)
    flux = family.initial(Geometry(grid), parameters, 3, 1)["velocity"]
    assert float(operators.mean_velocity(flux, grid).abs().amax()) < 1e-14
    assert float(operators.kinetic_energy(flux, grid)) == pytest.approx(0.5 * family.disturbance**2, rel=1e-6)
    batch = {name: np.array([value]) for name, value in parameters.items()}
    solver = family.solver(Geometry(grid), batch)
    recorded = solver.recorded(solver.advance(solver.working({"velocity": flux[None]}), 0.0, family.interval))
    assert bool((operators.div(recorded["velocity"], grid) == 0.0).all())
    assert not torch.equal(recorded["velocity"][0], flux)
