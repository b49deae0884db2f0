"""A composite model in memory, whose α can be set without a file."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from latentphys.composition.files import at, relate
from latentphys.composition.sources import Source, fixed_names, open_relatives
from latentphys.composition.weights import Weights
from latentphys.training.checkpoint import read_tensors
from latentphys.training.models import load_dynamics


class CompositeModel:
    """A dynamics model with the weights θ(α) of three checkpoints.

    Three sets of weights are in memory: the endpoints', and the model's own.

    Args:
        anchor, low, high: checkpoints, runs, or checkpoints that are open.
        device: where to. Default: the CPU.

    Attributes:
        dynamics, autoencoder: in evaluation mode; `set` changes the weights of the first in place.
        relation: how the three are related.

    Raises:
        ValueError: checkpoints that cannot be read, of other kinds, or no relatives.
    """

    def __init__(self, anchor: Source, low: Source, high: Source, device: torch.device | str = "cpu") -> None:
        self.checkpoints = open_relatives(anchor, low, high)
        first = self.checkpoints[0]
        if first.kind != "dynamics":
            raise ValueError(f"Expected dynamics models to roll out, got one of kind {first.kind!r} in {first.path}.")
        files, fixed = [one.weights(ema=True) for one in self.checkpoints], fixed_names(first)
        with ExitStack() as stack:
            self.relation = relate([Weights(file, stack) for file in files], fixed)
        dynamics, autoencoder = load_dynamics(first.path)
        self.dynamics, self.autoencoder = dynamics.to(device), autoencoder.to(device)
        self._weights = {n: p for n, p in self.dynamics.named_parameters() if n not in fixed}
        self._low, self._high = (
            {n: tensor.to(device) for n, tensor in read_tensors(file).items() if n in self._weights}
            for file in files[1:]
        )
        self.set(0.0)

    @torch.no_grad()
    def set(self, alpha: float) -> CompositeModel:
        """Give the model the weights θ(α), as `compose` would write them, on the CPU to the last bit; return it."""
        for name, weight in self._weights.items():
            weight.copy_(at(self._low[name], self._high[name], alpha))
        self.alpha = alpha
        return self
