"""The Hodge decomposition against null spaces, the gauge of the vector potential, the isometry of the Riesz curl."""

import numpy as np
import pytest
import torch
from homology import div_rows, net_flow_rows, unit_fluxes
from reference import (
    BOUNDARIES,
    OPEN,
    abc,
    abc_flux,
    box,
    edge_points,
    order,
    random_flux,
    random_geometry,
    ring,
    two_pi_box,
)
from scipy.sparse import csr_array
from scipy.sparse.linalg import lsqr
from torch import Tensor
from torch.autograd import gradcheck

from latentphys import exact, operators
from latentphys.grid import Geometry, Grid
from latentphys.hodge import Hodge, energy_product, hodge, isometric_curl, vector_potential
from latentphys.projection import project
from latentphys.topology import harmonic_dimension

ALL_BOXES = [*BOUNDARIES, *OPEN]
CASES = [(name, solid) for name in ALL_BOXES for solid in (False, True)]
CLOSED = [(name, solid) for name in BOUNDARIES for solid in (False, True)]
DOUBLE, SINGLE = torch.float64, torch.float32
SCALES = [(1.0, DOUBLE), (1e-6, DOUBLE), (1e-6, SINGLE)]
# Of the energy given, without and with solids: how far parts are from orthogonal. Iterations stop at 1e-13 and 1e-6.
ORTHOGONAL = {DOUBLE: (1e-15, 1e-13), SINGLE: (2e-7, 1e-6)}
# Of the largest flux given: how far parts are from their own parts, and from adding up.
AGAIN = {DOUBLE: 5e-13, SINGLE: 5e-6}
ROUNDING = {DOUBLE: 5e-16, SINGLE: 2e-7}


def geometry_of(name: str, solid: bool, *batch: int, scale: float = 1.0) -> Geometry:
    grid = box(name, (5, 4, 7), (0.7 * scale, 1.3 * scale, 0.4 * scale))
    return random_geometry(grid, *batch, fraction=0.3) if solid else Geometry(grid)


def largest(x: Tensor) -> float:
    return float(x.abs().amax())


def gap(parts: Hodge, geometry: Geometry) -> float:
    """Largest product of two parts, relative to the energy of all three."""
    whole = sum(energy_product(part, part, geometry) for part in parts)
    products = [energy_product(parts[i], parts[j], geometry) for i, j in ((0, 1), (0, 2), (1, 2))]
    return largest(torch.stack(products) / whole)


def edges_in_fluid(geometry: Geometry) -> Tensor:
    """True on the edges with four fluid cells around them, and no end of the box."""
    fluid, inside = geometry.fluid, []
    for edge in range(3):
        a, b = (edge + 1) % 3, (edge + 2) % 3
        inside.append(fluid & fluid.roll(1, a) & fluid.roll(1, b) & fluid.roll((1, 1), (a, b)))
        for axis in (a, b):
            if not geometry.grid.periodic[axis]:
                inside[edge].select(axis, 0).fill_(False)
    return torch.stack(inside)


@pytest.mark.parametrize(("scale", "dtype"), SCALES)
@pytest.mark.parametrize(("name", "solid"), CASES)
def test_parts_are_orthogonal_add_up_and_stay_what_they_are(
    name: str, solid: bool, scale: float, dtype: torch.dtype
) -> None:
    """In metres at 1 m/s and in micrometres at 1 µm/s."""
    geometry = geometry_of(name, solid, 2, scale=scale)
    flux = scale * operators.flux_of(random_flux(geometry.grid, 2, dtype=dtype), geometry.grid)
    parts = hodge(flux, geometry)
    assert all(part.dtype == dtype for part in parts)
    assert largest(sum(parts) - geometry.mask(flux)) < ROUNDING[dtype] * largest(flux)
    assert gap(Hodge(*(part.double() for part in parts)), geometry) < ORTHOGONAL[dtype][solid]
    assert largest(parts.curl) > 0.01 * largest(flux) and largest(parts.gradient) > 0.01 * largest(flux)
    assert (largest(parts.harmonic) > 1e-4 * largest(flux)) == bool((harmonic_dimension(geometry) > 0).any())
    for i, part in enumerate(parts):
        for j, again in enumerate(hodge(part, geometry)):
            assert largest(again - part if i == j else again) < AGAIN[dtype] * largest(flux)


@pytest.mark.parametrize(("name", "solid"), CASES)
def test_each_part_is_of_its_kind(name: str, solid: bool) -> None:
    geometry = geometry_of(name, solid)
    grid, free = geometry.grid, geometry.free_faces
    flux = random_flux(grid)
    curl, harmonic, gradient = hodge(flux, geometry)
    for part in (curl, harmonic):
        assert largest(operators.div(part, grid)) < 1e-11
        assert bool((part[~free] == 0.0).all())
    assert largest(project(gradient, geometry, tol=1e-14)) < 1e-11
    nets = torch.from_numpy(net_flow_rows(geometry))
    assert nets.shape[0] == 0 or largest(nets @ curl[free]) < 1e-11
    torch.testing.assert_close(nets @ harmonic[free], nets @ project(flux, geometry)[free], rtol=0, atol=1e-11)
    # The circulation round every edge that fluid surrounds.
    inside = edges_in_fluid(geometry)
    assert largest(operators.vorticity(harmonic, grid)[inside]) < 1e-11
    assert largest(operators.vorticity(curl, grid)[inside]) > 0.1


def energy_matrix(geometry: Geometry) -> np.ndarray:
    """The energy product over the free faces, those of open high sides included, written out."""
    grid = geometry.grid
    conductance = [area / h for area, h in zip(grid.face_areas, grid.spacing, strict=True)]
    stored = torch.ones(3, *grid.shape, dtype=DOUBLE) * torch.tensor(conductance, dtype=DOUBLE).reshape(3, 1, 1, 1)
    beyond = torch.zeros(grid.shape, dtype=DOUBLE)
    for axis, (low, high) in enumerate(grid.open_sides):
        if low:
            stored[axis].select(axis, 0).mul_(2)
        if high:
            beyond.select(axis, -1).add_(2 * conductance[axis])
    out = -operators.stored_div(unit_fluxes(geometry), grid).flatten(1).T.numpy()
    weight = np.where(beyond > 0, 1 / np.maximum(beyond.numpy(), 1e-9), 0.0).ravel()
    return np.diag(1 / stored[geometry.free_faces].numpy()) + out.T @ (weight[:, None] * out)


def null_projector(matrix: np.ndarray) -> np.ndarray:
    """Orthogonal projector onto the null space, from an SVD."""
    _, values, rows = np.linalg.svd(matrix)
    null = rows[int((values > 1e-9 * values[0]).sum()) :]
    return null.T @ null


def pores_of_every_kind() -> Geometry:
    """A box with open ends: a pore between them, one that winds, one that does both, one to a single end, a pocket."""
    solid = torch.ones(4, 7, 3, dtype=torch.bool)
    solid[:, 0, 0] = solid[1, 2, :] = solid[:, 4, 1] = solid[2, 4, :] = solid[0, 6, :] = solid[2, 6, :2] = False
    return Geometry(box("duct", (4, 7, 3)), solid)


DENSE = {f"{name} with solids" if solid else name: (name, solid) for name, solid in CASES}


@pytest.mark.parametrize("case", [*DENSE, "pores of every kind"])
def test_it_is_the_decomposition_into_dense_null_spaces(case: str) -> None:
    """Solenoidal: the null space of div. Curl: that of div and of all net flows. Harmonic: the difference."""
    if case in DENSE:
        grid = box(DENSE[case][0], (3, 4, 3))
        geometry = random_geometry(grid, fraction=0.25) if DENSE[case][1] else Geometry(grid)
    else:
        geometry = pores_of_every_kind()
        assert int(harmonic_dimension(geometry)) == 3
    free, root = geometry.free_faces, np.linalg.cholesky(energy_matrix(geometry)).T
    flux = random_flux(geometry.grid)
    parts = hodge(flux, geometry)
    to_flux = np.linalg.inv(root)
    div, nets = div_rows(geometry), net_flow_rows(geometry)
    solenoidal, curl = (null_projector(rows @ to_flux) for rows in (div, np.concatenate([div, nets])))
    assert round(float(np.trace(solenoidal - curl))) == int(harmonic_dimension(geometry))
    x = root @ flux[free].numpy()
    expected = Hodge(*(torch.from_numpy(to_flux @ p) for p in (curl @ x, (solenoidal - curl) @ x, x - solenoidal @ x)))
    for part, dense in zip(parts, expected, strict=True):
        torch.testing.assert_close(part[free], dense, rtol=0, atol=1e-11)
    torch.testing.assert_close(energy_product(flux, flux, geometry).item(), float(x @ x), rtol=1e-13, atol=0)


def test_two_ducts_have_a_mean_flow_each() -> None:
    """The mean of one duct is not moved into the other; a batch of fluxes shares a batch of geometries."""
    solid = torch.ones(2, 6, 5, 5, dtype=torch.bool)
    solid[:, :, 0, 0] = False
    solid[:, :, 2:4, 2:4] = False
    solid[1, 3, 0, 0] = True  # blocked in the second sample
    geometry = Geometry(Grid((6, 5, 5), (0.5, 0.7, 1.1)), solid)
    assert harmonic_dimension(geometry).tolist() == [2, 1]
    flux = random_flux(geometry.grid, 3, 1).expand(3, 2, 3, 6, 5, 5).contiguous()
    flux[:, :, 1:] = 0.0
    harmonic = hodge(flux, geometry).harmonic
    torch.testing.assert_close(hodge(flux[0], geometry).harmonic, harmonic[0], rtol=0, atol=1e-14)
    thin, wide = harmonic[..., 0, :, 0, 0], harmonic[..., 0, :, 2:4, 2:4]
    mean = flux[:, 0, 0, :, 0, 0].mean(-1)
    torch.testing.assert_close(thin[:, 0], mean[:, None].expand(3, 6), rtol=0, atol=1e-14)
    assert largest(thin[:, 1]) < 1e-14
    mean = flux[:, 0, 0, :, 2:4, 2:4].mean((-3, -2, -1))
    torch.testing.assert_close(wide, mean[:, None, None, None, None].expand(wide.shape), rtol=0, atol=1e-14)


def test_the_energy_product_does_not_underflow() -> None:
    """1 nm/s through micrometre cells: the flux squared is below FP32's range, its energy is not."""
    grid = box("bend", spacing=(1e-6, 2e-6, 3e-6))
    flux = 1e-9 * operators.flux_of(random_flux(grid, dtype=SINGLE), grid)
    double, single = (float(energy_product(f, f, Geometry(grid))) for f in (flux.double(), flux))
    assert abs(single / double - 1) < 1e-6
    closed = Geometry(box("closed"))
    flux = closed.mask(random_flux(closed.grid))
    volume = closed.grid.num_cells * closed.grid.cell_volume
    expected = 2 * volume * operators.kinetic_energy(flux, closed.grid)
    torch.testing.assert_close(energy_product(flux, flux, closed), expected, rtol=1e-14, atol=0)


def test_a_prescribed_inflow_is_refused() -> None:
    geometry = Geometry(box("duct"), None, {"x-": 1.0})
    with pytest.raises(ValueError, match=r"Expected a geometry without a prescribed inflow, .* make those sides walls"):
        hodge(random_flux(geometry.grid), geometry)
    with pytest.raises(ValueError, match="Expected a flux in FP32 or FP64, got torch.float16"):
        hodge(random_flux(box("duct"), dtype=torch.float16), Geometry(box("duct")))


def test_flow_through_a_ring_needs_a_potential_inside_the_solid() -> None:
    geometry, hole = ring()
    grid, inside = geometry.grid, edges_in_fluid(geometry)
    jet, eddies = torch.zeros(3, *grid.shape, dtype=DOUBLE), 0.01 * random_flux(grid)
    jet[0][hole] = 1.0
    flux = exact.conserve(flux=jet + operators.curl(torch.where(inside, eddies, 0.0), grid), geometry=geometry)
    assert bool((operators.div(flux, grid) == 0.0).all()) and float(flux[0][hole].sum()) > 1.0
    # No net flow has a place in this box: it is curl, and nothing else.
    parts = hodge(flux, geometry)
    assert largest(parts.curl - flux) < 1e-14 and largest(parts.harmonic) == 0.0

    potential = vector_potential(flux, geometry).potential
    assert largest(operators.curl(potential, grid) - flux) < 1e-14
    assert largest(potential[~inside]) > 0.1

    # The best that a potential can do which is zero on the solid: least squares over all edges in the fluid.
    edges = torch.eye(potential.numel(), dtype=DOUBLE)[inside.flatten()].reshape(-1, 3, *grid.shape)
    curls = csr_array(operators.curl(edges, grid).flatten(1).T.numpy())
    best = curls @ lsqr(curls, flux.flatten().numpy(), atol=1e-14, btol=1e-14)[0]
    masked = torch.from_numpy(best).reshape(flux.shape)
    assert abs(float(masked[0][hole].sum())) < 1e-14
    lost = (flux - masked).square().sum() / flux.square().sum()
    assert float(lost) > 0.5


@pytest.mark.parametrize(("scale", "dtype"), SCALES)
@pytest.mark.parametrize(("name", "solid"), CLOSED)
def test_the_curl_of_the_potential_is_the_solenoidal_flux(
    name: str, solid: bool, scale: float, dtype: torch.dtype
) -> None:
    geometry = geometry_of(name, solid, 2, scale=scale)
    grid = geometry.grid
    flux = scale * operators.flux_of(random_flux(grid, 2, dtype=dtype), grid)
    tol = {DOUBLE: 1e-13, SINGLE: 1e-6}[dtype]
    potential, uniform = vector_potential(flux, geometry, tol)
    assert potential.dtype == uniform.dtype == dtype
    back = operators.curl(potential, grid) + uniform[..., None, None, None]
    assert largest(back - project(flux, geometry, tol)) < AGAIN[dtype] * largest(flux)
    assert bool((uniform[:, [not p for p in grid.periodic]] == 0.0).all())
    if dtype == DOUBLE:
        parts = hodge(flux, geometry)
        potential, uniform = vector_potential(parts.curl, geometry, tol)
        assert largest(operators.curl(potential, grid) - parts.curl) < AGAIN[dtype] * largest(flux)
        assert largest(uniform) < 1e-13 * largest(flux)


@pytest.mark.parametrize(("name", "solid"), CLOSED)
def test_the_potential_is_the_one_of_the_coulomb_gauge(name: str, solid: bool) -> None:
    geometry = geometry_of(name, solid)
    grid = geometry.grid
    flux = exact.conserve(flux=random_flux(grid), geometry=geometry)
    potential, uniform = vector_potential(flux, geometry)
    h = torch.tensor(grid.spacing, dtype=DOUBLE).reshape(3, 1, 1, 1)
    vector, divergence = potential / h, torch.zeros(grid.shape, dtype=DOUBLE)
    for axis in range(3):
        divergence += (vector[axis] - operators.shift(vector[axis], axis, -1, grid)) / grid.spacing[axis]
    inner = tuple(slice(0 if periodic else 1, None) for periodic in grid.periodic)
    assert largest(divergence[inner]) < 1e-12 * largest(vector) / min(grid.spacing)
    for axis, periodic in enumerate(grid.periodic):
        if not periodic:
            tangential = [a for a in range(3) if a != axis]
            assert largest(potential[tangential].select(axis - 3, 0)) == 0.0
    # Another potential of the same flux leads back to this one.
    scalar = torch.zeros(grid.shape, dtype=DOUBLE)
    scalar[inner] = torch.randn(scalar[inner].shape, dtype=DOUBLE)
    other = potential + torch.stack([operators.shift(scalar, a, 1, grid) - scalar for a in range(3)])
    assert largest(other - potential) > 0.5
    again = vector_potential(operators.curl(other, grid), Geometry(grid)).potential
    assert largest(again - potential) < 1e-13
    # And the exact decode of it is the flux it came from.
    back = exact.conserve(potential=potential, harmonic=uniform, geometry=geometry)
    assert largest(back - flux) < 1e-11
    assert bool((operators.div(back, grid) == 0.0).all())


def test_the_potential_converges_to_the_one_of_the_abc_flow() -> None:
    """∇×u = u and ∇·u = 0: the flow is its own potential."""
    errors = []
    for n in (8, 16, 32):
        grid = two_pi_box((n, n, n))
        potential = vector_potential(abc_flux(grid), Geometry(grid)).potential
        expected = torch.stack([abc(a, edge_points(grid, a)) * grid.spacing[a] for a in range(3)])
        errors.append(largest(potential - expected) / grid.spacing[0])
    assert all(1.95 < p < 2.05 for p in order(errors)), order(errors)


@pytest.mark.parametrize("name", OPEN)
def test_open_boxes_have_no_stored_potential(name: str) -> None:
    geometry = Geometry(box(name))
    with pytest.raises(ValueError, match="Expected a box of walls and periodic axes, .* use a projection instead"):
        vector_potential(random_flux(geometry.grid), geometry)
    with pytest.raises(ValueError, match="Expected a box of walls and periodic axes, .* use a projection instead"):
        isometric_curl(random_flux(geometry.grid), geometry.grid)


def edge_units(grid: Grid) -> Tensor:
    """One unit vector for each edge that does not lie in a wall."""
    inside = torch.ones(3, *grid.shape, dtype=torch.bool)
    for axis, periodic in enumerate(grid.periodic):
        if not periodic:
            inside[[a for a in range(3) if a != axis]] &= (torch.arange(grid.shape[axis]) > 0).reshape(
                [-1 if a == axis else 1 for a in range(3)]
            )
    return torch.eye(inside.numel(), dtype=DOUBLE)[inside.flatten()].reshape(-1, 3, *grid.shape)


def curl_columns(grid: Grid, isometric: bool) -> Tensor:
    """Velocities that vectors on single edges make: of the Riesz curl, or of the plain one."""
    units = edge_units(grid)
    flux = (
        isometric_curl(units, grid) if isometric else operators.curl(units * grid.per_face(grid.spacing, units), grid)
    )
    return operators.velocity(flux, grid).flatten(1).T


@pytest.mark.parametrize("name", BOUNDARIES)
def test_the_riesz_curl_is_an_isometry_on_what_it_does_not_forget(name: str) -> None:
    """All singular values are 0 or 1, where all cells have one volume; its range is that of the curl."""
    grid = box(name, (3, 4, 5))
    riesz, plain = curl_columns(grid, True), curl_columns(grid, False)
    values = torch.linalg.svdvals(riesz)
    kept = values > 0.5
    assert largest(values[kept] - 1) < 1e-13 and largest(values[~kept]) < 1e-13
    both = [int(torch.linalg.matrix_rank(m)) for m in (plain, torch.cat([plain, riesz], 1))]
    assert int(kept.sum()) == both[0] == both[1]
    # All solenoidal fluxes but the uniform ones.
    geometry = Geometry(grid)
    div = div_rows(geometry)
    assert int(kept.sum()) == div.shape[1] - np.linalg.matrix_rank(div) - int(harmonic_dimension(geometry))


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("name", BOUNDARIES)
def test_it_keeps_the_energy_of_the_solenoidal_part(name: str, dtype: torch.dtype) -> None:
    """And forgets gradients and, along with them, whatever uniform vectors the walls allow."""
    grid = box(name, (3, 4, 5))
    units = edge_units(grid)
    corners = torch.eye(grid.num_cells, dtype=DOUBLE).reshape(-1, *grid.shape)
    for axis, periodic in enumerate(grid.periodic):
        if not periodic:
            corners.select(axis - 3, 0).zero_()
    gradients = torch.stack(
        [(operators.shift(corners, a, 1, grid) - corners) / grid.spacing[a] for a in range(3)], dim=-4
    )
    uniform = [torch.zeros(3, *grid.shape, dtype=DOUBLE) for _ in range(3)]
    for axis in range(3):
        if all(grid.periodic[a] for a in range(3) if a != axis):
            uniform[axis][axis] = 1.0
    forgotten = torch.cat([gradients.flatten(1), torch.stack(uniform).flatten(1)])
    basis, values, _ = torch.linalg.svd(forgotten.T, full_matrices=False)
    basis = basis[:, values > 1e-10 * values[0]]

    raw = (torch.randn(len(units), dtype=DOUBLE) @ units.flatten(1)).reshape(3, *grid.shape)
    solenoidal = raw.flatten() - basis @ (basis.T @ raw.flatten())
    flux = isometric_curl(raw.to(dtype), grid)
    assert flux.dtype == dtype
    energy = energy_product(flux.double(), flux.double(), Geometry(grid)) / grid.cell_volume
    torch.testing.assert_close(
        float(energy), float(solenoidal @ solenoidal), rtol=1e-13 if dtype == DOUBLE else 1e-6, atol=0
    )
    assert largest(isometric_curl((raw.flatten() - solenoidal).reshape(raw.shape).to(dtype), grid)) < (
        1e-14 if dtype == DOUBLE else 2e-6
    )


def test_a_plain_curl_gets_worse_conditioned_with_the_grid() -> None:
    """Twice as many cells, twice the ratio of its largest singular value to its smallest; the Riesz curl's is 1."""
    conditions = []
    for n in (3, 6):
        grid = Grid((n, n, n), (1 / n,) * 3, (("no_slip", "no_slip"),) * 3)
        values = torch.linalg.svdvals(curl_columns(grid, False))
        values = values[values > 1e-6 * values[0]]
        conditions.append(float(values[0] / values[-1]))
    assert 2.0 < conditions[1] / conditions[0] < 2.3


@pytest.mark.parametrize("name", BOUNDARIES)
def test_the_riesz_curl_is_linear_and_has_an_adjoint(name: str) -> None:
    grid = box(name, (3, 2, 4))
    raw = random_flux(grid).requires_grad_()
    assert gradcheck(lambda a: isometric_curl(a, grid), (raw,))
    other = random_flux(grid)
    (pulled,) = torch.autograd.grad(isometric_curl(raw, grid), raw, other)
    another = random_flux(grid)
    left, right = (isometric_curl(another, grid) * other).sum(), (another * pulled).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    batch = torch.stack([raw.detach(), other])
    both = isometric_curl(batch, grid)
    torch.testing.assert_close(both[1], isometric_curl(other, grid), rtol=0, atol=1e-14)
    torch.testing.assert_close(isometric_curl(2 * batch[0] - batch[1], grid), 2 * both[0] - both[1], rtol=0, atol=1e-13)
