"""Homology of pore spaces by dense linear algebra over integers: slow, and independent of `latentphys.topology`.

The fluid region is a cubical complex: its cells are the vertices, open faces between two cells the edges, cell edges
between four fluid cells the squares, and corners between eight the cubes.
"""

import itertools

import numpy as np
import torch
from torch import Tensor

from latentphys import operators
from latentphys.grid import SIDES, Geometry
from latentphys.inflow import through_sides
from latentphys.topology import regions

PRIME = 2**31 - 1


def rank(matrix: np.ndarray) -> int:
    """Rank of an integer matrix, exactly but for torsion: elimination modulo a large prime."""
    rows = np.mod(matrix.astype(np.int64), PRIME)
    found = 0
    for column in range(rows.shape[1]):
        candidates = np.nonzero(rows[found:, column])[0]
        if candidates.size == 0:
            continue
        rows[[found, found + candidates[0]]] = rows[[found + candidates[0], found]]
        pivot = rows[found] * pow(int(rows[found, column]), -1, PRIME) % PRIME
        below = found + 1 + np.nonzero(rows[found + 1 :, column])[0]
        rows[below] = (rows[below] - rows[below, column, None] * pivot) % PRIME
        found += 1
    return found


def boundaries(geometry: Geometry) -> list[np.ndarray]:
    """The boundary matrices ∂₁, ∂₂ and ∂₃, from edges to vertices, squares to edges and cubes to squares."""
    fluid, shape, periodic = geometry.fluid.numpy(), geometry.grid.shape, geometry.grid.periodic
    cells = list(itertools.product(*(range(n) for n in shape)))

    def below(cell: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...] | None:
        """The cell one step down along some axes; None beyond the box."""
        moved = tuple(i - (a in axes) for a, i in enumerate(cell))
        if any(i < 0 and not p for i, p in zip(moved, periodic, strict=True)):
            return None
        return tuple(i % n for i, n in zip(moved, shape, strict=True))

    def elements(num_axes: int) -> dict[tuple[tuple[int, ...], tuple[int, ...]], int]:
        """Products of unit intervals along some axes that end in a cell, all of whose corners are fluid."""
        found = []
        for axes in itertools.combinations(range(3), num_axes):
            corners = [c for k in range(num_axes + 1) for c in itertools.combinations(axes, k)]
            for cell in cells:
                around = [below(cell, corner) for corner in corners]
                if all(c is not None and fluid[c] for c in around):
                    found.append((axes, cell))
        return {element: number for number, element in enumerate(found)}

    matrices = []
    for dimension in (1, 2, 3):
        faces, wholes = elements(dimension - 1), elements(dimension)
        matrix = np.zeros((len(faces), len(wholes)), dtype=np.int64)
        for (axes, cell), column in wholes.items():
            for place, axis in enumerate(axes):
                rest, low = tuple(a for a in axes if a != axis), below(cell, (axis,))
                assert low is not None
                matrix[faces[rest, cell], column] += (-1) ** place
                matrix[faces[rest, low], column] -= (-1) ** place
        matrices.append(matrix)
    return matrices


def betti(geometry: Geometry) -> tuple[int, int, int]:
    """Numbers of pore spaces, of independent loops and of enclosed voids of the fluid region."""
    d1, d2, d3 = boundaries(geometry)
    assert not (d1 @ d2).any() and not (d2 @ d3).any()
    r1, r2, r3 = rank(d1), rank(d2), rank(d3)
    return d1.shape[0] - r1, d1.shape[1] - r1 - r2, d2.shape[1] - r2 - r3


def unit_fluxes(geometry: Geometry) -> Tensor:
    """One flux of 1 m³/s for each free face, which nothing else passes."""
    free = geometry.free_faces.flatten()
    return torch.eye(free.numel(), dtype=torch.float64)[free].reshape(-1, 3, *geometry.grid.shape)


def div_rows(geometry: Geometry) -> np.ndarray:
    """What must be zero, as rows over the free faces: the nets of the cells that are not before an open high side."""
    net = operators.stored_div(unit_fluxes(geometry), geometry.grid)
    for axis, (_, high) in enumerate(geometry.ends):
        if high == "open":
            net.select(axis - 3, -1).zero_()
    return net.flatten(1).T.numpy()


def net_flow_rows(geometry: Geometry) -> np.ndarray:
    """The net flows of each pore space as rows over the free faces.

    Through each open side that it has; where it has none, through the first cross-section of each periodic axis.
    """
    units, label = unit_fluxes(geometry), regions(geometry)
    known = through_sides(units.new_zeros(units.shape[1:]), geometry)
    sides = {side: flow - known[side] for side, flow in through_sides(units, geometry).items()}
    ends = dict(zip(SIDES, sum(geometry.ends, ()), strict=True))
    rows = []
    for region in range(int(label.max()) + 1):
        inside = label == region
        beside = {side: inside.select(SIDES.index(side) // 2, -(SIDES.index(side) % 2)) for side in SIDES}
        through = [s for s in SIDES if ends[s] == "open" and bool(beside[s].any())]
        rows += [(sides[s] * beside[s]).sum((-2, -1)) for s in through]
        if not through:
            rows += [
                (units.select(-4, axis) * inside).select(axis - 3, 0).sum((-2, -1))
                for axis in range(3)
                if geometry.grid.periodic[axis]
            ]
    return torch.stack(rows).numpy() if rows else np.zeros((0, units.shape[0]))
