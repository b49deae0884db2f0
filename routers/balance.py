"""Even load: a bias on the selection that training moves, or an auxiliary loss.

Shape suffixes: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from latentphys.routers.routing import Routing
from latentphys.routers.telemetry import expert_counts


@dataclass(frozen=True)
class BiasBalance:
    """Balance without a loss: overloaded experts become less, and idle ones more, likely to be selected.

        b ← b + u (s − mean(s)),    s = sign(mean(count) − count)

    Called by the trainer once per optimiser step, and never in evaluation. Under activation checkpointing count in the
    first pass only.

    Args:
        rate: step u, in units of the router's scores; ≥ 0. Good values: 1e-3.

    Raises:
        ValueError: a negative rate.

    Reference: arXiv 2408.15664, Algorithm 1; without the drift of the mean, as in torchtitan.
    """

    rate: float = 1e-3

    def __post_init__(self) -> None:
        if not self.rate >= 0:
            raise ValueError(f"Expected a balance rate ≥ 0, got {self.rate}.")

    def update(self, bias_E: Tensor, counts_E: Tensor) -> Tensor:
        """The next bias, from the tokens that each expert took in this step; both arguments stay as they are.

        Counts are summed over all ranks where ``torch.distributed`` runs, so that every rank gets the same bias.
        """
        if bias_E.shape != counts_E.shape:
            raise ValueError(
                f"Expected one count per expert, {tuple(bias_E.shape)}, got {tuple(counts_E.shape)}; see expert_counts."
            )
        counts_E = counts_E.to(torch.float64, copy=True)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts_E)
        sign_E = torch.sign(counts_E.mean() - counts_E)
        return bias_E + self.rate * (sign_E - sign_E.mean()).to(bias_E.dtype)


def load_loss(routing: Routing) -> Tensor:
    """Auxiliary loss E Σ_e f_e p_e: share of the tokens times mean score, 1 where both are even, E at collapse.

    It does not grow with the batch, the number of tokens or k. Gradients flow through the scores only.

    Reference: Switch Transformer, arXiv 2101.03961, eq. 4–6.
    """
    counts_E = expert_counts(routing.ids, routing.num_experts)
    fractions_E = counts_E / max(routing.ids.numel(), 1)
    mean_scores_E = routing.scores.sum(0) / max(routing.scores.shape[0], 1)
    return routing.num_experts * (fractions_E * mean_scores_E).sum()
