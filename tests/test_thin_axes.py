"""Two- and one-dimensional data: boxes with one cell along periodic axes, against closed forms and the same in 3D."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from homology import betti, div_rows, net_flow_rows, rank
from hypothesis import given
from hypothesis import strategies as st
from reference import BOUNDARIES, OPEN, SHAPE, box, edge_points, random_flux, taylor_green, two_pi_box
from torch import Tensor

from latentphys import conversions, operators
from latentphys.exact import conserve, conserve_report, quantise
from latentphys.grid import Geometry, Grid
from latentphys.hodge import energy_product, harmonic_fields, hodge, isometric_curl, vector_potential
from latentphys.inflow import inflow_flux, through_sides
from latentphys.multigrid import Multigrid
from latentphys.pressure import face_conductance
from latentphys.projection import decompose, project
from latentphys.resolution import coarsen, prolong, refine, restrict
from latentphys.topology import harmonic_dimension, regions, spanning_forests

COPIES = 4
"""Cells along a thin axis of the same box in 3D."""


def thin_boxes(size: tuple[int, int, int] = SHAPE) -> dict[str, Grid]:
    """Every mix of boundaries that has periodic axes, with one cell along each choice of these."""
    boxes = {}
    for name, pairs in (BOUNDARIES | OPEN).items():
        periodic = [axis for axis in range(3) if pairs[axis][0] == "periodic"]
        for count in range(1, len(periodic) + 1):
            for thin in itertools.combinations(periodic, count):
                nx, ny, nz = (1 if axis in thin else n for axis, n in enumerate(size))
                boxes[f"{name} {nx}x{ny}x{nz}"] = box(name, (nx, ny, nz))
    return boxes


BOXES = thin_boxes()
SOLID = [False, True]


def voxels(grid: Grid, *batch: int, fraction: float = 0.3) -> Geometry:
    """Random solids that leave the first cell fluid, with an inflow where something may flow in."""
    solid = torch.rand(*batch, *grid.shape) < fraction
    solid[..., 0, 0, 0] = False
    if grid.num_cells > 1:
        solid[..., -1, -1, -1] = True
    return Geometry(grid, solid)


def geometry_of(name: str, solid: bool) -> Geometry:
    return voxels(BOXES[name]) if solid else Geometry(BOXES[name])


def extruded(x: Tensor, grid: Grid) -> Tensor:
    """The same in every copy of a cell along the thin axes; what is no field of cells stays."""
    if tuple(x.shape[-3:]) == grid.shape:
        for axis, n in enumerate(grid.shape):
            if n == 1:
                x = x.repeat_interleave(COPIES, axis - 3)
    return x


def extruded_geometry(geometry: Geometry) -> Geometry:
    grid = geometry.grid
    nx, ny, nz = (n if n > 1 else COPIES for n in grid.shape)
    solid = None if geometry.solid is None else extruded(geometry.solid, grid)
    return Geometry(Grid((nx, ny, nz), grid.spacing, grid.boundaries), solid, geometry.inflow)


def largest(x: Tensor) -> float:
    return float(x.abs().amax())


def named(what: str) -> Callable[[str], str]:
    """A message that says what it is about."""
    return lambda message: f"{what}: {message}"


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (4, 4)}, r"Expected a shape of three axes, got \(4, 4\); .* give it 1 cell .* as in \(nx, ny, 1\)"),
        ({"shape": (4, 0, 4)}, r"Expected at least 2 cells along each axis, or 1 along a periodic one, got 0 along y"),
        ({"shape": (4, -1, 4)}, "got -1 along y"),
        ({"shape": (4, 4, 1), "boundaries": BOUNDARIES["channel"]}, "got 1 along z .*'no_slip', .* make z periodic"),
        ({"shape": (1, 4, 4), "boundaries": OPEN["duct"]}, "got 1 along x .*'inflow', 'outflow'.* make x periodic"),
        ({"shape": (4.7, 4, 4)}, r"Expected whole numbers of cells, got a shape of \(4.7, 4, 4\)"),
        ({"shape": ("4", 4, 4)}, r"Expected whole numbers of cells, got a shape of \('4', 4, 4\)"),
    ],
)
def test_impossible_boxes_are_refused(arguments: dict[str, Any], message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**{"spacing": (1.0, 1.0, 1.0), **arguments})


def test_whole_numbers_of_any_kind_are_a_shape(unchecked: None) -> None:
    shape: Any = tuple(np.array([3, 4, 1]))
    grid = Grid(shape, (1.0, 1.0, 1.0))
    assert grid.shape == (3, 4, 1) and all(type(n) is int for n in grid.shape)
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


def test_an_empty_stack_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected at least one geometry, got none"):
        Geometry.stack([])


CALLS: dict[str, Callable[[Tensor, Geometry], Any]] = {
    "project": project,
    "decompose": decompose,
    "hodge": hodge,
    "conserve": lambda f, g: conserve(flux=f, geometry=g),
    "conserve a potential": lambda f, g: conserve(potential=f, geometry=g),
    "conserve_report": lambda f, g: conserve_report(flux=f, geometry=g),
    "mask": lambda f, g: g.mask(f),
    "flux_from_cells": conversions.flux_from_cells,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_that_is_not_the_geometrys_is_refused(name: str, unchecked: None) -> None:
    geometry = voxels(BOXES["periodic 5x4x1"], 3)
    message = r"Expected leading axes that broadcast against the geometry's \(3,\), got \(2,\); pass one geometry"
    with pytest.raises(ValueError, match=message):
        CALLS[name](random_flux(geometry.grid, 2), geometry)
    for batch in ((), (1,), (3,), (2, 3), (3, 1)):
        CALLS[name](random_flux(geometry.grid, *batch), geometry)


@pytest.mark.parametrize("solid", SOLID)
def test_no_iteration_at_all_is_refused(solid: bool) -> None:
    geometry = geometry_of("periodic 5x4x1", solid)
    for call in (project, decompose):
        with pytest.raises(ValueError, match="Expected at least 1 iteration at most, got 0"):
            call(random_flux(geometry.grid), geometry, max_iterations=0)


# the same as in 3D


Computation = Callable[[Tensor, Tensor, Geometry], Any]
"""From a flux, a scalar and a geometry to a tensor or several."""
ANYWHERE: dict[str, Computation] = {
    "div": lambda f, s, g: operators.div(f, g.grid),
    "stored_div": lambda f, s, g: operators.stored_div(f, g.grid),
    "high_faces": lambda f, s, g: operators.high_faces(f, g.grid),
    "grad": lambda f, s, g: operators.grad(s, g.grid),
    "curl": lambda f, s, g: operators.curl(f, g.grid),
    "velocity": lambda f, s, g: operators.velocity(f, g.grid),
    "flux_of": lambda f, s, g: operators.flux_of(f, g.grid),
    "cell_velocity": lambda f, s, g: operators.cell_velocity(f, g.grid),
    "mean_velocity": lambda f, s, g: operators.mean_velocity(f, g.grid),
    "kinetic_energy": lambda f, s, g: operators.kinetic_energy(f, g.grid),
    "vorticity": lambda f, s, g: operators.vorticity(f, g.grid),
    "open_faces": lambda f, s, g: g.open_faces,
    "free_faces": lambda f, s, g: g.free_faces,
    "porosity": lambda f, s, g: g.porosity,
    "mask": lambda f, s, g: g.mask(f),
    "regions": lambda f, s, g: regions(g),
    "harmonic_dimension": lambda f, s, g: harmonic_dimension(g),
    "project": lambda f, s, g: project(f, g, 1e-15),
    "loose project": lambda f, s, g: project(f, g, 1e-15 if g.is_empty else 1e-3),
    "hodge": lambda f, s, g: hodge(f, g, 1e-15),
    "harmonic_fields": lambda f, s, g: harmonic_fields(g),
    "conserve": lambda f, s, g: conserve(flux=f, geometry=g),
    "interpolate_to_faces": lambda f, s, g: conversions.interpolate_to_faces(f, g),
    "flux_from_cells": lambda f, s, g: conversions.flux_from_cells(f, g),
}
CLOSED: dict[str, Computation] = {
    "vector_potential": lambda f, s, g: vector_potential(f, g, 1e-15),
    "isometric_curl": lambda f, s, g: isometric_curl(f, g.grid),
}
SPECTRAL: dict[str, Computation] = {
    "spectral_flux": lambda f, s, g: conversions.spectral_flux(f, g.grid),
    "spectral_flux off centre": lambda f, s, g: conversions.spectral_flux(f, g.grid, (0.0, 0.2, 0.7)),
    "spectral_velocity": lambda f, s, g: conversions.spectral_velocity(f, g.grid),
    "spectral_solenoidal": lambda f, s, g: conversions.spectral_solenoidal(f, g.grid),
}


@pytest.mark.parametrize("solid", SOLID)
@pytest.mark.parametrize("name", BOXES)
def test_a_thin_box_computes_what_the_same_in_3d_does(name: str, solid: bool) -> None:
    geometry = geometry_of(name, solid)
    grid, whole = geometry.grid, extruded_geometry(geometry)
    flux, scalar = random_flux(grid), torch.randn(grid.shape, dtype=torch.float64)
    computations = (
        ANYWHERE | ({} if any(sum(grid.open_sides, ())) else CLOSED) | (SPECTRAL if all(grid.periodic) else {})
    )
    for what, compute in computations.items():
        thin = compute(flux, scalar, geometry)
        full = compute(extruded(flux, grid), extruded(scalar, grid), whole)
        for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (thin, full)), strict=True):
            # loose iterations of two solvers differ, conservation differs by what it carries along another tree
            atol = 1e-2 if what == "loose project" else 1e-11 if what == "conserve" else 1e-12
            torch.testing.assert_close(extruded(one, grid), other, rtol=1e-12, atol=atol, msg=named(what))


@pytest.mark.parametrize("solid", SOLID)
def test_a_prescribed_inflow_is_that_of_the_same_in_3d(solid: bool) -> None:
    thin = geometry_of("duct 5x4x1", solid)
    profile = torch.rand(4, 1, dtype=torch.float64)
    geometry = Geometry(thin.grid, thin.solid, {"x-": profile})
    grid = geometry.grid
    closed = extruded_geometry(thin)
    whole = Geometry(closed.grid, closed.solid, {"x-": profile.expand(4, COPIES)})
    expected = extruded(inflow_flux(geometry), grid)
    torch.testing.assert_close(expected, inflow_flux(whole), rtol=0, atol=1e-12)
    flux = random_flux(grid)
    kept, full = conserve(flux=flux, geometry=geometry), conserve(flux=extruded(flux, grid), geometry=whole)
    torch.testing.assert_close(extruded(kept, grid), full, rtol=0, atol=1e-11)
    assert largest(operators.div(kept, grid)) == 0.0
    for side, flow in through_sides(kept, geometry).items():
        torch.testing.assert_close(flow.expand(4, COPIES), through_sides(full, whole)[side], rtol=0, atol=1e-11)


def test_wall_distance_sees_no_thin_axis() -> None:
    for thickness in (1e-3, 1.0, 1e3):
        grid = Grid((9, 1, 6), (0.5, thickness, 0.7), BOUNDARIES["channel"])
        assert grid.shortest_side == pytest.approx(4.2) and grid.finest_spacing == 0.5
        torch.manual_seed(0)
        geometry = voxels(grid, 2, fraction=0.1)
        whole = Grid((9, 20, 6), (0.5, 2.0, 0.7), BOUNDARIES["channel"])
        assert geometry.solid is not None
        for solid in (None, geometry.solid):
            expected = Geometry(whole, None if solid is None else solid.expand(2, 9, 20, 6)).wall_distance
            got = Geometry(grid, solid).wall_distance
            torch.testing.assert_close(got.expand_as(expected), expected)
    point = Geometry(Grid((1, 1, 1), (0.5, 0.25, 1.0)))
    assert point.wall_distance.item() == 0.125


# closed forms


def test_taylor_green_is_the_curl_of_its_stream_function() -> None:
    grid = two_pi_box((12, 10, 1))
    x, y, _ = edge_points(grid, 2)
    potential = torch.zeros(3, *grid.shape, dtype=torch.float64)
    potential[2] = x.sin() * y.sin() * grid.spacing[2]
    flux = operators.curl(potential, grid)
    # the curl is the mean over each face, the reference the value in its middle
    half = torch.tensor(grid.spacing, dtype=torch.float64) / 2
    means = torch.stack([half[1].sin() / half[1], half[0].sin() / half[0], torch.tensor(1.0)]).reshape(3, 1, 1, 1)
    torch.testing.assert_close(flux, means * taylor_green(grid, 2), rtol=0, atol=1e-14)
    geometry = Geometry(grid)
    torch.testing.assert_close(project(flux, geometry), flux, rtol=0, atol=1e-13)
    found = vector_potential(flux, geometry)
    torch.testing.assert_close(found.potential, potential, rtol=0, atol=1e-13)
    assert largest(found.harmonic) < 1e-14
    vorticity = operators.vorticity(taylor_green(grid, 2), grid)
    expected = x.sin() * y.sin() * (half[0].sin() / half[0] + half[1].sin() / half[1])
    torch.testing.assert_close(vorticity[2], expected, rtol=0, atol=1e-13)
    assert largest(vorticity[:2]) < 1e-14


def test_spectral_samples_of_taylor_green_have_its_fluxes() -> None:
    grid = two_pi_box((8, 9, 1))
    x, y = (grid.spacing[a] * (torch.arange(grid.shape[a], dtype=torch.float64) + 0.5) for a in range(2))
    x, y = x.reshape(-1, 1, 1), y.reshape(1, -1, 1)
    u = torch.stack([x.sin() * y.cos(), -x.cos() * y.sin(), x.cos() + 0.0 * y])
    flux = conversions.spectral_flux(u, grid)
    half = [h / 2 for h in grid.spacing]
    expected = taylor_green(grid, 2)
    expected[0] *= np.sinc(half[1] / np.pi)
    expected[1] *= np.sinc(half[0] / np.pi)
    expected[2] = u[2] * np.sinc(half[0] / np.pi) * grid.face_areas[2]
    torch.testing.assert_close(flux, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(conversions.spectral_velocity(flux, grid), u, rtol=0, atol=1e-13)


def test_along_a_line_only_the_mean_flow_along_it_is_solenoidal() -> None:
    for axis, shape in enumerate([(6, 1, 1), (1, 6, 1), (1, 1, 6)]):
        geometry = Geometry(box("periodic", shape))
        flux = random_flux(geometry.grid, 2)
        expected = flux.clone()
        expected.select(-4, axis).copy_(flux.select(-4, axis).mean((-3, -2, -1), keepdim=True).expand(2, *shape))
        torch.testing.assert_close(project(flux, geometry), expected, rtol=0, atol=1e-14)
        kept = conserve(flux=flux, geometry=geometry)
        assert largest(kept.select(-4, axis).amax((-3, -2, -1)) - kept.select(-4, axis).amin((-3, -2, -1))) == 0.0


def test_flow_across_a_thin_axis_is_harmonic_in_its_mean_over_a_pore_and_curl_in_the_rest() -> None:
    solid = torch.zeros(6, 5, 1, dtype=torch.bool)
    solid[[0, 3]] = True
    geometry = Geometry(box("periodic", (6, 5, 1)), solid)  # two slabs apart
    flux = torch.zeros(3, 6, 5, 1, dtype=torch.float64)
    flux[2] = torch.randn(6, 5, 1, dtype=torch.float64)
    parts = hodge(flux, geometry)
    expected = torch.zeros_like(flux)
    for slab in (slice(1, 3), slice(4, 6)):
        expected[2, slab] = flux[2, slab].mean()
    torch.testing.assert_close(parts.harmonic, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(parts.curl, geometry.mask(flux) - expected, rtol=0, atol=1e-13)
    assert largest(parts.gradient) < 1e-14
    assert int(harmonic_dimension(geometry)) == 4  # along y and z in each


# projection


@pytest.mark.parametrize("name", BOXES)
def test_projection_is_orthogonal_and_differentiable(name: str) -> None:
    geometry = geometry_of(name, solid=True)
    flux = random_flux(geometry.grid)
    kept = project(flux, geometry, 1e-15)
    taken = geometry.mask(flux) - kept
    assert abs(float(energy_product(kept, taken, geometry))) < 1e-11
    assert largest(operators.div(kept, geometry.grid)) < 1e-12
    # P is linear: the gradient of ⟨w, P f⟩ along any other flux h is ⟨w, P h⟩
    weight, other = random_flux(geometry.grid), random_flux(geometry.grid)
    (slope,) = torch.autograd.grad((weight * project(flux.requires_grad_(), geometry, 1e-15)).sum(), flux)
    expected = (weight * project(other, geometry, 1e-15)).sum()
    torch.testing.assert_close((slope * other).sum(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "shape",
    [(48, 40, 1), (1, 33, 48), (65, 1, 31), (1, 1, 57), (2, 2, 1), (3, 1, 2), (2, 24, 1), (2, 3, 5), (3, 3, 3)]
    + [(2, 2, 32), (3, 16, 17), (9, 2, 15), (5, 7, 11)],
)
def test_multigrid_takes_any_number_of_cells(shape: tuple[int, int, int]) -> None:
    """Round scattered voxels to twelve digits: axes of one, two, three and of odd numbers of cells."""
    for pairs in (BOUNDARIES["periodic"], BOUNDARIES["first"]):
        if all(n > 1 or pair[0] == "periodic" for n, pair in zip(shape, pairs, strict=True)):
            geometry = voxels(Grid(shape, (0.9, 1.0, 1.1), pairs), 2, fraction=0.15)
            done = decompose(random_flux(geometry.grid, 2), geometry, 1e-12)
            assert done.num_iterations <= 14
            assert largest(operators.div(done.solenoidal, geometry.grid)) < 1e-10


def test_multigrid_couples_nothing_along_a_thin_axis() -> None:
    geometry = voxels(box("periodic", (16, 12, 1)))
    conductance = geometry.free_faces * face_conductance(geometry, torch.zeros((), dtype=torch.float64))
    r = torch.randn(geometry.grid.shape, dtype=torch.float64)
    expected = Multigrid(conductance)(r)
    conductance[2] *= 1e6
    assert torch.equal(Multigrid(conductance)(r), expected)


def test_the_direct_solver_and_multigrid_agree_on_a_plane() -> None:
    """A solid slab is a wall: the solver round voxels, against the direct one on the rest of the box."""
    grid = box("periodic", (9, 8, 1))
    solid = torch.zeros(grid.shape, dtype=torch.bool)
    solid[0] = True
    flux = random_flux(grid)
    left = Grid((8, 8, 1), grid.spacing, BOUNDARIES["mixed"][:1] + BOUNDARIES["periodic"][1:])
    expected = project(flux[:, 1:], Geometry(left))
    torch.testing.assert_close(project(flux, Geometry(grid, solid), 1e-15)[:, 1:], expected, rtol=0, atol=1e-12)


# conservation and topology


@pytest.mark.parametrize("name", BOXES)
def test_the_net_of_every_cell_is_zero_bit_for_bit(name: str) -> None:
    grid = BOXES[name]
    for fraction in (0.0, 0.1, 0.3, 0.6):
        geometry = voxels(grid, 3, fraction=fraction) if fraction else Geometry(grid)
        flux = random_flux(grid, 2, 3)
        report = conserve_report(flux=flux, geometry=geometry)
        assert largest(operators.div(report.flux, grid)) == 0.0
        assert largest(torch.where(geometry.open_faces, 0.0, report.flux)) == 0.0
        assert report.correction < 1e-10
        torch.testing.assert_close(report.flux, project(flux, geometry), rtol=0, atol=1e-10)
        for axis, n in enumerate(grid.shape):
            if n == 1:  # what flows across balances whatever it is
                crossing = geometry.mask(flux)[..., axis, :, :, :]
                torch.testing.assert_close(report.flux[..., axis, :, :, :], crossing, rtol=0, atol=1e-12)
    stored = quantise(flux=random_flux(grid, 2), geometry=Geometry(grid))
    assert stored.dtype == torch.float32 and largest(operators.div(stored, grid)) == 0.0


@pytest.mark.parametrize("name", BOXES)
def test_no_tree_climbs_a_thin_axis(name: str) -> None:
    geometry = geometry_of(name, solid=True)
    thin = torch.tensor([n == 1 for n in geometry.grid.shape])
    (forest,) = spanning_forests(geometry)
    for child, parent, face, _ in forest.levels:
        assert not bool((child == parent).any())
        assert not bool(thin[face // geometry.grid.num_cells].any())


@given(
    boundaries=st.sampled_from(["periodic", "channel", "mixed", "first", "duct"]),
    shape=st.tuples(*(st.integers(1, 4) for _ in range(3))),
    thin=st.integers(0, 2),
    fraction=st.floats(0.0, 0.7),
    seed=st.integers(0, 10**6),
)
def test_net_flows_of_thin_boxes_are_those_of_their_homology(
    boundaries: str, shape: tuple[int, int, int], thin: int, fraction: float, seed: int
) -> None:
    torch.manual_seed(seed)
    pairs = (BOUNDARIES | OPEN)[boundaries]
    periodic = [axis for axis in range(3) if pairs[axis][0] == "periodic"]
    cells = [n if axis in periodic else max(n, 2) for axis, n in enumerate(shape)]
    cells[periodic[thin % len(periodic)]] = 1
    nx, ny, nz = cells
    geometry = voxels(box(boundaries, (nx, ny, nz)), fraction=fraction)
    dimension, div = int(harmonic_dimension(geometry)), div_rows(geometry)
    both = np.concatenate([div, net_flow_rows(geometry)])
    if any(sum(geometry.grid.open_sides, ())):
        assert np.linalg.matrix_rank(both) - np.linalg.matrix_rank(div) == dimension
    else:
        spaces, loops, _ = betti(geometry)
        assert int(regions(geometry).max()) + 1 == spaces
        assert rank(both) - rank(div) == dimension <= loops


@pytest.mark.parametrize(
    ("name", "dimension", "expected"),
    [
        ("periodic 1x1x1", 3, (1, 3, 3)),
        ("periodic 5x4x1", 3, (1, 3, 3)),
        ("channel 1x4x7", 2, (1, 2, 1)),
        ("mixed 5x1x7", 1, (1, 1, 0)),
        ("first 1x4x7", 1, (1, 1, 0)),
    ],
)
def test_an_empty_thin_box_has_the_loops_of_a_thick_one(
    name: str, dimension: int, expected: tuple[int, int, int]
) -> None:
    geometry = Geometry(BOXES[name])
    assert int(harmonic_dimension(geometry)) == dimension
    assert betti(geometry) == expected


# resolution


@pytest.mark.parametrize("name", thin_boxes((4, 6, 8)))
def test_a_single_factor_leaves_thin_axes_alone(name: str) -> None:
    grid = thin_boxes((4, 6, 8))[name]
    flux = conserve(flux=random_flux(grid, 2), geometry=Geometry(grid))
    coarse, fine = coarsen(Geometry(grid), 2).grid, refine(Geometry(grid), 2).grid
    assert coarse.shape == tuple(n if n == 1 else n // 2 for n in grid.shape)
    assert fine.shape == tuple(n if n == 1 else n * 2 for n in grid.shape)
    assert fine.lengths == pytest.approx(grid.lengths) and coarse.lengths == pytest.approx(grid.lengths)
    restricted, prolonged = restrict(flux, grid, 2), prolong(flux, grid)
    assert largest(operators.div(restricted, coarse)) == 0.0
    assert largest(operators.div(prolonged, fine)) < 1e-14
    if not any(sum(grid.open_sides, ())):
        torch.testing.assert_close(restrict(prolonged, fine, 2), flux, rtol=0, atol=0)
    # the same in 3D, where the doubled copies of a cell are put together again
    whole = extruded_geometry(Geometry(grid)).grid
    i, j, k = (2 if n == 1 else 1 for n in grid.shape)
    doubled = prolong(extruded(flux, grid), whole)
    doubled = restrict(doubled, refine(Geometry(whole), 2).grid, (i, j, k))
    torch.testing.assert_close(extruded(prolonged, fine), doubled, rtol=0, atol=1e-13)
    x, y, z = (n if n == 1 else 2 for n in grid.shape)
    torch.testing.assert_close(
        extruded(restricted, coarse), restrict(extruded(flux, grid), whole, (x, y, z)), rtol=0, atol=1e-13
    )


def test_a_periodic_axis_may_coarsen_to_one_cell_and_a_walled_one_may_not() -> None:
    grid = box("channel", (4, 6, 8))
    flux = conserve(flux=random_flux(grid), geometry=Geometry(grid))
    coarse = coarsen(Geometry(grid), (4, 3, 2)).grid
    assert coarse.shape == (1, 2, 4)
    plane = restrict(flux, grid, (4, 3, 2))
    assert largest(operators.div(plane, coarse)) == 0.0
    torch.testing.assert_close(plane[0].sum(), flux[0, 0].sum())
    with pytest.raises(ValueError, match="got 1 along z"):
        coarsen(Geometry(grid), (1, 1, 8))
    with pytest.raises(ValueError, match=r"Expected a factor that divides the grid \(1, 2, 4\), got \(2, 1, 1\)"):
        restrict(plane, coarse, (2, 1, 1))


def test_a_plane_of_voxels_extrudes_to_columns() -> None:
    geometry = voxels(box("periodic", (4, 6, 1)))
    columns = refine(geometry, (1, 1, 5))
    assert columns.grid.shape == (4, 6, 5) and columns.grid.lengths == pytest.approx(geometry.grid.lengths)
    assert torch.equal(columns.fluid, geometry.fluid.expand(4, 6, 5))
    fine = refine(geometry, 2)
    flux = prolong(project(random_flux(geometry.grid), geometry), geometry.grid, 2, fine)
    assert largest(operators.div(flux, fine.grid)) < 1e-11 and torch.equal(fine.mask(flux), flux)
