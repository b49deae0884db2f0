"""The layers that `bench_moe.py` holds against each other: ours, dense ones, and mixtures as others publish them.

Shape suffixes: B samples, N tokens per sample, T = B·N, D model width, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from latentphys.routers import Experts, FeedForward, Layout, MoEFeedForward, Router, Routing, SemanticTop1, TopK
from latentphys.transformer.block import TransformerBlock
from latentphys.transformer.rotary import rotary

LATENT = (16, 16, 16)


@dataclass(frozen=True)
class Size:
    """T tokens of width D, and experts of hidden width F."""

    tokens: int
    dim: int
    hidden: int

    @property
    def layout(self) -> Layout:
        """Samples of 16³ latent cells where the tokens fill them, else one row of cells."""
        cells = LATENT[0] * LATENT[1] * LATENT[2]
        if self.tokens % cells:
            return Layout(1, (self.tokens, 1, 1))
        return Layout(self.tokens // cells, LATENT)

    @property
    def num_heads(self) -> int:
        """Heads of 64 channels, or one."""
        return max(1, self.dim // 64)


def router(size: Size, num_experts: int, top_k: int) -> Router:
    """The library's top-1 or top-k router, untrained: on random tokens its load is close to even."""
    if top_k == 1:
        return SemanticTop1(size.dim, num_experts)
    return TopK(size.dim, num_experts, top_k)


def skew(layer: MoEFeedForward, x_BND: Tensor) -> None:
    """Bias the selection until expert 0 takes half of these tokens."""
    assert layer.router is not None
    scores_TE = layer.router(x_BND.flatten(0, 1)).scores.detach()
    margin_T = scores_TE[:, 1:].amax(1) - scores_TE[:, 0]
    layer.router.bias_E[0] = margin_T.median()


class Dense(nn.Module):
    """A plain feed-forward where a mixture stands otherwise."""

    router = None

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.feed_forward = FeedForward(dim, hidden)

    def forward(self, x_BND: Tensor, layout: Layout | None = None, routing: Any = None) -> tuple[Tensor, None]:
        return self.feed_forward(x_BND), None


class Block(nn.Module):
    """A transformer block on tokens alone: condition and positions are fixed, and no gate is zero."""

    def __init__(self, size: Size, feed_forward: nn.Module) -> None:
        super().__init__()
        self.layout, heads = size.layout, size.num_heads
        self.block = TransformerBlock(size.dim, size.dim, heads, size.hidden, 1, num_shared=0)
        self.block.register_module("feed_forward", feed_forward)
        nn.init.normal_(self.block.modulation.linear.weight, std=0.1)
        table = rotary(self.layout.shape, (True, True, True), size.dim // heads)
        self.register_buffer("table", table)
        self.register_buffer("condition", torch.randn(self.layout.num_samples, size.dim))

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.block(x_BND, self.condition, self.table, self.layout)[0]


class OneByOne(nn.Module):
    """A module per expert, with the weights of a mixture of ours, behind its router."""

    def __init__(self, layer: MoEFeedForward) -> None:
        super().__init__()
        assert layer.router is not None
        self.router = layer.router
        self.experts = nn.ModuleList(_modules(layer.experts))

    def forward(self, x_BND: Tensor) -> Tensor:
        x_TD = x_BND.flatten(0, 1)
        return self.combine(x_TD, self.router(x_TD)).view_as(x_BND)

    def combine(self, x_TD: Tensor, routing: Routing) -> Tensor:
        raise NotImplementedError


class LoopOverExperts(OneByOne):
    """What most published codes do: a mask per expert, and rows added back one expert at a time.

    Every mask makes a GPU wait for the host.
    """

    def combine(self, x_TD: Tensor, routing: Routing) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            token_N, slot_N = torch.where(routing.ids == number)
            weighted_ND = expert(x_TD[token_N]) * routing.weights[token_N, slot_N, None]
            y_TD.index_add_(0, token_N, weighted_ND.to(y_TD.dtype))
        return y_TD


class EveryExpert(OneByOne):
    """Every expert on every token, multiplied by a weight that is mostly zero."""

    def combine(self, x_TD: Tensor, routing: Routing) -> Tensor:
        weights_TE = torch.zeros_like(routing.scores).scatter(1, routing.ids, routing.weights).to(x_TD.dtype)
        y_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            y_TD = y_TD + expert(x_TD) * weights_TE[:, number, None]
        return y_TD


def _modules(experts: Experts) -> Iterator[FeedForward]:
    """Each expert as a feed-forward of its own."""
    for w_in_DG, w_out_FD in zip(experts.w_in_EDG.detach(), experts.w_out_EFD.detach(), strict=True):
        module = FeedForward(experts.dim, experts.hidden, experts.activation)
        module.w_in.weight = nn.Parameter(w_in_DG.mT.contiguous())
        module.w_out.weight = nn.Parameter(w_out_FD.mT.contiguous())
        yield module


def mixtral(layer: MoEFeedForward, top_k: int, implementation: str) -> nn.Module:
    """The sparse block of Mixtral in `transformers`, with the experts of ours and its own linear gate."""
    modeling = import_module("transformers.models.mixtral.modeling_mixtral")
    experts = layer.experts
    config = import_module("transformers").MixtralConfig(
        hidden_size=experts.dim,
        intermediate_size=experts.hidden,
        num_local_experts=experts.num_experts,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = implementation
    block: nn.Module = modeling.MixtralSparseMoeBlock(config)
    weights = block.state_dict()
    weights["gate.weight"] = torch.randn_like(weights["gate.weight"]) / experts.dim**0.5
    weights["experts.gate_up_proj"] = experts.w_in_EDG.detach().mT.contiguous()
    weights["experts.down_proj"] = experts.w_out_EFD.detach().mT.contiguous()
    block.load_state_dict(weights)
    return block


class Scatter(nn.Module):
    """The experts of ScatterMoE, as it initialises them, behind a router of ours."""

    def __init__(self, layer: MoEFeedForward, top_k: int) -> None:
        super().__init__()
        assert layer.router is not None
        experts, self.router = layer.experts, layer.router
        self.experts = import_module("scattermoe.mlp").GLUMLP(
            input_size=experts.dim, hidden_size=experts.hidden, num_experts=experts.num_experts, top_k=top_k
        )

    def forward(self, x_BND: Tensor) -> Tensor:
        x_TD = x_BND.flatten(0, 1)
        routing: Routing = self.router(x_TD)
        return self.experts(x_TD, routing.weights.to(x_TD.dtype), routing.ids).view_as(x_BND)


def peers(layer: MoEFeedForward, top_k: int, eager: bool) -> dict[str, nn.Module]:
    """The published layers that can be imported here, for the device and dtype of a layer of ours.

    Args:
        eager: its plain loop over stacked weights too. The backward of that fills E stacked gradients with zeros, and
            takes about 20 times as long as the others at E = 64.
    """
    w_EDG = layer.experts.w_in_EDG
    found: dict[str, nn.Module] = {}
    if find_spec("transformers") is not None:
        found["mixtral_grouped"] = mixtral(layer, top_k, "grouped_mm")
        if eager:
            found["mixtral_eager"] = mixtral(layer, top_k, "eager")
    if w_EDG.is_cuda and find_spec("scattermoe") is not None:
        found["scattermoe"] = Scatter(layer, top_k)
    return {name: module.to(w_EDG.device, w_EDG.dtype) for name, module in found.items()}
