"""Losses are what they say of single modes, count each field in its own units, and have a gradient everywhere."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from reference import box, face_points, order, points, poiseuille, random_flux, random_geometry, two_pi_box
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Normal, kl_divergence

from latentphys import operators
from latentphys.autoencoders.bottleneck import Bottleneck, Reconstruction
from latentphys.autoencoders.losses import (
    CellVelocityLoss,
    FieldLoss,
    FieldsLoss,
    GradientLoss,
    LatentKL,
    LatentLoss,
    WeightedSum,
)
from latentphys.autoencoders.normaliser import FamilyScale, FieldScale
from latentphys.autoencoders.spectral_loss import SpectrumLoss, _energy
from latentphys.autoencoders.wall_loss import WallShearLoss
from latentphys.configuration import compose
from latentphys.families.navier_stokes import NavierStokes
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.training.models import build

MAGNETIC = FieldSpec("magnetic", "flux", "m3/s", "solenoidal")
TEMPERATURE = FieldSpec("temperature", "scalar", "K")
MOMENTUM = FieldSpec("momentum", "vector", "kg/m2/s")
LOSSES: dict[str, FieldsLoss] = {
    "field": FieldLoss(),
    "cell": CellVelocityLoss(),
    "gradient": GradientLoss(),
    "spectrum": SpectrumLoss(),
    "wall": WallShearLoss(),
}
SHAPE = (6, 4, 8)


def family(grid: Grid, *specs: FieldSpec, size: float = 2.0, profile: float = 0.0) -> FamilyScale:
    """Fields of one size about one mean."""
    means = {spec: torch.full((1 if spec.kind == "scalar" else 3, 1, 1, 1), profile).double() for spec in specs}
    return FamilyScale(*(FieldScale(grid, mean, size, spec) for spec, mean in means.items()))


def random_packed(scale: FamilyScale, *batch: int) -> Tensor:
    return torch.randn(*batch, scale.num_components, *scale.grid.shape).double()


def loss(name: str, prediction: Tensor, target: Tensor, geometry: Geometry, scale: FamilyScale) -> float:
    return LOSSES[name](prediction, target, geometry, scale).item()


def test_the_error_of_values_is_one_for_the_mean_of_the_family() -> None:
    grid = box("channel", SHAPE)
    where, mean = Geometry(grid), torch.linspace(1, 9, SHAPE[2]).double().expand(3, 1, 1, -1)
    flux = where.mask(random_flux(grid, 3)) + mean
    velocities = operators.velocity(flux - mean, grid)[where.open_faces.expand_as(flux)]
    scale = FamilyScale(FieldScale(grid, mean, float(velocities.square().mean().sqrt())))
    one = [loss("field", mean.expand_as(f)[None], f[None], where, scale) ** 2 for f in flux]
    assert np.mean(one) == pytest.approx(1.0)


@pytest.mark.parametrize("spec", [VELOCITY, TEMPERATURE, MOMENTUM], ids=lambda spec: spec.kind)
def test_values_count_in_fluid_and_on_open_faces_only(spec: FieldSpec) -> None:
    grid = box("channel", SHAPE)
    where, scale = random_geometry(grid, 2), family(grid, spec)
    target, off = random_packed(scale, 2), torch.full((2, scale.num_components, *SHAPE), 0.5).double()
    if spec.kind == "flux":
        off = operators.flux_of(off, grid)
    there = where.open_faces if spec.kind == "flux" else where.fluid.unsqueeze(1)
    prediction = torch.where(there, target + off, torch.nan)
    assert loss("field", prediction, target, where, scale) == pytest.approx(0.5 / 2)
    elsewhere = loss("spectrum", torch.where(there, prediction, 7.0), target, where, scale)
    assert loss("spectrum", prediction, target, where, scale) == elsewhere > 0


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", ["flux", "scalar", "vector"])
def test_the_gradient_of_a_mode_is_its_wavenumber(kind: str, k: int, axis: int) -> None:
    """With k̃ = 2 sin(k h/2)/h on the grid: |k̃| times the finest spacing, of what it is worth in the error of values."""
    shape = [4, 4, 4]
    shape[axis] = 8
    grid, spec = two_pi_box(shape), {"flux": VELOCITY, "scalar": TEMPERATURE, "vector": MOMENTUM}[kind]
    scale, where, a, h = family(grid, spec), Geometry(grid), 0.8, grid.spacing[axis]
    mode = torch.zeros(1, scale.num_components, *shape).double()
    across = (axis + 1) % 3 if kind != "scalar" else 0
    mode[:, across] = a * (k * points(grid, (0.5, 0.5, 0.5))[axis]).sin()
    field = operators.flux_of(mode, grid) if kind == "flux" else mode
    value, zero = a / 2 / math.sqrt(2 * scale.num_components), torch.zeros_like(field)
    assert loss("field", field, zero, where, scale) == pytest.approx(value)
    assert loss("gradient", field, zero, where, scale) == pytest.approx(value * 2 * math.sin(k * h / 2))


def test_gradients_of_scalars_are_those_between_fluid_cells() -> None:
    """A slope of one is a slope of one beside solids and walls of any temperature, and at an open side."""
    for boundaries in ("closed", "bend", "through"):
        grid = box(boundaries, SHAPE)
        where, scale = random_geometry(grid, fraction=0.3), family(grid, TEMPERATURE)
        x, y, z = points(grid, (7.5, 0.5, 0.5))
        slope = torch.where(where.fluid, x + y + z, -40.0)[None, None]
        expected = math.sqrt(3) * 0.4 / 2  # one along every axis, times h / size
        assert loss("gradient", slope, torch.zeros_like(slope), where, scale) == pytest.approx(expected)


def test_velocities_at_cell_centres_are_means_of_faces() -> None:
    """A mode along its own component is smaller by cos(k h/2); on a solid's side of a cell nothing flows."""
    grid = two_pi_box((8, 4, 4))
    scale, u = family(grid, VELOCITY), torch.zeros(1, 3, 8, 4, 4).double()
    for k in (1, 2, 4):
        u[:, 0] = (k * face_points(grid, 0)[0]).cos()
        flux = operators.flux_of(u, grid)
        mean_square = 1.0 if k == 4 else 0.5
        expected = math.sqrt(mean_square / 3) / 2 * abs(math.cos(k * math.pi / 8))
        assert loss("cell", flux, 0 * flux, Geometry(grid), scale) == pytest.approx(expected, abs=1e-12)
    solid = torch.zeros(8, 4, 4, dtype=torch.bool)
    solid[3] = True
    where = Geometry(grid, solid)
    uniform = where.mask(operators.flux_of(torch.ones(1, 3, 8, 4, 4).double(), grid))
    uniform[:, 1:] = 0
    expected = math.sqrt((5 + 2 * 0.25) / (7 * 3)) / 2
    assert loss("cell", uniform, 0 * uniform, where, scale) == pytest.approx(expected)


@pytest.mark.parametrize("boundaries", ["periodic", "closed", "bend"])
@pytest.mark.parametrize("at_rest", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_zero_at_zero_error(name: str, at_rest: bool, boundaries: str) -> None:
    grid = box(boundaries, SHAPE)
    scale, where = family(grid, VELOCITY, TEMPERATURE, MOMENTUM), random_geometry(grid, 2)
    target = random_packed(scale, 2).float() * (not at_rest)
    prediction = target.clone().requires_grad_()
    value = LOSSES[name](prediction, target, where, scale)
    value.backward()
    assert value == 0 and value.dtype == torch.float32
    assert prediction.grad is not None and bool((prediction.grad == 0).all())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_depend_on_units(name: str) -> None:
    """Metres and kelvins, or millimetres and millikelvins."""
    grid = box("channel", SHAPE)
    where, scale = random_geometry(grid, 2), family(grid, VELOCITY, TEMPERATURE, profile=0.3)
    prediction, target = random_packed(scale, 2), random_packed(scale, 2)
    fine = Grid(SHAPE, tuple(1e3 * h for h in grid.spacing), grid.boundaries)  # type: ignore[arg-type]
    factors = torch.tensor([1e9, 1e9, 1e9, 1e3]).double().reshape(4, 1, 1, 1)
    parts = [
        FieldScale(fine, f.profile * (1e9 if f.spec.kind == "flux" else 1e3), 1e3 * f.size, f.spec)
        for f in scale.fields.values()
    ]
    there = Geometry(fine, where.solid)
    expected = loss(name, prediction, target, where, scale)
    assert expected > 0
    assert loss(name, prediction * factors, target * factors, there, FamilyScale(*parts)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "specs", "counted"),
    [
        ("field", (VELOCITY, MAGNETIC), (VELOCITY, MAGNETIC)),
        ("field", (VELOCITY, TEMPERATURE, MOMENTUM), (VELOCITY, TEMPERATURE, MOMENTUM)),
        ("gradient", (VELOCITY, TEMPERATURE, MOMENTUM), (VELOCITY, TEMPERATURE, MOMENTUM)),
        ("spectrum", (TEMPERATURE, VELOCITY, MOMENTUM), (VELOCITY, TEMPERATURE, MOMENTUM)),
        ("cell", (VELOCITY, TEMPERATURE, MAGNETIC), (VELOCITY, MAGNETIC)),
        ("cell", (TEMPERATURE, MOMENTUM), ()),
        ("wall", (MAGNETIC, VELOCITY, TEMPERATURE), (VELOCITY,)),
        ("wall", (MAGNETIC, TEMPERATURE), ()),
    ],
)
def test_a_family_counts_the_mean_over_its_fields(
    name: str, specs: tuple[FieldSpec, ...], counted: tuple[FieldSpec, ...]
) -> None:
    grid = box("channel", SHAPE)
    scale = FamilyScale(*(family(grid, spec, size=1.0 + i)[spec.name] for i, spec in enumerate(specs)))
    where, prediction, target = Geometry(grid), random_packed(scale, 2), random_packed(scale, 2)
    ours, theirs = scale.split(prediction), scale.split(target)
    alone = [loss(name, ours[s.name], theirs[s.name], where, FamilyScale(scale[s.name])) for s in counted]
    assert loss(name, prediction, target, where, scale) == pytest.approx(np.mean(alone) if alone else 0.0)
    assert min(alone, default=1.0) > 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_counts_the_mean_over_its_samples(name: str) -> None:
    grid = box("mixed", SHAPE)
    scale, where = family(grid, VELOCITY, TEMPERATURE), random_geometry(grid, 3)
    prediction, target = random_packed(scale, 3), random_packed(scale, 3)
    alone = [loss(name, prediction[i : i + 1], target[i : i + 1], where[i], scale) for i in range(3)]
    assert len({round(value, 6) for value in alone}) == 3
    assert loss(name, prediction, target, where, scale) == pytest.approx(np.mean(alone))


@pytest.mark.parametrize("name", LOSSES)
def test_the_thickness_of_a_flat_box_does_not_matter(name: str) -> None:
    values, u = [], torch.randn(2, 2, 4, 8, 1, 6).double()
    for thickness in (1e-3, 0.3, 50.0):
        grid = Grid((8, 1, 6), (0.2, thickness, 0.3), (("periodic",) * 2,) * 2 + (("no_slip", "free_slip"),))
        scale = family(grid, VELOCITY, TEMPERATURE)
        packed = [torch.cat([operators.flux_of(x[:, :3], grid), x[:, 3:]], 1) for x in u]
        values.append(loss(name, packed[0], packed[1], Geometry(grid), scale))
    assert values[0] > 0 and values[1:] == pytest.approx(values[:1] * 2)


@pytest.mark.parametrize(("boundaries", "k"), [(b, k) for b in ("periodic", "channel") for k in (1, 2, 3, 4, 7)])
def test_a_mode_of_half_the_amplitude_is_a_quarter_of_the_energy_in_its_band(boundaries: str, k: int) -> None:
    """k waves in 16 cells, in bands up to the Nyquist number 8: 1 | 2, 3 | 4…8, and from half a wave between walls."""
    grid = box(boundaries, (16, 16, 16), (0.5, 0.5, 0.5))
    wave = 2 * math.pi * k * points(grid, (0.5, 0.5, 0.5))[2] / grid.lengths[2]
    target = wave.cos().expand(1, 1, 16, 16, 16) + 5.0
    scale, where = family(grid, TEMPERATURE, profile=5.0), Geometry(grid)
    lowest = 0.5 if boundaries == "channel" else 1.0
    band = min(2, int(3 * math.log(k / lowest) / math.log(8 / lowest) + 1e-9))
    energy = 0.5 / 2**2
    for i in range(3):
        only = SpectrumLoss([float(j == i) for j in range(3)], floor=1e-4)
        value = only((target - 5) / 2 + 5, target, where, scale).item()
        assert value == pytest.approx(math.log((energy + 1e-4) / (energy / 4 + 1e-4)) if i == band else 0.0, abs=1e-9)
    assert SpectrumLoss(floor=1e-9)((target - 5) / 2 + 5, target, where, scale).item() == pytest.approx(math.log(4) / 3)
    weights = [0.0, 0.0, 0.0]
    weights[band] = 5.0
    weights[(band + 1) % 3] = 3.0
    weighted = SpectrumLoss(weights, floor=1e-9)((target - 5) / 2 + 5, target, where, scale).item()
    assert weighted == pytest.approx(math.log(4) * 5 / 8)


@pytest.mark.parametrize("boundaries", ["periodic", "channel", "closed", "first", "duct"])
@pytest.mark.parametrize("shape", [(6, 4, 8), (5, 4, 7), (3, 2, 2)])
def test_modes_share_the_energy_among_them(boundaries: str, shape: tuple[int, int, int]) -> None:
    grid = box(boundaries, shape)
    flux = random_flux(grid, 2)
    u = operators.velocity(flux, grid)
    torch.testing.assert_close(0.5 * _energy(u, grid).sum((-3, -2, -1)), operators.kinetic_energy(flux, grid))


def test_the_spectrum_knows_neither_phases_nor_the_mean_but_every_other_mode() -> None:
    grid = box("channel", SHAPE)
    scale, where = family(grid, VELOCITY), Geometry(grid)
    flux = where.mask(random_flux(grid, 2))
    moved = flux.roll((1, 2), (-3, -2))
    assert loss("spectrum", moved, flux, where, scale) == pytest.approx(0.0, abs=1e-12)
    temperature, at_rest = family(grid, TEMPERATURE), torch.zeros(1, 1, *SHAPE).double()
    assert loss("spectrum", at_rest + 3, at_rest, where, temperature) == pytest.approx(0.0, abs=1e-12)
    modes = np.ndindex(6, 4, 8)
    next(modes)
    for mode in modes:  # cosines of whole or half waves: every mode of the box but its mean
        phases = [(1 if axis == 2 else 2) * math.pi * mode[axis] / SHAPE[axis] for axis in range(3)]
        cells = [
            phase * (torch.arange(n).double() + (0.5 if axis == 2 else 0.1))
            for axis, (phase, n) in enumerate(zip(phases, SHAPE, strict=True))
        ]
        wave = (cells[0][:, None, None].cos() * cells[1][:, None].cos() * cells[2].cos()).expand(1, 1, *SHAPE)
        assert loss("spectrum", wave, at_rest, where, temperature) > 1


def test_the_spectrum_has_its_gradient_between_walls_and_beside_solids() -> None:
    grid = box("channel", (3, 2, 4))
    scale, where = family(grid, TEMPERATURE), random_geometry(grid, fraction=0.3)
    target, prediction = random_packed(scale, 2), random_packed(scale, 2).requires_grad_()
    spectrum = SpectrumLoss((1.0, 2.0), floor=1e-2)
    assert torch.autograd.gradcheck(lambda x: spectrum(x, target, where, scale), prediction)
    flat = torch.zeros_like(target).requires_grad_()
    spectrum(flat, target, where, scale).backward()
    assert flat.grad is not None and bool(flat.grad.isfinite().all())


def test_a_band_without_modes_does_not_count() -> None:
    """Four cells have wave numbers 1 and 2, the first of the lowest band and the last of the highest."""
    grid = two_pi_box((4, 1, 1))
    wave = points(grid, (0.5, 0.5, 0.5))[0].cos().expand(1, 1, 4, 1, 1)
    value = SpectrumLoss(floor=1e-9)(wave / 2, wave, Geometry(grid), family(grid, TEMPERATURE))
    assert value.item() == pytest.approx(math.log(4) / 2)


def test_a_box_without_modes_has_no_spectrum() -> None:
    grid = Grid((1, 1, 1), (1.0, 1.0, 1.0))
    scale, prediction = family(grid, TEMPERATURE), torch.ones(1, 1, 1, 1, 1, requires_grad=True)
    value = LOSSES["spectrum"](prediction, torch.zeros_like(prediction), Geometry(grid), scale)
    value.backward()
    assert value == 0 and prediction.grad is not None and prediction.grad.isfinite().all()


@pytest.mark.parametrize("normal", range(3))
@pytest.mark.parametrize("is_high", [False, True])
def test_the_wall_shear_of_couette_flow_is_its_slope(normal: int, is_high: bool) -> None:
    """u = S z over a wall at rest; the other side slips."""
    shape, slope = (4, 6, 5), 3.0
    sides = [("periodic", "periodic")] * 3
    sides[normal] = ("free_slip", "no_slip") if is_high else ("no_slip", "free_slip")
    grid = Grid(shape, (0.2, 0.7, 0.4), tuple(sides))  # type: ignore[arg-type]
    z, u = points(grid, (0.5, 0.5, 0.5))[normal], torch.zeros(2, 3, *shape).double()
    u[:, (normal + 2) % 3] = slope * (grid.lengths[normal] - z if is_high else z)
    flux, scale = operators.flux_of(u, grid), family(grid, VELOCITY)
    # two components lie in the wall, of which one is sheared
    expected = slope / math.sqrt(2) * 0.2 / 2
    assert loss("wall", flux, 0 * flux, Geometry(grid), scale) == pytest.approx(expected)
    away = flux.index_fill(normal + 2, torch.tensor([0 if is_high else shape[normal] - 1]), 9.0)
    assert loss("wall", away, 0 * flux, Geometry(grid), scale) == pytest.approx(expected)


def test_the_wall_shear_of_poiseuille_flow_converges_to_force_times_depth() -> None:
    errors = []
    for n in (8, 16, 32):
        grid = Grid((2, 2, n), (1.0, 1.0, 1 / n), (("periodic",) * 2,) * 2 + (("no_slip", "free_slip"),))
        u = torch.zeros(1, 3, 2, 2, n).double()
        u[:, 0] = poiseuille(points(grid, (0.5, 0.5, 0.5))[2], 1.0, 0.3, 0.1)
        flux = operators.flux_of(u, grid)
        shear = loss("wall", flux, 0 * flux, Geometry(grid), family(grid, VELOCITY)) * 2 * n * math.sqrt(2)
        errors.append(abs(shear - 3.0))
    assert order(errors) == pytest.approx([1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("boundaries", ["periodic", "mixed", "closed", "bend", "through"])
def test_surfaces_are_half_a_cell_away_and_at_a_step_a_whole_one(boundaries: str) -> None:
    grid = box(boundaries, (4, 3, 5))
    where, scale = random_geometry(grid, fraction=0.35), family(grid, VELOCITY)
    flux = where.mask(random_flux(grid, 1))
    u, shears = operators.velocity(flux, grid)[0], []
    for a, (cell, b, side) in product(range(3), product(np.ndindex(4, 3, 5), range(3), (-1, 1))):
        if a == b or not where.open_faces[(a, *cell)]:
            continue
        closed = 0
        for back in (0, 1):
            beside = list(cell)
            beside[a] -= back
            if beside[a] < 0 and not grid.periodic[a]:
                beside[a] = 0  # what lies beyond an open side is as it is before it
            beside[b] += side
            if not 0 <= beside[b] < grid.shape[b] and not grid.periodic[b]:
                closed += grid.boundaries[b][side > 0] == "no_slip"
            else:
                closed += not where.fluid[tuple(i % n for i, n in zip(beside, grid.shape, strict=True))]
        if closed:
            shears.append(closed * float(u[(a, *cell)]) / grid.spacing[b])
    expected = np.sqrt(np.mean(np.square(shears))) * 0.4 / 2
    assert len(shears) > 10
    assert loss("wall", flux, 0 * flux, where, scale) == pytest.approx(expected)


def test_wall_shear_is_that_of_the_solvers_friction() -> None:
    """Friction takes ν (shear / h) from the momentum of a cell beside a surface."""
    grid = box("mixed", SHAPE)
    flux, scale, where = random_flux(grid, 1), family(grid, VELOCITY), Geometry(grid)
    flux = where.mask(flux)
    flux[:, 1:] = 0  # along x, where only walls normal to z are no-slip
    friction = NavierStokes(where, 1.0, dtype=torch.float64).drag * operators.velocity(flux, grid)
    shear = (friction * grid.spacing[2])[:, 0][..., [0, -1]]
    assert bool((shear[:, 1:] != 0).all())
    # faces beside no-slip surfaces: along x, y and z; their surfaces
    counts = [5 * 4 * 2, 6 * 4 * 2 + 4 * 8, 6 * 4 * 0 + 4 * 7]
    expected = math.sqrt(float(shear.square().sum()) / sum(counts)) * grid.finest_spacing / 2
    assert loss("wall", flux, 0 * flux, where, scale) == pytest.approx(expected)


def test_without_surfaces_there_is_no_wall_shear() -> None:
    grid = Grid(SHAPE, (0.1, 0.2, 0.3), (("periodic",) * 2, ("free_slip",) * 2, ("inflow", "outflow")))
    flux = random_flux(grid, 1)
    assert loss("wall", flux, 0 * flux, Geometry(grid), family(grid, VELOCITY)) == 0


def test_losses_run_in_fp32_under_autocast_and_without_memory() -> None:
    grid = box("channel", SHAPE)
    scale, where = family(grid, VELOCITY, TEMPERATURE), random_geometry(grid, 2)
    prediction, target = random_packed(scale, 2).float(), random_packed(scale, 2).float()
    plain = {name: one(prediction, target, where, scale) for name, one in LOSSES.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert {name: one(prediction, target, where, scale) for name, one in LOSSES.items()} == plain
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = torch.empty(prediction.shape, requires_grad=True)
        SpectrumLoss((1.0, 1.0))(shape, torch.empty(prediction.shape), where, scale).backward()
    assert SpectrumLoss((1.0, 1.0))(prediction, target, where, scale) > 0


def test_divergence_of_latents_from_normal_ones() -> None:
    z, noise = torch.randn(4, 3, 5, 4, 2).double(), torch.tensor([0.02, 0.7, 1.5]).double().reshape(3, 1, 1, 1)
    expected = kl_divergence(Normal(z, noise.expand_as(z)), Normal(torch.zeros_like(z), 1.0)).mean()
    torch.testing.assert_close(LatentKL()(Reconstruction(z, z, noise)), expected)
    normal = LatentKL()(Reconstruction(z, torch.zeros_like(z), torch.ones_like(noise)))
    assert normal == 0
    with pytest.raises(ValueError, match="latents with noise, got none; give the bottleneck noise or leave this loss"):
        LatentKL()(Reconstruction(z, z))


def test_divergence_holds_channels_with_relative_noise_near_unit_size() -> None:
    bottleneck, direction = Bottleneck(noise=0.5), torch.randn(4, 3, 4, 4, 4).double()
    direction /= direction.square().mean((0, 2, 3, 4), keepdim=True).sqrt()
    size = torch.full((3, 1, 1, 1), 1 / math.sqrt(1 + 0.5**2), dtype=torch.float64, requires_grad=True)
    latent = size * direction
    LatentKL()(Reconstruction(latent, latent, bottleneck.deviation(latent))).backward()
    assert size.grad is not None and size.grad.abs().max() < 1e-12
    dead = torch.zeros(1, 3, 2, 2, 2, requires_grad=True)
    value = LatentKL()(Reconstruction(dead, dead, bottleneck.deviation(dead)))
    value.backward()
    assert value.isfinite() and dead.grad is not None and bool(dead.grad.isfinite().all())


def test_weighted_sum_adds_and_names_its_parts() -> None:
    grid = box("channel", SHAPE)
    where, scale, noise = Geometry(grid), family(grid, VELOCITY), torch.full((3, 1, 1, 1), 0.1)
    a, b = random_flux(grid, 2).requires_grad_(), random_flux(grid, 2)
    latent = torch.randn(2, 3, 2, 2, 2, requires_grad=True)
    losses: dict[str, FieldsLoss | LatentLoss] = {"u": FieldLoss(), "w": GradientLoss(), "kl": LatentKL()}
    losses["never"] = _Never()
    both = WeightedSum(losses, {"u": 2.0, "w": 0.5, "kl": 0.25, "never": 0.0})
    total, parts = both(Reconstruction(a, latent, noise), b, where, scale)
    wanted = {"u": FieldLoss()(a, b, where, scale), "w": GradientLoss()(a, b, where, scale)}
    wanted["kl"] = LatentKL()(Reconstruction(a, latent, noise))
    assert parts == wanted and not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(total, 2 * wanted["u"] + 0.5 * wanted["w"] + 0.25 * wanted["kl"])
    total.backward()
    assert a.grad is not None and latent.grad is not None


class _Never(FieldsLoss):
    def of_field(self, *_: object) -> Tensor:
        raise AssertionError


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"v": 1.0}, r"a weight for each loss \['u'\], got weights for \['v'\]"),
        ({"u": -1.0}, r"finite weights ≥ 0 of the losses, one of them positive, got \{'u': -1.0\}"),
        ({"u": math.nan}, "finite weights ≥ 0 of the losses, one of them positive, got {'u': nan}"),
        ({"u": math.inf}, "finite weights ≥ 0 of the losses, one of them positive, got {'u': inf}"),
        ({"u": 0.0}, "finite weights ≥ 0 of the losses, one of them positive, got {'u': 0.0}"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedSum({"u": FieldLoss()}, weights)


@pytest.mark.parametrize(
    ("weights", "floor", "message"),
    [
        ((), 1e-6, r"finite weights ≥ 0 of the bands, one of them positive, got \[\]"),
        ((1.0, -1.0), 1e-6, r"finite weights ≥ 0 of the bands, one of them positive, got \[1.0, -1.0\]"),
        ((1.0, math.nan), 1e-6, "finite weights ≥ 0 of the bands, one of them positive"),
        ((0.0, 0.0), 1e-6, "finite weights ≥ 0 of the bands, one of them positive"),
        ((1.0,), 0.0, "a positive floor of the energies, got 0.0"),
        ((1.0,), math.nan, "a positive floor of the energies, got nan"),
    ],
)
def test_bands_that_cannot_be_are_refused(weights: tuple[float, ...], floor: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectrumLoss(weights, floor)


@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("choice", ["plain", "all"])
def test_losses_are_chosen_and_weighted_by_configuration(size: str, choice: str) -> None:
    chosen = ["stores=[a.zarr]", "run=run", f"autoencoder={size}", f"autoencoder/loss={choice}"]
    built = build(compose("train", [*chosen, "loss.weights.vorticity=0.2"])["loss"])
    assert isinstance(built, WeightedSum) and built.weights == {"vrmse": 1.0, "vorticity": 0.2}
    if choice == "all":
        on = build(compose("train", [*chosen, "loss.weights.spectrum=0.02", "loss.weights.latent_kl=1e-3"])["loss"])
        assert built.weights | {"vorticity": 0.1, "spectrum": 0.02, "latent_kl": 1e-3} == on.weights
        assert isinstance(on.losses["spectrum"], SpectrumLoss) and on.losses["spectrum"].floor == 1e-6
