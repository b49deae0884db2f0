"""Pore spaces against homology over the integers, and the trees that carry nets through them."""

import numpy as np
import pytest
import torch
from homology import betti, div_rows, net_flow_rows, rank
from hypothesis import given
from hypothesis import strategies as st
from reference import BOUNDARIES, OPEN, box, random_geometry
from torch import Tensor

from latentphys import operators
from latentphys.grid import Geometry, Grid
from latentphys.topology import harmonic_dimension, regions, spanning_forests

Index = tuple[int | slice, int | slice, int | slice]
ALL = slice(None)
ROUND = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
"""A closed way round the middle of 3 × 3 cells."""


def pores(boundaries: str, shape: tuple[int, int, int], *open_cells: Index) -> Geometry:
    """A block of solid with these cells taken out."""
    solid = torch.ones(shape, dtype=torch.bool)
    for index in open_cells:
        solid[index] = False
    return Geometry(box(boundaries, shape, (1.0, 1.0, 1.0)), solid)


def obstacle(boundaries: str, shape: tuple[int, int, int], block: Index, *holes: Index) -> Geometry:
    """A box with one block of solid in it, and holes in the block."""
    solid = torch.zeros(shape, dtype=torch.bool)
    solid[block] = True
    for hole in holes:
        solid[hole] = False
    return Geometry(box(boundaries, shape, (1.0, 1.0, 1.0)), solid)


def helix(height: int) -> Geometry:
    """A pore that climbs a cell with each of the eight steps of its turn, in a box that is periodic along y only."""
    cells: list[Index] = []
    for step in range(8):
        (a, b), (c, d) = ROUND[step], ROUND[(step + 1) % 8]
        cells += [(a, step % height, b), (c, step % height, d)]
    return pores("mixed", (3, height, 3), *cells)


def diagonal(n: int) -> Geometry:
    """A staircase that comes back to where it began only after going round x and y both."""
    return pores("periodic", (n, n, 3), *[(i, i, 0) for i in range(n)], *[((i + 1) % n, i, 0) for i in range(n)])


SHAPE = (4, 5, 6)
RING = (1, slice(1, 4), slice(1, 4))
# name: geometry, harmonic dimension, Betti numbers
CASES: dict[str, tuple[Geometry, int, tuple[int, int, int]]] = {
    "empty periodic box": (Geometry(box("periodic", (2, 3, 4))), 3, (1, 3, 3)),
    "empty channel": (Geometry(box("channel", (3, 2, 4))), 2, (1, 2, 1)),
    "empty duct": (Geometry(box("first", (2, 3, 3))), 1, (1, 1, 0)),
    "empty closed box": (Geometry(box("closed", (3, 2, 4))), 0, (1, 0, 0)),
    "three ducts": (pores("periodic", SHAPE, (ALL, 0, 0), (ALL, 2, 2), (0, ALL, 4)), 3, (3, 3, 0)),
    "crossing ducts": (pores("periodic", SHAPE, (ALL, 0, 0), (0, ALL, 0)), 2, (1, 2, 0)),
    "blocked duct": (pores("periodic", SHAPE, (slice(0, 3), 0, 0)), 0, (1, 0, 0)),
    "duct with a dead end": (pores("periodic", SHAPE, (ALL, 0, 0), (1, slice(0, 3), 0)), 1, (1, 1, 0)),
    "duct with a by-pass": (
        pores("periodic", SHAPE, (ALL, 0, 0), (slice(0, 3), 2, 0), (0, 1, 0), (2, 1, 0)),
        1,
        (1, 2, 0),
    ),
    "diagonal": (diagonal(4), 1, (1, 1, 0)),
    "helix": (helix(8), 1, (1, 1, 0)),
    "helix that closes after two periods": (helix(4), 1, (1, 1, 0)),
    "two slabs joined through the image": (pores("first", SHAPE, (0, ALL, ALL), (-1, ALL, ALL)), 0, (1, 0, 0)),
    "two slabs apart": (pores("closed", SHAPE, (0, ALL, ALL), (-1, ALL, ALL)), 0, (2, 0, 0)),
    "solid in the middle": (obstacle("closed", (3, 3, 3), (1, 1, 1)), 0, (1, 0, 1)),
    "column between walls": (obstacle("closed", (3, 3, 3), (1, 1, ALL)), 0, (1, 1, 0)),
    "column in a channel": (obstacle("channel", (3, 3, 3), (1, 1, ALL)), 2, (1, 2, 0)),
    "wall with a hole": (obstacle("periodic", (3, 4, 3), (1, ALL, ALL), (1, 1, 1)), 3, (1, 3, 1)),
    "ring": (obstacle("closed", (3, 5, 5), RING, (1, 2, 2)), 0, (1, 1, 1)),
    "ring in a periodic box": (obstacle("periodic", (3, 5, 5), RING, (1, 2, 2)), 3, (1, 4, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_pore_spaces_and_their_loops(name: str) -> None:
    """The loops that wind round the box are the harmonic dimension.

    The other loops encircle solids: a flow along one is the curl of a potential in the solid it encircles, as that
    through the hole of a ring, and counts as curl.
    """
    geometry, dimension, expected = CASES[name]
    assert betti(geometry) == expected
    assert int(harmonic_dimension(geometry)) == dimension
    assert int(regions(geometry).max()) + 1 == expected[0]
    div = div_rows(geometry)
    assert rank(np.concatenate([div, net_flow_rows(geometry)])) - rank(div) == dimension


def corner(*more: Index) -> Geometry:
    """A pore along the edge of x+ and z+, both open, in cells as flat as a sheet."""
    grid = Grid((3, 3, 3), (1.0, 1.0, 1e-6), OPEN["bend"])
    solid = torch.ones(grid.shape, dtype=torch.bool)
    for index in ((-1, slice(1, 3), -1), *more):
        solid[index] = False
    return Geometry(grid, solid)


# name: geometry, harmonic dimension
OPEN_CASES: dict[str, tuple[Geometry, int]] = {
    "duct": (Geometry(box("duct")), 1),
    "bend": (Geometry(box("bend")), 2),
    "through": (Geometry(box("through")), 5),
    "duct of known inflow": (Geometry(box("duct"), None, {"x-": 1.0}), 0),
    "bend of known inflow": (Geometry(box("bend"), None, {"y-": 1.0}), 1),
    # What leaves a cell of the edge is one number, whatever the sides it leaves through.
    "edge": (corner(), 0),
    "edge, and a cell of one side": (corner((-1, 2, -2)), 1),
    "edge, and a cell of each side": (corner((-1, 2, -2), (-2, 2, -1)), 1),
    "edge, two sides and a third": (corner((-1, 0, -2), (-1, 1, -2), (-2, 2, -1)), 2),
    "a duct across, another round, a pocket": (
        pores("duct", (4, 5, 6), (ALL, 0, 0), (2, 2, ALL), (0, 4, slice(2, 4))),
        2,
    ),
    # Along z it would wind, but whatever flows there is the curl of a potential on the open side.
    "an open pore that winds": (pores("duct", (4, 5, 6), (0, 2, ALL)), 0),
}


@pytest.mark.parametrize("name", OPEN_CASES)
def test_flows_between_open_sides(name: str) -> None:
    geometry, dimension = OPEN_CASES[name]
    assert int(harmonic_dimension(geometry)) == dimension
    if geometry.grid.spacing[2] > 1e-3:  # the shares of flatter cells are beyond the dense rank's rounding
        div = div_rows(geometry)
        both = np.concatenate([div, net_flow_rows(geometry)])
        assert np.linalg.matrix_rank(both) - np.linalg.matrix_rank(div) == dimension


@given(
    boundaries=st.sampled_from(sorted(BOUNDARIES)),
    shape=st.tuples(*(st.integers(2, 4) for _ in range(3))),
    fraction=st.floats(0.1, 0.7),
    seed=st.integers(0, 10**6),
)
def test_random_pores_have_the_loops_of_their_homology(
    boundaries: str, shape: tuple[int, int, int], fraction: float, seed: int
) -> None:
    torch.manual_seed(seed)
    geometry = random_geometry(box(boundaries, shape), fraction=fraction)
    spaces, loops, _ = betti(geometry)
    dimension = int(harmonic_dimension(geometry))
    assert int(regions(geometry).max()) + 1 == spaces
    assert dimension <= loops
    div = div_rows(geometry)
    assert rank(np.concatenate([div, net_flow_rows(geometry)])) - rank(div) == dimension


@given(
    boundaries=st.sampled_from(sorted(OPEN)),
    shape=st.tuples(*(st.integers(2, 4) for _ in range(3))),
    fraction=st.floats(0.1, 0.7),
    inflow=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_random_open_pores_have_the_flows_of_their_sides(
    boundaries: str, shape: tuple[int, int, int], fraction: float, inflow: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    side = {"duct": "x-", "bend": "y-", "through": "x+"}[boundaries]
    voxels = random_geometry(box(boundaries, shape), fraction=fraction)
    geometry = Geometry(voxels.grid, voxels.solid, {side: 1.0} if inflow else {})
    div = div_rows(geometry)
    both = np.concatenate([div, net_flow_rows(geometry)])
    assert np.linalg.matrix_rank(both) - np.linalg.matrix_rank(div) == int(harmonic_dimension(geometry))


@pytest.mark.parametrize("boundaries", [*BOUNDARIES, *OPEN])
def test_regions_are_numbered_and_connected(boundaries: str) -> None:
    geometry = random_geometry(box(boundaries), 3)
    label = regions(geometry)
    assert bool(((label == -1) == ~geometry.fluid).all())
    for sample, solid in zip(label, geometry.solid, strict=True):  # type: ignore[arg-type]
        assert sample.unique().tolist() == list(range(-1, int(sample.max()) + 1))
        alone = Geometry(geometry.grid, solid)
        assert torch.equal(regions(alone), sample)
        assert betti(alone)[0] == int(sample.max()) + 1
    for axis in range(3):
        joined = geometry.open_faces[:, axis].clone()
        if not geometry.grid.periodic[axis]:
            joined.select(axis - 3, 0).fill_(False)
        assert bool((label == label.roll(1, axis - 3))[joined].all())


def test_a_batch_has_a_dimension_each() -> None:
    samples = [CASES[name][0] for name in ("three ducts", "blocked duct", "crossing ducts")]
    batch = Geometry.stack([*samples, samples[0]])
    assert harmonic_dimension(batch).tolist() == [3, 0, 2, 3]
    assert harmonic_dimension(Geometry(samples[0].grid)).shape == ()
    assert batch.solid is not None
    solid = batch.solid.clone()
    solid[1] = False  # a sample without solids among others
    assert harmonic_dimension(Geometry(batch.grid, solid.reshape(2, 2, *SHAPE))).tolist() == [[3, 3], [2, 3]]
    assert int(regions(Geometry(batch.grid, solid))[1].abs().max()) == 0


@pytest.mark.parametrize("shape", [(5, 4, 7), (2, 2, 2), (2, 5, 2)])
@pytest.mark.parametrize("boundaries", [*BOUNDARIES, *OPEN])
def test_the_forest_spans_every_pore_space(boundaries: str, shape: tuple[int, int, int]) -> None:
    geometry = random_geometry(box(boundaries, shape), fraction=0.3)
    label = regions(geometry).flatten()
    (forest,) = spanning_forests(geometry)
    children = torch.cat([level[0] for level in forest.levels]) if forest.levels else torch.zeros(0, dtype=torch.long)
    assert children.unique().numel() == children.numel()
    roots = np.setdiff1d(np.nonzero(label.numpy() >= 0)[0], children.numpy())
    assert set(label[roots].tolist()) == set(range(int(label.max()) + 1)), "a pore space without a root"
    above, cells = set(roots.tolist()), torch.arange(label.numel()).reshape(shape)
    for child, parent, face, sign in forest.levels:
        assert set(parent.tolist()) <= above, "a parent that is not one level up"
        axis, cell = face // label.numel(), face % label.numel()
        below = torch.stack([cells.roll(1, a).flatten() for a in range(3)])[axis, cell]
        assert torch.equal(cell, torch.where(sign > 0, child, parent))
        assert torch.equal(below, torch.where(sign > 0, parent, child))
        assert bool(geometry.open_faces.flatten()[face].all())
        above = set(child.tolist())


@pytest.mark.parametrize("boundaries", [*BOUNDARIES, *OPEN])
def test_carrying_leaves_no_net(boundaries: str) -> None:
    geometry = random_geometry(box(boundaries), fraction=0.3)
    grid, num_cells = geometry.grid, geometry.grid.num_cells
    units = torch.randint(-1000, 1000, (2, 3, *grid.shape)) * geometry.open_faces
    before = operators.div(units, grid)
    assert int(before.abs().sum()) > 0
    (forest,) = spanning_forests(geometry)
    carried: Tensor = forest.carry(units.reshape(2, 3 * num_cells), before.reshape(2, num_cells))
    carried = carried.reshape(units.shape)
    assert int(operators.div(carried, grid).abs().sum()) == 0
    assert bool((carried[~geometry.open_faces.expand_as(carried)] == 0).all())
    assert int((carried != units).sum()) <= 2 * int(geometry.fluid.sum()), "faces off the tree have changed"
