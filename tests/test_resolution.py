"""Coarser and finer grids: sums that stay zero bit for bit, shares that stay zero to rounding, and second order."""

import pytest
import torch
from reference import BOUNDARIES, OPEN, box, face_points, order, random_flux, random_geometry, two_pi_box
from torch import Tensor
from torch.autograd import gradcheck
from waves import Wave

from latentphys import operators
from latentphys.conversions import interpolate_to_faces, spectral_flux, spectral_solenoidal
from latentphys.exact import conserve, quantise
from latentphys.grid import Geometry, Grid
from latentphys.resolution import Factor, coarsen, prolong, refine, restrict

FACTORS: list[tuple[Factor, tuple[int, int, int]]] = [
    (2, (4, 6, 8)),
    (3, (6, 9, 6)),
    (4, (8, 8, 12)),
    (8, (16, 16, 16)),
    ((1, 3, 2), (3, 6, 4)),
]


def largest(x: Tensor) -> float:
    return float(x.abs().amax())


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def pooled(x: Tensor, factor: tuple[int, int, int]) -> Tensor:
    """Sums over blocks of cells."""
    for axis, f in enumerate(factor):
        x = x.unflatten(axis - 3, (-1, f)).sum(axis - 3)
    return x


def repeated(x: Tensor, factor: int) -> Tensor:
    for axis in range(3):
        x = x.repeat_interleave(factor, axis - 3)
    return x


# coarser


@pytest.mark.parametrize(("factor", "shape"), FACTORS)
@pytest.mark.parametrize("boundaries", ["periodic", "mixed"])
def test_the_net_of_a_coarse_cell_is_the_sum_of_the_nets_in_it(
    factor: Factor, shape: tuple[int, int, int], boundaries: str
) -> None:
    geometry = Geometry(box(boundaries, shape))
    flux, coarse = geometry.mask(random_flux(geometry.grid, 2)), coarsen(geometry, factor).grid
    each = factor if isinstance(factor, tuple) else (factor, factor, factor)
    expected = pooled(operators.div(flux, geometry.grid), each)
    got = operators.div(restrict(flux, geometry.grid, factor), coarse)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    assert coarse.lengths == pytest.approx(geometry.grid.lengths)


@pytest.mark.parametrize(("factor", "shape"), FACTORS)
@pytest.mark.parametrize("solid", [False, True])
def test_a_net_of_zero_stays_zero_bit_for_bit(factor: Factor, shape: tuple[int, int, int], solid: bool) -> None:
    for boundaries in ("periodic", "mixed"):
        grid = box(boundaries, shape)
        geometry = random_geometry(grid, 2) if solid else Geometry(grid)
        # a mean flow far above the rest: sums over coarse faces that grow with their area
        mean = torch.tensor([1.9, -1.95, 1.99], dtype=torch.float64).reshape(3, 1, 1, 1)
        flux = conserve(geometry=geometry, flux=mean + 0.01 * random_flux(grid, 2))
        coarse = coarsen(geometry, factor)
        restricted = restrict(flux, grid, factor)
        assert largest(restricted) > 0.0
        assert largest(operators.div(restricted, coarse.grid)) == 0.0
        assert torch.equal(coarse.mask(restricted), restricted)


def test_where_the_sums_outgrow_53_bits_the_zero_is_lost() -> None:
    """256 fine faces near the power of two that sets the quantum: 2⁴⁶ · 256 > 2⁵³."""
    grid = Grid((32, 32, 32), (1.0, 1.0, 1.0))
    mean = torch.tensor([1.9, -1.95, 1.99], dtype=torch.float64).reshape(3, 1, 1, 1)
    flux = conserve(geometry=Geometry(grid), flux=mean + 0.001 * random_flux(grid))
    net = {f: largest(operators.div(restrict(flux, grid, f), coarsen(Geometry(grid), f).grid)) for f in (8, 16)}
    assert net[8] == 0.0 and 0.0 < net[16] < 1e-12


def test_quantised_single_precision_fluxes_add_up_in_double() -> None:
    grid = box("mixed", (4, 6, 8))
    flux = quantise(geometry=Geometry(grid), flux=random_flux(grid))
    assert flux.dtype == torch.float32
    assert largest(operators.div(restrict(flux.double(), grid, 2), coarsen(Geometry(grid), 2).grid)) == 0.0


def test_a_coarse_cell_is_solid_where_all_its_cells_are() -> None:
    solid = torch.zeros(2, 4, 4, 6, dtype=torch.bool)
    solid[0, :2, 2:, :3] = True
    solid[0, 3, 3, 5] = True
    coarse = coarsen(Geometry(box("channel", (4, 4, 6)), solid), (2, 2, 3))
    assert coarse.grid.shape == (2, 2, 2) and coarse.grid.boundaries == BOUNDARIES["channel"]
    assert coarse.grid.spacing == pytest.approx((1.4, 2.6, 1.2))
    assert (~coarse.fluid).nonzero().tolist() == [[0, 0, 1, 0]]
    fine = refine(coarse, (2, 2, 3))
    assert fine.grid == Grid((4, 4, 6), fine.grid.spacing, BOUNDARIES["channel"])
    assert torch.equal(~fine.fluid[0, :2, 2:, :3], solid[0, :2, 2:, :3]) and int((~fine.fluid).sum()) == 12


def turbulence(n: int) -> tuple[Tensor, Grid]:
    """A random solenoidal flow with energy at all scales, E(k) ∝ k^(−5/3) up to a third of the sampling rate."""
    grid = two_pi_box((n, n, n))
    k = torch.meshgrid(*[torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)] * 3, indexing="ij")
    square = k[0] ** 2 + k[1] ** 2 + k[2] ** 2
    amplitude = torch.where((square > 0) & (square < (n / 3) ** 2), square.clamp(min=1) ** (-11 / 12), 0.0)
    noise = torch.fft.fftn(torch.randn(3, n, n, n, dtype=torch.float64), dim=(1, 2, 3))
    u = spectral_solenoidal(torch.fft.ifftn(noise * amplitude, dim=(1, 2, 3)).real, grid)
    return conserve(flux=spectral_flux(u, grid), geometry=Geometry(grid)), grid


def test_only_the_sum_of_fluxes_keeps_the_zero() -> None:
    """Against taking every second face velocity, and against averages of cell-centred velocities."""
    flux, grid = turbulence(24)
    coarse = coarsen(Geometry(grid), 2)

    def relative(flux: Tensor) -> float:
        return float(operators.div(flux, coarse.grid).square().mean().sqrt() / flux.square().mean().sqrt())

    strided = operators.flux_of(operators.velocity(flux, grid)[:, ::2, ::2, ::2], coarse.grid)
    averaged = interpolate_to_faces(pooled(operators.cell_velocity(flux, grid), (2, 2, 2)) / 8, coarse)
    assert relative(strided) > 0.03 and relative(averaged) > 0.03
    assert relative(restrict(flux, grid, 2)) == 0.0


def test_the_same_flows_in_on_coarse_and_fine_sides() -> None:
    grid = box("duct", (4, 6, 4))
    solid = torch.zeros(2, *grid.shape, dtype=torch.bool)
    solid[0, 0, :3, 0] = True
    solid[1, :2, :2, :2] = True
    profile = torch.rand(6, 4, dtype=torch.float64)
    for inflow in (profile, 0.7):
        geometry = Geometry(grid, solid, {"x-": inflow})
        coarse = coarsen(geometry, 2)
        area = grid.face_areas[0]
        expected = pooled(
            (torch.as_tensor(inflow, dtype=torch.float64) * geometry.fluid[:, 0] * area)[:, None], (1, 2, 2)
        )[:, 0]
        got = torch.as_tensor(coarse.inflow["x-"]) * coarse.fluid[:, 0] * coarse.grid.face_areas[0]
        torch.testing.assert_close(got, expected)
    assert coarsen(Geometry(grid, inflow={"x-": 0.7}), 2).inflow == {"x-": 0.7}
    fine = refine(Geometry(grid, inflow={"x-": profile}), (1, 2, 3)).inflow["x-"]
    assert torch.equal(torch.as_tensor(fine), profile.repeat_interleave(2, 0).repeat_interleave(3, 1))


# finer


@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("factor", [2, 4])
def test_every_fine_cell_has_its_share_of_the_coarse_net(boundaries: str, factor: int) -> None:
    geometry = Geometry(box(boundaries))
    flux, fine = geometry.mask(random_flux(geometry.grid, 2)), refine(geometry, factor).grid
    prolonged = prolong(flux, geometry.grid, factor)
    share = repeated(operators.div(flux, geometry.grid), factor) / factor**3
    torch.testing.assert_close(operators.div(prolonged, fine), share, rtol=0, atol=1e-14)
    torch.testing.assert_close(restrict(prolonged, fine, factor), flux, rtol=0, atol=1e-14)
    assert torch.equal(Geometry(fine).mask(prolonged), prolonged)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_exact_fluxes_are_kept_bit_for_bit(boundaries: str) -> None:
    geometry = Geometry(box(boundaries))
    flux, fine = conserve(geometry=geometry, flux=random_flux(geometry.grid, 2)), refine(geometry, 2)
    prolonged = prolong(flux, geometry.grid)
    assert torch.equal(restrict(prolonged, fine.grid, 2), flux)
    assert 0.0 < largest(operators.div(prolonged, fine.grid)) < 1e-15
    exact = conserve(geometry=fine, flux=prolonged)
    assert largest(operators.div(exact, fine.grid)) == 0.0
    # as far as the fixed point moves any flux: units of 2⁻⁴⁶, summed along its tree
    torch.testing.assert_close(exact, prolonged, rtol=0, atol=1e-12)


@pytest.mark.parametrize("boundaries", ["periodic", "closed", "mixed", "duct"])
def test_prolongation_is_second_order(boundaries: str) -> None:
    errors, worst = [], []
    for n in (2, 4, 8):
        grid = box(boundaries, (4 * n, 3 * n, 5 * n), (1 / (4 * n), 1.3 / (3 * n), 0.8 / (5 * n)))
        fine = refine(Geometry(grid), 2).grid
        prolonged = prolong(operators.flux_of(Wave(grid).face_means(), grid), grid)
        error = operators.velocity(prolonged, fine) - Wave(fine).face_means()
        errors.append(rms(error))
        worst.append(largest(error))
    # between two and three while the share of the cells at the walls still falls
    assert all(1.9 < p < 2.7 for p in order(errors)) and all(1.8 < p < 2.7 for p in order(worst))


def test_shared_fluxes_err_by_the_mixed_derivative_that_slopes_leave_out() -> None:
    before, after = [], []
    for n in (2, 4, 8):
        grid = box("periodic", (4 * n, 3 * n, 5 * n), (1 / (4 * n), 1.3 / (3 * n), 0.8 / (5 * n)))
        fine, wave = refine(Geometry(grid), 2).grid, Wave(grid)
        error = operators.velocity(prolong(operators.flux_of(wave.face_means(), grid), grid), fine)
        error -= Wave(fine).face_means()
        x, y, z = (wave.k[a] * c + wave.phase[a] for a, c in enumerate(face_points(fine, 0)))
        mixed = wave.amplitude[0] * wave.k[1] * wave.k[2] * x.sin() * y.sin() * z.sin()
        sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(3 * n, 5 * n)
        predicted = -sign * grid.spacing[1] * grid.spacing[2] / 16 * mixed
        before.append(rms(error[0, ::2]))
        after.append(rms((error[0] - predicted)[::2]))
    assert all(1.9 < p < 2.5 for p in order(before)) and all(2.85 < p < 3.15 for p in order(after))


def test_a_uniform_flow_stays_uniform_and_a_linear_one_linear() -> None:
    grid = box("periodic")
    uniform = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64).reshape(3, 1, 1, 1).expand(3, *grid.shape)
    assert torch.equal(prolong(uniform, grid), repeated(uniform, 2) / 4)
    # u_x = z in a channel between walls at rest: an eighth of the coarse flux a step on every fine face
    channel = box("channel")
    shear = torch.zeros(3, *channel.shape, dtype=torch.float64)
    shear[0] = torch.arange(7.0) + 0.5
    expected = torch.zeros(3, 10, 8, 14, dtype=torch.float64)
    expected[0] = (torch.arange(14.0) + 0.5) / 8
    torch.testing.assert_close(prolong(shear, channel), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("boundaries", ["periodic", "first"])
def test_slopes_are_central_but_at_the_sides(boundaries: str) -> None:
    """A parallel flow u_x(y) has the same profile on all its faces: fine ones a quarter cell off the coarse middle."""
    grid = box(boundaries)
    profile = torch.randn(4, dtype=torch.float64)
    flux = torch.zeros(3, *grid.shape, dtype=torch.float64)
    flux[0] = profile[:, None]
    slope = (profile.roll(-1) - profile.roll(1)) / 2
    if boundaries == "first":
        slope[0], slope[-1] = profile[1] - profile[0], profile[3] - profile[2]
    expected = torch.stack([profile - slope / 4, profile + slope / 4], 1).flatten() / 4
    torch.testing.assert_close(prolong(flux, grid)[0], expected[:, None].expand(10, 8, 14), rtol=0, atol=1e-15)


def test_with_solids_it_is_masked_and_projected() -> None:
    coarse = random_geometry(box("mixed", (4, 3, 5)), 2)
    fine = refine(coarse, 2)
    flux = conserve(geometry=coarse, flux=random_flux(coarse.grid, 2))
    prolonged = prolong(flux, coarse.grid, geometry=fine)
    assert torch.equal(fine.mask(prolonged), prolonged) and largest(prolonged) > 0.1
    assert largest(operators.div(prolonged, fine.grid)) < 1e-11 * largest(flux)
    assert largest(restrict(prolonged, fine.grid, 2) - flux) > 1e-3
    assert torch.equal(prolong(flux, coarse.grid, geometry=Geometry(fine.grid)), prolong(flux, coarse.grid))


@pytest.mark.parametrize("boundaries", OPEN)
def test_open_sides(boundaries: str) -> None:
    grid = box(boundaries, (4, 6, 8))
    flux, coarse = conserve(geometry=Geometry(grid), flux=random_flux(grid, 2)), coarsen(Geometry(grid), 2).grid
    fine = refine(Geometry(grid), 2)
    restricted, prolonged = restrict(flux, grid, 2), prolong(flux, grid)
    assert largest(operators.div(restricted, coarse)) == 0.0
    torch.testing.assert_close(restrict(prolonged, fine.grid, 2), flux, rtol=0, atol=1e-15)
    assert largest(operators.div(prolonged, fine.grid)) < 1e-14
    exact = conserve(geometry=fine, flux=prolonged)
    assert largest(operators.div(exact, fine.grid)) == 0.0
    torch.testing.assert_close(exact, prolonged, rtol=0, atol=1e-12)
    if boundaries == "duct":
        # one open high side: what leaves through it is kept in every face
        fluxes = ((restricted, coarse), (flux, grid), (prolonged, fine.grid))
        out = [operators.high_faces(given, of)[:, 0, -1:] for given, of in fluxes]
        torch.testing.assert_close(pooled(out[1], (1, 2, 2)), out[0], rtol=0, atol=1e-13)
        torch.testing.assert_close(pooled(out[2], (1, 2, 2)), out[1], rtol=0, atol=1e-13)
        driven = refine(Geometry(grid, inflow={"x-": 0.8}), 2)
        inflow = operators.velocity(prolong(flux, grid, geometry=driven), fine.grid)[:, 0, 0]
        torch.testing.assert_close(inflow, torch.full_like(inflow, 0.8))


def test_single_precision_and_gradients() -> None:
    grid = box("mixed", (2, 3, 4))
    flux = conserve(geometry=Geometry(grid), flux=random_flux(grid))
    fine = refine(Geometry(grid), 2).grid
    prolonged = prolong(flux.float(), grid)
    assert prolonged.dtype == restrict(prolonged, fine, 2).dtype == torch.float32
    assert largest(operators.div(prolonged, fine)) < 1e-6
    torch.testing.assert_close(restrict(prolonged, fine, 2), flux.float())
    assert gradcheck(lambda f: prolong(f, grid), flux.requires_grad_())
    assert gradcheck(lambda f: restrict(f, fine, 2), random_flux(fine).requires_grad_())


def test_impossible_factors_are_refused(unchecked: None) -> None:
    grid = box("periodic", (4, 6, 8))
    flux = torch.zeros(3, 4, 6, 8)
    with pytest.raises(ValueError, match=r"Expected a factor that divides the grid \(4, 6, 8\), got 3"):
        restrict(flux, grid, 3)
    with pytest.raises(ValueError, match=r"Expected a factor of at least 1 along each axis, got \(2, 0, 2\)"):
        coarsen(Geometry(grid), (2, 0, 2))
    with pytest.raises(ValueError, match="Expected at least 2 cells along each axis"):
        coarsen(Geometry(box("mixed", grid.shape)), (4, 1, 1))
    with pytest.raises(ValueError, match="Expected a power of two as factor, got 3"):
        prolong(flux, grid, 3)
    with pytest.raises(ValueError, match="Expected a fine geometry on .*8, 12, 16.*, got one on"):
        prolong(flux, grid, 2, Geometry(grid))
    for convert in (prolong, restrict):
        with pytest.raises(ValueError, match=r"Expected a field of shape"):
            convert(flux[..., :4], grid, 2)
