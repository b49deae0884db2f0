"""Shallow water on the sphere against closed forms, conservation laws and measured orders."""

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from reference import order
from torch import Tensor

pytest.importorskip("torch_harmonics")

from latentphys import sphere as harmonics  # noqa: E402
from latentphys.data import open_store  # noqa: E402
from latentphys.families import ShallowWater, ShallowWaterSphere, simulate  # noqa: E402
from latentphys.families.shallow_water import truncation  # noqa: E402
from latentphys.families.solver import Fields  # noqa: E402
from latentphys.sphere import Sphere  # noqa: E402

RADIUS, ROTATION, GRAVITY, DAY = 6.37122e6, 7.292e-5, 9.80616, 86400.0


def earth(nlat: int) -> Sphere:
    return Sphere(nlat, 2 * nlat, RADIUS)


def layer(nlat: int, depth: float = 8e3, rotation: float = ROTATION, damping_time: float = math.inf) -> ShallowWater:
    return ShallowWater(earth(nlat), rotation, GRAVITY, depth, damping_time=damping_time, dtype=torch.float64)


def at_rest(solver: ShallowWater, depth: float = 8e3) -> Fields:
    """The working state of a level layer at rest."""
    nlat, nlon = solver.sphere.shape
    level = torch.full((1, nlat, nlon), depth, dtype=torch.float64)
    return solver.working({"height": level, "velocity": torch.zeros(1, 2, nlat, nlon, dtype=torch.float64)})


def random_state(solver: ShallowWater, speed: float = 30.0) -> Fields:
    """A balanced flow of the few lowest degrees, with some divergence."""
    state, shape = at_rest(solver), (5, 5)
    noise = torch.tril(torch.randn(shape, dtype=torch.float64))
    state["vorticity"][0, 1:6, :5, 0] = noise * speed / RADIUS
    state["vorticity"][0, 1:6, 1:5, 1] = noise[:, 1:] * speed / RADIUS
    state = solver.balance(state)
    state["divergence"][0, 2, 1, 0] = 0.1 * speed / RADIUS
    return state


@pytest.mark.parametrize("angle", [0.0, math.pi / 4, math.pi / 2])
def test_a_solid_rotation_of_the_layer_is_steady_about_any_axis(angle: float, unchecked: None) -> None:
    """Case 2 of Williamson et al. (1992), five days, in the depth that `balance` finds from the winds alone."""
    grid, wind, level = earth(12), 2 * math.pi * RADIUS / (12 * DAY), 2.94e4
    theta, phi = grid.colatitudes[:, None], grid.longitudes
    mu = theta.cos() * math.cos(angle) - theta.sin() * phi.cos() * math.sin(angle)
    height = (level - (RADIUS * ROTATION * wind + wind**2 / 2) * mu**2) / GRAVITY
    east = wind * (theta.sin() * math.cos(angle) + theta.cos() * phi.cos() * math.sin(angle))
    velocity = torch.stack([wind * phi.sin() * math.sin(angle) + 0 * theta, east])
    solver = ShallowWater(grid, ROTATION, GRAVITY, level / GRAVITY, axis=(angle, math.pi), dtype=torch.float64)
    state = solver.working({"height": height[None], "velocity": velocity[None]})
    for start in (state, solver.balance(state)) if angle == math.pi / 4 else (state,):
        found = solver.recorded(solver.advance(start, 0.0, 5 * DAY))
        torch.testing.assert_close(found["height"][0], height, rtol=1e-12, atol=0)
        torch.testing.assert_close(found["velocity"][0], velocity, rtol=0, atol=1e-10)


@pytest.mark.parametrize("degree", [1, 3, 7])
def test_gravity_waves_keep_their_dispersion_relation_at_third_order(degree: int, unchecked: None) -> None:
    """Without rotation h_l(t) = cos ωt with ω² = g H l(l + 1)/a²."""
    depth, errors = 5e3, []
    solver = layer(12, depth, rotation=0.0)
    omega = math.sqrt(GRAVITY * depth * degree * (degree + 1)) / RADIUS
    duration = 2.5 / omega
    for num_steps in (10, 20, 40):
        state = at_rest(solver, depth)
        state["height"][0, degree, 1] = torch.tensor([1e-6, -2e-6])
        for _ in range(num_steps):
            state = solver.step(state, 0.0, duration / num_steps)
        found = state["height"][0, degree, 1] / torch.tensor([1e-6, -2e-6])
        errors.append(float((found - math.cos(omega * duration)).abs().amax()))
    assert errors[-1] < 1e-4 and all(2.7 < p < 3.3 for p in order(errors)), (errors, order(errors))


def test_a_rossby_haurwitz_wave_travels_as_fast_as_without_divergence_where_the_layer_is_deep(unchecked: None) -> None:
    """ν = (R(3 + R)ω − 2Ω)/((1 + R)(2 + R)), R = 4, ω = 7.848e-6 /s (Williamson et al. 1992, case 6)."""
    wavenumber, omega, depth, duration = 4, 7.848e-6, 1e8, 3600.0
    solver = layer(14, depth)
    latitude, phi = math.pi / 2 - solver.sphere.colatitudes[:, None], solver.sphere.longitudes
    wave = latitude.cos() ** wavenumber * latitude.sin() * (wavenumber * phi).cos()
    psi = RADIUS**2 * omega * (wave - latitude.sin())
    flow = harmonics.velocity(psi, None, solver.sphere)[None]
    level = torch.full((1, *solver.sphere.shape), depth, dtype=torch.float64)
    state = solver.balance(solver.working({"height": level, "velocity": flow}))
    angles = [torch.view_as_complex(state["vorticity"])[0, 5, 4].angle()]
    state = solver.advance(state, 0.0, duration)
    angles.append(torch.view_as_complex(state["vorticity"])[0, 5, 4].angle())
    expected = (wavenumber * (3 + wavenumber) * omega - 2 * ROTATION) / ((1 + wavenumber) * (2 + wavenumber))
    assert float(angles[0] - angles[1]) / (wavenumber * duration) == pytest.approx(expected, rel=1e-3)


def test_mass_is_conserved_bit_for_bit_and_energy_and_enstrophy_to_the_truncation(unchecked: None) -> None:
    solver = layer(24)
    state = random_state(solver)
    before = solver.invariants(state)
    after_state = solver.advance(state, 0.0, DAY)
    after = solver.invariants(after_state)
    assert torch.equal(after_state["height"][0, 0], state["height"][0, 0])
    assert float((after_state["vorticity"] - state["vorticity"]).norm() / state["vorticity"].norm()) > 0.3
    assert float(after["mass"]) == pytest.approx(float(before["mass"]), rel=1e-14)
    assert float(after["energy"]) == pytest.approx(float(before["energy"]), rel=1e-6)
    assert float(after["enstrophy"]) == pytest.approx(float(before["enstrophy"]), rel=1e-5)


def test_runge_kutta_is_third_order_in_time(unchecked: None) -> None:
    solver = layer(12, damping_time=6 * 3600.0)
    start = random_state(solver)

    def end(num_steps: int) -> Tensor:
        state = start
        for _ in range(num_steps):
            state = solver.step(state, 0.0, 8 * 3600.0 / num_steps)
        return torch.stack([1e8 * state["vorticity"], 1e8 * state["divergence"], state["height"]])

    ends = [end(n) for n in (16, 32, 64)]
    differences = [float((a - b).norm()) for a, b in zip(ends, ends[1:], strict=False)]
    assert all(2.7 < p < 3.3 for p in order(differences)), order(differences)


def test_products_are_not_aliased() -> None:
    """The rates of degrees l ≤ T are those on a grid twice as fine."""
    coarse, fine = layer(12), layer(24)
    last = truncation(coarse.sphere)
    assert last == 7 and truncation(earth(64)) == 42 and truncation(earth(128)) == 85
    state = at_rest(coarse)
    for value in state.values():
        noise = torch.tril(torch.randn(last, last + 1, 2, dtype=torch.float64).permute(2, 0, 1), diagonal=1)
        noise[1, :, 0] = 0.0
        value[0, 1 : last + 1, : last + 1] = noise.permute(1, 2, 0) * float(1e-5 if value.amax() < 1 else 50)
    finer = {}
    for name, value in state.items():
        finer[name] = torch.zeros(1, fine.sphere.lmax, fine.sphere.lmax, 2, dtype=torch.float64)
        finer[name][:, : coarse.sphere.lmax, : coarse.sphere.lmax] = value
    for name, rate in coarse.rates(state, {}).items():
        expected = fine.rates(finer, {})[name][:, : last + 1, : last + 1]
        torch.testing.assert_close(
            rate[:, : last + 1, : last + 1], expected, rtol=0, atol=1e-12 * float(expected.abs().amax())
        )
        assert bool((rate[:, last + 1 :] == 0).all())


def test_the_damping_takes_the_last_degree_in_its_time_and_leaves_solid_rotation_alone() -> None:
    time = 3600.0
    solver, free = layer(12, damping_time=time), layer(12)
    state = random_state(solver, 1e-9)
    state["vorticity"][0, solver.last, 3, 0] = state["height"][0, solver.last, 2, 1] = 1.0
    lost = {name: value - solver.rates(state, {})[name] for name, value in free.rates(state, {}).items()}
    assert float(lost["vorticity"][0, solver.last, 3, 0]) == pytest.approx(1 / time)
    assert float(lost["height"][0, solver.last, 2, 1]) == pytest.approx(1 / time)
    assert bool((lost["vorticity"][:, :2] == 0).all() and (lost["height"][:, 0] == 0).all())


def test_a_balanced_state_leaves_its_divergence_alone() -> None:
    solver = layer(16)
    state = random_state(solver)
    before, after = (float(solver.rates(s, {})["divergence"].abs().amax()) for s in (state, solver.balance(state)))
    assert after < 1e-10 * before


def growth(factor: float, damping_time: float) -> float:
    solver = layer(12, damping_time=damping_time)
    state = at_rest(solver)
    dt = factor * solver.stable_step(state)
    state["height"][0, 1 : solver.last + 1, 0, 0] = 1e-3
    before = float(state["height"][:, 1:].abs().amax())
    for _ in range(60):
        state = solver.step(state, 0.0, dt)
    return float(state["height"][:, 1:].abs().amax()) / before


@pytest.mark.parametrize("damping_time", [math.inf, 300.0])
def test_the_stable_step_is_stable_and_half_as_much_again_is_not(damping_time: float, unchecked: None) -> None:
    assert growth(1.0, damping_time) < 2.0
    assert not growth(1.5, damping_time) < 1e3


def test_single_precision_and_fused_products_are_the_same(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # traced, but not built
    grid, parameters = earth(12), (torch.tensor([4e-5, 8e-5]), GRAVITY, torch.tensor([5e3, 8e3]))
    exact = ShallowWater(grid, *parameters, dtype=torch.float64)
    one = exact.recorded(random_state(layer(12)))
    given = {name: value.expand(2, *value.shape[1:]) for name, value in one.items()}
    fused = ShallowWater(grid, *parameters, dtype=torch.float64, compiled=True)
    single = ShallowWater(grid, *parameters)
    ends = [s.recorded(s.advance(s.working(given), 0.0, DAY / 4)) for s in (exact, fused, single)]
    for i in range(2):
        alone = ShallowWater(grid, float(parameters[0][i]), GRAVITY, float(parameters[2][i]), dtype=torch.float64)
        dt = exact.stable_step(exact.working(given))
        own = alone.step(alone.working(one), 0.0, dt)
        together = exact.step(exact.working(given), 0.0, dt)
        for name, value in own.items():
            torch.testing.assert_close(together[name][i], value[0], rtol=1e-9, atol=1e-12 * float(value.abs().amax()))
    for name, size in (("height", 8e3), ("velocity", 30.0)):
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=1e-11 * size)
        torch.testing.assert_close(ends[2][name], ends[0][name], rtol=0, atol=1e-4 * size)
        assert ends[2][name].dtype == torch.float64


def test_impossible_layers_and_families_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Expected a Legendre–Gauss grid, got equiangular"):
        ShallowWater(Sphere(9, 18, quadrature="equiangular"), 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"Expected a positive gravity \[m/s²\], got 0.0"):
        ShallowWater(earth(8), ROTATION, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"Expected a positive damping time \[s\], got 0.0"):
        layer(8, damping_time=0.0)
    solver = layer(8)
    with pytest.raises(FloatingPointError, match="Expected a positive depth, got -1 m; damp more"):
        solver.recorded(at_rest(solver, -1.0))
    for arguments, message in [
        ({"rotation": (0.0, 1.0)}, "range of rotation rates"),
        ({"mean_depth": (2.0, 1.0)}, r"range of mean depths, two numbers with 0 < a ≤ b < inf, got \[2.0, 1.0\]"),
        ({"wind": (0.0, 1.0)}, "range of winds"),
        ({"eddies": (0.0, 1.0)}, "range of shares of eddies"),
        ({"gravity": -1.0}, r"Expected a finite gravity \[m/s²\] > 0, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ShallowWaterSphere(**arguments)  # type: ignore[arg-type]
    family = ShallowWaterSphere()
    assert family.grid((8, 8, 8)).shape == (8, 16) and family.grid((12, 20)).shape == (12, 20)
    with pytest.raises(ValueError, match=r"Expected \(nlat, nlon\) or three equal numbers .*, got \[8, 8, 4\]"):
        family.grid((8, 8, 4))
    harmonics._transforms.cache_clear()
    monkeypatch.setitem(sys.modules, "torch_harmonics", None)
    with pytest.raises(
        ImportError, match=r"Expected torch-harmonics, got none; run `pip install latentphys\[sphere\]`"
    ):
        layer(10)


def test_a_data_set_of_jets(tmp_path: Path, unchecked: None) -> None:
    family = ShallowWaterSphere(spin_up=3600.0)
    path = simulate(family, tmp_path / "a", shape=(16, 16, 16), num_trajectories=3, num_frames=4, seed=2)
    store = open_store(path)
    assert store.family == "shallow_water_sphere" and set(store.parameters) == {"rotation", "gravity", "mean_depth"}
    grid = store.domain
    assert grid == Sphere(16, 32, family.radius)
    share = grid.areas / (4 * math.pi * family.radius**2)
    for i in range(3):
        height = torch.as_tensor(store.read("height", i, slice(None)))
        mass = (height * share).sum((-2, -1))
        assert float((mass / mass[0] - 1).abs().amax()) < 1e-14
        assert float(mass[0]) == pytest.approx(family.draw(2, i)["mean_depth"], rel=1e-6)
        assert bool((height > 0).all())
    assert not torch.equal(store.read("height", 0, 0), store.read("height", 1, 0))


def test_the_first_state_of_a_layer_has_its_winds_and_is_balanced(unchecked: None) -> None:
    family = ShallowWaterSphere()
    grid = family.grid((24, 24, 24))
    drawn = family.draw(0, 1)
    fields = family.initial(grid, drawn, 0, 1)
    assert torch.equal(fields["velocity"], family.initial(grid, drawn, 0, 1)["velocity"])
    share = grid.areas / (4 * math.pi * grid.radius**2)
    energy = (fields["velocity"].square().sum(0) * share).sum()
    assert float(energy.sqrt()) == pytest.approx(drawn["wind"], rel=1e-9)
    zonal = (fields["velocity"].mean(-1, keepdim=True).square().sum(0) * share * grid.nlon).sum()
    assert float(1 - zonal / energy) == pytest.approx(drawn["eddies"], rel=1e-9)
    solver = ShallowWater(
        grid, drawn["rotation"], family.gravity, drawn["mean_depth"], dtype=torch.float64, damping_time=math.inf
    )
    state = solver.working({name: value[None] for name, value in fields.items()})
    rates = solver.rates(state, {})
    assert float(rates["divergence"].abs().amax()) < 1e-9 * float(rates["vorticity"].abs().amax())
    shallow = drawn | {"mean_depth": 500.0}
    thin = family.initial(grid, shallow, 0, 1)
    assert 100.0 < float(thin["height"].amin()) < 300.0
    assert float((thin["velocity"].square().sum(0) * share).sum().sqrt()) < 0.9 * drawn["wind"]
