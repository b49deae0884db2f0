"""Whether two endpoints are relatives of an anchor, which a straight line through their weights takes for granted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

UNRELATED = 0.25
"""Cosine below which weights do not look like fine-tuned ones of an anchor. Those of another start have about 0."""
FEWEST = 1000
"""Weights in matrices that a cosine is believed of: of N unrelated ones it is 0 ± 1/√N."""


@dataclass(frozen=True)
class Relation:
    """How two endpoints lie to their anchor.

    Attributes:
        num_moved, num_fixed: numbers that the composition moves, and numbers that are equal in all three.
        cosine_low, cosine_high: of an endpoint's matrices with the anchor's, each less its mean; None where there are
            fewer than `FEWEST` weights to tell.
        plus, minus: |Δ₊| / |θ₀| and |Δ₋| / |θ₀|, over what moves; None for an anchor of zeros.
        residuals: cosine between both endpoints' ways from the anchor; None where one of them did not move.
    """

    num_moved: int
    num_fixed: int
    cosine_low: float | None
    cosine_high: float | None
    plus: float | None
    minus: float | None
    residuals: float | None

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


class Tally:
    """Adds up, over pieces of tensors in FP64, what a `Relation` is made of.

    Args:
        paths: of anchor, low and high endpoint, for messages.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.num_moved = self.num_fixed = self.num_judged = 0
        self._gram = torch.zeros(3, 3, dtype=torch.float64)  # of θ₀, Δ₊ and Δ₋
        self._centred = torch.zeros(3, 3, dtype=torch.float64)  # of the matrices of anchor, low, high
        self._tensor = (0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64))

    def add_fixed(self, name: str, piece: Sequence[Tensor]) -> None:
        """Count a piece that has to be equal in all three."""
        for path, other in zip(self.paths[1:], piece[1:], strict=True):
            if other.dtype != piece[0].dtype or not torch.equal(other, piece[0]):
                why = (
                    "the router moved; fine-tune with finetune.freeze_router=true"
                    if "router" in name
                    else "buffers and scales do not compose; fine-tune both endpoints from this anchor"
                )
                raise ValueError(f"Expected {name!r} equal in {self.paths[0]} and {path}, got other values: {why}.")
        self.num_fixed += piece[0].numel()

    def add(self, name: str, piece: Sequence[Tensor], is_matrix: bool) -> None:
        """Count a piece that moves."""
        rows = []
        for path, values in zip(self.paths, piece, strict=True):
            row = values.to(torch.promote_types(values.dtype, torch.float64)).reshape(-1)
            row = torch.view_as_real(row).reshape(-1) if row.is_complex() else row
            if not bool(torch.isfinite(row).all()):
                raise ValueError(
                    f"Expected finite weights, got others in {name!r} of {path}. Use an earlier checkpoint."
                )
            rows.append(row)
        anchor, low, high = rows
        self.num_moved += piece[0].numel()
        if is_matrix:
            n, total, products = self._tensor
            total = total + torch.stack([row.sum() for row in rows])
            self._tensor = (n + anchor.numel(), total, products + _gram(rows))
        self._gram += _gram([anchor, (high + low) / 2 - anchor, (high - low) / 2])

    def end(self) -> None:
        """The tensor whose pieces came last is complete."""
        n, total, products = self._tensor
        if n:
            centred = products - torch.outer(total, total) / n
            if float(centred[0, 0]) > 1e-12 * float(products[0, 0]):
                self._centred += centred
                self.num_judged += n
        self._tensor = (0, torch.zeros_like(total), torch.zeros_like(products))

    def relation(self) -> Relation:
        """The relation.

        Raises:
            ValueError: endpoints of one and the same weights, or one that is no nearer to the anchor than weights that
                have nothing to do with it.
        """
        size, plus, minus = (float(x) for x in self._gram.diagonal().sqrt())
        if minus == 0.0:
            raise ValueError(
                f"Expected two endpoints that differ, got the same weights in {self.paths[1]} and {self.paths[2]}: no "
                "alpha would change anything."
            )
        cosines = [_cosine(self._centred, 0, k) if self.num_judged >= FEWEST else None for k in (1, 2)]
        for path, cosine in zip(self.paths[1:], cosines, strict=True):
            if cosine is not None and cosine < UNRELATED:
                raise ValueError(
                    f"Expected {path} to be fine-tuned from {self.paths[0]}, got weights whose cosine with its own is "
                    f"{cosine:.3f}, below {UNRELATED:g}: unrelated ones have about 0. Fine-tune both endpoints from "
                    "this anchor."
                )
        # θ_low − θ₀ = Δ₊ − Δ₋ and θ_high − θ₀ = Δ₊ + Δ₋
        ways = torch.tensor([[0.0, 1.0, -1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
        residuals = _cosine(ways @ self._gram @ ways.T, 0, 1)
        relative = [x / size if size > 0 else None for x in (plus, minus)]
        return Relation(self.num_moved, self.num_fixed, cosines[0], cosines[1], relative[0], relative[1], residuals)


def _gram(rows: Sequence[Tensor]) -> Tensor:
    """Inner products of some rows, without a copy of them all."""
    products = torch.empty(len(rows), len(rows), dtype=torch.float64)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows[: i + 1]):
            products[i, j] = products[j, i] = a.dot(b)
    return products


def _cosine(gram: Tensor, i: int, j: int) -> float | None:
    size = math.sqrt(max(0.0, float(gram[i, i] * gram[j, j])))
    return float(gram[i, j]) / size if size > 0 else None
