"""Fluxes whose net per cell is 0.0, bit for bit, in FP64.

A sum of FP64 numbers that are all multiples of one power of two q, and stay below 2⁵³ q, has no rounding error in any
order. So the last step of every conservative decode is fixed-point: fluxes become integers (multiples of q = 2⁻⁴⁶ of
the power of two above the largest), the small integer that each cell's balance is then off is carried along a spanning
tree of the pore space to its root, where it meets the integers of all other cells and cancels: over a connected region
closed by walls and solids, the balances of the cells sum to zero identically. The correction of a face is the sum over
the subtree that hangs on it, a few units of q for most faces.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.grid import Geometry, Grid
from latentphys.projection import decompose

FLUX_BITS = 46
"""Resolution of the fixed point: q is 2⁻⁴⁶ of the power of two above the sample's largest flux."""

SMALLEST_EXPONENT = -1074
"""Exponent of the smallest FP64 number above zero."""


_GROWN: WeakKeyDictionary[Geometry, list[_SpanningForest]] = WeakKeyDictionary()


class Conserved(NamedTuple):
    """A conservative flux, and how far the last, fixed-point step moved it."""

    flux: Float[Tensor, "*batch 3 nx ny nz"]
    correction: float
    """Largest change of a face against the FP64 projection, relative to the largest open-face flux given."""


def conserve(
    *,
    geometry: Geometry,
    flux: Float[Tensor, "*batch 3 nx ny nz"] | None = None,
    potential: Float[Tensor, "*batch 3 nx ny nz"] | None = None,
    harmonic: Float[Tensor, "*batch 3"] | None = None,
    tol: float = 1e-13,
) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """The FP64 flux nearest to the one given with net 0.0 in every cell and 0.0 through every wall and solid face.

    Args:
        geometry: the box and its solids, batched or not.
        flux: any flux through the low faces [m³/s], or
        potential: a vector potential on the low edges, ∫A·dl [m³/s], of which the curl is taken.
        harmonic: with a potential, the uniform flux through every face of each periodic axis [m³/s].
        tol: net flux that the projection before the fixed-point step may leave, ‖net‖₂ / ‖flux‖₂, in voxel geometry.
            A looser one makes the correction larger, never the result less exact.

    Returns:
        FP64 flux F with ``operators.div(F, grid) == 0.0`` everywhere, exactly, on the device of the input.

    Raises:
        ValueError: both or neither of flux and potential, a shape other than the grid's, or non-finite numbers.
    """
    return conserve_report(geometry=geometry, flux=flux, potential=potential, harmonic=harmonic, tol=tol).flux


@torch.no_grad()
def conserve_report(
    *,
    geometry: Geometry,
    flux: Tensor | None = None,
    potential: Tensor | None = None,
    harmonic: Tensor | None = None,
    tol: float = 1e-13,
) -> Conserved:
    """`conserve`, and the size of its correction."""
    if (flux is None) == (potential is None):
        raise ValueError("Expected either a flux or a potential, got " + ("neither." if flux is None else "both."))
    if harmonic is not None and potential is None:
        raise ValueError("Expected a harmonic part beside a potential, got it beside a flux, which has its own.")
    if potential is not None:
        flux = operators.curl(_finite(potential.double(), "potential"), geometry.grid)
        if harmonic is not None:
            periodic = torch.tensor(geometry.grid.periodic, device=flux.device)
            flux = flux + (_finite(harmonic.double(), "harmonic part") * periodic)[..., None, None, None]
    assert flux is not None
    solenoidal = decompose(_finite(flux.double(), "flux"), geometry, tol=0.0, floor=tol).solenoidal
    quantum = _quantum(solenoidal, geometry.grid)
    units = (solenoidal / quantum).round().to(torch.int64)
    units = _balance(units, geometry)
    result = units.double() * quantum
    size = geometry.mask(flux.double()).abs().amax((-4, -3, -2, -1))
    change = (result - solenoidal).abs().amax((-4, -3, -2, -1))
    return Conserved(result, float(torch.where(size > 0, change / size, 0.0).amax()))


def _finite(x: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"Expected a finite {name}, got {bad} NaN or infinite values among {x.numel()}.")
    return x


def _quantum(flux: Tensor, grid: Grid) -> Float[Tensor, "*batch 1 1 1 1"]:
    """The power of two of which a sample's fluxes become multiples.

    No branch of the tree carries more than Σ|net|. Where that is far above the largest flux (the projection has left
    little but its own residual) it sets the power, so that no integer passes 2⁵³.
    """
    largest = flux.abs().amax((-4, -3, -2, -1), keepdim=True)
    carried = operators.div(flux, grid).abs().sum((-3, -2, -1))[..., None, None, None, None]
    largest = torch.maximum(largest, carried / 8)
    exponent = (torch.frexp(largest).exponent - FLUX_BITS).clamp(min=SMALLEST_EXPONENT)
    return torch.ldexp(torch.ones_like(largest), exponent)


def _balance(units: Tensor, geometry: Geometry) -> Tensor:
    """Integer fluxes with the net of every cell carried away along a tree of open faces."""
    if geometry.is_empty:
        return _balance_box(units, geometry.grid)
    shape = units.shape
    flat = units.reshape(-1, 3 * geometry.grid.num_cells).clone()
    net = operators.div(units, geometry.grid).reshape(-1, geometry.grid.num_cells)
    samples = torch.arange(flat.shape[0]).reshape(shape[:-4])
    trees = torch.arange(max(1, int(np.prod(geometry.batch_shape)))).reshape(geometry.batch_shape)
    which = trees.expand(samples.shape).flatten()
    for tree, forest in enumerate(_forests(geometry)):
        rows = (which == tree).nonzero().flatten().to(units.device)
        flat[rows] = forest.carry(flat[rows], net[rows])
    return flat.reshape(shape)


def _forests(geometry: Geometry) -> list[_SpanningForest]:
    """One forest per sample of a geometry, grown once: a time loop asks for them at every step."""
    if geometry not in _GROWN:
        solids = geometry.solid.reshape(-1, *geometry.grid.shape)  # type: ignore[union-attr]
        _GROWN[geometry] = [_SpanningForest(Geometry(geometry.grid, solid)) for solid in solids]
    return _GROWN[geometry]


def _balance_box(units: Tensor, grid: Grid) -> Tensor:
    """The empty box's tree in closed form: along x, then along y in the last plane, then along z in the last row."""
    units = units.clone()
    net = operators.div(units, grid).cumsum(-3)
    units[..., 0, 1:, :, :] -= net[..., :-1, :, :]
    net = net[..., -1, :, :].cumsum(-2)
    units[..., 1, -1, 1:, :] -= net[..., :-1, :]
    net = net[..., -1, :].cumsum(-1)
    units[..., 2, -1, -1, 1:] -= net[..., :-1]
    return units


class _SpanningForest:
    """A breadth-first tree in each connected pore space: each cell but the roots has a parent and a face to it."""

    def __init__(self, geometry: Geometry) -> None:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import breadth_first_order, connected_components

        n = geometry.grid.num_cells
        cells = np.arange(n).reshape(geometry.grid.shape)
        axis, high = np.nonzero(geometry.open_faces.cpu().numpy().reshape(3, n))
        low = np.stack([np.roll(cells, 1, a).ravel() for a in range(3)])[axis, high]
        links = coo_matrix((np.ones(low.size), (low, high)), shape=(n + 1, n + 1)).tocsr()
        regions = connected_components(links[:n, :n], directed=False)[1]
        roots = np.unique(regions, return_index=True)[1]
        # One search serves all regions: it starts at an extra node n that is linked to the root of each.
        entry = coo_matrix((np.ones(roots.size), (np.full(roots.size, n), roots)), shape=(n + 1, n + 1)).tocsr()
        # scipy gives 32-bit indices; products of two cell numbers below need 64.
        order, parent = (x.astype(np.int64) for x in breadth_first_order(links + entry, n, directed=False))
        position = np.empty(n + 1, dtype=np.int64)
        position[order] = np.arange(n + 1)
        level = [1, 1 + roots.size]  # where each depth begins in the order: the roots, their children, …
        parent_position = position[parent[order[1:]]]
        while level[-1] <= n:
            level.append(1 + int(np.searchsorted(parent_position, level[-1])))
        child = order[level[1] :]
        above = parent[child]
        face, child_is_high = self._faces_between(child, above, low, high, axis * n + high, n + 1)
        columns = (child, above, face, np.where(child_is_high, 1, -1))
        cuts = np.asarray(level[2:-1], dtype=np.int64) - level[1]
        self.levels = [
            tuple(torch.from_numpy(part.astype(np.int64)) for part in parts)
            for parts in zip(*(np.split(column, cuts) for column in columns), strict=True)
        ]

    @staticmethod
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

    def carry(self, units: Tensor, net: Tensor) -> Tensor:
        """Move every cell's net into its parent, deepest cells first, by changing the face between the two."""
        units, net = units.clone(), net.clone()
        for level in reversed(self.levels):
            child, parent, face, sign = (column.to(units.device) for column in level)
            excess = net[:, child]
            units[:, face] += sign * excess
            net.index_add_(1, parent, excess)
        return units
