"""What a router says, and what every router has.

Shape suffixes: T tokens (all samples of a batch together), D model width, E routed experts, k experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts take each token, and with what weight.

    Args:
        ids: the chosen experts, best first, ``(T, k)`` int64 in 0…E−1.
        weights: what multiplies each chosen expert's output, ``(T, k)``; gradients reach the router through these.
        scores: the router's probability for every expert, ``(T, E)``, rows summing to 1; FP32 (FP64 for FP64 tokens).
    """

    ids: Tensor
    weights: Tensor
    scores: Tensor

    @property
    def num_experts(self) -> int:
        return self.scores.shape[-1]


class Router(nn.Module, ABC):
    """A map from tokens to experts.

    Args:
        num_experts: number of routed experts E, ≥ 1.
        top_k: experts per token k, 1…E.

    ``bias_E`` is a persistent FP32 buffer that `BiasBalance` moves to even out the load. It decides who is selected and
    never enters a weight.

    Raises:
        ValueError: counts that no router can have, or tokens that are not ``(T, D)``.
    """

    bias_E: Tensor

    def __init__(self, num_experts: int, top_k: int = 1) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"Expected at least 1 expert, got num_experts = {num_experts}.")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"Expected top_k in 1…{num_experts} (the number of experts), got {top_k}.")
        self.num_experts = num_experts
        self.top_k = top_k
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))

    @abstractmethod
    def route(self, tokens_TD: Tensor) -> Routing:
        """The routing of tokens that are already in FP32 or FP64, outside any autocast."""

    def forward(self, tokens_TD: Tensor) -> Routing:
        """Route each token; computed in FP32 (FP64 for FP64 tokens) whatever the autocast around it."""
        if tokens_TD.ndim != 2:
            raise ValueError(
                f"Expected tokens of shape (T, D), got {tuple(tokens_TD.shape)}; flatten the samples first."
            )
        with torch.autocast(tokens_TD.device.type, enabled=False):
            return self.route(tokens_TD.to(torch.promote_types(tokens_TD.dtype, torch.float32)))

    def select(self, scores_TE: Tensor) -> Routing:
        """The k experts of highest score + bias, weighted by their scores *as they are*.

        Weights normalised over k = 1 would be the constant 1 and the router would get no gradient.
        """
        ids_Tk = (scores_TE.detach() + self.bias_E).topk(self.top_k, dim=-1).indices
        return Routing(ids=ids_Tk, weights=scores_TE.gather(-1, ids_Tk), scores=scores_TE)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # model.bfloat16() casts buffers too, and steps of 1e-3 vanish in a bfloat16 bias.
        bias_E = self.bias_E
        super()._apply(fn, recurse)
        if self.bias_E.dtype != torch.float32:
            self.bias_E = bias_E.to(self.bias_E.device)
        return self

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}"


RouterFactory = Callable[..., Router]
"""Makes a router for tokens of a given width: ``functools.partial(SemanticTop1, num_experts=4)`` and the like."""


def build_router(factory: RouterFactory, dim: int) -> Router:
    """Call a router factory with the width of the tokens.

    Raises:
        ValueError: the factory made something else than a router.
    """
    router: Any = factory(dim)
    if not isinstance(router, Router):
        raise ValueError(
            f"Expected a router factory, dim -> Router, got one that makes {type(router).__name__}; "
            "pass functools.partial(SemanticTop1, num_experts=4) or `_partial_: true` in the router's YAML."
        )
    return router
