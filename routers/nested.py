"""Nested routing: each sample chooses groups of experts, each token chooses experts inside those groups.

Shape suffixes: B samples, T tokens, D model width, G groups, S experts per group, E = G·S experts, g groups chosen per
sample, k experts chosen per token in each of them, N = T·g rows (a token in one of its groups).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from latentphys.routers.routing import Layout, Router, Routing
from latentphys.routers.topk import choose


class Nested(Router):
    """Top-k twice: groups by the mean token of the sample, then experts by the token itself.

        p_group = softmax(V mean(x)),    p_expert|group = softmax(W_group x),    expert id = S · group + place
        score = p_group · p_expert|group,    weight = w_group · w_expert|group

    A level that chooses several normalises its weights over them, so that the routed output has one size however many
    groups there are. A level that chooses one keeps its probability: normalised it would be the constant 1, and its
    gate would get no gradient.

    The bias of an expert moves its selection inside the group, and the mean bias of a group that of the group.

    Args:
        dim: model width D.
        num_experts: number of experts E in all groups together. In NESTOR: 36.
        num_groups: number of groups G, which divides E. In NESTOR: 6.
        top_groups: groups per sample g, 1…G.
        top_k: experts per token in each chosen group k, 1…S. The router's own ``top_k`` is g·k.

    ``levels`` are the choice of groups, B rows over G groups, and the choice of experts: one row for each token in each
    of its groups, over all E experts, of which those of other groups have score 0. Groups are kept apart there because
    S experts pooled over the groups look even when each group sends all its tokens to another place. A load loss of
    the second level is even inside each group; its value there is G Σ_group share², 1 where the groups are even too.

    Raises:
        ValueError: groups that do not divide the experts, or more choices than there are; on use, no layout.

    Reference: NESTOR, arXiv 2602.22059.
    """

    def __init__(self, dim: int, num_experts: int, num_groups: int, top_groups: int = 2, top_k: int = 2) -> None:
        if not 1 <= num_groups <= num_experts or num_experts % num_groups:
            remedy = max(1, round(num_experts / max(num_groups, 1))) * max(num_groups, 1)
            raise ValueError(
                f"Expected a number of groups that divides num_experts = {num_experts}, got num_groups = {num_groups}; "
                f"set num_experts to a multiple such as {remedy}."
            )
        per_group = num_experts // num_groups
        if not 1 <= top_groups <= num_groups:
            raise ValueError(f"Expected top_groups in 1…{num_groups} (the number of groups), got {top_groups}.")
        if not 1 <= top_k <= per_group:
            raise ValueError(f"Expected top_k in 1…{per_group} (the experts of one group), got {top_k}.")
        super().__init__(num_experts, top_groups * top_k)
        self.num_groups, self.top_groups, self.top_k_in_group = num_groups, top_groups, top_k
        self.group_gate_GD = nn.Parameter(torch.randn(num_groups, dim) / math.sqrt(dim))
        self.expert_gate_ED = nn.Parameter(torch.randn(num_experts, dim) / math.sqrt(dim))

    def route(self, rows_TD: Tensor, layout: Layout | None) -> Routing:
        known, dtype = self.known(layout), rows_TD.dtype
        means_BD = known.pool(rows_TD, known.shape)
        group_logits_BG = means_BD @ self.group_gate_GD.to(dtype).mT
        bias_GS = self.bias_E.unflatten(0, (self.num_groups, -1))
        groups = choose(group_logits_BG, bias_GS.mean(-1), self.top_groups, self.top_groups > 1)

        logits_TGS = (rows_TD @ self.expert_gate_ED.to(dtype).mT).unflatten(-1, bias_GS.shape)
        group_ids_Tg = known.spread(groups.ids, known.shape)
        group_ids_N1 = group_ids_Tg.reshape(-1, 1)
        logits_TgS = logits_TGS.take_along_dim(group_ids_Tg[..., None], dim=1)
        places = choose(
            logits_TgS.flatten(0, 1), bias_GS[group_ids_N1[:, 0]], self.top_k_in_group, self.top_k_in_group > 1
        )
        experts = self._among_all(places, group_ids_N1, bias_GS.shape[1])

        group_weights_N1 = known.spread(groups.weights, known.shape).reshape(-1, 1)
        group_scores_TG = known.spread(groups.scores, known.shape)
        scores_TGS = group_scores_TG[..., None] * logits_TGS.softmax(dim=-1)
        return Routing(
            ids=experts.ids.reshape(len(rows_TD), self.top_k),
            weights=(group_weights_N1 * experts.weights).reshape(len(rows_TD), self.top_k),
            scores=scores_TGS.flatten(1),
            levels=(groups, experts),
        )

    def _among_all(self, places: Routing, group_ids_N1: Tensor, per_group: int) -> Routing:
        """The routing over the S experts of each row's group, as one over all E experts."""
        first_N1 = group_ids_N1 * per_group
        slots_NS = first_N1 + torch.arange(per_group, device=first_N1.device)
        scores_NE = places.scores.new_zeros(len(first_N1), self.num_experts).scatter(1, slots_NS, places.scores)
        return Routing(places.ids + first_N1, places.weights, scores_NE, places.log_z)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, num_groups={self.num_groups}, top_groups={self.top_groups}, "
            f"top_k_in_group={self.top_k_in_group}"
        )
