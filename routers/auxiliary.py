"""Auxiliary losses of routers: even load, and logits that stay small.

Shape suffixes: R rows that a router decided for, k experts per row, E experts, N numbers of any meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentphys.ranks import num_ranks
from latentphys.routers.balance import sum_over_ranks
from latentphys.routers.routing import Routing


@dataclass(frozen=True, eq=False)
class Load:
    """What the losses look at: means over all rows of all ranks, in FP64.

    Means do not change when every row is repeated, so neither do the losses; without any rows all of them are zero.

    Args:
        shares_E: share of all choices that went to each expert, sum 1; without a gradient.
        scores_E: mean score of each expert, sum 1.
        weights_E: mean weight that each expert got, 0 in rows that did not choose it: its *importance* over the rows.
        squared_log_z: mean of log_z²; 0 for a router without logits.
    """

    shares_E: Tensor
    scores_E: Tensor
    weights_E: Tensor
    squared_log_z: Tensor


def measure(groups: Sequence[Sequence[Routing]]) -> list[Load]:
    """The load of each group of routings over the same experts, such as those of one router in an unrolled pass.

    There is one all-reduce for all groups. The gradient of a load with respect to the routings of this rank is that of
    the whole batch times the number of ranks: the mean over ranks, which data-parallel training takes, is then the
    gradient in one process that has all the rows, whatever the split.
    """
    sums = [torch.stack([_sums(routing) for routing in group]).sum(0) for group in groups]
    if not sums:
        return []
    local_N = torch.cat(sums)
    total_N = sum_over_ranks(local_N)
    if local_N.requires_grad:
        scaled_N = local_N * num_ranks()
        total_N = scaled_N + (total_N - scaled_N).detach()
    return [_load(total) for total in total_N.split([len(s) for s in sums])]


def _sums(routing: Routing) -> Tensor:
    """Sums over rows, one after the other: choices, scores and weights of the experts, log_z², and rows."""
    all_E = torch.arange(routing.num_experts, device=routing.ids.device)
    chosen_NE = routing.ids.reshape(-1, 1) == all_E
    # Neither bincount nor index_add, which are not deterministic on GPUs.
    weights_E = torch.where(chosen_NE, routing.weights.reshape(-1, 1), 0).sum(0, dtype=torch.float64)
    log_z_R1 = routing.scores.new_zeros(1) if routing.log_z is None else routing.log_z
    return torch.cat(
        [
            chosen_NE.sum(0).double(),
            routing.scores.sum(0, dtype=torch.float64),
            weights_E,
            log_z_R1.double().square().sum()[None],
            weights_E.new_tensor([len(routing.ids)]),
        ]
    )


def _load(sums_N: Tensor) -> Load:
    choices_E, scores_E, weights_E = sums_N[:-2].chunk(3)
    rows = sums_N[-1].clamp(min=1)
    return Load(
        shares_E=choices_E / choices_E.sum().clamp(min=1),
        scores_E=scores_E / rows,
        weights_E=weights_E / rows,
        squared_log_z=sums_N[-2] / rows,
    )


def switch_loss(load: Load) -> Tensor:
    """E Σ_e share_e · score_e: 1 where either is even, E at collapse. Good values of its weight: 1e-2.

    The shares are those of the global batch: asking every small batch for an even load would keep experts from
    specialising. Gradients flow through the scores.

    Reference: Switch Transformer, arXiv 2101.03961, eq. 4–6; global batch, arXiv 2501.11873.
    """
    return len(load.shares_E) * (load.shares_E * load.scores_E).sum()


def importance_loss(load: Load) -> Tensor:
    """CV² = var(importance) / mean(importance)² over the experts: 0 where even, E − 1 at collapse.

    Gradients flow through the weights of the chosen experts alone: none reaches an expert that nobody chooses, unless
    noise or a bias has it chosen, as that of `BiasBalance` does. Good values of its weight: 1e-2…1e-1.

    Reference: arXiv 1701.06538, eq. 6–7, with the variance over the population of experts.
    """
    mean = load.weights_E.mean()
    return load.weights_E.var(correction=0) / mean.square().clamp(min=torch.finfo(mean.dtype).tiny)


def z_loss(load: Load) -> Tensor:
    """Mean of (log Σ exp logits)². Keeps logits small; it does not even out the load. Good values of its weight: 1e-3.

    Reference: ST-MoE, arXiv 2202.08906, eq. 5.
    """
    return load.squared_log_z


LOSSES: dict[str, Callable[[Load], Tensor]] = {"switch": switch_loss, "importance": importance_loss, "z": z_loss}

Weight = float | Sequence[float] | None
"""The weight of a loss, or one per level of the routers; None for no such loss."""


class AuxiliaryLosses:
    """A weighted sum of losses on the load of all routers, each loss being the mean over the routers.

    It is for training only: it waits for all ranks, once, and in evaluation there is nothing to even out. Routers that
    have nothing to learn (random, dense) add nothing. Where all windows of a step are of one family, as `Windows` draws
    them, the losses ask every family to spread over all experts; `BiasBalance` asks that of the families together.
    Blocks may be checkpointed with ``use_reentrant=False`` only: the other form cuts off the gradient of a `Routing`.

    Args:
        weights: loss, ``switch | importance | z``, → its weight, ≥ 0; or one weight per level, outermost first, for
            routers that decide in levels; None and 0 for no such loss. In NESTOR: ``{"switch": [3e-2, 1e-4]}``.

    Raises:
        ValueError: an unknown loss, weights that are negative or not finite, or, on use, another number of weights than
            the routers have levels.
    """

    def __init__(self, weights: Mapping[str, Weight] | None = None) -> None:
        checked = {name: _check(name, weight) for name, weight in (weights or {}).items()}
        self.weights = {name: weight for name, weight in checked.items() if any(weight)}

    def __bool__(self) -> bool:
        """Whether there is any loss."""
        return bool(self.weights)

    def __call__(self, steps: Sequence[Sequence[Routing]]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum in FP64, and each loss by itself, under ``name/level`` where there are several levels.

        Args:
            steps: what each router said, for every step of an unrolled pass. The load of a router is that of all steps.
        """
        total = torch.zeros((), dtype=torch.float64, device=steps[0][0].scores.device)
        if not self:
            return total, {}
        routers = [_levels(said) for said in zip(*steps, strict=True)]
        routers = [levels for levels in routers if any(r.scores.requires_grad for group in levels for r in group)]
        loads = measure([group for levels in routers for group in levels])
        parts = {}
        for name, weights in self.weights.items():
            for level, weight in enumerate(_per_level(name, weights, routers)):
                loss = torch.stack([LOSSES[name](load) for load in loads[level :: len(routers[0])]]).mean()
                total = total + weight * loss
                parts[f"{name}/{level}" if len(routers[0]) > 1 else name] = loss.detach()
        return total, parts


def _check(name: str, weight: Weight) -> tuple[float, ...]:
    """The weights of a loss for one or more levels."""
    if name not in LOSSES:
        raise ValueError(f"Expected auxiliary losses of {' | '.join(LOSSES)}, got {name!r}.")
    weights = [0.0] if weight is None else list(weight) if isinstance(weight, Sequence) else [weight]
    numbers = all(isinstance(w, float | int) and not isinstance(w, bool) for w in weights)
    if not (weights and numbers and all(math.isfinite(w) and w >= 0 for w in weights)):
        raise ValueError(
            f"Expected a finite weight ≥ 0 for the auxiliary loss {name!r}, or one per level of the routers, "
            f"got {weight!r}."
        )
    return tuple(weights)


def _levels(steps: Sequence[Routing]) -> list[tuple[Routing, ...]]:
    """For each level of one router, outermost first, what it said in every step."""
    return list(zip(*(routing.levels or (routing,) for routing in steps), strict=True))


def _per_level(name: str, weights: tuple[float, ...], routers: Sequence[Sequence[object]]) -> tuple[float, ...]:
    """One weight for each level that the routers have; no weight without a router."""
    if not routers:
        return ()
    (num_levels,) = {len(levels) for levels in routers}
    if len(weights) not in (1, num_levels):
        raise ValueError(
            f"Expected one weight of the auxiliary loss {name!r}, or {num_levels}, as many as the routers have levels, "
            f"got {list(weights)}."
        )
    return weights if len(weights) == num_levels else weights * num_levels
