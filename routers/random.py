"""A control: routing that knows nothing of the physics.

Shape suffixes: R rows to decide for, D model width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latentphys.routers.routing import Layout, Per, Router, Routing

_CELLS_PER_UNIT = 64.0


class RandomRouter(Router):
    """A fixed random hash of each token's content: equal load, and nothing learned.

    The direction of the token is projected on a fixed random vector, and the line is cut into short cells that are
    dealt to the experts in turn. The same token always goes to the same expert, but the cells are so short against the
    spread of the tokens that the choice carries no information on the family. An argmax of random projections would:
    it splits the token space into few large cones. Weights are the constant 1, so no gradient flows, and ``bias_E`` is
    ignored.

    Args:
        dim: model width D.
        num_experts: number of experts E.
        seed: seed of the projection, which is a buffer and stands in the checkpoint.
        per: what one decision holds for, see `Router`.
    """

    projection_D: Tensor

    def __init__(self, dim: int, num_experts: int, seed: int = 0, per: Per = "token") -> None:
        super().__init__(num_experts, top_k=1, per=per)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("projection_D", torch.randn(dim, generator=generator))

    def route(self, rows_RD: Tensor, layout: Layout | None) -> Routing:
        # Unit tokens have projections of order 1 whatever D, so the length of a cell is fixed against their spread.
        position_R = F.normalize(rows_RD.detach(), dim=-1) @ self.projection_D.to(rows_RD.dtype)
        ids_R = (position_R * (_CELLS_PER_UNIT * self.num_experts)).floor().long().remainder(self.num_experts)
        scores_RE = F.one_hot(ids_R, self.num_experts).to(rows_RD.dtype)
        return Routing(ids=ids_R[:, None], weights=scores_RE.new_ones(len(ids_R), 1), scores=scores_RE)
