"""Net flux 0.0, bit for bit: for any box, solids, precision and size of numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import BOUNDARIES, box, random_flux, random_geometry
from torch import Tensor

from latentphys import exact, operators
from latentphys.grid import Geometry, Grid
from latentphys.projection import project

CORRECTION_BOUND = 1e-9
"""Largest change of a face by the fixed-point step, relative to the sample's largest flux, at the default tolerance.

That is the largest of what was given: pores without a loop leave nothing of it.

A face moves by at most the sum of the nets in the subtree behind it: of N cells, each off by the rounding of six faces,
3 · 2⁻⁴⁶, and by what the projection left, 1e-13; N · 1.4e-13 < 1e-9 for the N ≤ 1000 cells here, and √N in place of N
where the nets are independent.
"""


def is_exact(flux: Tensor, geometry: Geometry) -> bool:
    closed = ~geometry.open_faces.expand_as(flux)
    net = operators.div(flux, geometry.grid)
    return flux.dtype == torch.float64 and bool((net == 0.0).all()) and bool((flux[closed] == 0.0).all())


def balances_in_any_order(flux: Tensor, grid: Grid) -> bool:
    """The six faces of a cell added up in another order than `operators.div` takes."""
    low = flux.unbind(-4)
    high = [operators.shift(low[a], a, 1, grid) for a in range(3)]
    return bool(((((high[2] + high[0]) + high[1]) - low[1]) - (low[0] + low[2]) == 0.0).all())


def near(flux: Tensor, given: Tensor, geometry: Geometry) -> bool:
    """Whether an exact flux is, within the bound, the projection of the one it was made from."""
    size = geometry.mask(given).abs().amax((-4, -3, -2, -1), keepdim=True)
    return bool(((flux - project(given, geometry)).abs() <= CORRECTION_BOUND * size).all())


magnitudes = st.floats(-30, 30).map(lambda power: 10.0**power)
dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**31)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    grid = box(draw(st.sampled_from(sorted(BOUNDARIES))), draw(st.tuples(*[st.integers(2, 9)] * 3)))
    if draw(st.booleans()):
        return Geometry(grid)
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    torch.manual_seed(draw(seeds))
    return random_geometry(grid, *batch, fraction=draw(st.floats(0.05, 0.9)))


@given(geometries(), dtypes, magnitudes, seeds, st.booleans())
def test_any_flux(geometry: Geometry, dtype: torch.dtype, magnitude: float, seed: int, batched: bool) -> None:
    torch.manual_seed(seed)
    batch = geometry.batch_shape or ((2,) if batched else ())
    flux = random_flux(geometry.grid, *batch, dtype=dtype) * magnitude
    got = exact.conserve_report(flux=flux, geometry=geometry)
    assert is_exact(got.flux, geometry) and balances_in_any_order(got.flux, geometry.grid)
    assert got.flux.shape == flux.shape
    assert got.correction < CORRECTION_BOUND and near(got.flux, flux.double(), geometry)


@given(geometries(), dtypes, magnitudes, seeds)
def test_any_potential_with_a_mean_flow(geometry: Geometry, dtype: torch.dtype, magnitude: float, seed: int) -> None:
    torch.manual_seed(seed)
    potential = random_flux(geometry.grid, *geometry.batch_shape, dtype=dtype) * magnitude
    harmonic = torch.randn(*geometry.batch_shape, 3, dtype=dtype) * magnitude
    got = exact.conserve(potential=potential, harmonic=harmonic, geometry=geometry)
    assert is_exact(got, geometry)
    periodic = torch.tensor(geometry.grid.periodic)
    uniform = (harmonic.double() * periodic)[..., None, None, None]
    assert near(got, operators.curl(potential.double(), geometry.grid) + uniform, geometry)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_in_an_empty_box_a_curl_and_its_mean_flow_only_lose_rounding(boundaries: str) -> None:
    grid = box(boundaries)
    potential, harmonic = random_flux(grid), torch.tensor([1.0, -2.0, 3.0])
    got = exact.conserve(potential=potential, harmonic=harmonic, geometry=Geometry(grid))
    uniform = (harmonic.double() * torch.tensor(grid.periodic)).reshape(3, 1, 1, 1)
    torch.testing.assert_close(got, operators.curl(potential, grid) + uniform, rtol=0, atol=1e-11)


@pytest.mark.parametrize("magnitude", [1e-300, 1e-160, 1e160, 1e300])
@pytest.mark.parametrize("solid", [False, True])
def test_even_where_squares_are_out_of_range(solid: bool, magnitude: float) -> None:
    grid = box("channel")
    geometry = random_geometry(grid) if solid else Geometry(grid)
    got = exact.conserve_report(flux=random_flux(grid) * magnitude, geometry=geometry)
    assert is_exact(got.flux, geometry)
    assert got.correction < CORRECTION_BOUND and float(got.flux.abs().amax()) > 0.1 * magnitude


def test_subnormal_fluxes() -> None:
    geometry = random_geometry(box("channel"))
    got = exact.conserve(flux=random_flux(geometry.grid) * 1e-315, geometry=geometry)
    assert is_exact(got, geometry) and float(got.abs().amax()) > 1e-316


@pytest.mark.parametrize("solid", [False, True])
def test_a_field_at_rest_stays_at_rest(solid: bool) -> None:
    grid = box("mixed")
    geometry = random_geometry(grid) if solid else Geometry(grid)
    got = exact.conserve_report(flux=torch.zeros(3, *grid.shape), geometry=geometry)
    assert is_exact(got.flux, geometry) and not bool(got.flux.any()) and got.correction == 0.0


def test_a_sample_at_rest_beside_one_that_is_not() -> None:
    geometry = random_geometry(box("mixed"), 2)
    flux = random_flux(geometry.grid, 2) * torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1)
    got = exact.conserve(flux=flux, geometry=geometry)
    assert is_exact(got, geometry) and not bool(got[0].any()) and bool(got[1].any())


def test_a_batch_is_its_samples() -> None:
    geometry = random_geometry(box("mixed"), 3)
    flux = random_flux(geometry.grid, 3)
    together = exact.conserve(flux=flux, geometry=geometry)
    for i in range(3):
        assert torch.equal(together[i], exact.conserve(flux=flux[i], geometry=geometry[i]))
    frames = random_flux(geometry.grid, 2, 3)
    over_time = exact.conserve(flux=frames, geometry=geometry)
    assert is_exact(over_time, geometry)
    assert torch.equal(over_time[1, 2], exact.conserve(flux=frames[1, 2], geometry=geometry[2]))


def test_a_flux_that_is_exact_already_does_not_change() -> None:
    geometry = Geometry(box("channel"))
    once = exact.conserve(flux=random_flux(geometry.grid), geometry=geometry)
    assert float((exact.conserve(flux=once, geometry=geometry) - once).abs().amax()) < 1e-12


def test_more_cells_than_the_square_root_of_a_32_bit_integer() -> None:
    geometry = random_geometry(Grid((37, 36, 36), (1.0, 1.0, 1.0)), fraction=0.1)
    assert geometry.grid.num_cells**2 > 2**31
    got = exact.conserve_report(flux=random_flux(geometry.grid), geometry=geometry, tol=1e-9)
    assert is_exact(got.flux, geometry) and got.correction < 1e-6


@pytest.mark.parametrize("tol", [1e-2, 10.0])
def test_a_tolerance_however_loose_costs_nearness_only(tol: float) -> None:
    """A smooth source, left as it is by the projection: the tree then carries hundreds of times the largest flux."""
    grid = Grid((24, 24, 24), (1.0, 1.0, 1.0), (("free_slip", "free_slip"),) * 3)
    wave = torch.sin(torch.pi * torch.arange(24, dtype=torch.float64) / 24)
    shapes = ((24, 1, 1), (1, 24, 1), (1, 1, 24))
    flux = torch.stack([wave.reshape(shape).expand(grid.shape) for shape in shapes])
    geometry = random_geometry(grid, fraction=0.05)
    got = exact.conserve_report(flux=flux, geometry=geometry, tol=tol)
    assert is_exact(got.flux, geometry)
    assert got.correction > 1e-4


def test_pure_gradients_leave_nothing_but_exactly_balanced_rounding() -> None:
    for geometry in (Geometry(box("channel")), random_geometry(box("channel"))):
        areas = geometry.grid.per_face(geometry.grid.face_areas, torch.ones(1).double())
        lengths = geometry.grid.per_face(geometry.grid.spacing, torch.ones(1).double())
        scalar = torch.randn(geometry.grid.shape, dtype=torch.float64)
        got = exact.conserve(flux=operators.grad(scalar, geometry.grid) * areas / lengths, geometry=geometry)
        assert is_exact(got, geometry) and float(got.abs().amax()) < 1e-11


def test_both_or_neither_are_refused() -> None:
    grid = box("periodic")
    with pytest.raises(ValueError, match="Expected either a flux or a potential, got neither"):
        exact.conserve(geometry=Geometry(grid))
    with pytest.raises(ValueError, match="Expected either a flux or a potential, got both"):
        exact.conserve(flux=random_flux(grid), potential=random_flux(grid), geometry=Geometry(grid))


def test_a_harmonic_part_needs_a_potential() -> None:
    with pytest.raises(ValueError, match="Expected a harmonic part beside a potential, got it beside a flux"):
        exact.conserve(flux=random_flux(box("periodic")), harmonic=torch.ones(3), geometry=Geometry(box("periodic")))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    geometry = random_geometry(box("periodic"))
    field = random_flux(geometry.grid)
    field[0, 1, 2, 3] = bad
    with pytest.raises(ValueError, match="Expected a finite flux, got 1 NaN or infinite values among 420"):
        exact.conserve(flux=field, geometry=geometry)
    with pytest.raises(ValueError, match="Expected a finite potential, got 1 NaN"):
        exact.conserve(potential=field, geometry=geometry)
    with pytest.raises(ValueError, match="Expected a finite harmonic part, got 3 NaN"):
        exact.conserve(potential=random_flux(geometry.grid), harmonic=torch.full((3,), bad), geometry=geometry)


def test_another_shape_is_refused(unchecked: None) -> None:
    for geometry in (Geometry(box("periodic")), random_geometry(box("periodic"))):
        for name in ("flux", "potential"):
            with pytest.raises(ValueError, match=r"Expected a field of shape .* got \(3, 5, 4, 6\)"):
                exact.conserve(**{name: torch.zeros(3, 5, 4, 6)}, geometry=geometry)  # type: ignore[arg-type]
