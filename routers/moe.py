"""The feed-forward of a block: shared experts for every token, and routed ones.

Shape suffixes: B samples, N tokens per sample, T = B·N, D model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from latentphys.routers.dispatch import check_backend, dispatch
from latentphys.routers.experts import SwiGLU, SwiGLUExperts
from latentphys.routers.routing import Router, Routing


class MoEFeedForward(nn.Module):
    """shared(x) + Σ_j w_j expert_j(x).

    Args:
        dim: model width D, a multiple of 8.
        hidden: hidden width of each routed expert, a multiple of 8.
        router: says which experts take each token.
        num_shared: number of always-on experts, ≥ 0; their sum runs as one feed-forward of that many times the width.
        shared_hidden: hidden width of each shared expert. Default: ``hidden``.
        dispatch: backend of `latentphys.routers.dispatch`.

    Raises:
        ValueError: a negative number of shared experts, an unknown backend, or widths that the experts refuse.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        router: Router,
        num_shared: int = 1,
        shared_hidden: int | None = None,
        dispatch: str = "auto",
    ) -> None:
        super().__init__()
        if num_shared < 0:
            raise ValueError(f"Expected num_shared ≥ 0, got {num_shared}.")
        check_backend(dispatch)
        self.router = router
        self.experts = SwiGLUExperts(router.num_experts, dim, hidden)
        self.shared = SwiGLU(dim, num_shared * (shared_hidden or hidden)) if num_shared else None
        self.dispatch = dispatch

    def forward(self, x_BND: Tensor) -> tuple[Tensor, Routing]:
        """The layer's output ``(B, N, D)`` and the routing of its B·N tokens, sample after sample."""
        x_TD = x_BND.flatten(0, 1)
        routing = self.router(x_TD)
        y_TD = dispatch(x_TD, routing.ids, routing.weights, self.experts, self.dispatch)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.unflatten(0, x_BND.shape[:2]), routing
