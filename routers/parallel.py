"""Experts spread over ranks: rows travel to the rank that holds their expert, and its results travel back.

Shape suffixes: N rows of this rank's tokens, M rows that this rank's experts get, D model width, E experts, P ranks,
L = E/P experts per rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from latentphys.routers.experts import Experts
from latentphys.routers.order import ExpertOrder


@torch.compiler.disable  # torch.compile has no graph for sizes that other ranks decide
def run_across_ranks(x_ND: Tensor, ends_E: Tensor, experts: Experts, one_by_one: bool = False) -> Tensor:
    """Rows sorted by expert through the experts of all ranks.

    Every rank of ``experts.group`` has to call this as often as the others, with as many rows as it has: none is fine,
    and so are all for one expert. Weights of the routing never travel, for results are combined where the tokens are.
    The host waits for the device once, to read how many rows go where and come from where.

    Args:
        x_ND: rows of this rank, ``(N, D)``.
        ends_E: int32, expert e of all E takes rows ends[e−1]…ends[e]−1.
        experts: this rank's slice of the experts, E/P in the order of the ranks.
        one_by_one: run them one after the other, in any precision, rather than grouped.

    Returns:
        each row's result, ``(N, D)``, in the same order.
    """
    group = experts.group
    assert group is not None
    if torch.is_autocast_enabled(x_ND.device.type):
        x_ND = x_ND.to(torch.get_autocast_dtype(x_ND.device.type))  # half the bytes on the way
    num_ranks = dist.get_world_size(group)
    counts_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    to_PL = counts_E.unflatten(0, (num_ranks, -1))
    from_PL = torch.empty_like(to_PL)
    dist.all_to_all_single(from_PL, to_PL, group=group)
    to_P, from_P = torch.stack([to_PL.sum(1), from_PL.sum(1)]).tolist()

    x_MD = _Exchange.apply(x_ND, to_P, from_P, group)
    # They come sorted by rank, and by expert within each.
    num_local = to_PL.shape[1]
    local_L = torch.arange(num_local, device=x_ND.device)
    ids_M = local_L.repeat(num_ranks).repeat_interleave(from_PL.flatten(), output_size=len(x_MD))
    order = ExpertOrder.of(ids_M, num_local)
    run = experts.each if one_by_one else experts
    y_MD = order.restore(run(order.sort(x_MD), order.ends_E))
    return _Exchange.apply(y_MD, from_P, to_P, group)


class _Exchange(torch.autograd.Function):
    """Rows to all ranks and rows from all ranks; the gradient goes the same way back.

    torch's own differentiable exchange is deprecated in ``torch.distributed.nn``, and its successor is private.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, to_P: list[int], from_P: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.to_P, ctx.from_P, ctx.group = to_P, from_P, group
        return _exchange(x_ND, to_P, from_P, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.from_P, ctx.to_P, ctx.group), None, None, None


def _exchange(x_ND: Tensor, to_P: list[int], from_P: list[int], group: dist.ProcessGroup) -> Tensor:
    y_MD = x_ND.new_empty(sum(from_P), x_ND.shape[1])
    dist.all_to_all_single(y_MD, x_ND.contiguous(), from_P, to_P, group=group)
    return y_MD
