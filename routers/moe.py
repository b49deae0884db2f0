"""The feed-forward of a block: shared experts for every token, and routed ones.

Shape suffixes: B samples, N tokens per sample, T = B·N, D model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from latentphys.routers.dispatch import check_backend, dispatch
from latentphys.routers.experts import Experts, FeedForward
from latentphys.routers.routing import Layout, Router, Routing


class MoEFeedForward(nn.Module):
    """shared(x) + Σ_j w_j expert_j(x).

    Args:
        dim: model width D, a multiple of 8.
        hidden: hidden width of each routed expert, a multiple of 8.
        router: says which experts take each token; the number of experts where a router outside this layer says so.
        num_shared: number of always-on experts, ≥ 0; their sum runs as one feed-forward of that many times the width.
            (A mean of them, as in MoE-POT, is the same function with W_out scaled.)
        shared_hidden: hidden width of each shared expert. Default: ``hidden``.
        activation: of all experts, ``swiglu | gelu``.
        dispatch: backend of `latentphys.routers.dispatch`.

    Raises:
        ValueError: a negative number of shared experts, an unknown backend, widths that the experts refuse, or no
            routing for a layer without a router.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        router: Router | int,
        num_shared: int = 1,
        shared_hidden: int | None = None,
        activation: str = "swiglu",
        dispatch: str = "auto",
    ) -> None:
        super().__init__()
        if num_shared < 0:
            raise ValueError(f"Expected num_shared ≥ 0, got {num_shared}.")
        check_backend(dispatch)
        self.router = router if isinstance(router, Router) else None
        num_experts = router.num_experts if isinstance(router, Router) else router
        self.experts = Experts(num_experts, dim, hidden, activation)
        self.shared = FeedForward(dim, num_shared * (shared_hidden or hidden), activation) if num_shared else None
        self.dispatch = dispatch

    def forward(
        self, x_BND: Tensor, layout: Layout | None = None, routing: Routing | None = None
    ) -> tuple[Tensor, Routing]:
        """The layer's output ``(B, N, D)`` and the routing of its B·N tokens, sample after sample.

        Args:
            layout: where the tokens stand, for routers that look at samples or blocks.
            routing: what a router outside decided; without one the layer's own router decides.
        """
        x_TD = x_BND.flatten(0, 1)
        if routing is None:
            if self.router is None:
                raise ValueError("Expected a routing for a layer without a router of its own, got none; pass routing=…")
            routing = self.router(x_TD, layout)
        y_TD = dispatch(x_TD, routing.ids, routing.weights, self.experts, self.dispatch)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.unflatten(0, x_BND.shape[:2]), routing
