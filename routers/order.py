"""Rows in the order of their experts, and back.

Shape suffixes: T tokens, k rows per token, N = T·k rows, D model width, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class ExpertOrder(NamedTuple):
    """A stable sort of rows by expert.

    Args:
        order_N: the row that stands at each place.
        place_N: the place of each row; the inverse of ``order_N``.
        ends_E: int32, expert e has places ends[e−1]…ends[e]−1.
    """

    order_N: Tensor
    place_N: Tensor
    ends_E: Tensor

    @classmethod
    def of(cls, ids_N: Tensor, num_experts: int) -> ExpertOrder:
        """The order of rows by the expert of each."""
        order_N = ids_N.argsort(stable=True)
        # searchsorted rather than bincount, which makes a GPU wait for the host.
        all_E = torch.arange(num_experts, device=ids_N.device)
        ends_E = torch.searchsorted(ids_N[order_N], all_E, right=True, out_int32=True)
        place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
        return cls(order_N, place_N, ends_E)

    def sort(self, x_TD: Tensor, k: int = 1) -> Tensor:
        """``(N, D)``: each token once for each of its k rows, in expert order."""
        return _Sort.apply(x_TD, self.order_N, self.place_N, k)

    def restore(self, y_ND: Tensor) -> Tensor:
        """The rows in the order they had before."""
        return _Restore.apply(y_ND, self.order_N, self.place_N)


def sum_slots(rows_ND: Tensor, k: int) -> Tensor:
    """The sum of the k rows of each token, ``(T, D)``; torch copies a sum over one."""
    return rows_ND if k == 1 else rows_ND.unflatten(0, (-1, k)).sum(1)


class _Sort(torch.autograd.Function):
    """The gradient is a gather as well: no atomics, so the same bits each time, and dense."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, place_N: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(place_N)
        ctx.k = k
        return x_TD.index_select(0, order_N // k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (place_N,) = ctx.saved_tensors
        return sum_slots(grads[0].index_select(0, place_N), ctx.k), None, None, None


class _Restore(torch.autograd.Function):
    """The gradient is the inverse gather."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, order_N: Tensor, place_N: Tensor) -> Tensor:
        ctx.save_for_backward(order_N)
        return y_ND.index_select(0, place_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order_N,) = ctx.saved_tensors
        return grads[0].index_select(0, order_N), None, None
