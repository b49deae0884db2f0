"""A pre-norm transformer block that a conditioning vector modulates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentphys.routers import Layout, MoEFeedForward, Router, Routing
from latentphys.transformer.attention import SelfAttention
from latentphys.transformer.fourier import FourierMixer

MIXERS = ("attention", "fourier")


class Modulation(nn.Module):
    """Vectors linear in silu(condition), zero at the start (AdaLN-zero).

    Args:
        condition_dim: width of the conditioning vector.
        dim: width of each vector.
        num_vectors: how many vectors.
    """

    def __init__(self, condition_dim: int, dim: int, num_vectors: int) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = nn.Linear(condition_dim, num_vectors * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Float[Tensor, "b condition"]) -> tuple[Float[Tensor, "b 1 dim"], ...]:
        return self.linear(F.silu(condition))[:, None].chunk(self.num_vectors, dim=-1)


def normalise(
    x: Float[Tensor, "b token dim"], shift: Float[Tensor, "b 1 dim"], scale: Float[Tensor, "b 1 dim"]
) -> Float[Tensor, "b token dim"]:
    """(1 + scale) · layer_norm(x) + shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class TransformerBlock(nn.Module):
    """x + g₁ mix(norm₁ x), then x + g₂ feed_forward(norm₂ x); shifts, scales and gates g from the condition.

    The gates are zero at the start, so that an untrained block is the identity.

    Args:
        dim: model width.
        condition_dim: width of the conditioning vector.
        num_heads: attention heads, or diagonal blocks of the Fourier mixer.
        hidden: hidden width of each routed and shared expert.
        router: which experts take each token; the number of experts where a router outside the block says so.
        num_shared: experts that take every token.
        mixer: ``attention`` over all cells, or ``fourier``.
        attention: backend of `SelfAttention`.
        activation: of the experts, ``swiglu | gelu``.
        dispatch: backend of `latentphys.routers.dispatch`.

    Attributes:
        recompute: in training, keep no activations but the tokens between the parts, and work out the others again for
            the gradient. The routing is kept: a near-tie cannot go another way. See
            `latentphys.training.recompute.set_recompute`.

    Raises:
        ValueError: an unknown mixer, or what its parts refuse.
    """

    recompute: bool = False

    def __init__(
        self,
        dim: int,
        condition_dim: int,
        num_heads: int,
        hidden: int,
        router: Router | int,
        num_shared: int = 1,
        mixer: str = "attention",
        attention: str = "auto",
        activation: str = "swiglu",
        dispatch: str = "auto",
    ) -> None:
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"Expected a mixer of {' | '.join(MIXERS)}, got {mixer!r}.")
        self.modulation = Modulation(condition_dim, dim, 6)
        self.attention = SelfAttention(dim, num_heads, attention) if mixer == "attention" else None
        self.fourier = FourierMixer(dim, num_heads) if mixer == "fourier" else None
        self.feed_forward = MoEFeedForward(dim, hidden, router, num_shared, activation=activation, dispatch=dispatch)

    def forward(
        self,
        x: Float[Tensor, "b token dim"],
        condition: Float[Tensor, "b condition"],
        table: Float[Tensor, "2 token pair"],
        layout: Layout,
        routing: Routing | None = None,
    ) -> tuple[Float[Tensor, "b token dim"], Routing]:
        """The next tokens, and where the feed-forward sent these.

        Args:
            table: what `rotary` makes for the tokens' positions.
            layout: where the tokens stand.
            routing: what a router outside the block decided.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition)
        x, z = self._run(self._before_routing, x, table, layout, shift_1, scale_1, gate_1, shift_2, scale_2)
        if routing is None and self.feed_forward.router is not None:
            routing = self.feed_forward.router(z.flatten(0, 1), layout)
        return self._run(self._after_routing, x, z, layout, routing, gate_2)

    def _run(self, part: Callable[..., Any], *inputs: Any) -> Any:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def _before_routing(
        self,
        x: Tensor,
        table: Tensor,
        layout: Layout,
        shift_1: Tensor,
        scale_1: Tensor,
        gate_1: Tensor,
        shift_2: Tensor,
        scale_2: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x = x + gate_1 * self._mix(normalise(x, shift_1, scale_1), table, layout)
        return x, normalise(x, shift_2, scale_2)

    def _after_routing(
        self, x: Tensor, z: Tensor, layout: Layout, routing: Routing | None, gate_2: Tensor
    ) -> tuple[Tensor, Routing]:
        y, routing = self.feed_forward(z, layout, routing)
        return x + gate_2 * y, routing

    def _mix(self, x: Tensor, table: Tensor, layout: Layout) -> Tensor:
        if self.attention is not None:
            return self.attention(x, table)
        assert self.fourier is not None
        return self.fourier(x, layout.shape)
