"""A control: routing that knows nothing of the physics.

Shape suffixes: T tokens, D model width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latentphys.routers.routing import Router, Routing

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
    """

    projection_D: Tensor

    def __init__(self, dim: int, num_experts: int, seed: int = 0) -> None:
        super().__init__(num_experts, top_k=1)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("projection_D", torch.randn(dim, generator=generator))

    def route(self, tokens_TD: Tensor) -> Routing:
        # Unit tokens have projections of order 1 whatever D, so the length of a cell is fixed against their spread.
        position_T = F.normalize(tokens_TD.detach(), dim=-1) @ self.projection_D.to(tokens_TD.dtype)
        ids_T = (position_T * (_CELLS_PER_UNIT * self.num_experts)).floor().long().remainder(self.num_experts)
        scores_TE = F.one_hot(ids_T, self.num_experts).to(tokens_TD.dtype)
        return Routing(ids=ids_T[:, None], weights=scores_TE.new_ones(len(ids_T), 1), scores=scores_TE)
