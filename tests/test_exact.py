"""Net flux 0.0, bit for bit: for any box, solids, precision and size of numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import BOUNDARIES, OPEN, box, random_flux, random_geometry
from torch import Tensor

from latentphys import exact, operators
from latentphys.grid import SIDES, Boundaries, Geometry, Grid
from latentphys.inflow import inflow_flux, prescribed_outflow, through_sides
from latentphys.pressure import face_conductance
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


def sums_to_zero_in_any_order(flux: Tensor, grid: Grid, num_orders: int = 8) -> bool:
    """The six faces of each cell added up in random orders; not where an unstored face closes the balance."""
    high = [operators.shift(flux[..., a, :, :, :], a, 1, grid) for a in range(3)]
    faces = [*high, *(-low for low in flux.unbind(-4))]
    known = torch.ones(grid.shape, dtype=torch.bool)
    for axis, (_, is_open) in enumerate(grid.open_sides):
        if is_open:
            known.select(axis, -1).fill_(False)
    for _ in range(num_orders):
        total = torch.zeros_like(high[0])
        for i in torch.randperm(6).tolist():
            total = total + faces[i]
        if bool((total[..., known] != 0.0).any()):
            return False
    return True


def size_of(given: Tensor, geometry: Geometry) -> Tensor:
    """The largest flux of each sample, given or prescribed; never zero."""
    inlets = torch.cat([inflow_flux(geometry), prescribed_outflow(geometry).unsqueeze(-4)], dim=-4)
    fluxes = (geometry.mask(given).double(), inlets)
    one, other = (x.abs().amax((-4, -3, -2, -1), keepdim=True) for x in fluxes)
    return torch.maximum(one, other).clamp(min=5e-324)


def near(flux: Tensor, given: Tensor, geometry: Geometry) -> bool:
    """Whether an exact flux is, within the bound, the projection of the one it was made from."""
    change = (flux - project(given, geometry)).abs()
    return bool((change <= CORRECTION_BOUND * size_of(given, geometry)).all())


def inflow_error(flux: Tensor, given: Tensor, geometry: Geometry) -> float:
    """Largest deviation from a prescribed inflow, through low and high sides, relative to the largest flux."""
    lift, size = inflow_flux(geometry), size_of(given, geometry).squeeze(-4)
    net = operators.stored_div(flux, geometry.grid) + prescribed_outflow(geometry)
    for axis, (_, high) in enumerate(geometry.ends):
        if high == "open":
            net.select(axis - 3, -1).zero_()
    errors = [(net.abs() / size).amax()]
    for side in geometry.inflow:
        axis, is_high = divmod(SIDES.index(side), 2)
        if not is_high:
            low = (flux - lift).select(-4, axis).select(axis - 3, 0)
            errors.append((low.abs() / size.squeeze(-1)).amax())
    return float(torch.stack(errors).amax())


INFLOW_BOUND = 1e-11
"""A prescribed inflow is rounded to 2⁻⁴⁶ of the largest flux; a pore space without an opening must balance these
roundings, at one of its inlets: 120 faces at most. What else is carried leaves through an opening."""

INLETS: dict[str, Boundaries] = OPEN | {
    "inlets": (("inflow", "inflow"), ("no_slip", "inflow"), ("periodic", "periodic")),
    "low": (("inflow", "no_slip"), ("inflow", "free_slip"), ("no_slip", "no_slip")),
    "everywhere": (("inflow", "inflow"), ("outflow", "inflow"), ("inflow", "outflow")),
}
EVERY: dict[str, Boundaries] = BOUNDARIES | INLETS

magnitudes = st.floats(-30, 30).map(lambda power: 10.0**power)
dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**31)
shapes = st.one_of(
    st.tuples(*[st.integers(2, 9)] * 3), st.sampled_from([(2, 2, 29), (23, 2, 3), (3, 31, 2), (2, 2, 2)])
)


@st.composite
def geometries(draw: st.DrawFn, boundaries: dict[str, Boundaries] = EVERY, empty: bool | None = None) -> Geometry:
    grid = Grid(draw(shapes), (0.7, 1.3, 0.4), boundaries[draw(st.sampled_from(sorted(boundaries)))])
    torch.manual_seed(draw(seeds))
    is_empty, batch = draw(st.booleans()) if empty is None else empty, draw(st.sampled_from([(), (1,), (3,)]))
    solid = None if is_empty else random_geometry(grid, *batch, fraction=draw(st.floats(0.05, 0.9))).solid
    inflow: dict[str, float | Tensor] = {}
    for side, name in zip(SIDES, sum(grid.boundaries, ()), strict=True):
        if name == "inflow" and draw(st.booleans()):
            shape = torch.zeros(grid.shape).select(SIDES.index(side) // 2, 0).shape
            profile = torch.randn(*(batch if solid is not None and draw(st.booleans()) else ()), *shape)
            velocities: list[float | Tensor] = [0.0, 0.3, profile, profile.double() * 1e20]
            inflow[side] = velocities[draw(st.integers(0, 3))]
    return Geometry(grid, solid, inflow)


@given(geometries(), dtypes, magnitudes, seeds, st.booleans())
def test_any_flux(geometry: Geometry, dtype: torch.dtype, magnitude: float, seed: int, batched: bool) -> None:
    torch.manual_seed(seed)
    batch = geometry.batch_shape or ((2,) if batched else ())
    flux = (random_flux(geometry.grid, *batch) * magnitude).to(dtype)
    got = exact.conserve_report(flux=flux, geometry=geometry)
    assert is_exact(got.flux, geometry) and sums_to_zero_in_any_order(got.flux, geometry.grid)
    assert got.flux.shape == flux.shape
    assert got.correction < CORRECTION_BOUND and near(got.flux, flux.double(), geometry)
    assert inflow_error(got.flux, flux, geometry) < INFLOW_BOUND


@given(geometries(), st.sampled_from([0, 1]), seeds)
def test_any_mixture_of_sizes_in_one_field(geometry: Geometry, batched: int, seed: int) -> None:
    torch.manual_seed(seed)
    flux = random_flux(geometry.grid, *(2,) * batched, *geometry.batch_shape)
    flux = flux * 10.0 ** (torch.rand_like(flux) * 600 - 300)
    flux[..., 0] = 1e-310  # subnormal
    got = exact.conserve_report(flux=flux, geometry=geometry)
    assert is_exact(got.flux, geometry) and sums_to_zero_in_any_order(got.flux, geometry.grid)
    assert got.correction < CORRECTION_BOUND and inflow_error(got.flux, flux, geometry) < INFLOW_BOUND


@given(geometries(INLETS), magnitudes, seeds)
def test_a_loose_projection_moves_no_inlet(geometry: Geometry, magnitude: float, seed: int) -> None:
    """What it left is carried to an opening where there is one, and sums to nothing where there is none."""
    torch.manual_seed(seed)
    flux = random_flux(geometry.grid, *geometry.batch_shape) * magnitude
    got = exact.conserve(flux=flux, geometry=geometry, tol=1e-3)
    assert is_exact(got, geometry) and inflow_error(got, flux, geometry) < INFLOW_BOUND


@given(geometries(), seeds)
def test_the_same_bits_twice_and_next_to_nothing_the_second_time(geometry: Geometry, seed: int) -> None:
    torch.manual_seed(seed)
    flux = random_flux(geometry.grid, *geometry.batch_shape)
    once = exact.conserve(flux=flux, geometry=geometry)
    same = Geometry(geometry.grid, geometry.solid, geometry.inflow)
    assert torch.equal(exact.conserve(flux=flux, geometry=same), once)
    again = exact.conserve(flux=once, geometry=geometry)
    assert bool(((again - once).abs() <= CORRECTION_BOUND * size_of(once, geometry)).all())


@given(geometries(), dtypes, magnitudes, seeds)
def test_any_potential_with_a_mean_flow(geometry: Geometry, dtype: torch.dtype, magnitude: float, seed: int) -> None:
    torch.manual_seed(seed)
    potential = random_flux(geometry.grid, *geometry.batch_shape, dtype=dtype) * magnitude
    harmonic = torch.randn(*geometry.batch_shape, 3, dtype=dtype) * magnitude
    got = exact.conserve(potential=potential, harmonic=harmonic, geometry=geometry)
    assert is_exact(got, geometry)
    through = torch.tensor(geometry.grid.through)
    uniform = (harmonic.double() * through)[..., None, None, None]
    assert near(got, operators.curl(potential.double(), geometry.grid) + uniform, geometry)


@pytest.mark.parametrize("boundaries", BOUNDARIES | OPEN)
def test_in_an_empty_box_a_curl_and_its_mean_flow_only_lose_rounding(boundaries: str) -> None:
    grid = box(boundaries)
    potential, harmonic = random_flux(grid), torch.tensor([1.0, -2.0, 3.0])
    got = exact.conserve(potential=potential, harmonic=harmonic, geometry=Geometry(grid))
    uniform = (harmonic.double() * torch.tensor(grid.through)).reshape(3, 1, 1, 1)
    torch.testing.assert_close(got, operators.curl(potential, grid) + uniform, rtol=0, atol=1e-11)


@pytest.mark.parametrize("magnitude", [1e-300, 1e-160, 1e160, 1e300])
@pytest.mark.parametrize("solid", [False, True])
@pytest.mark.parametrize("boundaries", ["channel", "duct", "through"])
def test_even_where_squares_are_out_of_range(boundaries: str, solid: bool, magnitude: float) -> None:
    grid = box(boundaries)
    geometry = random_geometry(grid) if solid else Geometry(grid)
    got = exact.conserve_report(flux=random_flux(grid) * magnitude, geometry=geometry)
    assert is_exact(got.flux, geometry)
    assert got.correction < CORRECTION_BOUND and float(got.flux.abs().amax()) > 0.1 * magnitude


@pytest.mark.parametrize("boundaries", ["channel", "bend"])
def test_subnormal_fluxes(boundaries: str) -> None:
    geometry = random_geometry(box(boundaries))
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
    """To what the projection leaves: sums over a batch run in another order than over a sample."""
    geometry = random_geometry(box("mixed"), 3)
    flux = random_flux(geometry.grid, 3)
    together = exact.conserve(flux=flux, geometry=geometry)
    for i in range(3):
        alone = exact.conserve(flux=flux[i], geometry=geometry[i])
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-11)
    frames = random_flux(geometry.grid, 2, 3)
    over_time = exact.conserve(flux=frames, geometry=geometry)
    assert is_exact(over_time, geometry)
    alone = exact.conserve(flux=frames[1, 2], geometry=geometry[2])
    torch.testing.assert_close(over_time[1, 2], alone, rtol=0, atol=1e-11)


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


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("solid", [False, True])
def test_what_flows_in_flows_out_bit_for_bit(solid: bool, given: bool) -> None:
    """All are multiples of one quantum: their sums have no rounding."""
    grid = box("duct")
    geometry = Geometry(grid, random_geometry(grid).solid if solid else None, {"x-": torch.rand(4, 7)} if given else {})
    flux = exact.conserve(flux=random_flux(grid), geometry=geometry)
    sides = through_sides(flux, geometry)
    assert float(sides["x-"].abs().amax()) > 0.1
    assert float(sides["x-"].sum() - sides["x+"].sum()) == 0.0
    assert float(sides["x-"].flatten().flip(0).cumsum(0)[-1] - sides["x+"].sum()) == 0.0


@pytest.mark.parametrize("side", ["x+", "y-"])
def test_a_cell_beside_an_inlet_and_an_opening_lets_its_rest_out_through_the_opening(side: str) -> None:
    """One pore, whose only opening is in the cell where the inlet is."""
    boundaries: dict[str, Boundaries] = {
        "x+": (("no_slip", "inflow"), ("outflow", "no_slip"), ("no_slip", "no_slip")),
        "y-": (("outflow", "no_slip"), ("inflow", "no_slip"), ("no_slip", "no_slip")),
    }
    grid = Grid((4, 5, 6), (1.0, 1.0, 1.0), boundaries[side])
    solid = torch.ones(grid.shape, dtype=torch.bool)
    column = (-1, slice(None)) if side == "x+" else (slice(None), 0)
    solid[column] = False
    solid[..., 0] = True
    profile = torch.zeros(5, 6) if side == "x+" else torch.zeros(4, 6)
    profile[0] = 1.0
    geometry = Geometry(grid, solid, {side: profile})
    flux = random_flux(grid)
    got = exact.conserve(flux=flux, geometry=geometry, tol=1e-2)
    assert is_exact(got, geometry) and inflow_error(got, flux, geometry) < 1e-13


def single_bound(geometry: Geometry) -> float:
    """Largest change of a face in `quantise`, relative to the largest flux.

    A quantum is 2⁻²⁰ of it at most. Closed: half a quantum from each of four edges and the uniform flow. Open: half a
    quantum, and those of the six faces of all cells of a line.
    """
    if not any(sum(geometry.grid.open_sides, ())):
        return 2.4e-6
    return (0.5 + 3 * max(geometry.grid.shape)) * 2.0**-20


@given(geometries(BOUNDARIES | OPEN, empty=True), st.floats(-40, 30), seeds, st.booleans(), st.booleans())
def test_single_precision_for_storage(
    geometry: Geometry, power: float, seed: int, batched: bool, from_potential: bool
) -> None:
    torch.manual_seed(seed)
    geometry = Geometry(geometry.grid)
    given = random_flux(geometry.grid, *(2,) * batched) * 10.0**power
    if from_potential:
        harmonic = torch.randn(*(2,) * batched, 3, dtype=torch.float64) * 10.0**power
        got = exact.quantise(potential=given, harmonic=harmonic, geometry=geometry)
        uniform = harmonic * torch.tensor(geometry.grid.through)
        given = operators.curl(given, geometry.grid) + uniform[..., None, None, None]
    else:
        got = exact.quantise(flux=given, geometry=geometry)
    assert got.dtype == torch.float32 and sums_to_zero_in_any_order(got, geometry.grid)
    assert bool((got[~geometry.open_faces.expand_as(got)] == 0.0).all())
    expected = project(given, geometry)
    largest = expected.abs().amax((-4, -3, -2, -1), keepdim=True)
    smallest = 0.5 * (1 + 6 * max(geometry.grid.shape)) * 2.0**-149
    assert bool(((got.double() - expected).abs() <= single_bound(geometry) * largest + smallest).all())


@given(geometries(INLETS, empty=True), seeds)
def test_single_precision_with_a_prescribed_inflow(geometry: Geometry, seed: int) -> None:
    torch.manual_seed(seed)
    given = random_flux(geometry.grid)
    got = exact.quantise(flux=given, geometry=geometry)
    assert got.dtype == torch.float32 and sums_to_zero_in_any_order(got, geometry.grid)
    expected = project(given, geometry)
    # Without an opening the roundings of all inlets meet in one of them.
    cells = geometry.grid.num_cells if "open" not in sum(geometry.ends, ()) else max(geometry.grid.shape)
    assert float((got.double() - expected).abs().amax() / expected.abs().amax()) < (0.5 + 3 * cells) * 2.0**-20


def test_a_long_line_of_nothing_but_rounding_still_balances_in_single_precision() -> None:
    """Nothing is left of a gradient: what its line carries is then far above the largest flux."""
    boundaries: Boundaries = (("outflow", "no_slip"), ("no_slip", "no_slip"), ("no_slip", "no_slip"))
    grid = Grid((2000, 3, 4), (0.7, 1.3, 0.4), boundaries)
    scalar = torch.randn(grid.shape, dtype=torch.float64)
    gradient = operators.grad(scalar, grid) * face_conductance(Geometry(grid), scalar)
    got = exact.quantise(flux=gradient, geometry=Geometry(grid))
    assert sums_to_zero_in_any_order(got, grid) and 0.0 < float(got.abs().amax()) < 1e-9


@pytest.mark.parametrize("boundaries", ["mixed", "duct"])
def test_single_precision_of_samples_of_different_size(boundaries: str) -> None:
    geometry = Geometry(box(boundaries))
    given = random_flux(geometry.grid, 3) * torch.tensor([0.0, 1e-20, 1e20]).reshape(3, 1, 1, 1, 1)
    got = exact.quantise(flux=given, geometry=geometry)
    assert not bool(got[0].any())
    assert got.dtype == torch.float32 and sums_to_zero_in_any_order(got, geometry.grid)
    for i in (1, 2):
        assert torch.equal(got[i], exact.quantise(flux=given[i], geometry=geometry))


def test_voxels_and_fluxes_beyond_its_range_do_not_fit_into_single_precision() -> None:
    grid = box("channel")
    with pytest.raises(ValueError, match="Expected a box without solids, got voxels; store what `conserve` returns in"):
        exact.quantise(flux=random_flux(grid), geometry=random_geometry(grid))
    with pytest.raises(ValueError, match=r"Expected fluxes within FP32's range, got \d\.\de\+39; scale them first"):
        exact.quantise(flux=random_flux(grid) * 1e39, geometry=Geometry(grid))
    with pytest.raises(ValueError, match="Expected either a flux or a potential, got neither"):
        exact.quantise(geometry=Geometry(grid))
    with pytest.raises(ValueError, match="Expected a finite flux, got 420 NaN"):
        exact.quantise(flux=random_flux(grid) * torch.nan, geometry=Geometry(grid))


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


@pytest.mark.parametrize("solid", [False, True])
def test_numbers_at_the_end_of_the_range_are_refused(solid: bool) -> None:
    grid = box("channel")
    geometry = random_geometry(grid) if solid else Geometry(grid)
    flux = random_flux(grid).clamp(-1, 1) * 1.7e308
    with pytest.raises(ValueError, match="Expected fluxes whose sums stay within FP64's range, got an overflow"):
        exact.conserve(flux=flux, geometry=geometry)
