"""Scalars that a flow carries: closed forms, conservation, budgets; and convection, where they drive it."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from reference import BOUNDARIES, box, order, points, random_flux, random_geometry, two_pi_box
from torch import Tensor

from latentphys import operators
from latentphys.families import Convection, PassiveScalar
from latentphys.families.convection import BuoyantFlow, free_fall
from latentphys.families.passive_scalar import StirredScalar
from latentphys.families.scalar_transport import ScalarFlow, ScalarTransport, Total
from latentphys.families.solver import Fields
from latentphys.families.turbulence import StirredFlow
from latentphys.grid import Boundaries, Boundary, Geometry, Grid
from latentphys.projection import project

NOTHING = 1e-300


def transport(geometry: Geometry, diffusivity: float, walls: Mapping[str, float] | None = None) -> ScalarTransport:
    return ScalarTransport(geometry, torch.full((1, 1, 1, 1), diffusivity, dtype=torch.float64), walls)


def slab(n: int, axis: int, boundary: Boundary, height: float = 1.0) -> Grid:
    """n cells between two walls, two along the other axes."""
    nx, ny, nz = (n if a == axis else 2 for a in range(3))
    dx, dy, dz = (height / n if a == axis else 0.3 for a in range(3))
    sides: list[tuple[Boundary, Boundary]] = [("periodic", "periodic")] * 3
    sides[axis] = (boundary, boundary)
    return Grid((nx, ny, nz), (dx, dy, dz), (sides[0], sides[1], sides[2]))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("held", [False, True])
def test_diffusion_between_walls_is_second_order(axis: int, held: bool, unchecked: None) -> None:
    """exp(−Dπ²t): a cosine between insulated walls, a sine between walls at zero, on top of a conducting profile."""
    diffusivity, duration, errors = 0.2, 0.3, []
    sides = [f"{'xyz'[axis]}{end}" for end in "-+"]
    for n in (6, 12, 24):
        grid = slab(n, axis, "no_slip")
        flow = ScalarFlow(
            Geometry(grid),
            diffusivity,
            diffusivity,
            walls=dict(zip(sides, (1.0, -2.0), strict=True)) if held else None,
            dtype=torch.float64,
        )
        x = points(grid, (0.5, 0.5, 0.5))[axis].expand(grid.shape)
        base, mode = (1 - 3 * x, (math.pi * x).sin()) if held else (torch.full_like(x, 0.7), (math.pi * x).cos())
        start = {"velocity": torch.zeros(1, 3, *grid.shape, dtype=torch.float64), "scalar": (base + mode)[None]}
        end = flow.advance(start, 0.0, duration)["scalar"][0]
        errors.append(float((end - base - mode * math.exp(-diffusivity * math.pi**2 * duration)).abs().amax()))
    assert all(1.9 < p < 2.1 for p in order(errors)), (errors, order(errors))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_wave_is_carried_at_the_phase_speed_of_central_differences(axis: int) -> None:
    """∂c/∂t of cos(kx) in a uniform flow U is U sin(kh)/h sin(kx) − 4D sin²(kh/2)/h² cos(kx)."""
    grid, speed, diffusivity = box("periodic"), 1.7, 0.3
    n, h = grid.shape[axis], grid.spacing[axis]
    u = torch.zeros(1, 3, *grid.shape, dtype=torch.float64)
    u[:, axis] = speed
    k = 2 * math.pi / (n * h)
    x = points(grid, (0.5, 0.5, 0.5))[axis].expand(1, *grid.shape)
    found = transport(Geometry(grid), diffusivity).rate((k * x).cos(), operators.flux_of(u, grid))
    carried = speed * math.sin(k * h) / h * (k * x).sin()
    spread = -diffusivity * 4 * math.sin(k * h / 2) ** 2 / h**2 * (k * x).cos()
    torch.testing.assert_close(found, carried + spread, rtol=0, atol=1e-13)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("solid", [False, True])
def test_a_scalar_is_conserved_and_its_variance_only_diffuses(boundaries: str, solid: bool) -> None:
    """Σ ∂c/∂t = 0; Σ c ∂c/∂t is zero without diffusion and −D Σ (Δc/h)² over the open faces with it."""
    geometry = random_geometry(box(boundaries), 2, fraction=0.25) if solid else Geometry(box(boundaries))
    grid = geometry.grid
    flux = project(random_flux(grid, 2), geometry, tol=1e-14)
    scalar = torch.randn(2, *grid.shape, dtype=torch.float64)
    slopes = operators.grad(scalar, grid) / grid.per_face(grid.spacing, scalar)
    for diffusivity in (NOTHING, 0.3):
        rate = transport(geometry, diffusivity).rate(scalar, flux)
        assert bool((rate.sum((1, 2, 3)).abs() < 1e-12 * rate.abs().sum((1, 2, 3))).all())
        assert bool((rate[(~geometry.fluid).expand(rate.shape)] == 0.0).all())
        lost = diffusivity * (slopes.square() * geometry.open_faces).sum((1, 2, 3, 4))
        change = scalar * rate
        assert bool(((change.sum((1, 2, 3)) + lost).abs() < 1e-12 * change.abs().sum((1, 2, 3))).all())


def test_walls_give_what_they_conduct() -> None:
    """Σ ∂c/∂t V = Σ over the wall's fluid cells of D A (c_wall − c)/(h/2), and 2Dc/h² less for every wall at zero."""
    grid = box("closed")
    geometry = random_geometry(grid, fraction=0.25)
    scalar, flux = torch.randn(1, *grid.shape, dtype=torch.float64), torch.zeros(1, 3, *grid.shape, dtype=torch.float64)
    rate = transport(geometry, 0.3, {"x+": 2.0, "z-": -1.0}).rate(scalar, flux)
    low, high = (geometry.fluid * scalar[0])[:, :, 0], (geometry.fluid * scalar[0])[-1]
    given_x = (2.0 * geometry.fluid[-1] - high).sum() * 0.3 * grid.face_areas[0] / (grid.spacing[0] / 2)
    given_z = (-1.0 * geometry.fluid[:, :, 0] - low).sum() * 0.3 * grid.face_areas[2] / (grid.spacing[2] / 2)
    assert float(rate.sum()) * grid.cell_volume == pytest.approx(float(given_x + given_z), rel=1e-12)


@pytest.mark.parametrize(
    ("walls", "message"),
    [
        ({"x-": 1.0}, r"Expected the value of a scalar on a wall \(z- \| z\+\), got one for 'x-'"),
        ({"top": 1.0}, r"on a wall \(z- \| z\+\), got one for 'top'"),
        ({"z+": math.nan}, r"Expected a finite value of the scalar on z\+, got nan"),
    ],
)
def test_only_walls_have_values(walls: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transport(Geometry(box("channel")), 0.1, walls)


@pytest.mark.parametrize("solid", [False, True])
@pytest.mark.parametrize("largest", [0.0, 1e-12, 1.0, 3e20])
def test_a_total_is_kept_in_every_bit_and_in_any_order(solid: bool, largest: float) -> None:
    grid = box("periodic")
    geometry = random_geometry(grid, 2) if solid else Geometry(grid)
    fluid = geometry.fluid.expand(2, *grid.shape)
    values = largest * torch.randn(2, *grid.shape, dtype=torch.float64) * fluid
    total = Total.of(values)
    moved = (values + 1e-7 * largest * torch.rand(2, *grid.shape) * fluid).float()
    kept = total.kept(moved, geometry)
    expected = (total.units * total.quantum).flatten()
    for one in (kept, kept.flip(-1), kept.transpose(1, 3)):
        assert torch.equal(one.reshape(2, -1).sum(1), expected)
    assert bool((kept[~fluid] == 0.0).all())
    assert float((kept - moved).abs().amax()) <= 2e-7 * largest
    torch.testing.assert_close(expected, values.sum((1, 2, 3)), rtol=0, atol=1e-10 * largest)


def test_a_mean_gradient_is_a_scalar_that_lies_on_a_slope() -> None:
    """Away from where the box is cut, carrying c + Gx and subtracting nothing is carrying c on the gradient G."""
    grid, gradient = two_pi_box((10, 8, 6)), 0.8
    flux = project(random_flux(grid, 1), Geometry(grid))
    flux = flux - flux.mean((-3, -2, -1), keepdim=True)
    flow = StirredScalar(Geometry(grid), 0.1, NOTHING, 1.0, 2, gradient, dtype=torch.float64)
    scalar = torch.randn(1, *grid.shape, dtype=torch.float64)
    fields = {"velocity": flux, "scalar": scalar}
    found = flow.rates(fields, flow.drive(fields, 0.0))["scalar"]
    slope = gradient * points(grid, (0.5, 0.5, 0.5))[0]
    expected = flow.transport.rate(scalar + slope, flux)
    torch.testing.assert_close(found[:, 1:-1], expected[:, 1:-1], rtol=0, atol=1e-11)
    assert abs(float(found.sum())) < 1e-11


def test_a_passive_scalar_leaves_the_stirred_flow_alone() -> None:
    grid = two_pi_box((10, 8, 6))
    flux, scalar = project(random_flux(grid, 1), Geometry(grid)), torch.randn(1, *grid.shape, dtype=torch.float64)
    alone = StirredFlow(Geometry(grid), 0.1, 2.0, dtype=torch.float64)
    carrying = StirredScalar(Geometry(grid), 0.1, 0.2, 2.0, 2, 0.8, dtype=torch.float64)
    after = carrying.step({"velocity": flux, "scalar": scalar}, 0.0, 0.01)["velocity"]
    torch.testing.assert_close(after, alone.step({"velocity": flux}, 0.0, 0.01)["velocity"], rtol=0, atol=1e-14)


def decay(diffusivity: float, factor: float) -> float:
    """Largest value after 60 steps of `factor` times the stable length against before, from noise at rest."""
    grid = box("channel")
    flow = ScalarFlow(Geometry(grid), 1e-3, diffusivity, walls={"z-": 0.0, "z+": 0.0}, dtype=torch.float64)
    fields = {"velocity": torch.zeros(1, 3, *grid.shape).double(), "scalar": torch.randn(1, *grid.shape).double()}
    before, dt = float(fields["scalar"].abs().amax()), factor * flow.stable_step(fields)
    for _ in range(60):
        fields = flow.step(fields, 0.0, dt)
    return float(fields["scalar"].abs().amax()) / before


def test_the_stable_step_is_stable_for_the_scalar_and_not_much_longer() -> None:
    assert decay(1.0, 1.0) <= 1.0
    assert not decay(1.0, 1.3) < 10.0


def batch_of(family: PassiveScalar | Convection, count: int) -> tuple[dict[str, np.ndarray], list[Fields], Geometry]:
    geometry = Geometry(family.grid((8, 10, 8)))
    drawn = [family.draw(4, i) for i in range(count)]
    first = [family.initial(geometry, drawn[i], 4, i) for i in range(count)]
    return {name: np.array([p[name] for p in drawn]) for name in drawn[0]}, first, geometry


@pytest.mark.parametrize("family", [PassiveScalar(), Convection()])
def test_recorded_states_are_exact_and_a_run_can_be_taken_up_again(family: PassiveScalar | Convection) -> None:
    parameters, first, geometry = batch_of(family, 2)
    scalar = list(family.specs)[1]
    start = {name: torch.stack([f[name] for f in first]) for name in first[0]}
    solver = family.solver(geometry, parameters)
    fields = solver.working(start)
    assert fields[scalar].dtype == torch.float32
    totals, kept = [], []
    for frame in range(4):
        recorded = solver.recorded(fields)
        assert recorded[scalar].dtype == torch.float64
        assert bool((operators.div(recorded["velocity"], geometry.grid) == 0.0).all())
        assert float((recorded[scalar] - fields[scalar]).abs().amax()) < 1e-5
        totals.append(recorded[scalar].flatten(1).sum(1))
        kept.append(recorded)
        if frame == 1:
            again = family.solver(geometry, parameters)
            again.remember(solver.memory())
            resumed = {name: value.clone() for name, value in fields.items()}
        fields = solver.advance(fields, frame * 0.1, 0.1)
    for frame in (1, 2, 3):
        assert all(torch.equal(again.recorded(resumed)[name], kept[frame][name]) for name in start)
        resumed = again.advance(resumed, frame * 0.1, 0.1)
    if family.specs[scalar].constraint == "conserved":
        assert all(torch.equal(total, totals[0]) for total in totals)
    assert not torch.equal(kept[0][scalar], kept[3][scalar])


@pytest.mark.slow
@pytest.mark.parametrize("family", [PassiveScalar(), Convection()])
def test_fused_steps_are_plain_steps(family: PassiveScalar | Convection, unchecked: None) -> None:
    parameters, first, geometry = batch_of(family, 2)
    start = {name: torch.stack([f[name] for f in first]) for name in first[0]}
    plain, fused = (family.solver(geometry, parameters, dtype=torch.float64, compiled=c) for c in (False, True))
    one, other = (solver.step(solver.working(start), 0.0, 0.01) for solver in (plain, fused))
    for name in start:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-13)
        assert not torch.equal(one[name], start[name])


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        (PassiveScalar, {"schmidt": (0.0, 1.0)}, "Expected a range of Sc, two numbers with 0 < a ≤ b < inf, got"),
        (Convection, {"rayleigh": (2.0, 1.0)}, "Expected a range of Ra, two numbers with 0 < a ≤ b < inf, got"),
        (Convection, {"prandtl": (0.0, 1.0)}, "Expected a range of Pr, two numbers with 0 < a ≤ b < inf, got"),
        (Convection, {"lengths": (1.0, 1.0, 2.0)}, r"Expected a height of 1 .* got lengths \(1.0, 1.0, 2.0\)"),
        (Convection, {"plates": ("no_slip", "periodic")}, r"Expected two plates, each no_slip \| free_slip, got"),
    ],
)
def test_impossible_families_are_refused(family: type, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family(**arguments)


def test_draws_are_of_the_ranges() -> None:
    drawn = [Convection(rayleigh=(1e4, 1e6), prandtl=(0.7, 7.0)).draw(0, i) for i in range(200)]
    nu, kappa = (np.array([d[name] for d in drawn]) for name in ("viscosity", "diffusivity"))
    rayleigh, prandtl = 1 / (nu * kappa), nu / kappa
    assert 1e4 <= rayleigh.min() < 1.2e4 and 8e5 < rayleigh.max() <= 1e6
    assert np.median(rayleigh) == pytest.approx(1e5, rel=0.5)
    assert prandtl.min() >= 0.7 and prandtl.max() <= 7.0
    scalars = [PassiveScalar(schmidt=(0.5, 1.0)).draw(0, i) for i in range(50)]
    schmidt = np.array([d["viscosity"] / d["diffusivity"] for d in scalars])
    assert 0.5 <= schmidt.min() < 0.55 and 0.95 < schmidt.max() <= 1.0


def layer(grid: Grid, rayleigh: Sequence[float], prandtl: float) -> BuoyantFlow:
    scales = {name: torch.from_numpy(value) for name, value in free_fall(np.array(rayleigh), prandtl).items()}
    return BuoyantFlow(Geometry(grid), **scales, dtype=torch.float64)


def rolls(grid: Grid, batch: int, speed: float, warmth: float) -> Fields:
    """The conducting layer with a pair of rolls in it, sin(πz) across it and one wave along x."""
    k = 2 * math.pi / grid.lengths[0]
    (x, _, zu), (xw, _, zw) = points(grid, (0.0, 0.5, 0.5)), points(grid, (0.5, 0.5, 0.0))
    u = torch.zeros(3, *grid.shape, dtype=torch.float64)
    u[0] = -speed * math.pi / k * (k * x).sin() * (math.pi * zu).cos()
    u[2] = speed * (k * xw).cos() * (math.pi * zw).sin()
    flux = project(operators.flux_of(u, grid), Geometry(grid))
    temperature = 0.5 - zu + warmth * (k * xw).cos() * (math.pi * zu).sin()
    return {"velocity": flux.expand(batch, *flux.shape), "temperature": temperature.expand(batch, *grid.shape)}


def slice_of(plates: tuple[Boundary, Boundary], wavenumber: float, nz: int) -> Grid:
    walls: Boundaries = (("periodic", "periodic"), ("periodic", "periodic"), plates)
    return Grid((2 * nz, 1, nz), (math.pi / wavenumber / nz, 1.0, 1.0 / nz), walls)


def growth(grid: Grid, rayleigh: Sequence[float], wavenumber: float, wait: float, last: float) -> Tensor:
    """Growth rates of an infinitesimal roll at Pr = 1 [κ/H²], between two times [H²/κ of the mean Ra]."""
    flow, conduction = layer(grid, rayleigh, 1.0), math.sqrt(float(np.mean(rayleigh)))
    start = rolls(grid, len(rayleigh), 1e-6, 1e-6 * math.sqrt(math.pi**2 + wavenumber**2) / wavenumber)
    fields = flow.advance(start, 0.0, wait * conduction)
    before = operators.kinetic_energy(fields["velocity"], grid)
    fields = flow.advance(fields, 0.0, last * conduction)
    gained = (operators.kinetic_energy(fields["velocity"], grid) / before).log()
    return 0.5 * gained / (last * conduction) * torch.tensor(rayleigh, dtype=torch.float64).sqrt()


def onset(rayleigh: Sequence[float], rates: Tensor) -> float:
    """Ra of zero growth; at Pr = 1 the rate is all but linear in √Ra."""
    low, high = np.sqrt(rayleigh)
    return float(low - float(rates[0]) * (high - low) / float(rates[1] - rates[0])) ** 2


@pytest.mark.parametrize("nz", [8, 12])
def test_rolls_between_free_plates_grow_as_the_discrete_equations_say(nz: int, unchecked: None) -> None:
    """σ = √(Ra/q²) k cos(πh/2) − q² with the wave numbers of central differences; in the limit Ra_c = 27π⁴/4."""
    k = math.pi / math.sqrt(2)
    grid, rayleigh = slice_of(("free_slip", "free_slip"), k, nz), [620.0, 690.0]
    dx, _, dz = grid.spacing
    kx, kz = 2 / dx * math.sin(k * dx / 2), 2 / dz * math.sin(math.pi * dz / 2)
    q2 = kx**2 + kz**2
    expected = [math.sqrt(ra / q2) * kx * math.cos(math.pi * dz / 2) - q2 for ra in rayleigh]
    found = growth(grid, rayleigh, k, 0.1, 0.05)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-5)
    discrete = q2**3 / (kx * math.cos(math.pi * dz / 2)) ** 2
    assert onset(rayleigh, found) == pytest.approx(discrete, rel=1e-5)
    assert discrete == pytest.approx(27 * math.pi**4 / 4, rel=0.9 / nz**2)


@pytest.mark.parametrize(
    ("plates", "wavenumber", "critical"),
    [(("no_slip", "no_slip"), 3.116, 1707.762), (("no_slip", "free_slip"), 2.682, 1100.650)],
)
def test_convection_begins_at_the_critical_rayleigh_number(
    plates: tuple[Boundary, Boundary], wavenumber: float, critical: float, unchecked: None
) -> None:
    """Growth rates on two grids, extrapolated to h → 0, against Chandrasekhar (1961), ch. II."""
    rayleigh, found = [0.95 * critical, 1.05 * critical], []
    for nz in (8, 16):
        rates = growth(slice_of(plates, wavenumber, nz), rayleigh, wavenumber, 0.15, 0.05)
        found.append(onset(rayleigh, rates))
    assert found[1] == pytest.approx(critical, rel=0.025)
    assert found[1] + (found[1] - found[0]) / 3 == pytest.approx(critical, rel=0.005)


def test_steady_rolls_carry_the_heat_that_a_spectral_computation_says(unchecked: None) -> None:
    """Nu = 2.6525 at Ra = 10⁴, Pr = 0.71, one wave of 3.117; and every way to measure Nu agrees."""
    found = []
    for nz in (8, 12):
        grid = slice_of(("no_slip", "no_slip"), 3.117, nz)
        flow = layer(grid, [1e4], 0.71)
        kappa = float(free_fall(1e4, 0.71)["diffusivity"])
        fields = flow.advance(rolls(grid, 1, 0.2, 0.2), 0.0, 60.0)
        temperature = fields["temperature"][0]
        by_bottom = float((0.5 - temperature[..., 0]).mean()) * 2 * nz
        by_top = float((temperature[..., -1] + 0.5).mean()) * 2 * nz
        w = operators.velocity(fields["velocity"], grid)[0, 2]
        lifted = float((0.5 * (temperature + temperature.roll(1, -1)) * w).mean())
        # heat carried; and the work of buoyancy, all of which viscosity takes
        u = operators.velocity(fields["velocity"], grid)
        still = {"velocity": fields["velocity"], "temperature": torch.zeros_like(fields["temperature"])}
        dissipated = -float((u * operators.velocity(flow.rates(still, {})["velocity"], grid)).sum(1).mean())
        assert by_top == pytest.approx(by_bottom, rel=1e-5)
        assert 1 + lifted / kappa == pytest.approx(by_bottom, rel=1e-5)
        assert dissipated == pytest.approx((by_bottom - 1) * kappa, rel=1e-5)
        found.append(by_bottom)
    assert found[1] == pytest.approx(2.6525, rel=0.05)
    assert found[1] + (found[1] - found[0]) / (1.5**2 - 1) == pytest.approx(2.6525, rel=0.005)


def test_energy_and_heat_budgets_of_any_convecting_state() -> None:
    """d⟨½u²⟩/dt = ⟨wT⟩ − viscous loss and d⟨T⟩/dt = κ (flux in below − flux out above), to rounding."""
    family = Convection()
    parameters, _, geometry = batch_of(family, 2)
    grid, flow = geometry.grid, family.solver(geometry, parameters, dtype=torch.float64)
    flux = project(random_flux(grid, 2), geometry)
    fields = {"velocity": flux, "temperature": torch.randn(2, *grid.shape, dtype=torch.float64)}
    still = fields | {"temperature": torch.zeros_like(fields["temperature"])}
    u, mean = operators.velocity(flux, grid), fields["temperature"].mean((1, 2))
    rates, without = (operators.velocity(flow.rates(f, {})["velocity"], grid) for f in (fields, still))
    gained = ((rates - without) * u).sum((1, 2, 3, 4))
    t = fields["temperature"]
    lifted = (0.5 * (t[..., 1:] + t[..., :-1]) * u[:, 2, ..., 1:]).sum((1, 2, 3))
    torch.testing.assert_close(gained, lifted, rtol=1e-11, atol=1e-10)
    kappa, dz = torch.from_numpy(parameters["diffusivity"]), grid.spacing[2]
    warmed = kappa * ((0.5 - mean[:, 0]) - (mean[:, -1] + 0.5)) * 2 / dz
    change = flow.rates(fields, {})["temperature"].mean((1, 2, 3))
    torch.testing.assert_close(change, warmed, rtol=1e-11, atol=1e-13)


def test_upside_down_and_with_cold_for_warm_a_layer_is_the_same() -> None:
    """z → H − z, T → −T: the Boussinesq equations do not know up from down."""
    family = Convection()
    parameters, first, geometry = batch_of(family, 2)
    fields = {name: torch.stack([f[name] for f in first]) for name in first[0]}
    fields["temperature"] = fields["temperature"] + 0.1 * torch.randn_like(fields["temperature"])

    def turned(fields: Fields) -> Fields:
        u, v, w = fields["velocity"].flip(-1).unbind(1)
        return {"velocity": torch.stack([u, v, -w.roll(1, -1)], dim=1), "temperature": -fields["temperature"].flip(-1)}

    solver = family.solver(geometry, parameters, dtype=torch.float64)
    one, other = turned(solver.step(fields, 0.0, 0.02)), solver.step(turned(fields), 0.0, 0.02)
    for name in fields:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-13)


def test_the_stable_step_sees_buoyancy_where_nothing_else_is_fast() -> None:
    """A sluggish layer at rest on a coarse grid: steps stay short against the growth of what falls freely."""
    family = Convection(rayleigh=(1e12, 1e12))
    parameters, first, geometry = batch_of(family, 1)
    solver = family.solver(geometry, parameters, dtype=torch.float64)
    rest = {name: value[None] for name, value in first[0].items()}
    rest["velocity"] = torch.zeros_like(rest["velocity"])
    assert 0.5 < solver.stable_step(rest) <= 1.0
