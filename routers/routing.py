"""What a router says, and what every router has.

Shape suffixes: T tokens (all samples of a batch together), D model width, E routed experts, k experts per token,
R rows that a router decides for: tokens, or groups of tokens that share one decision.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import reduce, repeat
from torch import Tensor, nn

from latentphys.routers.balance import BiasBalance


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch stand: samples of px × py × pz latent cells, sample after sample in C order.

    Args:
        num_samples: samples B in the batch.
        shape: cells per axis.
        num_experts: how many experts, the first ones, these samples may choose. Default: all.
    """

    num_samples: int
    shape: tuple[int, int, int]
    num_experts: int | None = None

    @property
    def cells(self) -> int:
        """Tokens per sample."""
        return math.prod(self.shape)

    def _sizes(self, block: Sequence[int]) -> dict[str, int]:
        """Blocks and cells per block of each axis; a block is no longer than its axis."""
        lengths = [min(length, n) for length, n in zip(block, self.shape, strict=True)]
        if any(n % length for n, length in zip(self.shape, lengths, strict=True)):
            raise ValueError(
                f"Expected blocks that divide the {self.shape} latent cells, got {tuple(block)}; choose divisors."
            )
        sizes = {"b": self.num_samples}
        for axis, n, length in zip("xyz", self.shape, lengths, strict=True):
            sizes |= {axis: n // length, f"{axis}0": length}
        return sizes

    def pool(self, tokens_TD: Tensor, block: Sequence[int]) -> Tensor:
        """The mean token of every block of cells, ``(R, D)``.

        Raises:
            ValueError: another number of tokens, or blocks that do not divide the latent cells.
        """
        sizes = self._sizes(block)
        if tokens_TD.shape[0] != self.num_samples * self.cells:
            raise ValueError(
                f"Expected {self.num_samples} samples of {self.shape} latent cells, got {tokens_TD.shape[0]} tokens."
            )
        return reduce(tokens_TD, "(b x x0 y y0 z z0) d -> (b x y z) d", "mean", **sizes)

    def spread(self, rows_RC: Tensor, block: Sequence[int]) -> Tensor:
        """What was decided for each block, at each of its tokens, ``(T, …)``; the inverse of `pool` on means."""
        return repeat(rows_RC, "(b x y z) c -> (b x x0 y y0 z z0) c", **self._sizes(block))


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts take each token, and with what weight.

    Args:
        ids: the chosen experts, best first, ``(T, k)`` int64 in 0…E−1.
        weights: what multiplies each chosen expert's output, ``(T, k)``; gradients reach the router through these.
        scores: the router's probability for every expert, ``(T, E)``, rows summing to 1, 0 for experts that the
            samples may not choose; FP32 (FP64 for FP64 tokens).
        log_z: log Σ exp of the logits behind the scores, ``(T, 1)``; None where there are none.
        levels: the decisions of a router that decides in several levels, outermost first, each of its own rows, for
            balance and telemetry; empty where this routing is the only decision.
    """

    ids: Tensor
    weights: Tensor
    scores: Tensor
    log_z: Tensor | None = None
    levels: tuple[Routing, ...] = ()

    @property
    def num_experts(self) -> int:
        return self.scores.shape[-1]

    def spread(self, layout: Layout, block: Sequence[int]) -> Routing:
        """The routing of tokens whose blocks this one decided for."""
        return replace(
            self,
            ids=layout.spread(self.ids, block),
            weights=layout.spread(self.weights, block),
            scores=layout.spread(self.scores, block),
            log_z=None if self.log_z is None else layout.spread(self.log_z, block),
        )


Per = str | Sequence[int]
"""What one decision holds for: ``"token"``, ``"sample"``, or a block of latent cells such as ``(2, 2, 2)``."""


def check_per(per: Per) -> str | tuple[int, int, int]:
    """Refuse what no decision can hold for."""
    if isinstance(per, str):
        if per in ("token", "sample"):
            return per
    elif len(per) == 3 and all(isinstance(n, int) and n >= 1 for n in per):
        x, y, z = per
        return x, y, z
    raise ValueError(f"Expected per = token | sample | three block lengths ≥ 1 such as [2, 2, 2], got {per!r}.")


class Router(nn.Module, ABC):
    """A map from tokens to experts.

    Args:
        num_experts: number of routed experts E, ≥ 1.
        top_k: experts per token k, 1…E.
        per: what one decision holds for, ``token | sample`` or a block of latent cells such as ``(2, 2, 2)``. Samples
            and blocks are judged by their mean token, and all their tokens take the same way.

    ``bias_E`` is a persistent FP32 buffer that `BiasBalance` moves to even out the load. It decides who is selected and
    never enters a weight. ``num_frozen`` experts, the first ones, keep theirs: 0 unless the router is frozen.

    Raises:
        ValueError: counts that no router can have, or tokens that are not ``(T, D)``.
    """

    bias_E: Tensor

    def __init__(self, num_experts: int, top_k: int = 1, per: Per = "token") -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"Expected at least 1 expert, got num_experts = {num_experts}.")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"Expected top_k in 1…{num_experts} (the number of experts), got {top_k}.")
        self.num_experts = num_experts
        self.top_k = top_k
        self.per = check_per(per)
        self.num_frozen = 0
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))

    @abstractmethod
    def route(self, rows_RD: Tensor, layout: Layout | None) -> Routing:
        """The routing of rows that are already in FP32 or FP64, outside any autocast.

        Args:
            rows_RD: tokens, or the mean tokens of samples or blocks where `per` says so.
            layout: where the tokens stand; None where the caller did not say.
        """

    def forward(self, tokens_TD: Tensor, layout: Layout | None = None) -> Routing:
        """Route each token; computed in FP32 (FP64 for FP64 tokens) whatever the autocast around it.

        Args:
            layout: where the tokens stand, which routing per sample or block has to know.
        """
        if tokens_TD.ndim != 2:
            raise ValueError(
                f"Expected tokens of shape (T, D), got {tuple(tokens_TD.shape)}; flatten the samples first."
            )
        with torch.autocast(tokens_TD.device.type, enabled=False):
            rows_TD = tokens_TD.to(torch.promote_types(tokens_TD.dtype, torch.float32))
            if self.per == "token":
                return self.route(rows_TD, layout)
            known = self.known(layout)
            block = known.shape if isinstance(self.per, str) else self.per
            return self.route(known.pool(rows_TD, block), layout).spread(known, block)

    def known(self, layout: Layout | None) -> Layout:
        """The layout, for routers that cannot do without."""
        if layout is None:
            raise ValueError(
                f"Expected the layout of the tokens for a {type(self).__name__} that looks at whole samples or blocks, "
                "got none; pass layout=Layout(num_samples, shape)."
            )
        return layout

    def select(self, scores_RE: Tensor, log_z_R1: Tensor | None = None) -> Routing:
        """The k experts of highest score + bias, weighted by their scores *as they are*.

        Weights normalised over k = 1 would be the constant 1 and the router would get no gradient.
        """
        bias_E = self.bias_E[: scores_RE.shape[-1]]
        ids_Rk = (scores_RE.detach() + bias_E).topk(self.top_k, dim=-1).indices
        weights_Rk = scores_RE.gather(-1, ids_Rk)
        return self.of_all(Routing(ids=ids_Rk, weights=weights_Rk, scores=scores_RE, log_z=log_z_R1))

    def num_choices(self, layout: Layout | None) -> int:
        """How many experts, the first ones, the tokens may choose."""
        return self.num_experts if layout is None or layout.num_experts is None else layout.num_experts

    def of_all(self, routing: Routing) -> Routing:
        """A routing among the first experts as one among all: the others have score 0."""
        others = self.num_experts - routing.num_experts
        return replace(routing, scores=F.pad(routing.scores, (0, others))) if others else routing

    def freeze(self) -> None:
        """Keep the router as it is: no gradient reaches it, and no balance moves its bias."""
        self.requires_grad_(False)
        self.num_frozen = self.num_experts

    @torch.no_grad()
    def even_out(self, balance: BiasBalance, counts_E: Tensor) -> None:
        """Move the bias of the experts that are not frozen towards an even load among these.

        Args:
            counts_E: tokens that each expert took in this step, on all ranks.
        """
        free = slice(self.num_frozen, None)
        self.bias_E[free] = balance.update(self.bias_E[free], counts_E[free])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # model.bfloat16() casts buffers too, and steps of 1e-3 vanish in a bfloat16 bias.
        bias_E = self.bias_E
        super()._apply(fn, recurse)
        if self.bias_E.dtype != torch.float32:
            self.bias_E = bias_E.to(self.bias_E.device)
        return self

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, per={self.per}"


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
