"""A control: one expert that takes every token, so that the layer is an ordinary feed-forward.

Shape suffixes: R rows to decide for, D model width, E experts.
"""

from __future__ import annotations

from torch import Tensor

from latentphys.routers.routing import Layout, Router, Routing


class DenseRouter(Router):
    """Every token to the one expert, with weight 1: the dense layer of the same active width.

    Args:
        dim: model width D; any.
        num_experts: 1.

    Raises:
        ValueError: any other number of experts.
    """

    def __init__(self, dim: int, num_experts: int = 1) -> None:
        if num_experts != 1:
            raise ValueError(f"Expected 1 expert in the dense control, got {num_experts}; set num_experts to 1.")
        super().__init__(num_experts, top_k=1)

    def route(self, rows_RD: Tensor, layout: Layout | None) -> Routing:
        ones_R1 = rows_RD.new_ones(len(rows_RD), 1)
        return Routing(ids=ones_R1.new_zeros(ones_R1.shape).long(), weights=ones_R1, scores=ones_R1)
