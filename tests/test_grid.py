"""Boxes, their open faces and wall distances, and what they refuse."""

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
from reference import BOUNDARIES, OPEN, box, random_geometry

from latentphys.grid import Boundary, Geometry, Grid

Pair = tuple[Boundary, Boundary]
P: Pair = ("periodic", "periodic")
N: Pair = ("no_slip", "no_slip")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (4, 4)}, r"Expected a shape of three axes, got \(4, 4\)"),
        ({"shape": (4, 1, 4), "boundaries": (P, N, P)}, r"at least 2 cells along each axis, or 1 along a periodic one"),
        ({"spacing": (1.0, 1.0)}, r"Expected three positive, finite spacings \[m\], got \(1.0, 1.0\)"),
        ({"spacing": (1.0, 0.0, 1.0)}, "positive, finite spacings"),
        ({"spacing": (1.0, math.nan, 1.0)}, "positive, finite spacings"),
        ({"spacing": (1.0, math.inf, 1.0)}, "positive, finite spacings"),
        ({"boundaries": (P, P)}, r"Expected a \(low, high\) boundary pair for each of three axes"),
        ({"boundaries": (P, P, ("no_slip",))}, r"Expected a \(low, high\) boundary pair"),
        ({"boundaries": (P, ("no_slip", "wall"), P)}, "no_slip | free_slip on axis y, got 'wall'"),
        ({"boundaries": (P, P, ("periodic", "no_slip"))}, "'periodic' on both sides of axis z or on neither"),
    ],
)
def test_impossible_boxes_are_refused(arguments: dict[str, Any], message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**{"shape": (4, 4, 4), "spacing": (1.0, 1.0, 1.0), **arguments})


@pytest.mark.parametrize("boundaries", BOUNDARIES | OPEN)
def test_a_grid_survives_json_and_is_the_same_key(boundaries: str) -> None:
    grid = box(boundaries)
    back = Grid.from_dict(json.loads(json.dumps(grid.to_dict())))
    assert back == grid and hash(back) == hash(grid)
    assert back.boundaries == (BOUNDARIES | OPEN)[boundaries]


@pytest.mark.parametrize("data", [{"shape": [4, 4, 4]}, {"shape": None, "spacing": [1, 1, 1], "boundaries": [P] * 3}])
def test_an_incomplete_description_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected a grid with shape, spacing and boundaries, got"):
        Grid.from_dict(data)


def test_sizes_of_a_box_in_closed_form() -> None:
    grid = box("channel", (4, 5, 6), (0.5, 2.0, 3.0))
    assert grid.num_cells == 120
    assert grid.lengths == (2.0, 10.0, 18.0)
    assert grid.cell_volume == 3.0
    assert grid.face_areas == (6.0, 1.5, 1.0)
    assert grid.periodic == (True, True, False)


@pytest.mark.parametrize(
    ("solid", "message"),
    [
        (torch.zeros(4, 4, 4), r"Expected boolean solid voxels, got torch.float32; pass `solid > 0.5`"),
        (torch.zeros(4, 4, 5, dtype=torch.bool), r"shape \(…, \(4, 4, 4\)\), got \(4, 4, 5\)"),
        (torch.ones(4, 4, 4, dtype=torch.bool), "at least one fluid cell in every sample"),
        (torch.arange(2).reshape(2, 1, 1, 1).expand(2, 4, 4, 4) == 1, "at least one fluid cell in every sample"),
    ],
)
def test_impossible_solids_are_refused(solid: Any, message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry(Grid((4, 4, 4), (1.0, 1.0, 1.0)), solid)


def test_solids_that_fill_nothing_are_an_empty_box() -> None:
    geometry = Geometry(box("periodic"), torch.zeros(5, 4, 7, dtype=torch.bool))
    assert geometry.is_empty and geometry.batch_shape == ()
    assert geometry.to("cpu") is geometry and geometry[3] is geometry
    assert float(geometry.porosity) == 1.0


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_an_empty_box_is_open_everywhere_but_at_low_walls(boundaries: str) -> None:
    grid = box(boundaries)
    faces = Geometry(grid).open_faces
    for axis in range(3):
        low, rest = faces[axis].select(axis, 0), faces[axis].narrow(axis, 1, grid.shape[axis] - 1)
        assert bool(rest.all())
        assert bool(low.all()) if grid.periodic[axis] else not bool(low.any())


def test_a_voxel_closes_its_six_faces_also_across_a_periodic_side() -> None:
    solid = torch.zeros(4, 5, 6, dtype=torch.bool)
    solid[3, 4, 5] = True
    geometry = Geometry(Grid((4, 5, 6), (1.0, 1.0, 1.0)), solid)
    closed = {tuple(i) for i in (~geometry.open_faces).nonzero().tolist()}
    assert closed == {(0, 3, 4, 5), (0, 0, 4, 5), (1, 3, 4, 5), (1, 3, 0, 5), (2, 3, 4, 5), (2, 3, 4, 0)}
    flux = torch.full((3, 4, 5, 6), torch.nan)
    flux[geometry.open_faces] = 2.0
    masked = geometry.mask(flux)
    assert bool((masked[geometry.open_faces] == 2.0).all()) and bool((masked[~geometry.open_faces] == 0.0).all())


def test_porosity_is_the_fluid_share_of_each_sample() -> None:
    solid = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    solid[1, :1] = True
    assert Geometry(Grid((4, 4, 4), (1.0, 1.0, 1.0)), solid).porosity.tolist() == [1.0, 0.75]


def test_wall_distance_between_walls() -> None:
    grid = Grid((4, 4, 8), (10.0, 10.0, 0.5), (P, P, ("no_slip", "free_slip")))
    z = (torch.arange(8, dtype=torch.float64) + 0.5) * 0.5
    expected = z.clamp(max=2.0)
    torch.testing.assert_close(Geometry(grid).wall_distance, expected.expand(4, 4, 8))
    grid = Grid((4, 4, 8), (10.0, 10.0, 0.5), (P, P, N))
    torch.testing.assert_close(Geometry(grid).wall_distance, torch.minimum(z, 4.0 - z).expand(4, 4, 8))


def test_wall_distance_without_a_no_slip_surface_is_half_the_shortest_side() -> None:
    grid = Grid((4, 6, 8), (1.0, 0.5, 1.0), (P, ("free_slip", "free_slip"), P))
    assert bool((Geometry(grid).wall_distance == 1.5).all())
    grid = Grid((4, 4, 4), (1.0, 1.0, 1.0), (("free_slip", "free_slip"),) * 3)
    solid = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    solid[1, 0, 0, 0] = True
    assert bool((Geometry(grid, solid).wall_distance[0] == 2.0).all())


def test_wall_distance_round_a_voxel_is_euclidean_and_periodic() -> None:
    grid, at = Grid((9, 8, 7), (1.0, 1.0, 1.0)), (0, 6, 3)
    solid = torch.zeros(grid.shape, dtype=torch.bool)
    solid[at] = True
    distance2 = torch.zeros(grid.shape, dtype=torch.float64)
    for axis, (n, centre) in enumerate(zip(grid.shape, at, strict=True)):
        d = (torch.arange(n, dtype=torch.float64) - centre).abs()
        distance2 += torch.minimum(d, n - d).square().reshape([-1 if a == axis else 1 for a in range(3)])
    expected = (distance2.sqrt() - 0.5).clamp(0.0, 3.5)
    torch.testing.assert_close(Geometry(grid, solid).wall_distance, expected)
    assert float(expected[at]) == 0.0


@pytest.mark.parametrize("boundaries", ["periodic", "mixed"])
def test_a_batch_is_its_samples(boundaries: str) -> None:
    grid = box(boundaries)
    samples = [Geometry(grid), random_geometry(grid), random_geometry(grid)]
    stacked = Geometry.stack(samples)
    together = Geometry(grid, torch.stack([~g.fluid for g in samples]))
    for batch in (stacked, together):
        assert batch.batch_shape == (3,)
        for i, sample in enumerate(samples):
            for one in (batch, batch[i]):
                for name in ("fluid", "open_faces", "wall_distance"):
                    value = getattr(one, name)
                    assert torch.equal(value[i] if one is batch else value, getattr(sample, name))
    assert batch[1:].batch_shape == (2,)


def test_a_stack_keeps_what_its_samples_know() -> None:
    samples = [random_geometry(box("periodic")) for _ in range(2)]
    assert {"open_faces", "wall_distance"} <= Geometry.stack(samples).__dict__.keys()
    empty = Geometry(box("periodic"))
    assert Geometry.stack([empty, Geometry(box("periodic"))]) is empty


def test_samples_on_different_grids_do_not_stack() -> None:
    with pytest.raises(ValueError, match="Expected samples on one grid, got several; batch each grid by itself"):
        Geometry.stack([Geometry(box("periodic")), Geometry(box("channel"))])


def test_ends_and_free_faces_of_sides_with_and_without_a_prescribed_inflow() -> None:
    grid = Grid((3, 4, 5), (1.0, 1.0, 1.0), (("inflow", "inflow"), ("no_slip", "outflow"), P))
    assert grid.open_sides == ((True, True), (False, True), (False, False)) and grid.through == (True, False, True)
    free, given = Geometry(grid), Geometry(grid, None, {"x-": 1.0, "x+": torch.zeros(4, 5)})
    assert free.ends == (("open", "open"), ("closed", "open"), P)
    assert given.ends == (("closed", "closed"), ("closed", "open"), P)
    assert bool(given.open_faces[0].all()) and torch.equal(free.free_faces, free.open_faces)
    assert not bool(given.free_faces[0, 0].any()) and torch.equal(given.free_faces[:, 1:], free.open_faces[:, 1:])


def test_a_stack_has_one_inflow() -> None:
    grid = box("duct")
    velocities = (0.1, torch.tensor(0.1, dtype=torch.float64), 0.1 + 1e-12)
    samples = [Geometry(grid, random_geometry(grid).solid, {"x-": v}) for v in velocities]
    assert Geometry.stack(samples[:2]).inflow == {"x-": 0.1}
    with pytest.raises(ValueError, match="Expected samples with one inflow, got several; batch each inflow by itself"):
        Geometry.stack(samples)


def test_a_profile_goes_with_its_samples() -> None:
    grid = box("duct")
    profiles, shared = (
        torch.rand(2, 3, 4, 7),
        Geometry(grid, random_geometry(grid, 2, 3).solid, {"x-": torch.rand(4, 7)}),
    )
    geometry = Geometry(grid, shared.solid, {"x-": profiles}).to("cpu")
    for i in (1, (0, 2), slice(1, 2)):
        assert torch.equal(torch.as_tensor(geometry[i].inflow["x-"]), profiles[i])
        assert torch.equal(torch.as_tensor(shared[i].inflow["x-"]), torch.as_tensor(shared.inflow["x-"]))


def test_copies_and_pickles() -> None:
    grid = Grid((4, 3, 2), (1.0, 1.0, 1.0), (("inflow", "outflow"), P, P))
    for solid in (None, torch.rand(4, 3, 2) < 0.5):
        geometry = Geometry(grid, solid, {"x-": torch.rand(3, 2)})
        _ = geometry.open_faces
        for twin in (copy.deepcopy(geometry), pickle.loads(pickle.dumps(geometry))):
            assert twin.grid == grid and torch.equal(twin.open_faces, geometry.open_faces)
            assert torch.equal(torch.as_tensor(twin.inflow["x-"]), torch.as_tensor(geometry.inflow["x-"]))


def test_a_geometry_that_is_there_already_keeps_what_it_knows() -> None:
    geometry = Geometry(Grid((4, 3, 2), (1.0, 1.0, 1.0)), torch.rand(4, 3, 2) < 0.5)
    assert geometry.to("cpu") is geometry


def test_an_inflow_with_a_gradient_is_refused() -> None:
    grid = Grid((4, 3, 2), (1.0, 1.0, 1.0), (("inflow", "outflow"), P, P))
    with pytest.raises(ValueError, match="Expected an inflow without a gradient on x-"):
        Geometry(grid, None, {"x-": torch.rand(3, 2, requires_grad=True)})
