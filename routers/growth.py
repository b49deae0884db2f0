"""More experts for a trained model, beside those it has: what was there keeps every bit.

Shape suffixes: E experts that were there, n new ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from latentphys.routers.moe import MoEFeedForward
from latentphys.routers.routing import Router
from latentphys.routers.top1 import SemanticTop1
from latentphys.routers.topk import TopK

NOISE = 0.02
"""Size of the noise on copies, in units of the spread of what is copied: enough to part a copy from its original."""

_ROWS: dict[type[Router], str] = {SemanticTop1: "prototypes_ES", TopK: "gate_ED"}
"""The routers that can grow, and their parameter with one row per expert."""


class Appended(nn.Module):
    """A parametrisation that appends rows of their own to a tensor; the rows that were there are another parameter.

    Args:
        new: the new rows, ``(n, …)``.
    """

    def __init__(self, new: Tensor) -> None:
        super().__init__()
        self.new = nn.Parameter(new)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, self.new])


def grow(model: nn.Module, num_new: int, counts: Sequence[Tensor] | None = None) -> None:
    """Give every layer new experts, in place: copies of those that are used most, with a little noise.

    A copy starts from what serves the tokens best so far, as in sparse upcycling; a new expert that says zero would
    take from a new family what the model already knows. Its row in the router is a copy too: without the noise, copy
    and original would get the same tokens' scores, and the same gradients. Routers are frozen but for the new rows
    (`Router.freeze`). What was there is an `original` of `torch.nn.utils.parametrize`; `requires_grad` of the experts
    is left to the caller.

    Args:
        num_new: new experts n per layer, ≥ 1.
        counts: tokens that each expert of each router took, ``(E,)``, first router to last. Default: all alike.

    Raises:
        ValueError: no new expert, a router that cannot grow, or a model that has none.

    Reference: Sparse upcycling, arXiv 2212.05055.
    """
    if num_new < 1:
        raise ValueError(f"Expected at least 1 new expert, got {num_new}.")
    routers = [module for module in model.modules() if isinstance(module, Router)]
    layers = [module for module in model.modules() if isinstance(module, MoEFeedForward)]
    for router in routers:
        if type(router) not in _ROWS:
            raise ValueError(
                f"Expected routers that can take new experts, {' or '.join(sorted(t.__name__ for t in _ROWS))}, got a "
                f"{type(router).__name__}; fine-tune the weights that are there."
            )
    if not routers or not layers:
        raise ValueError("Expected a model with routers and experts, got one without.")
    used = counts or [torch.ones(router.num_experts) for router in routers]
    if len(used) != len(routers) or any(len(c) != r.num_experts for c, r in zip(used, routers, strict=False)):
        raise ValueError(f"Expected the counts of {len(routers)} routers, one per expert, got others.")
    parents = [_most_used(counts_E, num_new) for counts_E in used]
    for router, parents_n in zip(routers, parents, strict=True):
        _grow_router(router, parents_n)
    # One router for each layer, or one that decides for all.
    for layer, parents_n in zip(layers, parents if len(parents) > 1 else parents * len(layers), strict=True):
        for name in ("w_in_EDG", "w_out_EFD"):
            _append(layer.experts, name, parents_n)
        layer.experts.num_experts += num_new


def _most_used(counts_E: Tensor, num_new: int) -> Tensor:
    """The experts to copy, most used first and first of equals; from the start again where there are too few."""
    order_E = counts_E.double().argsort(descending=True, stable=True)
    return order_E[torch.arange(num_new) % len(order_E)]


def _grow_router(router: Router, parents_n: Tensor) -> None:
    router.freeze()
    _append(router, _ROWS[type(router)], parents_n)
    router.num_experts += len(parents_n)
    router.bias_E = torch.cat([router.bias_E, router.bias_E[parents_n]])


@torch.no_grad()
def _append(module: nn.Module, name: str, parents_n: Tensor) -> None:
    rows: Tensor = getattr(module, name)
    copies = rows[parents_n]
    spread = copies.flatten(1).std(1, correction=0).reshape(-1, *[1] * (copies.ndim - 1))
    # Unsafe means that the shape may change, which is the point.
    parametrize.register_parametrization(
        module, name, Appended(copies + NOISE * spread * torch.randn_like(copies)), unsafe=True
    )
