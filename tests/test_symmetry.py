"""Symmetries of the staggered box: exact inverses, and the complex before and after."""

import math

import pytest
import torch
from reference import BOUNDARIES, OPEN, abc_flux, box, random_flux, random_geometry, two_pi_box
from torch import Tensor

from latentphys import exact, operators
from latentphys.grid import Geometry, Grid
from latentphys.symmetry import Placement, reflect, reflect_geometry, rotate, rotate_geometry, shift, shift_geometry

PLANES = [(0, 1), (1, 0), (1, 2), (2, 0)]
PLACEMENTS: list[Placement] = ["flux", "scalar", "vector", "potential"]


def flow(geometry: Geometry, *batch: int) -> Tensor:
    """An admissible flux of integers that is not solenoidal."""
    return geometry.mask(torch.randint(-999, 1000, (*batch, 3, *geometry.grid.shape)).double())


def field(grid: Grid, placement: Placement) -> Tensor:
    return random_flux(grid, 2) if placement != "scalar" else torch.randn(2, *grid.shape, dtype=torch.float64)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_a_reflection_is_its_own_inverse_and_four_turns_are_none(boundaries: str, placement: Placement) -> None:
    geometry = random_geometry(box(boundaries))
    x = field(geometry.grid, placement)
    for axis in range(3):
        mirrored, image = reflect(x, geometry, axis, placement), reflect_geometry(geometry, axis)
        assert not torch.equal(mirrored, x)
        assert torch.equal(reflect(mirrored, image, axis, placement), x)
        back = reflect_geometry(image, axis)
        assert back.grid == geometry.grid and torch.equal(back.fluid, geometry.fluid)
    for plane in PLANES:
        turned, image = x, geometry
        for quarter in range(4):
            assert quarter == 0 or turned.shape != x.shape or not torch.equal(turned, x)
            turned, image = rotate(turned, image, plane, placement), rotate_geometry(image, plane)
        assert torch.equal(turned, x)
        assert image.grid == geometry.grid and torch.equal(image.fluid, geometry.fluid)
        there, at = rotate(x, geometry, plane, placement), rotate_geometry(geometry, plane)
        assert torch.equal(rotate(there, at, plane[::-1], placement), x)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_the_net_flux_moves_with_the_cells(boundaries: str) -> None:
    geometry = random_geometry(box(boundaries))
    flux = flow(geometry, 2)
    net = operators.div(flux, geometry.grid)
    for axis in range(3):
        image = reflect_geometry(geometry, axis)
        after = operators.div(reflect(flux, geometry, axis), image.grid)
        assert torch.equal(after, reflect(net, geometry, axis, "scalar"))
    for plane in PLANES:
        image = rotate_geometry(geometry, plane)
        after = operators.div(rotate(flux, geometry, plane), image.grid)
        assert torch.equal(after, rotate(net, geometry, plane, "scalar"))


@pytest.mark.parametrize("boundaries", ["periodic", "channel", "mixed"])
def test_reflecting_any_floating_point_flux_keeps_its_nets_bit_for_bit(boundaries: str) -> None:
    geometry = random_geometry(box(boundaries))
    flux = geometry.mask(random_flux(geometry.grid))
    for axis in range(3):
        after = operators.div(reflect(flux, geometry, axis), reflect_geometry(geometry, axis).grid)
        assert torch.equal(after, operators.div(flux, geometry.grid).flip(axis))


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_a_net_of_zero_stays_zero_and_walls_and_solids_stay_closed(boundaries: str) -> None:
    geometry = random_geometry(box(boundaries), fraction=0.2)
    flux = exact.conserve(flux=random_flux(geometry.grid), geometry=geometry)
    assert float(flux.abs().amax()) > 0.1
    images = [(reflect(flux, geometry, a), reflect_geometry(geometry, a)) for a in range(3)]
    images += [(rotate(flux, geometry, p), rotate_geometry(geometry, p)) for p in PLANES]
    for moved, image in images:
        assert bool((operators.div(moved, image.grid) == 0.0).all())
        assert bool((moved[~image.open_faces] == 0.0).all())
        torch.testing.assert_close(
            operators.kinetic_energy(moved, image.grid), operators.kinetic_energy(flux, geometry.grid)
        )


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_open_faces_and_wall_distances_move_with_the_geometry(boundaries: str) -> None:
    geometry = random_geometry(box(boundaries))
    ones = geometry.open_faces.double()
    for axis in range(3):
        image = reflect_geometry(geometry, axis)
        assert torch.equal(reflect(ones, geometry, axis).abs().bool(), image.open_faces)
        torch.testing.assert_close(geometry.wall_distance.flip(axis), image.wall_distance)
    for plane in PLANES:
        image = rotate_geometry(geometry, plane)
        assert torch.equal(rotate(ones, geometry, plane).abs().bool(), image.open_faces)
        moved = rotate(geometry.wall_distance, geometry, plane, "scalar")
        torch.testing.assert_close(moved, image.wall_distance)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_curl_commutes_bit_for_bit(boundaries: str) -> None:
    geometry = Geometry(box(boundaries))
    grid, potential = geometry.grid, random_flux(geometry.grid, 2)
    flux = operators.curl(potential, grid)
    for axis in range(3):
        image = reflect_geometry(geometry, axis)
        after = operators.curl(reflect(potential, geometry, axis, "potential"), image.grid)
        assert torch.equal(after, reflect(flux, geometry, axis))
    for plane in PLANES:
        image = rotate_geometry(geometry, plane)
        after = operators.curl(rotate(potential, geometry, plane, "potential"), image.grid)
        assert torch.equal(after, rotate(flux, geometry, plane))


def test_gradients_and_vorticity_commute_where_they_are_stored() -> None:
    geometry = Geometry(box("periodic"))
    grid, flux = geometry.grid, random_flux(geometry.grid)
    pressure, omega = torch.randn(grid.shape, dtype=torch.float64), operators.vorticity(flux, grid)
    centres = operators.cell_velocity(flux, grid)
    for axis in range(3):
        image, mirrored = reflect_geometry(geometry, axis).grid, reflect(flux, geometry, axis)
        assert torch.equal(
            operators.grad(pressure.flip(axis), image), reflect(operators.grad(pressure, grid), geometry, axis)
        )
        torch.testing.assert_close(operators.vorticity(mirrored, image), reflect(omega, geometry, axis, "potential"))
        torch.testing.assert_close(operators.cell_velocity(mirrored, image), reflect(centres, geometry, axis, "vector"))
    for plane in PLANES:
        image, turned = rotate_geometry(geometry, plane).grid, rotate(flux, geometry, plane)
        torch.testing.assert_close(operators.vorticity(turned, image), rotate(omega, geometry, plane, "potential"))
        torch.testing.assert_close(operators.cell_velocity(turned, image), rotate(centres, geometry, plane, "vector"))


def test_a_flow_turns_the_way_it_is_said_to() -> None:
    grid = Grid((4, 6, 5), (0.5, 0.25, 1.0))
    geometry = Geometry(grid)
    u = torch.zeros(3, *grid.shape, dtype=torch.float64)
    u[0] = 1.0
    image = rotate_geometry(geometry, (0, 1))
    assert image.grid == Grid((6, 4, 5), (0.25, 0.5, 1.0))
    turned = operators.mean_velocity(rotate(operators.flux_of(u, grid), geometry, (0, 1)), image.grid)
    assert turned.tolist() == [0.0, 1.0, 0.0]
    spot = torch.zeros(grid.shape)
    spot[3, 0, 2] = 1.0  # far along x, low in y: after the turn far along y, and y's low end is x's high one
    assert rotate(spot, geometry, (0, 1), "scalar").nonzero().tolist() == [[5, 3, 2]]
    walls = Geometry(box("mixed"))
    assert reflect_geometry(walls, 0).grid.boundaries[0] == ("no_slip", "free_slip")
    assert rotate_geometry(walls, (0, 1)).grid.boundaries[:2] == (("periodic",) * 2, ("free_slip", "no_slip"))


def test_a_flow_of_closed_form_has_the_mirror_image_of_closed_form() -> None:
    """sin x along x, odd in x, is its own mirror image; cos x changes sign."""
    grid = two_pi_box((8, 8, 8))
    x = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    u = torch.zeros(3, 8, 8, 8, dtype=torch.float64)
    u[0] = x.sin().reshape(8, 1, 1)
    torch.testing.assert_close(reflect(u, Geometry(grid), 0), u)
    u[0] = x.cos().reshape(8, 1, 1)
    torch.testing.assert_close(reflect(u, Geometry(grid), 0), -u)


def test_a_reflection_changes_the_handedness_of_a_flow_and_a_turn_does_not() -> None:
    grid = two_pi_box((8, 8, 8))

    def helicity(flux: Tensor) -> float:
        return float((operators.cell_velocity(flux, grid) * operators.vorticity(flux, grid)).sum())

    flux, geometry = abc_flux(grid), Geometry(grid)
    assert helicity(flux) > 100
    assert helicity(reflect(flux, geometry, 2)) < -100
    assert helicity(rotate(flux, geometry, (1, 2))) > 100


def test_shifts_move_cells_and_their_solids() -> None:
    geometry = random_geometry(box("channel"))
    grid, flux = geometry.grid, geometry.mask(random_flux(geometry.grid))
    moved, image = shift(flux, grid, (2, -1, 0)), shift_geometry(geometry, (2, -1, 0))
    assert torch.equal(moved[:, 2, 0], flux[:, 0, 1]) and torch.equal(image.fluid[2, 0], geometry.fluid[0, 1])
    assert torch.equal(shift(geometry.open_faces, grid, (2, -1, 0)), image.open_faces)
    assert torch.equal(operators.div(moved, grid), shift(operators.div(flux, grid), grid, (2, -1, 0)))
    assert torch.equal(shift(moved, grid, (-2, 1, 0)), flux)


def test_a_batch_of_geometries_is_moved_sample_by_sample() -> None:
    geometry = random_geometry(box("first"), 2)
    for one, image in (
        (reflect_geometry(geometry, 1), lambda g: reflect_geometry(g, 1)),
        (rotate_geometry(geometry, (0, 2)), lambda g: rotate_geometry(g, (0, 2))),
        (shift_geometry(geometry, (3, 0, 0)), lambda g: shift_geometry(g, (3, 0, 0))),
    ):
        for sample in range(2):
            assert torch.equal(one.fluid[sample], image(geometry[sample]).fluid)


def test_what_cannot_be_moved_is_refused(unchecked: None) -> None:
    geometry = Geometry(box("channel"))
    x = random_flux(geometry.grid)
    with pytest.raises(ValueError, match="Expected a shift along periodic axes, got 2 cells along z"):
        shift(x, geometry.grid, (1, 0, 2))
    with pytest.raises(ValueError, match="Expected a number of cells for each of three axes"):
        shift(x, geometry.grid, (1, 0))
    with pytest.raises(ValueError, match="Expected an axis of 0, 1 or 2, got 3"):
        reflect(x, geometry, 3)
    with pytest.raises(ValueError, match="Expected an axis of 0, 1 or 2, got -1"):
        reflect_geometry(geometry, -1)
    with pytest.raises(ValueError, match="Expected a plane of two different axes of 0, 1 and 2, got 1, 1"):
        rotate(x, geometry, (1, 1))
    with pytest.raises(ValueError, match="Expected a plane of two different axes of 0, 1 and 2, got 1, 4"):
        rotate_geometry(geometry, (1, 4))
    with pytest.raises(ValueError, match="Expected a placement of flux | scalar | vector | potential, got 'edge'"):
        reflect(x, geometry, 0, "edge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected a placement"):
        rotate(x, geometry, (0, 1), "edge")  # type: ignore[arg-type]
    duct = Grid((4, 4, 4), (1.0, 1.0, 1.0), OPEN["duct"])
    with pytest.raises(ValueError, match="Expected walls or periodic sides on axis x, got .*'inflow', 'outflow'"):
        reflect(random_flux(duct), Geometry(duct), 0)
    with pytest.raises(ValueError, match="Expected walls or periodic sides on axis x"):
        rotate(random_flux(duct), Geometry(duct), (1, 0))
    for move in (
        lambda g: reflect_geometry(g, 2),
        lambda g: rotate_geometry(g, (1, 2)),
        lambda g: shift_geometry(g, (0, 0, 1)),
    ):
        with pytest.raises(ValueError, match="Expected a box without a prescribed inflow, got one on x-"):
            move(Geometry(duct, None, {"x-": 1.0}))


def test_beside_an_open_side_other_axes_can_be_reflected() -> None:
    duct = Geometry(Grid((4, 5, 6), (1.0, 0.5, 0.7), OPEN["duct"]))
    flux = flow(duct)
    for axis in (1, 2):
        mirrored = reflect(flux, duct, axis)
        assert torch.equal(operators.div(mirrored, duct.grid), operators.div(flux, duct.grid).flip(axis))
        high, before = operators.high_faces(mirrored, duct.grid)[0], operators.high_faces(flux, duct.grid)[0]
        torch.testing.assert_close(high, before.flip(axis))
