"""Magnetohydrodynamics: what the nonlinear terms conserve, Alfvén waves, decay, budgets, and the data sets."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import box, face_points, order, random_flux, random_geometry, two_pi_box
from torch import Tensor

from latentphys import operators
from latentphys.data import open_store
from latentphys.families import MHD, Magnetohydrodynamics, simulate
from latentphys.families.solver import Fields
from latentphys.grid import Geometry, Grid
from latentphys.projection import project

NONE = 1e-300
"""A viscosity or resistivity that does nothing."""


def solver_of(
    grid: Grid, viscosity: float, resistivity: float, dtype: torch.dtype = torch.float64
) -> Magnetohydrodynamics:
    return Magnetohydrodynamics(Geometry(grid), viscosity, resistivity, dtype=dtype)


def random_fields(grid: Grid, batch: int = 2) -> Fields:
    """Solenoidal velocities and magnetic fields at every scale, with a mean."""
    flux = project(random_flux(grid, 2 * batch), Geometry(grid)) + 0.2
    return {"velocity": flux[:batch], "magnetic": flux[batch:]}


def rates(solver: Magnetohydrodynamics, fields: Fields) -> tuple[Tensor, Tensor]:
    """∂u/∂t, projected, and ∂B/∂t [m/s²]."""
    grid, rate = solver.geometry.grid, solver.rates(fields, {})
    flux = project(rate["velocity"], solver.geometry)
    return operators.velocity(flux, grid), operators.velocity(rate["magnetic"], grid)


def balance(power: Tensor) -> Tensor:
    """The sum of a batch of terms against the sum of their magnitudes."""
    return power.flatten(1).sum(1) / power.abs().flatten(1).sum(1)


def test_nonlinear_terms_conserve_energy_cross_helicity_momentum_and_the_mean_field() -> None:
    grid = box("periodic")
    fields = random_fields(grid)
    du, db = rates(solver_of(grid, NONE, NONE), fields)
    u, b = (operators.velocity(fields[name], grid) for name in ("velocity", "magnetic"))
    assert float(balance(torch.cat([u * du, b * db], 1)).abs().amax()) < 1e-14
    assert float(balance(torch.cat([b * du, u * db], 1)).abs().amax()) < 1e-14
    for rate in (du, db):
        assert float(rate.mean((-3, -2, -1)).abs().amax()) < 1e-13 * float(rate.abs().amax())
    # Neither is conserved by itself.
    assert float(balance(u * du).abs().amin()) > 1e-3 and float(balance(b * du).abs().amin()) > 1e-3


def test_energy_is_lost_to_vorticity_and_current_alone() -> None:
    """dE/dt = −ν⟨ω²⟩ − η⟨J²⟩, to rounding."""
    grid, nu, eta = box("periodic"), 0.3, 0.7
    fields = random_fields(grid)
    du, db = rates(solver_of(grid, nu, eta), fields)
    power = operators.velocity(fields["velocity"], grid) * du + operators.velocity(fields["magnetic"], grid) * db
    vorticity, current = (operators.vorticity(fields[name], grid) for name in ("velocity", "magnetic"))
    lost = nu * vorticity.square() + eta * current.square()
    torch.testing.assert_close(power.sum((1, 2, 3, 4)), -lost.sum((1, 2, 3, 4)), rtol=1e-12, atol=0)


def test_the_induced_flux_leaves_every_cell_as_it_entered() -> None:
    grid = box("periodic")
    induced = solver_of(grid, 0.1, 0.1).rates(random_fields(grid), {})["magnetic"]
    assert float(operators.div(induced, grid).abs().amax()) < 1e-14 * float(induced.abs().amax())


def alfven_wave(grid: Grid, mean: tuple[float, float, float], time: float = 0.0) -> Fields:
    """A circularly polarised wave of wave vector (1, 2, 0) and amplitude 0.5, moved along by B₀t; u = −(B − B₀).

    An exact solution without viscosity, however large: it is a function of x − B₀t.
    """
    flux = []
    for axis, direction in enumerate(((2, 0.0), (-1, 0.0), (0, math.sqrt(5)))):
        x, y, _ = face_points(grid, axis)
        phase = x + 2 * y - time * (mean[0] + 2 * mean[1])
        wave = phase.sin() if axis == 2 else phase.cos()
        flux.append((0.5 / math.sqrt(5) * (direction[0] or direction[1]) * wave).expand(grid.shape))
    wave_flux = operators.flux_of(torch.stack(flux), grid)
    uniform = operators.flux_of(torch.tensor(mean, dtype=torch.float64).reshape(3, 1, 1, 1), grid)
    return {"velocity": -wave_flux[None], "magnetic": (wave_flux + uniform)[None]}


def test_alfven_waves_travel_along_the_field_at_second_order() -> None:
    mean, viscosity, duration = (1.0, -0.4, 0.3), 0.02, 1.5
    errors: dict[str, list[float]] = {"velocity": [], "magnetic": []}
    for n in (16, 32, 64):
        grid = two_pi_box((n, n, 1))
        solver = solver_of(grid, viscosity, viscosity)
        start = alfven_wave(grid, mean)
        end, expected = solver.advance(start, 0.0, duration), alfven_wave(grid, mean, duration)
        decay = math.exp(-5 * viscosity * duration)
        uniform = expected["magnetic"] + expected["velocity"]
        for name, still in (("velocity", 0.0), ("magnetic", uniform)):
            exact = decay * (expected[name] - still) + still
            errors[name].append(float((end[name] - exact).norm() / start["velocity"].norm()))
    for found in errors.values():
        assert found[-1] < 0.02 and all(1.9 < p < 2.1 for p in order(found)), (found, order(found))


def test_a_wave_along_a_grid_line_has_the_discrete_frequency_and_damping() -> None:
    """Two coupled amplitudes, of u and of b, where ν ≠ η: d/dt (u, b) = [[−νκ², iω], [iω, −ηκ²]] (u, b).

    κ² = (2 sin(kh/2)/h)² is that of the discrete Laplacian, ω = B₀ sin(kh)/h.
    """
    n, k, b0, nu, eta, duration = 12, 2, 1.3, 0.05, 0.2, 1.0
    grid = two_pi_box((n, 1, 1))
    h = grid.spacing[0]
    x = face_points(grid, 1)[0]
    start = torch.stack([torch.zeros_like(x), (k * x).cos(), (k * x).sin()])
    uniform = torch.tensor([b0, 0.0, 0.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    fields = {"velocity": 0.0 * start[None], "magnetic": operators.flux_of(0.7 * start + uniform, grid)[None]}
    solver = solver_of(grid, nu, eta)
    for step in range(200):
        fields = solver.step(fields, step * duration / 200, duration / 200)
    kappa2, omega = (2 * math.sin(k * h / 2) / h) ** 2, b0 * math.sin(k * h) / h
    matrix = torch.tensor([[-nu * kappa2, 1j * omega], [1j * omega, -eta * kappa2]], dtype=torch.complex128)
    expected = torch.linalg.matrix_exp(duration * matrix) @ torch.tensor([0, 0.7], dtype=torch.complex128)
    for amplitude, name in zip(expected, ("velocity", "magnetic"), strict=True):
        found = operators.velocity(fields[name][0], grid)
        # circular polarisation: u_y + i u_z = (amplitude) exp(ikx)
        along = (torch.complex(found[1], found[2]) * torch.exp(-1j * k * x)).mean()
        assert abs(complex(along) - complex(amplitude)) < 1e-5, (name, along, amplitude)


@pytest.mark.parametrize("normal", [0, 1, 2])
def test_a_field_at_rest_decays_by_resistivity(normal: int) -> None:
    """A force-free field, ∇×B = B: J × B = 0 and B decays as exp(−ηt) at second order."""
    errors = []
    for n in (8, 16, 32):
        shape = [n, n, n]
        shape[normal] = 1
        grid = two_pi_box(shape)
        i, j = (normal + 1) % 3, (normal + 2) % 3
        parts = [torch.zeros(grid.shape, dtype=torch.float64)] * 3
        parts[i] = face_points(grid, i)[j].sin().expand(grid.shape)
        parts[j] = (-face_points(grid, j)[i].sin()).expand(grid.shape)
        at = face_points(grid, normal)
        parts[normal] = (-at[i].cos() - at[j].cos()).expand(grid.shape)
        start = operators.flux_of(torch.stack(parts), grid)[None]
        end = solver_of(grid, 0.1, 0.4).advance({"velocity": 0.0 * start, "magnetic": start}, 0.0, 1.0)
        errors.append(float((end["magnetic"] - math.exp(-0.4) * start).norm() / start.norm()))
    assert errors[-1] < 1e-3 and all(1.9 < p < 2.1 for p in order(errors)), (errors, order(errors))


def test_orszag_tang_on_a_coarse_grid() -> None:
    """Energies at t = 0.5 of the vortex with ν = η = 0.02, against a spectral computation; 1 % at 32²."""
    grid = two_pi_box((32, 32, 1))
    (x, y) = face_points(grid, 1)[0], face_points(grid, 0)[1]
    u = torch.stack([(-2 * y.sin()).expand(grid.shape), (2 * x.sin()).expand(grid.shape), 0 * (x + y)])
    b = torch.stack([(-2 * (2 * y).sin()).expand(grid.shape), (2 * x.sin()).expand(grid.shape), 0 * (x + y)])
    start = {"velocity": operators.flux_of(u, grid)[None], "magnetic": operators.flux_of(b, grid)[None]}
    end = solver_of(grid, 0.02, 0.02).advance(start, 0.0, 0.5)
    assert float(operators.kinetic_energy(end["velocity"], grid)) == pytest.approx(1.68062, rel=0.01)
    assert float(operators.kinetic_energy(end["magnetic"], grid)) == pytest.approx(2.13667, rel=0.01)


def test_runge_kutta_is_third_order_in_time() -> None:
    grid = box("periodic", (6, 4, 5), (1.0, 1.0, 1.0))
    start = random_fields(grid, 1)

    def end(num_steps: int) -> Tensor:
        solver, fields, dt = solver_of(grid, 0.1, 0.2), start, 0.4 / num_steps
        for k in range(num_steps):
            fields = solver.step(fields, k * dt, dt)
        return torch.cat(list(fields.values()))

    ends = [end(n) for n in (4, 8, 16, 32)]
    differences = [float((a - b).norm()) for a, b in zip(ends, ends[1:], strict=False)]
    assert all(2.7 < p < 3.3 for p in order(differences)), order(differences)


def growth(viscosity: float, resistivity: float, factor: float) -> float:
    """Energy of the fluctuations after 60 steps of a weak noise in a strong field, against that before."""
    grid = Grid((8, 6, 4), (1.0, 0.5, 2.0))
    flux = project(1e-3 * random_flux(grid, 2), Geometry(grid))
    mean = operators.flux_of(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64).reshape(3, 1, 1, 1), grid)
    fields = {"velocity": flux[:1], "magnetic": flux[1:] + mean}
    solver = solver_of(grid, viscosity, resistivity)
    dt = factor * solver.stable_step(fields)

    def energy(fields: Fields) -> float:
        wave = fields["magnetic"] - fields["magnetic"].mean((-3, -2, -1), keepdim=True)
        return float(operators.kinetic_energy(wave, grid) + operators.kinetic_energy(fields["velocity"], grid))

    before = energy(fields)
    for _ in range(60):
        fields = solver.step(fields, 0.0, dt)
    return energy(fields) / before


@pytest.mark.parametrize(("viscosity", "resistivity"), [(1e-4, 1e-4), (0.2, 0.2), (1e-3, 5.0), (5.0, 1e-3)])
def test_the_stable_step_is_stable(viscosity: float, resistivity: float) -> None:
    """Limited by Alfvén waves, by both at once, and by either diffusion."""
    assert growth(viscosity, resistivity, 1.0) <= 1.0


@pytest.mark.parametrize(("viscosity", "resistivity", "factor"), [(1e-4, 1e-4, 3.0), (1e-3, 5.0, 1.3)])
def test_well_beyond_the_stable_step_is_not(viscosity: float, resistivity: float, factor: float) -> None:
    assert not growth(viscosity, resistivity, factor) < 10.0


@pytest.mark.slow
def test_the_fused_solver_computes_what_the_plain_one_does(unchecked: None) -> None:
    grid = box("periodic", (6, 4, 5))
    fields = random_fields(grid)
    plain = solver_of(grid, 0.1, 0.2).step(fields, 0.0, 1e-2)
    fused = Magnetohydrodynamics(Geometry(grid), 0.1, 0.2, dtype=torch.float64, compiled=True).step(fields, 0.0, 1e-2)
    for name in fields:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-13, atol=1e-13)


def test_walls_and_solids_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected a periodic box without solids .* got sides .*no_slip"):
        solver_of(box("channel"), 0.1, 0.1)
    with pytest.raises(ValueError, match="Expected a periodic box without solids .* got solids"):
        Magnetohydrodynamics(random_geometry(box("periodic")), 0.1, 0.1)
    with pytest.raises(ValueError, match=r"Expected a positive resistivity \[m²/s\], got 0.0"):
        solver_of(box("periodic"), 0.1, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reynolds": (0.0, 1.0)}, "Expected a range of Re, two numbers with 0 < a"),
        ({"prandtl": (2.0, 1.0)}, "Expected a range of Pm, two numbers"),
        ({"magnetic": (1.0,)}, "Expected a range of magnetic fluctuations, two numbers"),
        ({"mean_field": (-1.0, 1.0)}, r"range of mean fields, two numbers with 0 ≤ a ≤ b, got \[-1.0, 1.0\]"),
        ({"mean_field": (1.0,)}, "Expected a range of mean fields"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MHD(**arguments)  # type: ignore[arg-type]


def test_first_states_have_the_energies_and_the_mean_field_that_were_drawn() -> None:
    family = MHD()
    grid, seen = family.grid((8, 10, 6)), set()
    for trajectory in range(3):
        p = family.draw(4, trajectory)
        fields = family.initial(Geometry(grid), p, 4, trajectory)
        again = family.initial(Geometry(grid), family.draw(4, trajectory), 4, trajectory)
        assert all(torch.equal(fields[name], again[name]) for name in fields)
        u, b = (operators.velocity(fields[name], grid) for name in ("velocity", "magnetic"))
        mean = b.mean((-3, -2, -1))
        np.testing.assert_allclose(mean, p["mean_field"], rtol=0, atol=1e-12)
        wave = b - mean.reshape(3, 1, 1, 1)
        assert float(u.square().sum(0).mean()) == pytest.approx(1.0)
        assert float(wave.square().sum(0).mean().sqrt()) == pytest.approx(p["magnetic"])
        assert 0.5 <= p["viscosity"] / p["resistivity"] <= 2 and 300 <= 1 / p["viscosity"] <= 1000
        seen.add(p["viscosity"])
    assert len(seen) == 3


def test_a_data_set_holds_two_exactly_solenoidal_fields_and_a_mean_field_that_stays(tmp_path: Path) -> None:
    family = MHD(spin_up=0.02)
    store = open_store(simulate(family, tmp_path / "a", shape=(8, 8, 8), num_trajectories=2, num_frames=3))
    assert set(store.specs) == {"velocity", "magnetic"} and set(store.parameters) == {"viscosity", "resistivity"}
    for i in range(2):
        fields = {name: store.read(name, i, slice(None)) for name in store.specs}
        for flux in fields.values():
            assert bool((operators.div(flux, store.grid) == 0.0).all())
            assert not torch.equal(flux[0], flux[1])
        mean = operators.mean_velocity(fields["magnetic"], store.grid)
        np.testing.assert_allclose(mean, np.tile(family.draw(0, i)["mean_field"], (3, 1)), rtol=0, atol=1e-6)
        energy = sum(operators.kinetic_energy(flux, store.grid) for flux in fields.values())
        assert bool((energy.diff() < 0).all())  # type: ignore[union-attr]
