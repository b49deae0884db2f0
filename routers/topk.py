"""Top-k routing by a linear gate.

Shape suffixes: R rows to decide for, D model width, E experts, k experts per row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from latentphys.routers.routing import Layout, Per, Router, Routing


def choose(logits_RE: Tensor, bias: Tensor, k: int, normalise: bool) -> Routing:
    """The k experts of highest softmax + bias, weighted by the softmax over all experts or over the k chosen.

    Args:
        logits_RE: what the gate says.
        bias: moves the selection only, ``(E,)`` or ``(R, E)``.
        normalise: weights that sum to 1 over the chosen. They come from the chosen logits: a quotient of probabilities
            is 0/0 where the bias chose experts that the gate is sure to refuse.
    """
    scores_RE = logits_RE.softmax(dim=-1)
    ids_Rk = (scores_RE.detach() + bias).topk(k, dim=-1).indices
    weights_Rk = logits_RE.gather(-1, ids_Rk).softmax(dim=-1) if normalise else scores_RE.gather(-1, ids_Rk)
    return Routing(ids_Rk, weights_Rk, scores_RE, logits_RE.logsumexp(-1, keepdim=True))


class TopK(Router):
    """The k experts to which a linear gate gives the highest probability.

        s = softmax(W x),    experts = top-k of (s + b),    weight_j = s_j / Σ_chosen s

    The softmax runs over all experts. There is no normalisation over the batch, so one sample routes as many do.

    Args:
        dim: model width D.
        num_experts: number of experts E. In MoE-POT: 16.
        top_k: experts per token k, 1…E. In MoE-POT: 4.
        normalise: weights that sum to 1 over the chosen experts; False leaves the probabilities as they are.
        per: what one decision holds for, see `Router`. In MoE-POT: ``"sample"``.

    Raises:
        ValueError: weights normalised over a single expert.

    Reference: MoE-POT, arXiv 2510.25803.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int = 4, normalise: bool = True, per: Per = "token") -> None:
        super().__init__(num_experts, top_k, per)
        if normalise and top_k == 1:
            raise ValueError(
                "Expected top_k ≥ 2 for normalised weights, got 1: the one weight would be the constant 1 and the gate "
                "would get no gradient; set normalise=False."
            )
        self.normalise = normalise
        self.gate_ED = nn.Parameter(torch.randn(num_experts, dim) / math.sqrt(dim))

    def route(self, rows_RD: Tensor, layout: Layout | None) -> Routing:
        num_choices = self.num_choices(layout)
        logits_RE = rows_RD @ self.gate_ED[:num_choices].to(rows_RD.dtype).mT
        return self.of_all(choose(logits_RE, self.bias_E[:num_choices], self.top_k, self.normalise))
