"""Even load without a loss: a bias on the selection that training moves.

Shape suffixes: E experts, N numbers of any meaning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from latentphys.ranks import in_group


@dataclass(frozen=True)
class BiasBalance:
    """Balance without a loss: overloaded experts become less, and idle ones more, likely to be selected.

        b ← b + u (s − mean(s)),    s = sign(mean(count) − count)

    Once per optimiser step, and never in evaluation. Counts come out of the forward pass as values (`Routing.ids`), so
    what activation checkpointing computes again in the backward pass is not counted again; and the bias has to stay as
    it is until that pass is over, or tokens would be routed another way in it.

    Args:
        rate: step u, in units of the router's scores; finite, ≥ 0, and 0 for no balance. Good values: 1e-3.

    Raises:
        ValueError: a rate that is negative or not finite.

    Reference: arXiv 2408.15664, Algorithm 1; without the drift of the mean, as in torchtitan.
    """

    rate: float = 1e-3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and self.rate >= 0):
            raise ValueError(f"Expected a finite balance rate ≥ 0, got {self.rate}.")

    def update(self, bias_E: Tensor, counts_E: Tensor) -> Tensor:
        """The next bias, from the tokens that each expert took in this step; both arguments stay as they are.

        With several ranks the counts are those of all of them (`counts_over_ranks`), so that each gets the same bias.
        """
        if bias_E.shape != counts_E.shape:
            raise ValueError(
                f"Expected one count per expert, {tuple(bias_E.shape)}, got {tuple(counts_E.shape)}; see expert_counts."
            )
        sign_E = torch.sign(counts_E.double().mean() - counts_E)
        return bias_E + self.rate * (sign_E - sign_E.mean()).to(bias_E.dtype)


def sum_over_ranks(values_N: Tensor) -> Tensor:
    """The sum of a tensor over all ranks where ``torch.distributed`` runs, else a copy; FP64, without a gradient.

    Every rank must come here, in the same order.
    """
    total_N = values_N.detach().to(torch.float64, copy=True)
    if in_group():
        dist.all_reduce(total_N)
    return total_N


def counts_over_ranks(counts: Sequence[Tensor]) -> list[Tensor]:
    """Tokens per expert of every router, summed over all ranks in one all-reduce."""
    return list(sum_over_ranks(torch.cat(list(counts))).split([len(counts_E) for counts_E in counts]))
