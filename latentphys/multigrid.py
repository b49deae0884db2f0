"""Algebraic multigrid in the pore space: an approximate inverse of the pressure operator round voxels.

The operator couples each cell with the fluid cells beside it and, at open sides of the box, with the outside:

    (L φ)_i = Σ_f k_f (φ_j − φ_i) − s_i φ_i.

Every level doubles the blocks of cells, and a node of the next level is a *connected piece* of such a block: pores that
run side by side without touching are never joined. A piece carries one number (plain aggregation), so the coarse
operator is again a graph of conductances. Two pieces of a block do not touch, so the nodes of every level are red and
black by the parity of their blocks, and red–black Gauss–Seidel smooths them. The conductance between two pieces is
that of their contact over their distance; without the latter, plain aggregation corrects too little. One V-cycle, its
smoothing mirrored on the way up, is a fixed, symmetric and definite operator, as conjugate gradients want it.

References: Braess, Computing 55 (1995), and Notay, ETNA 37 (2010), on aggregation; Baker, Falgout, Kolev & Yang, SIAM
J. Sci. Comput. 33 (2011), on the diagonal where a colour meets itself.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

FIRST_HALF_SWEEPS, MOST_HALF_SWEEPS = 6, 64
"""Half-sweeps before and after the coarse correction: on the cells, then doubled per level up to the most."""

STRONG = 0.3
"""Blocks double along the axes whose conductance is at least this share of the largest of the three."""


class Multigrid:
    """One symmetric V-cycle for L, set up once per geometry.

    Args:
        conductance: k ≥ 0 of each low face, FP32 or FP64, of shape ``(*batch, 3, nx, ny, nz)``; 0 on closed faces. Face
            0 of an axis lies between its last and its first cell; along an axis of one cell it couples nothing.
        sink: s ≥ 0 of each cell, of shape ``(*batch, nx, ny, nz)``. Default: none.

    Raises:
        ValueError: a dtype other than FP32 and FP64, or a sink of another shape than the cells' or another dtype.
    """

    def __init__(
        self, conductance: Float[Tensor, "*batch 3 nx ny nz"], sink: Float[Tensor, "*batch nx ny nz"] | None = None
    ) -> None:
        if conductance.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Expected conductances in FP32 or FP64, got {conductance.dtype}; convert them first.")
        self.shape = (*conductance.shape[:-4], *conductance.shape[-3:])
        if sink is None:
            sink = conductance.new_zeros(self.shape)
        elif tuple(sink.shape) != self.shape or sink.dtype != conductance.dtype:
            got = f"{tuple(sink.shape)} in {sink.dtype}"
            raise ValueError(
                f"Expected a sink of shape {self.shape} in {conductance.dtype}, got {got}; convert it first."
            )
        samples = conductance.reshape(-1, *conductance.shape[-4:])
        self.cells, graph = _pore_space(samples, sink.reshape(-1, *sink.shape[-3:]))
        self.levels: list[_Level] = []
        half_sweeps = FIRST_HALF_SWEEPS
        node, region = torch.arange(self.cells.numel(), device=self.cells.device), torch.full_like(self.cells, -1)
        while graph.low.numel():
            coarse, piece, parent = _coarsen(graph)
            restriction, prolongation = _transfers(parent, coarse.sink.numel(), graph.conductance.dtype)
            self.levels.append(_Level(graph, restriction, prolongation, half_sweeps))
            # A piece that is not on the next level is a whole pore space without a sink.
            whole = (region < 0) & (parent.index_select(0, node) < 0)
            region = torch.where(whole, piece.index_select(0, node) + len(self.levels) * self.cells.numel(), region)
            node = torch.where(region < 0, parent.index_select(0, node), 0)
            graph, half_sweeps = coarse, min(2 * half_sweeps, MOST_HALF_SWEEPS)
        self.coarsest = (1 / graph.sink)[:, None]  # a node without neighbours is kept only for its sink
        numbers, region = torch.unique(region, return_inverse=True)
        first = int(numbers.numel() > 0 and bool(numbers[0] < 0))  # −1, where there are sinks
        self.gather, self.scatter = _transfers(region - first, numbers.numel() - first, sink.dtype)
        self.shares = self.gather @ torch.ones(self.cells.numel(), dtype=sink.dtype, device=sink.device)

    @property
    def sizes(self) -> list[int]:
        """Number of nodes on each level; on the first they are the cells with an open face or a sink."""
        return [level.diagonal.shape[0] for level in self.levels]

    @torch.no_grad()
    def __call__(self, r: Float[Tensor, "*lead nx ny nz"]) -> Float[Tensor, "*lead nx ny nz"]:
        """Approximately L⁻¹ r, and 0 in cells that nothing couples.

        Args:
            r: of shape ``(*lead, *batch, nx, ny, nz)``; the leading axes are several right-hand sides.

        Raises:
            ValueError: another shape than that of the cells behind the leading axes.
        """
        if tuple(r.shape[r.dim() - len(self.shape) :]) != self.shape:
            raise ValueError(f"Expected a right-hand side of shape (…, {self.shape}), got {tuple(r.shape)}.")
        columns = r.reshape(-1, math.prod(self.shape))
        b = -columns.index_select(1, self.cells).T.contiguous()
        solution = self._without_means(self._cycle(self._without_means(b), 0)).T.contiguous()
        return torch.zeros_like(columns).index_copy_(1, self.cells, solution).reshape(r.shape)

    def _without_means(self, x: Tensor) -> Tensor:
        """Take the mean off in every pore space without a sink, where rounding would make it grow."""
        return _plus_product(x, self.scatter, -_product(self.gather, x) / self.shares[:, None])

    def _cycle(self, b: Tensor, depth: int) -> Tensor:
        if depth == len(self.levels):
            return b * self.coarsest
        level = self.levels[depth]
        x = level.first_red(b)
        for half in range(1, level.half_sweeps):
            level.relax(x, b, half % 2)
        correction = self._cycle(_product(level.restriction, level.residual(x, b)), depth + 1)
        x = _plus_product(x, level.prolongation, correction)
        for half in reversed(range(level.half_sweeps)):
            level.relax(x, b, half % 2)
        return x


class _Graph(NamedTuple):
    """Conductances between nodes, once as edges and once as a matrix; the nodes of red blocks come first."""

    block: Tensor
    """Position x, y, z of each node's block, (3, n)."""
    num_red: int
    dims: tuple[int, ...]
    """Blocks along each axis."""
    strength: tuple[float, ...]
    """Conductance between two full blocks along each axis."""
    low: Tensor
    high: Tensor
    axis: Tensor
    conductance: Tensor
    """An entry per edge; the same conductances, from both sides, are the matrix of neighbours, (n, n)."""
    neighbours: Tensor
    sink: Tensor


def _pore_space(conductance: Tensor, sink: Tensor) -> tuple[Tensor, _Graph]:
    """The cells that have an open face or a sink, red ones first, as flat indices; and the graph of them."""
    device = sink.device
    low_face = [k if n > 1 else torch.zeros_like(k) for k, n in zip(conductance.unbind(1), sink.shape[1:], strict=True)]
    high_face = [k.roll(-1, a + 1) for a, k in enumerate(low_face)]
    used = sink > 0
    for k in (*low_face, *high_face):
        used = used | (k > 0)
    x, y, z = torch.meshgrid(*(torch.arange(n, device=device) for n in sink.shape[1:]), indexing="ij")
    red = (x + y + z) % 2 == 0
    cells = torch.cat([(used & red).flatten().nonzero(), (used & ~red).flatten().nonzero()]).flatten()
    n = cells.numel()

    def at_cells(values: Tensor) -> Tensor:
        return values.expand_as(sink).flatten().index_select(0, cells)

    number = torch.empty(sink.shape, dtype=torch.int32, device=device)
    number.view(-1)[cells] = torch.arange(n, dtype=torch.int32, device=device)
    edges, neighbours, faces = [], [], []
    for a in range(3):
        low, k = at_cells(number.roll(1, a + 1)), at_cells(low_face[a])
        high = (k > 0).nonzero().flatten()
        edges.append((low[high].long(), high, torch.full_like(high, a), k[high]))
        neighbours += [low, at_cells(number.roll(-1, a + 1))]
        faces += [k, at_cells(high_face[a])]
    low, high, axis, edge_conductance = (torch.cat(parts) for parts in zip(*edges, strict=True))
    k = torch.stack(faces, dim=1)
    places = (k > 0).flatten().nonzero().flatten()
    starts = torch.cat([cells.new_zeros(1), (k > 0).sum(1).cumsum(0)])
    columns = torch.stack(neighbours, dim=1).flatten().index_select(0, places)
    return cells, _Graph(
        block=torch.stack([at_cells(position) for position in (x, y, z)]),
        num_red=int((used & red).sum()),
        dims=tuple(sink.shape[1:]),
        strength=tuple(conductance.amax((0, 2, 3, 4)).tolist()),
        low=low,
        high=high,
        axis=axis,
        conductance=edge_conductance,
        neighbours=_matrix(starts, columns, k.flatten().index_select(0, places), n),
        sink=at_cells(sink),
    )


def _coarsen(graph: _Graph) -> tuple[_Graph, Tensor, Tensor]:
    """The graph of the connected pieces of doubled blocks that touch others or have a sink.

    With it, of each node, its piece, and the number of that in the graph, −1 where it is not there.
    """
    k, num_nodes = graph.conductance, graph.sink.numel()
    reach = [s if n > 1 else 0.0 for s, n in zip(graph.strength, graph.dims, strict=True)]
    factors = [2 if s >= STRONG * max(reach) else 1 for s in reach]
    dims = tuple(-(-n // f) for n, f in zip(graph.dims, factors, strict=True))
    doubled = graph.block.new_tensor(factors)[:, None]
    # Inside a new block lies the low face of every odd one along a doubled axis, and all where one block is left.
    inner = (graph.block % doubled == 1) | (graph.block.new_tensor(dims) == 1)[:, None]
    is_inside = inner.flatten().index_select(0, graph.axis * num_nodes + graph.high)
    inside, outside = is_inside.nonzero().flatten(), (~is_inside).nonzero().flatten()
    low, high = graph.low.index_select(0, inside), graph.high.index_select(0, inside)
    piece, first = _pieces(low, high, num_nodes)
    # Along an axis a piece is two layers thick if an edge inside it runs that way, else one.
    thickness = k.new_ones(3 * first.numel())
    thickness.index_fill_(0, 3 * piece.index_select(0, low) + graph.axis.index_select(0, inside), 2)

    low, high = (piece.index_select(0, end.index_select(0, outside)) for end in (graph.low, graph.high))
    used = torch.zeros_like(first, dtype=torch.bool)
    for touching in (low, high, piece[graph.sink > 0]):
        used.index_fill_(0, touching, True)
    kept = used.nonzero().flatten()
    block = graph.block.index_select(1, first[kept]) // doubled
    black = block.sum(0) % 2 == 1
    order = torch.argsort(black, stable=True)
    kept, block, n = kept[order], block[:, order], kept.numel()
    number = torch.full_like(first, -1)
    number[kept] = torch.arange(n, device=kept.device)
    parent = number.index_select(0, piece)

    pairs, faces = torch.sort(number.index_select(0, low) * n + number.index_select(0, high), stable=True)
    is_first = torch.ones_like(pairs, dtype=torch.bool)
    is_first[1:] = pairs[1:] != pairs[:-1]
    begin = is_first.nonzero().flatten()
    low, high, faces = pairs[begin] // n, pairs[begin] % n, outside.index_select(0, faces)
    axis = graph.axis[faces[begin]]
    ends = torch.cat([begin, begin.new_tensor([faces.numel()])])
    contact = _matrix(ends, faces, torch.ones_like(faces, dtype=k.dtype), k.numel()) @ k
    distance = (thickness[3 * kept[low] + axis] + thickness[3 * kept[high] + axis]) / 2
    conductance = contact / distance
    rows, order = torch.sort(torch.cat([low, high]), stable=True)
    neighbours = _matrix(
        _starts(rows, n), torch.cat([high, low])[order], torch.cat([conductance, conductance])[order], n
    )
    on = parent >= 0
    sink = k.new_zeros(n).index_add_(0, parent[on], graph.sink[on])
    coarse = _Graph(
        block=block,
        num_red=n - int(black.sum()),
        dims=dims,
        strength=tuple(s * math.prod(factors) / f**2 for s, f in zip(graph.strength, factors, strict=True)),
        low=low,
        high=high,
        axis=axis,
        conductance=conductance,
        neighbours=neighbours,
        sink=sink,
    )
    return coarse, piece, parent


def _pieces(low: Tensor, high: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The connected piece 0, 1, … of each of n nodes, and the first node of every piece.

    Each node takes the lowest label next to it, and then the label of the node that has that number, until all agree.
    """
    label = torch.arange(n, device=low.device)
    while True:
        ends = label.index_select(0, low), label.index_select(0, high)
        if torch.equal(*ends):
            break
        lowest = torch.minimum(*ends)
        for end in ends:
            label = label.scatter_reduce(0, end, lowest, "amin")
        label = label.index_select(0, label)
    is_first = label == torch.arange(n, device=low.device)
    return (is_first.cumsum(0) - 1).index_select(0, label), is_first.nonzero().flatten()


class _Level:
    """What a V-cycle does on one level: relax one colour, pass the residual down."""

    def __init__(self, graph: _Graph, restriction: Tensor, prolongation: Tensor, half_sweeps: int) -> None:
        n, red = graph.sink.numel(), graph.num_red
        self.half_sweeps = half_sweeps
        matrix = graph.neighbours
        starts, columns, k = matrix.crow_indices(), matrix.col_indices(), matrix.values()
        diagonal = graph.sink + matrix @ torch.ones_like(graph.sink)
        alike = (graph.low < red) == (graph.high < red)
        self.two_coloured = not bool(alike.any())
        if not self.two_coloured:
            # Across an odd periodic axis a colour meets itself: there it relaxes by a Jacobi step, which half of the
            # coupling on the diagonal keeps convergent.
            rows = torch.arange(n, device=columns.device).repeat_interleave(starts.diff())
            same = ((rows < red) == (columns < red)).to(k.dtype)
            excess = _matrix(starts, columns, k * same / 2, n) @ torch.ones_like(graph.sink)
            diagonal = diagonal + excess
            own = excess.nonzero().flatten()
            rows, order = torch.sort(torch.cat([rows, own]), stable=True)
            starts, columns, k = _starts(rows, n), torch.cat([columns, own])[order], torch.cat([k, excess[own]])[order]
        cut = int(starts[red])
        self.diagonal, self.inverse = diagonal[:, None], (1 / diagonal)[:, None]
        self.rows = slice(0, red), slice(red, n)
        self.neighbours = (
            _matrix(starts[: red + 1], columns[:cut], k[:cut], n),
            _matrix(starts[red:] - cut, columns[cut:], k[cut:], n),
        )
        self.restriction, self.prolongation = restriction, prolongation

    def first_red(self, b: Tensor) -> Tensor:
        """The first red half-sweep, from zero."""
        x, red = torch.zeros_like(b), self.rows[0]
        torch.mul(b[red], self.inverse[red], out=x[red])
        return x

    def relax(self, x: Tensor, b: Tensor, colour: int) -> None:
        """Solve for the nodes of one colour, the others given."""
        rows = self.rows[colour]
        torch.mul(_plus_product(b[rows], self.neighbours[colour], x), self.inverse[rows], out=x[rows])

    def residual(self, x: Tensor, b: Tensor) -> Tensor:
        """b + L x after the half-sweeps on the way down."""
        residual = torch.zeros_like(b)
        # The last half-sweep has left nothing on its own colour, if no two nodes of that are neighbours.
        for colour in (self.half_sweeps % 2,) if self.two_coloured else (0, 1):
            rows = self.rows[colour]
            inflow = _plus_product(b[rows], self.neighbours[colour], x)
            torch.addcmul(inflow, self.diagonal[rows], x[rows], value=-1, out=residual[rows])
        return residual


def _transfers(parent: Tensor, num_coarse: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrix that adds up nodes by their parent, and its transpose; nodes with parent −1 have none."""
    has_parent = parent >= 0
    members = has_parent.nonzero().flatten()
    parents, order = torch.sort(parent[members], stable=True)
    ones = torch.ones(members.numel(), dtype=dtype, device=parent.device)
    begin = torch.cat([parent.new_zeros(1), has_parent.cumsum(0)])
    restriction = _matrix(_starts(parents, num_coarse), members[order], ones, parent.numel())
    return restriction, _matrix(begin, parent[members], ones, num_coarse)


def _starts(rows: Tensor, n: int) -> Tensor:
    """Where the entries of each of n rows begin among sorted ones, and where the last end."""
    count = torch.bincount(rows, minlength=n)
    return torch.cat([count.new_zeros(1), count.cumsum(0)])


def _matrix(starts: Tensor, columns: Tensor, values: Tensor, num_columns: int) -> Tensor:
    """A sparse matrix of compressed rows with 32-bit indices, which multiply fastest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)
        size = (starts.numel() - 1, num_columns)
        return torch.sparse_csr_tensor(starts.int(), columns.int(), values, size, check_invariants=False)


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """Matrix times columns; a single column goes the faster way."""
    return (matrix @ x[:, 0])[:, None] if x.shape[1] == 1 else matrix @ x


def _plus_product(b: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
    """b + matrix times columns."""
    return torch.addmv(b[:, 0], matrix, x[:, 0])[:, None] if x.shape[1] == 1 else torch.addmm(b, matrix, x)
