"""Tree routing: a whole input function goes down a tree of nearest centroids to one leaf, its expert.

Shape suffixes: R rows to decide for (functions), D features per row, E experts (leaves), N inner nodes, C children per
node; n rows that reach one node.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentphys.routers.routing import Layout, Per, Router, Routing

_ROUNDING = 1e-5
"""Spread of a feature, relative to its size, below which it may be the rounding of a constant in FP32."""


class TreeRouter(Router):
    """A complete tree of nearest-centroid decisions over standardised rows.

        x = (row − mean) / std,    child = argmin_c |x − centroid_{node, c}|²    at each of ``depth`` nodes

    A row is compared with the C centroids of the nodes on its way alone: the cost of routing grows with the logarithm
    of the number of experts. The map is piecewise constant, so nothing is learned by gradient: `fit` places the
    centroids, once. The one leaf has the constant weight 1 and scores are one-hot; ``bias_E`` is ignored, for moving
    rows to another leaf would undo the partition. Until `fit` all centroids coincide, and every row goes to leaf 0:
    costs can be counted, and shapes traced, before there is any data.

    Args:
        dim: features per row D.
        num_experts: leaves E, a power of ``branching``.
        branching: children per node C, ≥ 2. Good values: 2…4, which make about equally few comparisons.
        per: what one decision holds for, see `Router`; ``token`` for rows that are whole functions already.

    Raises:
        ValueError: a branching below 2, or a number of experts that no complete tree has.

    Reference: mixtures of neural operators, arXiv 2404.09101, which routes by such trees and leaves open how to place
    the centroids.
    """

    mean_D: Tensor
    std_D: Tensor
    centroids_NCD: Tensor
    fitted: Tensor

    def __init__(self, dim: int, num_experts: int, branching: int = 2, per: Per = "token") -> None:
        super().__init__(num_experts, top_k=1, per=per)
        if branching < 2:
            raise ValueError(f"Expected branching ≥ 2, got {branching}.")
        depth = 0
        while branching**depth < num_experts:
            depth += 1
        if branching**depth != num_experts:
            raise ValueError(
                f"Expected a power of branching = {branching} experts, the leaves of a complete tree, "
                f"got {num_experts}; use {branching ** (depth - 1)} or {branching**depth}."
            )
        self.dim, self.branching, self.depth = dim, branching, depth
        num_nodes = (num_experts - 1) // (branching - 1)
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("std_D", torch.ones(dim))
        # Level after level: the children of node n are the nodes nC + 1 … nC + C.
        self.register_buffer("centroids_NCD", torch.zeros(num_nodes, branching, dim))
        self.register_buffer("fitted", torch.zeros(1, dtype=torch.bool))

    @property
    def num_comparisons(self) -> int:
        """Distances worked out for each row: branching × depth."""
        return self.branching * self.depth

    def route(self, rows_RD: Tensor, layout: Layout | None) -> Routing:
        dtype = rows_RD.dtype
        x_R1D = ((rows_RD - self.mean_D.to(dtype)) / self.std_D.to(dtype)).unsqueeze(1)
        node_R = torch.zeros(len(rows_RD), dtype=torch.int64, device=rows_RD.device)
        for _ in range(self.depth):
            squares_RC = (x_R1D - self.centroids_NCD[node_R].to(dtype)).square().sum(-1)
            node_R = node_R * self.branching + 1 + squares_RC.argmin(-1)
        ids_R = node_R - len(self.centroids_NCD)
        scores_RE = F.one_hot(ids_R, self.num_experts).to(dtype)
        return Routing(ids=ids_R[:, None], weights=scores_RE.new_ones(len(ids_R), 1), scores=scores_RE)

    @torch.no_grad()
    def fit(self, rows_RD: Tensor) -> None:
        """Place the centroids by k-means at each node, from the root down; the same rows give the same bits.

        Features that do not vary take no part. With two children per node, one that k-means would leave with fewer
        different rows than leaves is evened out by a cut through the median. Where rows are fewer than leaves, or
        coincide, leaves stay empty. Distant clusters of rows get leaves of their own as far as halving the clusters
        again and again parts them: an outlier far from all others takes a whole branch.

        Args:
            rows_RD: rows as `route` will see them, R ≥ 1.

        Raises:
            ValueError: rows of another width, none, or some that are not finite.
        """
        if rows_RD.ndim != 2 or rows_RD.shape[1] != self.dim or not len(rows_RD):
            raise ValueError(f"Expected rows of shape (R, {self.dim}) with R ≥ 1, got {tuple(rows_RD.shape)}.")
        rows = rows_RD.double().cpu().numpy()
        if not np.isfinite(rows).all():
            row, feature = np.argwhere(~np.isfinite(rows))[0].tolist()
            raise ValueError(
                f"Expected finite rows to fit a tree to, got {rows[row, feature]} as feature {feature} of row {row}; "
                "look for NaN in the data."
            )
        std = np.maximum(rows.std(0), _ROUNDING * np.abs(rows).max(0))
        self.mean_D.copy_(torch.from_numpy(rows.mean(0)))
        self.std_D.copy_(torch.from_numpy(np.where(std > np.finfo(np.float32).tiny, std, 1.0)))
        x = (rows - self.mean_D.double().cpu().numpy()) / self.std_D.double().cpu().numpy()
        level, centroids = [x], []
        for depth in reversed(range(self.depth)):
            children = []
            for members in level:
                # In FP32, as they are stored, so that rows go where routing will send them.
                chosen = _centroids(members, self.branching, self.branching**depth).astype(np.float32)
                nearest = _nearest(members, chosen)
                children += [members[nearest == child] for child in range(self.branching)]
                centroids.append(chosen)
            level = children
        if centroids:
            self.centroids_NCD.copy_(torch.from_numpy(np.stack(centroids)))
        self.fitted.fill_(True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TreeRouter:
        # model.bfloat16() casts buffers too, and centroids of 8 bits are others.
        kept = {name: getattr(self, name) for name in ("mean_D", "std_D", "centroids_NCD")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return f"dim={self.dim}, {super().extra_repr()}, branching={self.branching}, depth={self.depth}"


def _nearest(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The nearest of a few centroids for each row, the first of equals; shape (n,)."""
    return np.stack([np.square(rows - c).sum(1) for c in centroids.astype(np.float64)]).argmin(0)


def _centroids(rows: np.ndarray, number: int, leaves: int) -> np.ndarray:
    """Centroids that divide the rows at one node among its children, (number, D); equal ones leave children empty.

    Args:
        leaves: how many leaves each child has, and how many different rows it needs to fill them.
    """
    from scipy.cluster.vq import ClusterError, kmeans2

    distinct = np.unique(rows, axis=0)
    if len(distinct) <= number:
        missing = ((0, number - len(distinct)), (0, 0))
        return np.pad(distinct, missing, mode="edge" if len(distinct) else "constant")
    axis = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][0]
    axis *= np.sign(axis[np.abs(axis).argmax()])  # the sign of a singular vector is arbitrary
    parts = np.array_split(distinct[np.argsort(distinct @ axis, kind="stable")], number)
    start = np.stack([part.mean(0) for part in parts])
    candidates = [start]
    with suppress(ClusterError):
        candidates.insert(0, kmeans2(rows, start, iter=50, minit="matrix", missing="raise")[0])
    if number == 2:
        # Two points that mirror each other in the plane halfway between the two middle rows.
        below, above = parts[0][-1] @ axis, parts[1][0] @ axis
        middle = start.mean(0) + ((below + above) / 2 - start.mean(0) @ axis) * axis
        reach = (start[1] - start[0]) @ axis / 2 * axis
        candidates.append(np.stack([middle - reach, middle + reach]))

    def least(centroids: np.ndarray) -> int:
        """Different rows of the child that gets the fewest, as far as its leaves need them."""
        return min(leaves, int(np.bincount(_nearest(distinct, centroids), minlength=number).min()))

    return max(candidates, key=least)
