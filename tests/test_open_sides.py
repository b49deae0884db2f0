"""Boxes that something flows through: against the whole complex written out, its algebra, inlets, and second order."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from reference import OPEN, random_flux, random_geometry
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from latentphys import operators
from latentphys.grid import SIDES, Boundaries, Boundary, Geometry, Grid
from latentphys.hodge import energy_product
from latentphys.inflow import inflow_flux, through_sides
from latentphys.pressure import face_conductance
from latentphys.projection import project

Pair = tuple[Boundary, Boundary]
P: Pair = ("periodic", "periodic")
W: Pair = ("no_slip", "free_slip")
ALL: dict[str, Boundaries] = OPEN | {
    "everywhere": (("inflow", "inflow"),) * 3,
    "pass": (("inflow", "inflow"), W, P),
    "elbow": (("inflow", "no_slip"), ("free_slip", "inflow"), ("outflow", "no_slip")),
}
CASES = list(itertools.product(ALL, (False, True), (False, True)))
each_case = pytest.mark.parametrize(("name", "solid", "given"), CASES)


def random_inflow(grid: Grid, *batch: int) -> dict[str, float | Tensor]:
    """A profile on each inflow side."""
    names = zip(SIDES, sum(grid.boundaries, ()), strict=True)
    sides = [side for side, name in names if name == "inflow"]
    return {s: torch.randn(*batch, *at_side(torch.zeros(grid.shape), s).shape, dtype=torch.float64) for s in sides}


def geometry_of(
    name: str, solid: bool, given: bool, *batch: int, shape: tuple[int, int, int] = (5, 4, 6), fraction: float = 0.4
) -> Geometry:
    grid = Grid(shape, (0.7, 1.3, 0.4), ALL[name])
    inflow = random_inflow(grid) if given else {}
    return Geometry(grid, random_geometry(grid, *batch, fraction=fraction).solid if solid else None, inflow)


def at_side(x: Tensor, side: str) -> Tensor:
    """Of values in cells those beside a side; of a flux, those on the low faces of these cells along the axis."""
    axis, high = divmod(SIDES.index(side), 2)
    return x.select(axis - 3, -high)


def largest(x: Tensor) -> float:
    return float(x.abs().amax())


def balance(flux: Tensor, geometry: Geometry) -> Tensor:
    """Net of every cell, with what flows through the high sides of the box [m³/s]."""
    net = operators.stored_div(flux, geometry.grid)
    for side, through in through_sides(flux, geometry).items():
        if side.endswith("+"):
            at_side(net, side).add_(through)
    return net


class Face(NamedTuple):
    """A face of a box: its place in the flattened flux (None where no array holds it) and the cells beside it."""

    stored: int | None
    cells: list[tuple[int, float]]
    side: str
    area: float
    distance: float


def faces_of(grid: Grid) -> Iterator[Face]:
    """Every face of a box, those of high sides too."""
    cells = np.arange(grid.num_cells).reshape(grid.shape)
    for axis, (n, h, (low, _)) in enumerate(zip(grid.shape, grid.spacing, grid.boundaries, strict=True)):
        for i in range(n if low == "periodic" else n + 1):
            for below, above in zip(cells.take(i - 1, axis).flat, cells.take(i % n, axis).flat, strict=True):
                side = "" if low == "periodic" or 0 < i < n else SIDES[2 * axis + (i == n)]
                beside = [(c, s) for c, s, end in ((int(below), 1.0, "-"), (int(above), -1.0, "+")) if end not in side]
                index = axis * grid.num_cells + int(above) if i < n else None
                yield Face(index, beside, side, float(np.prod(grid.spacing)) / h, h / 2 if side else h)


def pore_spaces(num_cells: int, faces: list[Face]) -> np.ndarray:
    """A number for each cell, the same for all that open faces join."""
    number = np.arange(num_cells)
    while True:
        before = number.copy()
        for face in faces:
            inside = [c for c, _ in face.cells]
            number[inside] = number[inside].min()
        if (number == before).all():
            return number


def dense_projection(flux: Tensor, geometry: Geometry) -> Tensor:
    """The admissible flux nearest to the one given: min Σ (F − F₀)² distance / area over *all* faces."""
    grid, fluid = geometry.grid, geometry.fluid.flatten().numpy()
    names = dict(zip(SIDES, sum(grid.boundaries, ()), strict=True))
    faces = [f for f in faces_of(grid) if all(fluid[c] for c, _ in f.cells)]
    faces = [f for f in faces if not f.side or names[f.side] in ("inflow", "outflow")]
    divergence = np.zeros((grid.num_cells, len(faces)))
    for j, face in enumerate(faces):
        for cell, sign in face.cells:
            divergence[cell, j] += sign
    given = np.array([0.0 if f.stored is None else float(flux.flatten()[f.stored]) for f in faces])

    # What is prescribed replaces what the flux says; where it cannot get out it is lowered.
    fixed = np.array([f.side in geometry.inflow for f in faces])
    for side, profile in geometry.inflow.items():
        mine = [j for j, f in enumerate(faces) if f.side == side]
        velocity = np.zeros(grid.shape)
        np.moveaxis(velocity, SIDES.index(side) // 2, 0)[...] = np.asarray(profile)
        given[mine] = [velocity.flat[faces[j].cells[0][0]] * faces[j].area for j in mine]
    number = pore_spaces(grid.num_cells, faces)
    for pore in np.unique(number):
        inlets = [j for j, f in enumerate(faces) if fixed[j] and number[f.cells[0][0]] == pore]
        openings = [f for j, f in enumerate(faces) if f.side and not fixed[j] and number[f.cells[0][0]] == pore]
        if inlets and not openings:
            area = np.array([faces[j].area for j in inlets])
            given[inlets] -= area * given[inlets].sum() / area.sum()
    inward = np.array([-1.0 if fixed[j] and f.side.endswith("+") else 1.0 for j, f in enumerate(faces)])
    given *= inward

    # What no array stores closes the balance of its cell.
    conductance = np.array([f.area / f.distance for f in faces])
    implied = np.array([f.stored is None for f in faces]) & ~fixed
    share = np.where(implied, conductance, 0.0) * np.abs(divergence)
    share /= np.maximum(share.sum(1, keepdims=True), 1e-300)
    given -= np.einsum("cf,c->f", share, divergence @ given)

    free = np.where(fixed, 0.0, conductance)
    laplacian = divergence * free @ divergence.T
    result = given - free * (divergence.T @ (np.linalg.pinv(laplacian, rcond=1e-11) @ (divergence @ given)))
    assert np.abs(divergence @ result).max() < 1e-11
    out = torch.zeros(3 * grid.num_cells, dtype=torch.float64)
    for face, value in zip(faces, result, strict=True):
        if face.stored is not None:
            out[face.stored] = value
    return out.reshape(3, *grid.shape)


@each_case
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 2, 3)])
def test_it_is_the_least_squares_solution_of_the_whole_complex(
    name: str, solid: bool, given: bool, shape: tuple[int, int, int]
) -> None:
    geometry = geometry_of(name, solid, given, shape=shape)
    flux = random_flux(geometry.grid)
    torch.testing.assert_close(project(flux, geometry), dense_projection(flux, geometry), rtol=0, atol=1e-10)


@each_case
def test_it_is_an_orthogonal_projection(name: str, solid: bool, given: bool) -> None:
    """Of what the prescribed inflow leaves free."""
    geometry = geometry_of(name, solid, given, 2)
    lift = inflow_flux(geometry)
    flux, other = (torch.where(geometry.free_faces, random_flux(geometry.grid, 2), lift) for _ in range(2))
    once, again = project(flux, geometry), project(other, geometry)
    assert largest(once) > 0.3
    assert largest(operators.div(once, geometry.grid)) < 1e-10 and largest(balance(once, geometry)) < 1e-10
    assert bool((once[~geometry.open_faces.expand_as(once)] == 0.0).all())
    torch.testing.assert_close(project(once, geometry), once, rtol=0, atol=1e-10)
    left = energy_product(once - lift, other - lift, geometry)
    torch.testing.assert_close(left, energy_product(flux - lift, again - lift, geometry), rtol=0, atol=1e-9)
    assert largest(energy_product(flux - once, again - lift, geometry)) < 1e-9


@each_case
def test_the_lift_has_the_least_energy_of_all_flows_with_its_inflow(name: str, solid: bool, given: bool) -> None:
    """It is orthogonal to all that can be added to it, what the open high sides carry included."""
    geometry = geometry_of(name, solid, given)
    lift, other = inflow_flux(geometry), project(random_flux(geometry.grid), geometry)
    assert largest(balance(lift, geometry)) < 1e-11
    product = (lift * (other - lift) / face_conductance(geometry, lift))[geometry.free_faces].sum()
    out, other_out = through_sides(lift, geometry), through_sides(other, geometry)
    for side, end in zip(SIDES, sum(geometry.ends, ()), strict=True):
        if side.endswith("+") and end == "open":
            across = 2 * geometry.grid.conductances[SIDES.index(side) // 2]
            product += (out[side] * (other_out[side] - out[side]) / across).sum()
    assert largest(product) < 1e-10
    assert given or not bool(lift.any())


@pytest.mark.parametrize("name", OPEN)
def test_a_pressure_that_is_zero_on_the_open_sides_drives_nothing_that_is_kept(name: str) -> None:
    grid = Grid((5, 4, 6), (0.7, 1.3, 0.4), OPEN[name])
    geometry = random_geometry(grid)
    scalar = torch.randn(grid.shape, dtype=torch.float64)
    for axis, (_, high) in enumerate(grid.open_sides):
        if high:
            scalar.select(axis, -1).zero_()  # the gradient beyond it is not stored
    gradient = operators.grad(scalar, grid) * grid.per_face(grid.face_areas, scalar)
    gradient = gradient / grid.per_face(grid.spacing, scalar)
    for axis, (low, _) in enumerate(grid.open_sides):
        if low:
            gradient[axis].select(axis, 0).mul_(2)
    closed_last = operators.stored_div(geometry.mask(gradient), grid) - operators.div(geometry.mask(gradient), grid)
    assert largest(closed_last) > 0.1
    assert largest(operators.div(project(gradient, geometry), grid)) < 1e-10


@pytest.mark.parametrize("name", OPEN)
def test_curls_and_flows_through_are_kept(name: str) -> None:
    grid = Grid((5, 4, 6), (0.7, 1.3, 0.4), OPEN[name])
    mean = torch.tensor([1.0, -2.0, 3.0]).double() * torch.tensor(grid.through)
    flux = operators.curl(random_flux(grid), grid) + mean.reshape(3, 1, 1, 1)
    assert largest(operators.div(flux, grid)) < 1e-14
    torch.testing.assert_close(project(flux, Geometry(grid)), flux, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "solid"), [("duct", True), ("through", True), ("elbow", False), ("pass", False)])
def test_gradients(name: str, solid: bool) -> None:
    geometry = geometry_of(name, solid, given=name != "through", shape=(2, 3, 2))
    flux = random_flux(geometry.grid).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return project(x, geometry, tol=1e-14)

    assert gradcheck(function, (flux,))
    assert gradgradcheck(lambda x: function(x).square(), (flux,), fast_mode=True)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_its_samples_also_over_time(name: str) -> None:
    solid = random_geometry(Grid((5, 4, 6), (0.7, 1.3, 0.4), ALL[name]), 3).solid
    grid = Grid((5, 4, 6), (0.7, 1.3, 0.4), ALL[name])
    geometry = Geometry(grid, solid, random_inflow(grid, 3))
    flux = random_flux(grid, 2, 3)
    together = project(flux, geometry)
    sides = through_sides(together, geometry)
    for time, i in itertools.product(range(2), range(3)):
        alone = project(flux[time, i], geometry[i])
        torch.testing.assert_close(together[time, i], alone, rtol=0, atol=1e-11)
        for side, through in through_sides(alone, geometry[i]).items():
            torch.testing.assert_close(sides[side][time, i], through, rtol=0, atol=1e-11)


@each_case
def test_single_precision(name: str, solid: bool, given: bool) -> None:
    geometry = geometry_of(name, solid, given)
    flux = random_flux(geometry.grid)
    single = project(flux.float(), geometry)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), project(flux, geometry), rtol=0, atol=2e-5)


def duct(*pairs: Pair, shape: tuple[int, int, int] = (6, 5, 4)) -> Grid:
    x, y, z = pairs
    return Grid(shape, (0.5, 0.7, 1.1), (x, y, z))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("end", ["-", "+"])
@pytest.mark.parametrize("across", [W, P])
def test_uniform_inflow_into_an_empty_duct_flows_through_it_uniformly(axis: int, end: str, across: Pair) -> None:
    pairs = [across, across, across]
    pairs[axis] = ("inflow", "outflow") if end == "-" else ("outflow", "inflow")
    grid = duct(*pairs)
    geometry = Geometry(grid, None, {"xyz"[axis] + end: 0.1})
    expected = torch.zeros(3, *grid.shape, dtype=torch.float64)
    expected[axis] = (0.1 if end == "-" else -0.1) * grid.face_areas[axis]
    torch.testing.assert_close(project(torch.zeros_like(expected), geometry), expected, rtol=0, atol=1e-15)
    for through in through_sides(expected, geometry).values():
        torch.testing.assert_close(through, expected[axis].select(axis, 0), rtol=0, atol=1e-15)


@pytest.mark.parametrize("profile", [0.1, -3.7e-9, "profile", "single", "integers"])
@pytest.mark.parametrize("solid", [False, True])
@pytest.mark.parametrize("side", ["x-", "x+"])
def test_what_is_prescribed_flows_in_and_out_again(side: str, solid: bool, profile: float | str) -> None:
    ends: Pair = ("inflow", "outflow") if side == "x-" else ("outflow", "inflow")
    grid = duct(ends, ("no_slip", "outflow"), P)
    values = {
        "profile": torch.randn(5, 4, dtype=torch.float64),
        "single": torch.randn(5, 4),
        "integers": torch.arange(20).reshape(5, 4),
    }
    velocity = values[profile] if isinstance(profile, str) else profile
    # A layer of free cells, so that every inlet has a way out.
    voxels = torch.rand(grid.shape) < 0.3
    voxels[[1, -2]] = False
    geometry = Geometry(grid, voxels if solid else None, {side: velocity})
    flux = project(random_flux(grid), geometry)
    sides = through_sides(flux, geometry)
    inward = torch.as_tensor(velocity, dtype=torch.float64) * grid.face_areas[0] * at_side(geometry.fluid, side)
    sign = 1.0 if side == "x-" else -1.0
    torch.testing.assert_close(sides[side], sign * inward.expand(5, 4), rtol=1e-14, atol=0)
    out = (sides["x+"].sum() if side == "x-" else -sides["x-"].sum()) + sides["y+"].sum()
    # The projection leaves 1e-12 of ‖net‖₂ ≈ 30, and these are sums over 120 cells.
    torch.testing.assert_close(out, sides[side].sum() * sign, rtol=0, atol=3e-10)
    assert largest(balance(flux, geometry)) < 3e-11


def test_what_flows_into_a_solid_cell_is_nothing_and_a_dead_end_takes_nothing() -> None:
    """A plate behind the inlet with one hole in it, and a chamber before it without one."""
    grid = duct(("inflow", "outflow"), W, W, shape=(6, 5, 4))
    solid = torch.zeros(grid.shape, dtype=torch.bool)
    solid[2] = True
    solid[:2, 3] = True  # a wall between two chambers, y < 3 and y = 4
    solid[2, 1, 2] = False
    geometry = Geometry(grid, solid, {"x-": 2.0})
    flux = project(torch.zeros(3, *grid.shape, dtype=torch.float64), geometry)
    inlet, area = through_sides(flux, geometry)["x-"], grid.face_areas[0]
    assert bool((inlet[3:] == 0.0).all()) and largest(flux[:, :2, 4]) < 1e-11
    assert bool((inlet[:3] == 2.0 * area).all())
    torch.testing.assert_close(float(flux[0, 2, 1, 2]), 12 * 2.0 * area)
    torch.testing.assert_close(float(through_sides(flux, geometry)["x+"].sum()), 24 * area)


@pytest.mark.parametrize("velocity", [1.0, 1e30, 1e-30, 0.0])
def test_a_pore_that_only_inlets_reach_is_at_rest(velocity: float) -> None:
    """One cell in the corner of three inlets, where even the rounding of a balance has nowhere to go."""
    grid = duct(("inflow", "inflow"), ("outflow", "inflow"), ("no_slip", "inflow"))
    solid = torch.ones(grid.shape, dtype=torch.bool)
    solid[-1, -1, -1] = False
    solid[0, 1, :2] = False
    inflow: dict[str, float | Tensor] = {"x-": 1.1 * velocity, "x+": 0.3 * velocity, "y+": 0.3 * velocity}
    geometry = Geometry(grid, solid, inflow | {"z+": 0.3 * velocity})
    flux = project(torch.zeros(3, *grid.shape, dtype=torch.float64), geometry)
    assert not bool(flux.any()) and not any(bool(side.any()) for side in through_sides(flux, geometry).values())


def test_different_inflows_of_a_single_cell_flow_past_each_other() -> None:
    """Where the balance is all that a pore space can keep, its rounding has nowhere to go."""
    grid = duct(("inflow", "inflow"), ("no_slip", "inflow"), ("no_slip", "inflow"))
    solid = torch.ones(grid.shape, dtype=torch.bool)
    solid[-1, -1, -1] = False
    geometry = Geometry(grid, solid, {"x+": 0.1, "y+": 0.7, "z+": -0.35})
    flux = project(random_flux(grid), geometry)
    area = torch.tensor(grid.face_areas).double()
    inward = area * torch.tensor([0.1, 0.7, -0.35]).double()
    inward = inward - area * inward.sum() / area.sum()
    sides = through_sides(flux, geometry)
    for side, expected in zip(("x+", "y+", "z+"), inward, strict=True):
        torch.testing.assert_close(sides[side][-1, -1], -expected, rtol=1e-6, atol=0)
    assert not bool(flux.any())


@pytest.mark.parametrize("solid", [False, True])
def test_inflow_from_both_ends_of_a_closed_box_is_lowered_alike(solid: bool) -> None:
    grid = duct(("inflow", "inflow"), W, P)
    low, high = torch.rand(5, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    voxels = torch.zeros(grid.shape, dtype=torch.bool)
    voxels[2:4, 1:3] = voxels[0, 2] = solid
    geometry = Geometry(grid, voxels, {"x-": low, "x+": high})
    fluid = torch.stack([at_side(geometry.fluid, s) for s in ("x-", "x+")])
    inward = torch.stack([low, high]) * fluid
    expected = (inward - inward.sum() / fluid.sum() * fluid) * grid.face_areas[0]
    sides = through_sides(project(random_flux(grid), geometry), geometry)
    torch.testing.assert_close(torch.stack([sides["x-"], -sides["x+"]]), expected, rtol=0, atol=1e-15)
    assert abs(float(sides["x-"].sum() - sides["x+"].sum())) < 1e-14


@pytest.mark.parametrize("solid", [False, True])
def test_an_inflow_that_is_uniform_but_for_its_last_digits_is_balanced_to_the_last_of_them(solid: bool) -> None:
    """Elsewhere the rounding of the large part would be all that is left to balance."""
    grid = duct(("inflow", "no_slip"), W, P)
    profile = 1 + 1e-11 * torch.randn(5, 4, dtype=torch.float64)
    voxels = torch.zeros(grid.shape, dtype=torch.bool)
    voxels[2:4, 1:3] = solid
    inlet = inflow_flux(Geometry(grid, voxels, {"x-": profile}))[0, 0]
    torch.testing.assert_close(inlet / grid.face_areas[0], profile - profile.mean(), rtol=0, atol=1e-15)
    assert abs(float(inlet.sum())) < 1e-13 * largest(inlet)


def test_every_sample_has_its_own_profile_also_in_empty_boxes() -> None:
    grid = duct(("inflow", "outflow"), W, P)
    profiles = torch.rand(3, 5, 4, dtype=torch.float64)
    empty = Geometry(grid, torch.zeros(3, *grid.shape, dtype=torch.bool), {"x-": profiles})
    flux = random_flux(grid, 3)
    together = project(flux, empty)
    for i in range(3):
        alone = Geometry(grid, None, {"x-": profiles[i]})
        torch.testing.assert_close(together[i], project(flux[i], alone), rtol=0, atol=1e-11)
    assert empty[1].is_empty and empty[1:].batch_shape == (2,)


@pytest.mark.parametrize("magnitude", [1e-250, 1e-30, 1e30, 1e250])
@pytest.mark.parametrize("side", ["x-", "x+"])
@pytest.mark.parametrize("solid", [False, True])
def test_the_size_of_the_inflow_does_not_matter(solid: bool, side: str, magnitude: float) -> None:
    ends: Pair = ("inflow", "outflow") if side == "x-" else ("outflow", "inflow")
    grid = duct(ends, W, P)
    voxels = random_geometry(grid, fraction=0.2).solid if solid else None
    profile = torch.rand(5, 4, dtype=torch.float64)
    one = inflow_flux(Geometry(grid, voxels, {side: profile}))
    scaled = inflow_flux(Geometry(grid, voxels, {side: profile * magnitude}))
    torch.testing.assert_close(scaled / magnitude, one, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("inflow", "message"),
    [
        ({"x+": 1.0}, r"Expected a velocity for an inflow side \(x- \| y\+\), got one for 'x\+'"),
        ({"left": 1.0}, r"Expected a velocity for an inflow side \(x- \| y\+\), got one for 'left'"),
        ({"x-": torch.zeros(4, 5)}, r"a number or a profile of shape \(…, \(5, 4\)\) on x-, got \(4, 5\)"),
        ({"x-": torch.zeros(4)}, r"a number or a profile of shape \(…, \(5, 4\)\) on x-, got \(4,\)"),
        ({"x-": torch.zeros(2, 5, 4)}, r"the batch axes \(3,\) of the solid before the profile on x-, got \(2,\)"),
        ({"y+": torch.nan}, r"Expected a finite velocity on y\+, got NaN or infinity"),
        ({"x-": torch.full((3, 5, 4), torch.inf)}, "Expected a finite velocity on x-, got NaN or infinity"),
    ],
)
def test_impossible_inflows_are_refused(inflow: dict[str, float | Tensor], message: str, unchecked: None) -> None:
    grid = duct(("inflow", "outflow"), ("no_slip", "inflow"), P)
    solid = torch.zeros(3, *grid.shape, dtype=torch.bool)
    solid[..., 1] = True
    with pytest.raises(ValueError, match=message):
        Geometry(grid, solid, inflow)


def test_an_inflow_into_a_box_that_has_no_inflow_side_is_refused() -> None:
    with pytest.raises(ValueError, match=r"for an inflow side \(no side at all\), got one for 'x-'"):
        Geometry(duct(("outflow", "outflow"), W, P), None, {"x-": 1.0})


def test_profiles_for_several_samples_need_voxels_for_several() -> None:
    with pytest.raises(ValueError, match=r"the batch axes \(\) of the solid .* got \(2,\); pass voxels with the same"):
        Geometry(duct(("inflow", "outflow"), W, P), None, {"x-": torch.zeros(2, 5, 4)})
