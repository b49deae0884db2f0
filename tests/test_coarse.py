"""Conservative latents: a coarse flux that balances to the bit, and fine fluxes whose restriction it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BOUNDARIES, OPEN, box, points, random_flux, random_geometry
from torch import Tensor
from torch.autograd import gradcheck

from latentphys import operators
from latentphys.autoencoders.coarse import (
    admit,
    coarse_flux,
    coarse_geometry,
    exact_coarse_flux,
    restrict_velocity,
    split,
    with_coarse,
)
from latentphys.autoencoders.normaliser import FieldScale
from latentphys.exact import conserve
from latentphys.fields import FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.hodge import energy_product
from latentphys.inflow import through_sides
from latentphys.projection import project
from latentphys.resolution import coarsen, restrict

BOXES: dict[str, Geometry] = {name: Geometry(box(name, (8, 16, 8))) for name in BOUNDARIES | OPEN} | {
    "thin": Geometry(Grid((16, 1, 8), (0.7, 1.3, 0.4), (("periodic",) * 2, ("periodic",) * 2, ("no_slip",) * 2))),
    "inlet": Geometry(box("duct", (8, 8, 8)), inflow={"x-": torch.rand(8, 8, dtype=torch.float64)}),
    "against": Geometry(box("through", (8, 8, 8)), inflow={"x+": 1.5, "z-": torch.rand(8, 8, dtype=torch.float64)}),
}


def largest(x: Tensor) -> float:
    return float(x.abs().amax())


def off(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).norm() / expected.norm())


def unit_scale(grid: Grid, size: float = 1.0) -> FieldScale:
    return FieldScale(grid, torch.zeros(3, 1, 1, 1, dtype=torch.float64), size)


def spheres(n: int, diameter: float, count: int, seed: int = 0) -> Geometry:
    """Spheres at random places of a periodic box of side 1."""
    grid = Grid((n, n, n), (1 / n,) * 3)
    centres = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    solid = torch.zeros(grid.shape, dtype=torch.bool)
    for centre in centres:
        apart = [(x - c).abs() for x, c in zip(points(grid, (0.5,) * 3), centre, strict=True)]
        x, y, z = (torch.minimum(d, 1 - d) ** 2 for d in apart)
        solid |= x + y + z < (diameter / 2) ** 2
    return Geometry(grid, solid)


def plate(thickness: int = 1) -> Geometry:
    """A box of 8³ with a solid plate in the last plane of the first coarse cells of four, and a hole in it."""
    solid = torch.zeros(8, 8, 8, dtype=torch.bool)
    solid[4 - thickness : 4] = True
    solid[:, 5:7, 5:7] = False
    return Geometry(Grid((8, 8, 8), (0.7, 1.3, 0.4)), solid)


def grains() -> Geometry:
    """A duct with an inflow and a few grains, of which one covers the inlet of a coarse cell, and one its outlet."""
    solid = torch.zeros(8, 8, 8, dtype=torch.bool)
    solid[0, :4, :4] = solid[7, 4:, 4:] = solid[3:6, 2:5, 5:7] = True
    inflow = torch.where(solid[0], 0.0, 0.5 + torch.rand(8, 8, dtype=torch.float64))
    return Geometry(box("duct", (8, 8, 8)), solid, {"x-": inflow})


# the latent grid


def test_a_coarse_face_is_closed_where_all_its_fine_faces_are() -> None:
    geometry = plate()
    coarse = coarse_geometry(geometry, 4)
    assert coarse is coarse_geometry(geometry, 4) and bool(coarse.fluid.all())
    closed = (~coarse.open_faces).nonzero().tolist()
    assert closed == [[0, 1, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0]]
    assert coarse.grid == coarsen(geometry, 4).grid
    # any coarse flux: without the closed faces the projection lets a third of it through the plate
    flux = random_flux(coarse.grid)
    assert largest(project(flux, coarse)[0, 1, 0]) == 0.0 < largest(project(flux, coarsen(geometry, 4))[0, 1, 0])
    assert largest(operators.div(project(flux, coarse), coarse.grid)) < 1e-10


def test_where_nothing_closes_the_latent_grid_is_that_of_the_box() -> None:
    solid = torch.zeros(8, 8, 8, dtype=torch.bool)
    solid[3, 3, 3] = True
    assert coarse_geometry(Geometry(box("channel", (8, 8, 8)), solid), 4).is_empty
    full = solid.clone()
    full[:4, :4, 4:] = True
    coarse = coarse_geometry(Geometry(box("channel", (8, 8, 8)), full), 4)
    assert (~coarse.fluid).nonzero().tolist() == [[0, 0, 1]]
    thin = coarse_geometry(BOXES["thin"], 4).grid
    assert thin.shape == (4, 1, 2) and thin.spacing == pytest.approx((2.8, 1.3, 1.6))


def test_a_batch_of_geometries_is_each_by_itself() -> None:
    geometries = [plate(), spheres(8, 0.4, 3), plate(2)]
    stacked = Geometry.stack([Geometry(geometries[0].grid, g.solid) for g in geometries])
    scale, fine, channels = unit_scale(stacked.grid), random_flux(stacked.grid, 3), torch.randn(3, 3, 2, 2, 2).double()
    admitted = admit(channels, scale, stacked, 4, tol=1e-2)
    decoded = with_coarse(fine, coarse_flux(channels, scale, stacked, 4), stacked, 4, tol=1e-2)
    exact = exact_coarse_flux(channels, scale, stacked, 4)
    for i in range(3):
        alone, one, here = stacked[i], channels[i : i + 1], slice(i, i + 1)
        torch.testing.assert_close(admitted[here], admit(one, scale, alone, 4, 1e-2), rtol=0, atol=1e-10)
        coarse = coarse_flux(one, scale, alone, 4)
        torch.testing.assert_close(decoded[here], with_coarse(fine[here], coarse, alone, 4, 1e-2), rtol=0, atol=1e-9)
        torch.testing.assert_close(exact[here], exact_coarse_flux(one, scale, alone, 4), rtol=0, atol=1e-10)


# channels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_are_coarse_velocities_in_units_of_the_fluctuations(dtype: torch.dtype) -> None:
    """In micrometre pores too, whose fluxes are of 1e-18 m³/s."""
    h = 1e-6
    grid, size = Grid((8, 8, 16), (h, 2 * h, 3 * h)), 1e-4
    geometry, scale = Geometry(grid), FieldScale(grid, torch.full((3, 1, 1, 1), 7.0), size)
    u = torch.tensor([1.0, -2.0, 0.5], dtype=dtype).reshape(1, 3, 1, 1, 1) * size
    flux = operators.flux_of(u.expand(1, 3, *grid.shape), grid)
    channels = restrict_velocity(flux, scale, geometry, 4)
    assert channels.dtype == dtype and channels.shape == (1, 3, 2, 2, 4)
    torch.testing.assert_close(channels, (u / size).expand_as(channels))
    torch.testing.assert_close(coarse_flux(channels, scale, geometry, 4), restrict(flux, grid, 4), atol=0, rtol=1e-6)
    admitted = admit(channels + torch.randn_like(channels), scale, geometry, 4)
    assert admitted.dtype == dtype and bool(torch.isfinite(admitted).all())
    net = operators.div(operators.flux_of(admitted, grid) / h**2, coarse_geometry(geometry, 4).grid)
    assert largest(net) < 1e-4 if dtype == torch.float32 else largest(net) < 1e-12


def test_channels_in_half_precision_are_admitted_in_single() -> None:
    geometry = BOXES["channel"]
    channels, scale = torch.randn(1, 3, 2, 4, 2, dtype=torch.bfloat16), unit_scale(geometry.grid)
    with torch.autocast("cpu", torch.bfloat16):
        admitted = admit(channels, scale, geometry, 4)
        decoded = with_coarse(torch.zeros(1, 3, 8, 16, 8), coarse_flux(channels, scale, geometry, 4), geometry, 4)
    assert admitted.dtype == decoded.dtype == torch.float32
    coarse = coarse_flux(admitted, scale, geometry, 4)
    assert largest(operators.div(coarse, coarse_geometry(geometry, 4).grid)) < 1e-5 * largest(coarse)
    assert off(restrict(decoded, geometry.grid, 4), coarse) < 1e-5


@pytest.mark.parametrize("name", ["channel", "bend", "thin", "inlet", "grains", "plate", "spheres"])
def test_admitted_channels_are_the_nearest_and_stay(name: str) -> None:
    geometry = (BOXES | {"grains": grains(), "plate": plate(), "spheres": spheres(16, 0.4, 12)})[name]
    scale, coarse = unit_scale(geometry.grid, 0.3), coarse_geometry(geometry, 4)
    channels = torch.randn(2, 3, *coarse.grid.shape, dtype=torch.float64)
    admitted = admit(channels, scale, geometry, 4)
    flux = coarse_flux(admitted, scale, geometry, 4)
    assert largest(operators.div(flux, coarse.grid)) < 1e-10
    assert torch.equal(coarse.mask(flux), flux)
    torch.testing.assert_close(admit(admitted, scale, geometry, 4), admitted, rtol=0, atol=1e-9)
    # what was taken off is orthogonal to the difference of any two admissible fluxes
    taken = coarse_flux(channels, scale, geometry, 4) - flux
    another = coarse_flux(admit(torch.randn_like(channels), scale, geometry, 4), scale, geometry, 4) - flux
    sizes = [energy_product(x, x, coarse).sqrt() for x in (taken, another)]
    assert largest(energy_product(taken, another, coarse) / sizes[0] / sizes[1]) < 1e-9
    # a solenoidal field's own channels are admissible
    own = restrict_velocity(project(random_flux(geometry.grid, 2), geometry), scale, geometry, 4)
    torch.testing.assert_close(admit(own, scale, geometry, 4), own, rtol=0, atol=1e-9)


@settings(max_examples=15)
@given(
    boundaries=st.sampled_from(sorted(BOUNDARIES | OPEN)),
    fraction=st.sampled_from([0.0, 0.3, 0.6, 0.8]),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 2**31),
)
def test_coarse_fluxes_of_any_latents_balance_to_the_bit(
    boundaries: str, fraction: float, exponent: int, seed: int
) -> None:
    torch.manual_seed(seed)
    grid = box(boundaries, (6, 8, 4))
    geometry = random_geometry(grid, 2, fraction=fraction) if fraction else Geometry(grid)
    channels = torch.randn(2, 3, 3, 4, 2) * 10.0**exponent
    flux, coarse = exact_coarse_flux(channels, unit_scale(grid, 0.1), geometry, 2), coarsen(geometry, 2)
    assert flux.dtype == torch.float64 and largest(flux) > 0
    assert largest(operators.div(flux, coarse.grid)) == 0.0
    assert torch.equal(coarse.mask(flux), flux)
    closed = ~coarse_geometry(geometry, 2).open_faces.expand(flux.shape)
    assert largest(torch.where(closed, flux, 0.0)) < 1e-11 * largest(flux)


# the fine flux


@pytest.mark.parametrize("name", sorted(BOXES))
@pytest.mark.parametrize("factor", [2, 4])
def test_in_empty_boxes_the_restriction_is_the_coarse_flux(name: str, factor: int) -> None:
    geometry = BOXES[name]
    grid, latent = geometry.grid, coarse_geometry(geometry, factor)
    coarse = project(random_flux(latent.grid, 2), latent)
    fine = random_flux(grid, 2)
    decoded = with_coarse(fine, coarse, geometry, factor)
    exact = conserve(flux=decoded, geometry=geometry)
    assert largest(operators.div(decoded, grid)) < 1e-10
    if name != "against":
        torch.testing.assert_close(restrict(decoded, grid, factor), coarse, rtol=0, atol=1e-12 * largest(coarse))
        torch.testing.assert_close(restrict(exact, grid, factor), coarse, rtol=0, atol=1e-12 * largest(coarse))
    assert largest(operators.div(exact, grid)) == 0.0
    # only the solenoidal part of the coarse flux counts, and only that of the fine one
    for f, c in ((fine, random_flux(latent.grid, 2)), (project(fine, geometry), coarse)):
        expected = with_coarse(project(f, geometry), project(c, latent), geometry, factor)
        torch.testing.assert_close(with_coarse(f, c, geometry, factor), expected, rtol=0, atol=1e-9)
    own = project(fine, geometry)
    torch.testing.assert_close(with_coarse(own, restrict(own, grid, factor), geometry, factor), own, rtol=0, atol=1e-9)


@pytest.mark.parametrize("factor", [8, 16])
def test_large_factors(factor: int) -> None:
    geometry = Geometry(box("channel", (32, 32, 32)))
    coarse = project(random_flux(coarse_geometry(geometry, factor).grid, 1), coarse_geometry(geometry, factor))
    exact = conserve(flux=with_coarse(random_flux(geometry.grid, 1), coarse, geometry, factor), geometry=geometry)
    assert largest(operators.div(exact, geometry.grid)) == 0.0
    torch.testing.assert_close(restrict(exact, geometry.grid, factor), coarse, rtol=0, atol=1e-11 * largest(coarse))


@pytest.mark.parametrize("name", ["inlet", "against", "grains"])
def test_a_prescribed_inflow_is_kept(name: str) -> None:
    geometry = (BOXES | {"grains": grains()})[name]
    coarse = random_flux(coarse_geometry(geometry, 4).grid, 1)
    decoded = with_coarse(random_flux(geometry.grid, 1), coarse, geometry, 4)
    assert largest(operators.div(decoded, geometry.grid)) < 1e-10
    torch.testing.assert_close(project(decoded, geometry), decoded, rtol=0, atol=1e-9)
    sides = through_sides(decoded, geometry)
    areas = dict(zip("xyz", geometry.grid.face_areas, strict=True))
    for side, velocity in geometry.inflow.items():
        inward = sides[side] * (1 if side[1] == "-" else -1) / areas[side[0]]
        torch.testing.assert_close(inward, torch.as_tensor(velocity).expand_as(inward).double(), rtol=0, atol=1e-12)


def test_a_uniform_through_flow_needs_no_detail() -> None:
    geometry = Geometry(box("periodic", (8, 8, 8)))
    latent = coarse_geometry(geometry, 4).grid
    u = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64).reshape(1, 3, 1, 1, 1)
    coarse = operators.flux_of(u.expand(1, 3, *latent.shape), latent)
    expected = operators.flux_of(u.expand(1, 3, *geometry.grid.shape), geometry.grid)
    decoded = with_coarse(torch.zeros_like(expected), coarse, geometry, 4)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-14)


def test_the_mean_profile_of_a_channel_comes_back() -> None:
    """From the decoder's fluctuations of zero about the profile, and the coarse flux of the profile."""
    geometry = BOXES["channel"]
    z = torch.linspace(0, 1, 8, dtype=torch.float64)
    profile = torch.zeros(1, 3, 8, 16, 8, dtype=torch.float64)
    profile[:, 0] = z * (2 - z)
    scale = FieldScale(geometry.grid, profile[0, :, :1, :1], 0.2)
    channels = restrict_velocity(profile, scale, geometry, 4)
    raw = scale.denormalise(torch.zeros_like(profile), geometry.grid)
    decoded = with_coarse(raw, coarse_flux(channels, scale, geometry, 4), geometry, 4)
    torch.testing.assert_close(decoded, profile, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("diameter", "count", "bound"), [(0.4, 12, 0.01), (0.3, 45, 0.03)])
def test_round_voxels_the_coarse_flux_is_kept_to_percents(diameter: float, count: int, bound: float) -> None:
    """Porosities of about 0.67 and 0.53; the coarse flux is that of another solenoidal flux in the same pores."""
    geometry = spheres(24, diameter, count)
    coarsely = torch.randn(1, 3, 6, 6, 6, dtype=torch.float64)
    for axis in (-3, -2, -1):
        coarsely = coarsely.repeat_interleave(4, axis)
    truth = project(coarsely, geometry)
    coarse, raw = restrict(truth, geometry.grid, 4), random_flux(geometry.grid, 1) * truth.std()

    def missed(flux: Tensor) -> float:
        return off(restrict(flux.double(), geometry.grid, 4), coarse)

    decoded = with_coarse(raw, coarse, geometry, 4, tol=1e-3)
    assert missed(decoded) < bound < 0.5 < missed(project(raw, geometry, 1e-3))
    assert float(operators.div(decoded, geometry.grid).norm()) < 1e-2 * float(decoded.norm())
    assert torch.equal(geometry.mask(decoded), decoded)
    # FP32 with a training tolerance costs nothing of it
    single = with_coarse(raw.float(), coarse.float(), geometry, 4, tol=1e-2)
    assert single.dtype == torch.float32 and missed(single) < bound
    # its own coarse flux changes nothing, and is not in the detail
    assert off(with_coarse(truth, coarse, geometry, 4, tol=1e-3), truth) < 1e-9
    detail = split(truth, geometry, 4, tol=1e-3).detail
    assert float(restrict(detail, geometry.grid, 4).norm()) < bound * float(coarse.norm())


def test_the_detail_has_no_coarse_flux_and_completes_it() -> None:
    geometry = BOXES["mixed"]
    flux = project(random_flux(geometry.grid, 1), geometry)
    parts = split(flux, geometry, 4)
    assert torch.equal(parts.coarse, restrict(flux, geometry.grid, 4))
    assert largest(restrict(parts.detail, geometry.grid, 4)) < 1e-12
    from_coarse = with_coarse(torch.zeros_like(flux), parts.coarse, geometry, 4)
    torch.testing.assert_close(from_coarse + parts.detail, flux, rtol=0, atol=1e-12)
    assert largest(from_coarse) > 0.1


# derivatives and errors


@pytest.mark.parametrize("name", ["channel", "thin", "inlet", "plate"])
def test_derivatives(name: str) -> None:
    grid = Grid((4, 1, 4) if name == "thin" else (4, 4, 4), (0.7, 1.3, 0.4), BOXES.get(name, plate()).grid.boundaries)
    inflow = {"x-": 0.7} if name == "inlet" else {}
    solid = torch.zeros(grid.shape, dtype=torch.bool)
    if name == "plate":
        solid[1, :3] = True
    geometry, scale = Geometry(grid, solid, inflow), unit_scale(grid, 0.3)
    fine = random_flux(grid, 1).requires_grad_()
    channels = torch.randn(1, 3, *coarse_geometry(geometry, 2).grid.shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda c: admit(c, scale, geometry, 2, 1e-13), channels, fast_mode=True)

    def decode(f: Tensor, c: Tensor) -> Tensor:
        return with_coarse(f, coarse_flux(c, scale, geometry, 2), geometry, 2, 1e-13)

    assert gradcheck(decode, (fine, channels), fast_mode=True)


def test_errors(unchecked: None) -> None:
    geometry = BOXES["channel"]
    scale, flux = unit_scale(geometry.grid), random_flux(geometry.grid, 1)
    coarse = restrict(flux, geometry.grid, 2)
    with pytest.raises(ValueError, match="power of two as factor, got 3"):
        with_coarse(flux, coarse, geometry, 3)
    with pytest.raises(ValueError, match="divides the grid"):
        restrict_velocity(flux, scale, geometry, 3)
    with pytest.raises(ValueError, match="at least 2 cells along each axis"):
        coarse_geometry(geometry, 8)  # between walls
    with pytest.raises(ValueError, match=r"at least 2 latent cells .* got \(1, 2, 2\) for \(4, 8, 8\) cells"):
        coarse_geometry(Geometry(box("channel", (4, 8, 8))), 4)
    for refused in (lambda c: coarse_flux(c, scale, geometry, 2), lambda c: admit(c, scale, geometry, 2)):
        with pytest.raises(ValueError, match=r"shape \(…, 3, nx, ny, nz\) = \(…, 3, 4, 8, 4\)"):
            refused(torch.cat([coarse, coarse], dim=1))
    for shapes in ((coarse, coarse), (flux, flux)):
        for box_or_pores in (geometry, Geometry(geometry.grid, torch.rand(geometry.grid.shape) < 0.2)):
            with pytest.raises(ValueError, match="Expected a field of shape"):
                with_coarse(*shapes, box_or_pores, 2)
    pressure = FieldScale(geometry.grid, torch.zeros(1, 1, 1, 1), 1.0, FieldSpec("pressure", "scalar", "Pa"))
    with pytest.raises(ValueError, match="solenoidal flux for conservative latents, got 'pressure', a scalar"):
        restrict_velocity(flux, pressure, geometry, 2)
    with pytest.raises(ValueError, match="boundaries this model knows"):
        admit(coarse, unit_scale(box("closed", (8, 16, 8))), geometry, 2)
