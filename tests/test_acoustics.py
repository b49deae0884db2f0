"""Sound against closed forms: dispersion, standing waves, reflection, energy, reciprocity, reversal."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from reference import BOUNDARIES, box, face_points, order, points, random_flux, random_geometry
from scipy.optimize import brentq
from torch import Tensor

from latentphys import operators
from latentphys.data import open_store
from latentphys.families import Acoustics, AcousticScattering, simulate
from latentphys.families.solver import Fields
from latentphys.grid import Geometry, Grid
from latentphys.projection import decompose


def sound(grid: Grid, pressure: Tensor, speed: float | Tensor = 1.0, velocity: Tensor | None = None) -> Fields:
    """A state with a velocity [m/s], by default at rest."""
    batch = pressure.shape[:-3]
    u = torch.zeros(*batch, 3, *grid.shape, dtype=torch.float64) if velocity is None else velocity
    c = torch.as_tensor(speed, dtype=torch.float64).expand(*batch, *grid.shape)
    return {"pressure": pressure.double(), "velocity": operators.flux_of(u, grid), "sound_speed": c}


def acoustics(geometry: Geometry, density: float | Tensor = 1.0) -> Acoustics:
    return Acoustics(geometry, density, dtype=torch.float64)


def random_medium(geometry: Geometry, *batch: int) -> tuple[Acoustics, Fields]:
    """A solver and a working state in a medium whose density and sound speed are noise."""
    shape = (*batch, *geometry.grid.shape)
    solver = acoustics(geometry, 0.5 + torch.rand(shape))
    state = solver.working(sound(geometry.grid, torch.randn(shape), 0.5 + torch.rand(shape)))
    return solver, state | {"impulse": torch.randn(shape).double()}


def swing(omega: list[float], time: float) -> Tensor:
    """cos ωt of each trajectory."""
    return (torch.tensor(omega, dtype=torch.float64) * time).cos().reshape(-1, 1, 1, 1)


def test_a_plane_wave_obeys_the_dispersion_relation_of_the_scheme(unchecked: None) -> None:
    """p = cos(ωt) cos(k·x) with sin²(ωΔt/2) = (cΔt)² Σ sin²(k h/2)/h², to rounding; ω → c|k| at second order."""
    modes, errors = (1, 2, 1), []
    for n in (8, 16, 32):
        grid = Grid((n, 2 * n, n), (1.0 / n, 0.7 / n, 1.5 / n))
        k = [2 * math.pi * m / length for m, length in zip(modes, grid.lengths, strict=True)]
        phase = torch.zeros(1, dtype=torch.float64)
        for x, wavenumber in zip(points(grid, (0.5,) * 3), k, strict=True):
            phase = phase + wavenumber * x
        c, solver = torch.tensor([1.3, 0.8]), acoustics(Geometry(grid), torch.tensor([2.0, 0.5]))
        state = solver.working(sound(grid, phase.cos().expand(2, *phase.shape), c.reshape(2, 1, 1, 1)))
        dt = solver.stable_step(state)
        for _ in range(n):
            state = solver.step(state, 0.0, dt)
        squared = sum((math.sin(w * h / 2) / h) ** 2 for w, h in zip(k, grid.spacing, strict=True))
        omega = [2 / dt * math.asin(float(speed) * dt * math.sqrt(squared)) for speed in c]
        expected = swing(omega, n * dt) * phase.cos()
        torch.testing.assert_close(state["pressure"], expected, rtol=0, atol=1e-12)
        errors.append(abs(omega[0] / (float(c[0]) * math.hypot(*k)) - 1))
    assert errors[-1] < 1e-2 and all(1.9 < p < 2.1 for p in order(errors)), (errors, order(errors))


@pytest.mark.parametrize("boundaries", ["closed", "mixed"])
def test_a_standing_wave_between_walls_is_second_order(boundaries: str) -> None:
    """p = cos(ωt) Π cos(k x) and ρ ∂u/∂t = −∇p: pressure and velocity at the same time, in the box's lowest mode."""
    c, rho, duration, errors = 1.5, 0.8, 0.6, []
    for n in (8, 16, 32):
        grid = box(boundaries, (n, n, n), (1.0 / n, 1.4 / n, 0.8 / n))
        k = [math.pi * (2 if p else 1) / length for p, length in zip(grid.periodic, grid.lengths, strict=True)]
        omega = c * math.hypot(*k)

        def wave(at: tuple[Tensor, Tensor, Tensor], along: int | None, k: list[float] = k) -> Tensor:
            value = torch.ones(1, dtype=torch.float64)
            for axis in range(3):
                value = value * (-k[axis] * (k[axis] * at[axis]).sin() if axis == along else (k[axis] * at[axis]).cos())
            return value

        solver = acoustics(Geometry(grid), rho)
        state = solver.working(sound(grid, wave(points(grid, (0.5,) * 3), None)[None], c))
        found = solver.recorded(solver.advance(state, 0.0, duration))
        pressure = found["pressure"][0] - math.cos(omega * duration) * wave(points(grid, (0.5,) * 3), None)
        u = torch.stack([wave(face_points(grid, a), a) for a in range(3)]) * (
            -math.sin(omega * duration) / (rho * omega)
        )
        velocity = operators.velocity(found["velocity"][0], grid) - u
        errors.append(float(pressure.abs().amax() + rho * c * velocity.abs().amax()))
    assert errors[-1] < 0.02 and all(1.9 < p < 2.1 for p in order(errors)), (errors, order(errors))


@pytest.mark.parametrize(("density", "speed"), [(3.0, 1.0), (1.0, 0.5), (0.4, 2.0)])
def test_a_pulse_is_reflected_and_passes_as_the_impedances_say(density: float, speed: float, unchecked: None) -> None:
    """R = (Z₂ − Z₁)/(Z₂ + Z₁), T = 2Z₂/(Z₂ + Z₁), from ρ = c = 1 to a medium that begins on a face."""
    n, walls = 800, ("free_slip", "free_slip")
    grid = Grid((n, 1, 1), (4.0 / n, 1.0, 1.0), (walls, *BOUNDARIES["periodic"][1:]))  # type: ignore[arg-type]
    x, at_faces = points(grid, (0.5,) * 3)[0], face_points(grid, 0)[0]
    beyond = (x > 2.0).expand(1, *grid.shape)
    rho, c = torch.where(beyond, density, 1.0), torch.where(beyond, speed, 1.0)

    def pulse(x: Tensor) -> Tensor:
        return torch.exp(-(((x - 1.2) / 0.12) ** 2)).expand(1, *grid.shape)

    solver = acoustics(Geometry(grid), rho)
    moving = torch.stack([pulse(at_faces), *(torch.zeros(1, *grid.shape).double(),) * 2], dim=1)
    state = solver.advance(solver.working(sound(grid, pulse(x), c, moving)), 0.0, 1.45)
    p = state["pressure"][0, :, 0, 0]
    back, on = p[: n // 2], p[n // 2 :]
    impedance = density * speed
    reflected, passed = (impedance - 1) / (impedance + 1), 2 * impedance / (impedance + 1)
    assert float(back[back.abs().argmax()]) == pytest.approx(reflected, abs=2e-3 * (1 + passed))
    assert float(on[on.abs().argmax()]) == pytest.approx(passed, rel=3e-3)


def test_a_standing_wave_in_two_layers_is_second_order(unchecked: None) -> None:
    """tan(ωL/2c₁)/ρ₁c₁ + tan(ωL/2c₂)/ρ₂c₂ = 0, the pressure and the velocity being continuous where the layers meet."""
    densities, speeds, duration, errors = (1.0, 4.0), (1.0, 0.7), 1.3, []
    omega = brentq(
        lambda w: sum(math.tan(w / 2 / c) / (rho * c) for rho, c in zip(densities, speeds, strict=True)), 2.3, 2.8
    )
    walls = ("free_slip", "free_slip")
    for n in (16, 32, 64):
        grid = Grid((n, 1, 1), (1.0 / n, 1.0, 1.0), (walls, *BOUNDARIES["periodic"][1:]))  # type: ignore[arg-type]
        x = points(grid, (0.5,) * 3)[0].expand(1, *grid.shape)
        (rho, beyond), (c, slow) = densities, speeds
        far = math.cos(omega / 2 / c) / math.cos(omega / 2 / slow) * (omega / slow * (1 - x)).cos()
        shape = torch.where(x < 0.5, (omega / c * x).cos(), far)
        solver = acoustics(Geometry(grid), torch.where(x < 0.5, rho, beyond))
        state = solver.working(sound(grid, shape, torch.where(x < 0.5, c, slow)))
        found = solver.advance(state, 0.0, duration)["pressure"]
        errors.append(float((found - math.cos(omega * duration) * shape).norm() / shape.norm()))
    assert errors[-1] < 1e-3 and all(1.8 < p < 2.2 for p in order(errors)), (errors, order(errors))


@pytest.mark.parametrize("boundaries", ["periodic", "closed"])
def test_energy_is_conserved_to_rounding(boundaries: str, unchecked: None) -> None:
    """The energy of the scheme, in noise with solids, at the largest step; the energy itself only swings about it."""
    geometry = random_geometry(box(boundaries), 2, fraction=0.25)
    solver, state = random_medium(geometry, 2)
    dt = solver.stable_step(state)
    start, energy = solver.energy(state, dt), solver.energy(state)
    assert bool((start > 0).all())
    swings = []
    for _ in range(80):
        state = solver.step(state, 0.0, dt)
        torch.testing.assert_close(solver.energy(state, dt), start, rtol=1e-12, atol=0)
        swings.append(float((solver.energy(state) / energy - 1).abs().amax()))
    assert 1e-3 < max(swings) < 1.0


def test_sound_runs_backwards(unchecked: None) -> None:
    solver, state = random_medium(random_geometry(box("mixed"), fraction=0.25), 1)
    dt, start = solver.stable_step(state), state
    for _ in range(50):
        state = solver.step(state, 0.0, dt)
    assert float((state["pressure"] - start["pressure"]).abs().amax()) > 0.1
    state = state | {"impulse": -state["impulse"]}
    for _ in range(50):
        state = solver.step(state, 0.0, dt)
    torch.testing.assert_close(state["pressure"], start["pressure"], rtol=0, atol=1e-10)
    torch.testing.assert_close(-state["impulse"], start["impulse"], rtol=0, atol=1e-10)


def test_source_and_listener_may_change_places() -> None:
    """The pressure at B after the cell A was compressed by a given volume is that at A after B was, in any medium."""
    geometry = random_geometry(box("mixed"), fraction=0.2)
    solver, state = random_medium(geometry, 1)
    a, b = torch.argwhere(geometry.fluid)[[0, -1]].tolist()
    heard = []
    for source, listener in ((a, b), (b, a)):
        pressure = torch.zeros(1, *geometry.grid.shape, dtype=torch.float64)
        pressure[0, *source] = solver._stiffness(state)[0, *source]
        there = state | {"pressure": pressure, "impulse": torch.zeros_like(pressure)}
        heard.append(float(solver.advance(there, 0.0, 8.0)["pressure"][0, *listener]))
    assert abs(heard[0]) > 1e-3 and heard[0] == pytest.approx(heard[1], rel=1e-9)


def test_a_solid_across_the_box_is_its_wall() -> None:
    closed = BOUNDARIES["closed"]
    half, full = Grid((4, 4, 7), (0.7, 1.3, 0.4), closed), Grid((8, 4, 7), (0.7, 1.3, 0.4), closed)
    solid = torch.zeros(full.shape, dtype=torch.bool)
    solid[4:] = True
    pressure = torch.randn(1, *full.shape)
    ends = []
    for grid, geometry in ((half, Geometry(half)), (full, Geometry(full, solid))):
        solver = acoustics(geometry)
        state = solver.working(sound(grid, pressure[:, : grid.shape[0]]))
        for _ in range(20):
            state = solver.step(state, 0.0, 0.1)
        ends.append(solver.recorded(state))
    torch.testing.assert_close(ends[1]["pressure"][:, :4], ends[0]["pressure"], rtol=0, atol=1e-13)
    torch.testing.assert_close(ends[1]["velocity"][:, :, :4], ends[0]["velocity"], rtol=0, atol=1e-13)
    assert bool((ends[1]["pressure"][:, 4:] == 0).all() and (ends[1]["velocity"][:, :, 4:] == 0).all())


def growth(factor: float) -> float:
    solver = acoustics(Geometry(Grid((4, 4, 4), (0.1, 0.2, 0.15))), 2.0)
    state = solver.working(sound(solver.geometry.grid, torch.randn(1, 4, 4, 4), 3.0))
    before, dt = float(state["pressure"].abs().amax()), factor * solver.stable_step(state)
    for _ in range(400):
        state = solver.step(state, 0.0, dt)
    return float(state["pressure"].abs().amax()) / before


def test_the_stable_step_is_stable_and_an_eighth_more_is_not(unchecked: None) -> None:
    assert growth(1.0) < 5.0
    assert growth(1.125) > 1e6


def test_what_is_recorded_is_a_gradient_and_begins_where_it_ended() -> None:
    geometry = random_geometry(box("mixed"), 2, fraction=0.2)
    solver, state = random_medium(geometry, 2)
    solver = Acoustics(geometry, torch.tensor([0.5, 2.0]))
    state = {name: value.float() for name, value in state.items()}
    found = solver.recorded(state)
    assert found["velocity"].dtype == torch.float64
    assert bool((found["velocity"][~geometry.open_faces] == 0).all())
    rest = decompose(found["velocity"], geometry, tol=1e-13).solenoidal
    assert float(rest.norm() / found["velocity"].norm()) < 1e-11
    fluid = geometry.fluid
    again = solver.recorded(solver.working(found))
    torch.testing.assert_close(again["velocity"], found["velocity"], rtol=0, atol=1e-5)
    torch.testing.assert_close(again["pressure"][fluid], found["pressure"][fluid], rtol=0, atol=0)
    assert torch.equal(again["sound_speed"], found["sound_speed"])


def test_a_batch_of_sounds_is_its_sounds_and_fused_ones_are_the_same(
    monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # traced, but not built
    geometry, density = random_geometry(box("channel"), 2), torch.tensor([0.5, 2.0])
    _, state = random_medium(geometry, 2)
    together = acoustics(geometry, density).step(state, 0.0, 0.05)
    fused = Acoustics(geometry, density, dtype=torch.float64, compiled=True).step(state, 0.0, 0.05)
    for name in ("pressure", "impulse"):
        torch.testing.assert_close(fused[name], together[name], rtol=0, atol=1e-13)
        for i in range(2):
            own = {key: value[i : i + 1] for key, value in state.items()}
            alone = acoustics(geometry[i], float(density[i])).step(own, 0.0, 0.05)
            torch.testing.assert_close(alone[name][0], together[name][i], rtol=0, atol=1e-13)


def test_impossible_sounds_and_families_are_refused(unchecked: None) -> None:
    grid = box("periodic")
    open_box = Grid((4, 4, 4), (1.0,) * 3, (("inflow", "outflow"), *BOUNDARIES["periodic"][1:]))
    with pytest.raises(ValueError, match="Expected a box of walls and periodic axes, got .*; sound cannot leave"):
        Acoustics(Geometry(open_box), 1.0)
    with pytest.raises(ValueError, match=r"Expected a positive density \[kg/m³\], got 0.0"):
        Acoustics(Geometry(grid), 0.0)
    solver, pressure = acoustics(Geometry(grid)), torch.zeros(1, *grid.shape)
    with pytest.raises(ValueError, match=r"Expected a positive sound speed \[m/s\], got -1.0"):
        solver.working(sound(grid, pressure, -1.0))
    with pytest.raises(ValueError, match="Expected a velocity whose momentum ρu is a gradient, got .*; sound never"):
        solver.working(sound(grid, pressure, 1.0, random_flux(grid, 1)))
    for arguments, message in [
        ({"contrast": (0.1, 1.0)}, r"range of contrasts, two numbers with 0 < a ≤ b < 1, got \[0.1, 1.0\]"),
        ({"density": (0.0, 1.0)}, "range of densities"),
        ({"diameter": (0.1, 0.6)}, "range of diameters"),
        ({"scatterers": -1}, "Expected a finite number of scatterers ≥ 0, got -1"),
        ({"sides": "open"}, r"sides that are periodic \| closed, got 'open'"),
    ]:
        with pytest.raises(ValueError, match=message):
            AcousticScattering(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("sides", ["periodic", "closed"])
def test_a_data_set_of_sounds(sides: str, tmp_path: Path, unchecked: None) -> None:
    family = AcousticScattering(sides=sides, spin_up=0.1)  # type: ignore[arg-type]
    path = simulate(family, tmp_path / "a", shape=(12, 12, 12), num_trajectories=3, num_frames=4, seed=3)
    store = open_store(path)
    assert store.family == "acoustics" and set(store.parameters) == {"density"}
    for i in range(3):
        geometry, drawn = store.geometry(i), family.draw(3, i)
        pressure, flux, c = (store.read(name, i, slice(None)) for name in ("pressure", "velocity", "sound_speed"))
        assert bool((c == c[0]).all()) and float(c[0].log().std()) == pytest.approx(drawn["contrast"], rel=1e-5)
        assert bool((flux[:, ~geometry.open_faces] == 0).all() and (pressure[:, ~geometry.fluid] == 0).all())
        rest = decompose(flux, geometry, tol=1e-13).solenoidal
        assert float(flux.norm()) > 0 and float(rest.norm() / flux.norm()) < 1e-11
        solver = acoustics(geometry, float(store.parameters["density"][i]))
        energy = [solver.energy(solver.working({"pressure": p[None], "velocity": u[None], "sound_speed": c[:1]}))
                  for p, u in zip(pressure, flux, strict=True)]  # fmt: skip
        assert max(energy) / min(energy) < 1.15
        compression = torch.where(geometry.fluid, pressure / c**2, 0.0)
        assert float(compression.mean()) == pytest.approx(0.0, abs=1e-6)
    first = [family.initial(store.geometry(i), family.draw(3, i), 3, i)["pressure"] for i in (0, 0, 1)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert float(first[2][store.geometry(1).fluid].square().mean()) == pytest.approx(family.pressure**2)
    assert any(not store.geometry(i).is_empty for i in range(3))
    assert AcousticScattering(scatterers=0).solid(store.grid, {}, 0, 0) is None
