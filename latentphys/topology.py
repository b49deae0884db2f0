"""Connected pore spaces: which cells belong together, a tree through each, how many net flows can pass through it."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from latentphys.grid import SIDES, Geometry, per_geometry


@per_geometry
def regions(geometry: Geometry) -> Int[Tensor, "*batch nx ny nz"]:
    """Number of the connected pore space that each fluid cell belongs to, from 0 in every sample; −1 in solids."""
    from scipy.ndimage import label
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    fluid = geometry.fluid.cpu().numpy().reshape(-1, *geometry.grid.shape)
    result = np.empty(fluid.shape, dtype=np.int64)
    for sample, out in zip(fluid, result, strict=True):
        labels, count = label(sample)
        joined = [np.zeros((2, 0), dtype=np.int64)]
        for axis, periodic in enumerate(geometry.grid.periodic):
            if periodic:
                low, high = np.take(labels, 0, axis).ravel(), np.take(labels, -1, axis).ravel()
                joined.append(np.unique(np.stack([low, high])[:, (low > 0) & (high > 0)], axis=1))
        low, high = np.concatenate(joined, axis=1)
        links = coo_matrix((np.ones(low.size), (low, high)), shape=(count + 1, count + 1))
        merged = connected_components(links, directed=False)[1]
        numbers = np.unique(np.where(labels > 0, merged[labels], -1), return_inverse=True)[1].reshape(out.shape)
        out[...] = numbers - (0 if sample.all() else 1)
    return torch.from_numpy(result).reshape(*geometry.batch_shape, *geometry.grid.shape).to(geometry.fluid.device)


def harmonic_dimension(geometry: Geometry) -> Int[Tensor, "*batch"]:
    """How many independent net flows a geometry has room for; the dimension of the harmonic part of `hodge`.

    In a pore space without open sides they are the mean flows along the periodic axes round which it winds: the rank of
    the windings of its closed loops. In one with open sides they are the flows from one open side to another: their
    number less one (a cell in the corner of two open high sides has but one opening there, see `operators.high_faces`).
    Dead ends and closed pores have none. Exact: a count of integers.
    """
    ranks = [int(forest.harmonic_ranks.sum()) for forest in spanning_forests(geometry)]
    return torch.tensor(ranks).reshape(geometry.batch_shape)


@per_geometry
def spanning_forests(geometry: Geometry) -> list[SpanningForest]:
    """One forest per sample of a geometry."""
    if geometry.solid is None:
        return [SpanningForest(Geometry(geometry.grid, None, geometry.inflow))]
    profiles = {
        side: p.reshape(-1, *p.shape[-2:]) if isinstance(p, Tensor) and p.ndim > 2 else p
        for side, p in geometry.inflow.items()
    }
    samples = Geometry(geometry.grid, geometry.solid.reshape(-1, *geometry.grid.shape), profiles)
    return [SpanningForest(samples[i]) for i in range(samples.batch_shape[0])]


class SpanningForest:
    """A breadth-first tree in each pore space of one sample: each cell but the roots has a parent and a face to it.

    Roots are the cells at open sides, through which anything can leave; else one at an inlet, else any one cell.

    Attributes:
        levels: per depth, from the roots' children down, the columns (child, parent, face, sign): the face that a child
            shares with its parent, as an index into the flattened flux, and +1 where it is the child's own low face, −1
            where it is the parent's.
        exits: (root, face) of the roots beside a low side through which their own net can leave.
    """

    def __init__(self, geometry: Geometry) -> None:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import breadth_first_order

        self.geometry = geometry
        n = geometry.grid.num_cells
        axis, low, high = self._links
        links = coo_matrix((np.ones(low.size), (low, high)), shape=(n + 1, n + 1)).tocsr()
        roots, exits = self._roots()
        # One search serves all regions: it starts at an extra node n that is linked to every root.
        entry = coo_matrix((np.ones(roots.size), (np.full(roots.size, n), roots)), shape=(n + 1, n + 1)).tocsr()
        # scipy gives 32-bit indices; products of two cell numbers below need 64.
        order, parent = (x.astype(np.int64) for x in breadth_first_order(links + entry, n, directed=False))
        position = np.empty(n + 1, dtype=np.int64)
        position[order] = np.arange(order.size)
        level = [1, 1 + roots.size]  # where each depth begins in the order: the roots, their children, …
        parent_position = position[parent[order[1:]]]
        while level[-1] < order.size:
            level.append(1 + int(np.searchsorted(parent_position, level[-1])))
        child = order[level[1] :]
        above = parent[child]
        face, child_is_high = _faces_between(child, above, low, high, axis * n + high, n + 1)
        columns = (child, above, face, np.where(child_is_high, 1, -1))
        cuts = np.asarray(level[2:-1], dtype=np.int64) - level[1]
        self.levels = [
            tuple(torch.from_numpy(part.astype(np.int64)) for part in parts)
            for parts in zip(*(np.split(column, cuts) for column in columns), strict=True)
        ]
        self.exits = torch.from_numpy(exits[0]), torch.from_numpy(exits[1])
        self._placed: dict[torch.device, tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]] = {}

    @cached_property
    def _links(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Axis, low cell and high cell of every open face between two cells."""
        grid = self.geometry.grid
        inner = self.geometry.open_faces.clone()
        for axis, (low, _) in enumerate(grid.open_sides):
            if low:
                inner[axis].select(axis, 0).fill_(False)
        cells = np.arange(grid.num_cells).reshape(grid.shape)
        axes, high = np.nonzero(inner.cpu().numpy().reshape(3, -1))
        below = np.stack([np.roll(cells, 1, a).ravel() for a in range(3)])
        return axes, below[axes, high], high

    def _roots(self) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Roots, and the (root, face) pairs of those that let their net out through a stored face."""
        region = self._region
        num_regions = region.max() + 1
        exit_face = np.full(region.size, -1)
        is_open, is_inlet = np.zeros(region.size, dtype=bool), np.zeros(region.size, dtype=bool)
        implied = np.zeros(region.size, dtype=bool)
        sides = list(zip(SIDES, sum(self.geometry.ends, ()), self._sides, strict=True))
        for side, end, (cells, face) in sorted(sides, key=lambda s: s[1] == "open"):  # an opening before an inlet
            is_open[cells] |= end == "open"
            is_inlet[cells] |= side in self.geometry.inflow
            implied[cells] = side.endswith("+")
            exit_face[cells] = face
        roots = is_open.copy()
        for candidates in (is_inlet, region >= 0):
            rest = np.setdiff1d(np.arange(num_regions), region[roots])
            free = np.nonzero(candidates & np.isin(region, rest))[0]
            roots[free[np.unique(region[free], return_index=True)[1]]] = True
        leaving = np.nonzero(roots & (exit_face >= 0) & ~implied)[0]
        return np.concatenate([np.nonzero(roots)[0], np.nonzero(region < 0)[0]]), (leaving, exit_face[leaving])

    @cached_property
    def _region(self) -> np.ndarray:
        return regions(self.geometry).cpu().numpy().ravel()

    @cached_property
    def _sides(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Fluid cells at each inflow and outflow side, and their low faces along its axis; nothing on other sides."""
        grid = self.geometry.grid
        cells = np.arange(grid.num_cells).reshape(grid.shape)
        sides = []
        for axis, pair in enumerate(grid.open_sides):
            for index, is_side in zip((0, -1), pair, strict=True):
                beside = cells.take(index, axis).ravel() if is_side else cells[:0].ravel()
                beside = beside[self._region[beside] >= 0]
                sides.append((beside, axis * grid.num_cells + beside))
        return sides

    @cached_property
    def harmonic_ranks(self) -> np.ndarray:
        """Number of independent net flows of each pore space."""
        num_regions = int(self._region.max()) + 1
        openings = _ranks(*self._openings, num_regions)
        return np.where(openings > 0, openings - 1, _ranks(*self._windings, num_regions))

    @property
    def _openings(self) -> tuple[np.ndarray, np.ndarray]:
        """Pore space of each opening, and 1 for each of the six sides that share what leaves there.

        A low face is an opening of its own; the open high sides of a cell are one together, since no array stores them.
        Their shares go by area / cell size, the same for all openings of a side: a rank does not see such factors.
        """
        region = self._region
        shared = np.zeros((region.size, 6), dtype=np.int64)
        openings = []
        for side, (end, (cells, _)) in enumerate(zip(sum(self.geometry.ends, ()), self._sides, strict=True)):
            if end != "open":
                continue
            if side % 2:
                shared[cells, side] = 1
            else:
                openings.append((cells, np.tile(np.eye(6, dtype=np.int64)[side], (cells.size, 1))))
        last = np.nonzero(shared.any(axis=1))[0]
        cells_of, sides_of = zip(*openings, (last, shared[last]), strict=True)
        return region[np.concatenate(cells_of)], np.concatenate(sides_of)

    @property
    def _windings(self) -> tuple[np.ndarray, np.ndarray]:
        """Pore space of each loop that a link off the tree closes, and how often it goes round along each axis."""
        axis, low, high = self._links
        turns = np.zeros((self._region.size, 3), dtype=np.int64)  # from the root to each cell
        for child, above, face, sign in (tuple(c.numpy() for c in level) for level in self.levels):
            along, cell = np.divmod(face, self._region.size)
            turns[child] = turns[above]
            turns[child, along] += sign * (cell // self._stride[along] % self._shape[along] == 0)
        winding = turns[low] - turns[high]
        winding[np.arange(axis.size), axis] += high // self._stride[axis] % self._shape[axis] == 0
        loops = winding.any(axis=1)
        return self._region[low[loops]], winding[loops]

    @property
    def _shape(self) -> np.ndarray:
        return np.asarray(self.geometry.grid.shape)

    @property
    def _stride(self) -> np.ndarray:
        _, ny, nz = self.geometry.grid.shape
        return np.asarray([ny * nz, nz, 1])

    def carry(self, units: Tensor, net: Tensor) -> Tensor:
        """Integer fluxes (b, 3 cells) with every cell's net (b, cells) moved into its parent, deepest cells first."""
        units, net = units.clone(), net.clone()
        levels, (root, face) = self._on(units.device)
        for child, parent, link, sign in reversed(levels):
            excess = net[:, child]
            units[:, link] += sign * excess
            net.index_add_(1, parent, excess)
        units[:, face] += net[:, root]
        return units

    def _on(self, device: torch.device) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """Levels and exits where the fluxes are; copied there once."""
        if device not in self._placed:
            levels = [tuple(column.to(device) for column in level) for level in self.levels]
            self._placed[device] = levels, tuple(column.to(device) for column in self.exits)
        return self._placed[device]


def _ranks(region: np.ndarray, vectors: np.ndarray, num_regions: int) -> np.ndarray:
    """Rank of the integer vectors of each pore space."""
    gram = np.zeros((num_regions, vectors.shape[1], vectors.shape[1]))
    np.add.at(gram, region, np.einsum("li,lj->lij", vectors, vectors))
    return np.linalg.matrix_rank(gram, hermitian=True)


def _faces_between(
    child: np.ndarray, parent: np.ndarray, low: np.ndarray, high: np.ndarray, face: np.ndarray, base: int
) -> tuple[np.ndarray, np.ndarray]:
    """One open face that a child shares with its parent, and whether it is the child's own low face."""
    pairs, first = np.unique(low * base + high, return_index=True)
    if pairs.size == 0:
        return child, child == parent
    own = parent * base + child
    place = np.searchsorted(pairs, own).clip(max=pairs.size - 1)
    child_is_high = pairs[place] == own
    place = np.where(child_is_high, place, np.searchsorted(pairs, child * base + parent))
    return face[first[place]], child_is_high
