"""Figures summed over the steps since the last log line, over all processes, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from latentphys.ranks import in_group, num_ranks


class Meter:
    """Means of figures. Every process adds figures of the same names, in the same order."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        for name, value in figures.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The mean of each figure since the last call; one collective."""
        if not self._sums:
            return {}
        names = list(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        if in_group():
            dist.all_reduce(sums)
        counts = self._counts
        self._sums, self._counts = {}, {}
        return {name: value / num_ranks() / counts[name] for name, value in zip(names, sums.tolist(), strict=True)}
