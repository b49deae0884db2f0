"""What a training run logs of its experts: sums over the steps since the last line, over all processes.

Shape suffixes: B samples, L layers, E experts, R families.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from latentphys.ranks import in_group
from latentphys.routers import Routing, telemetry


@dataclass(frozen=True, eq=False)
class Usage:
    """How one training step of one process used the experts of every layer.

    Args:
        counts_LBE: tokens of each sample that each expert took.
        margin_L: mean top-1 margin of the routers.
        family: of all these samples, 0…R−1.
    """

    counts_LBE: Tensor
    margin_L: Tensor
    family: int

    @staticmethod
    def of(routings: Sequence[Sequence[Routing]], num_samples: int, family: int) -> Usage | None:
        """From the routings of all layers at each step of an unrolled pass; None where there is but one expert.

        A router that decides in levels is judged by the experts that its tokens reach in the end.
        """
        layers = list(zip(*routings, strict=True))
        if layers[0][0].num_experts < 2:
            return None
        counts = [[telemetry.sample_counts(r.ids, num_samples, r.num_experts) for r in layer] for layer in layers]
        margins = [[telemetry.margins(r.scores).mean() for r in layer] for layer in layers]
        return Usage(
            torch.stack([torch.stack(steps).sum(0) for steps in counts]),
            torch.stack([torch.stack(steps).mean() for steps in margins]),
            family,
        )

    @staticmethod
    def join(usages: Sequence[Usage]) -> Usage:
        """Of several passes of one step, which have equally many samples of one family."""
        counts_LBE = torch.cat([usage.counts_LBE for usage in usages], dim=1)
        return Usage(counts_LBE, torch.stack([usage.margin_L for usage in usages]).mean(0), usages[0].family)


class RoutingLog:
    """Sums what the experts do, on the device and without waiting for it, until a log line asks.

    Nothing of it is in a checkpoint: after a resume the first line covers the steps since then, and the ages of dead
    experts count from there. The weights never see it.

    Args:
        num_families: families R that batches are drawn from.
    """

    def __init__(self, num_families: int) -> None:
        self.num_families = num_families
        self._sums: list[Tensor] = []
        self._ages_LE = torch.zeros(0)

    def add(self, usage: Usage) -> None:
        """One training step of this process."""
        counts_LBE = usage.counts_LBE.double()
        layers, num_samples, num_experts = counts_LBE.shape
        if not self._sums:
            shapes = [(layers, self.num_families, num_experts)] * 2 + [(self.num_families,), (layers,)]
            self._sums = [counts_LBE.new_zeros(shape) for shape in shapes]
        if self._ages_LE.shape != (layers, num_experts):
            self._ages_LE = counts_LBE.new_zeros(layers, num_experts)
        counts_LRE, squares_LRE, samples_R, margin_L = self._sums
        counts_LRE[:, usage.family] += counts_LBE.sum(1)
        squares_LRE[:, usage.family] += counts_LBE.square().sum(1)
        samples_R[usage.family] += num_samples
        margin_L += num_samples * usage.margin_L
        self._ages_LE = telemetry.dead_ages(self._ages_LE, counts_LBE.sum(1))

    def lines(self) -> list[dict[str, Any]]:
        """What was added since the last call, one entry per layer; empty where nothing was.

        Every process calls it at the same steps and gets the same: it is one collective.

        - ``load``: share of the tokens that each expert took; ``entropy`` of the load [bit], and ``entropy_share`` of
          the log₂ E of an even one.
        - ``dead``: experts that took no token since the last line; ``dead_age``: for how many steps by now, each.
        - ``margin``: mean distance of a token's best score from its second best, of scores before the balance.
        - ``mutual_information`` of expert and family [bit], corrected for its bias, and ``purity``; both None where
          there was one family only.
        """
        if not self._sums:
            return []
        gathered = _gather(torch.cat([part.flatten() for part in (*self._sums, self._ages_LE)])).cpu()
        sizes = [part.numel() for part in self._sums]
        parts = gathered[:, : sum(sizes)].sum(0).split(sizes)
        counts_LRE, squares_LRE, samples_R, margin_L = (
            part.reshape(old.shape) for part, old in zip(parts, self._sums, strict=True)
        )
        # Any process may have been the last to use an expert.
        ages_LE = gathered[:, sum(sizes) :].amin(0).reshape(self._ages_LE.shape)
        self._sums = []
        margins = (margin_L / samples_R.sum()).tolist()
        return [
            {"layer": layer, **_line(counts_LRE[layer], squares_LRE[layer], samples_R, ages_LE[layer], margin)}
            for layer, margin in enumerate(margins)
        ]


def _line(counts_RE: Tensor, squares_RE: Tensor, samples_R: Tensor, ages_E: Tensor, margin: float) -> dict[str, Any]:
    counts_E = counts_RE.sum(0)
    bits, dead = telemetry.entropy(counts_E), telemetry.dead_experts(counts_E)
    several = int((samples_R > 0).sum()) > 1
    information = telemetry.corrected_mutual_information(counts_RE, squares_RE, samples_R).bits
    return {
        "load": [round(share, 6) for share in telemetry.load(counts_E).tolist()],
        "entropy": round(bits, 6),
        "entropy_share": round(bits / math.log2(len(counts_E)), 6),
        "dead": dead,
        "dead_age": [int(ages_E[expert]) for expert in dead],
        "margin": round(margin, 6),
        "mutual_information": round(information, 6) if several else None,
        "purity": round(telemetry.domain_purity(counts_RE), 6) if several else None,
    }


def _gather(vector: Tensor) -> Tensor:
    """The vector of every process, ``(process, n)``."""
    if not in_group():
        return vector[None]
    gathered = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, vector)
    return torch.stack(gathered)
