"""Soft-semantic top-1 routing: tokens go to the expert whose learned prototype they resemble most.

Shape suffixes: R rows to decide for, D model width, S semantic width, E experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentphys.routers.routing import Layout, Per, Router, Routing


class SemanticTop1(Router):
    """Top-1 by cosine similarity with learned expert prototypes.

        s_e = softmax_e( cos(W x, p_e) / τ ),    expert = argmax_e (s_e + b_e),    weight = s_expert

    The projection W to a narrow space and the cosine keep tokens from collapsing onto the prototypes. The weight is not
    normalised over the one expert chosen, so that the router gets a gradient.

    Args:
        dim: model width D.
        num_experts: number of experts E.
        semantic_dim: width S of the space in which tokens and prototypes are compared. Good values: 32…64.
        per: what one decision holds for, see `Router`.
        temperature: initial temperature τ, > 0, learned as log τ. Good values: 0.1…0.5. Below that the scores saturate:
            tokens that the balance sends to another expert get a weight near zero, and the router learns little.

    Raises:
        ValueError: a temperature that is not positive.

    Reference: Shodh-MoE, arXiv 2605.15179; cosine routing as in X-MoE, arXiv 2204.09179, eq. 6–8.
    """

    def __init__(
        self, dim: int, num_experts: int, semantic_dim: int = 64, temperature: float = 0.2, per: Per = "token"
    ) -> None:
        super().__init__(num_experts, top_k=1, per=per)
        if not temperature > 0:
            raise ValueError(f"Expected a positive temperature, got {temperature}.")
        self.projection_SD = nn.Parameter(torch.randn(semantic_dim, dim) / math.sqrt(dim))
        self.prototypes_ES = nn.Parameter(nn.init.orthogonal_(torch.empty(num_experts, semantic_dim)))
        # One element and not a scalar: FSDP2 refuses parameters without an axis.
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]))

    def route(self, rows_RD: Tensor, layout: Layout | None) -> Routing:
        dtype = rows_RD.dtype
        semantic_RS = F.normalize(rows_RD @ self.projection_SD.to(dtype).mT, dim=-1)
        prototypes_ES = F.normalize(self.prototypes_ES[: self.num_choices(layout)].to(dtype), dim=-1)
        logits_RE = semantic_RS @ prototypes_ES.mT * torch.exp(-self.log_temperature.to(dtype))
        return self.select(logits_RE.softmax(dim=-1), logits_RE.logsumexp(-1, keepdim=True))
