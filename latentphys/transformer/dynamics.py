"""The dynamics model: a latent transformer with the scales of its latents and of its conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentphys.data import Store
from latentphys.routers import Routing
from latentphys.transformer.conditioning import Conditioning
from latentphys.transformer.model import LatentTransformer


class Step(NamedTuple):
    """One step of the dynamics model: the next latent, and the routing of every layer."""

    latent: Float[Tensor, "b c x y z"]
    routings: list[Routing]


class Dynamics(nn.Module):
    """Advances latents by one Δt.

    Args:
        transformer: predicts the increment in units of `increment_std`.
        conditioning: scales of Δt and parameters.
        intervals: family → Δt [s] the model was trained on.
        latent_channels: channels C.
        experts: family → how many experts of each layer, the first ones, it may choose. Default: all, for each.

    Attributes:
        adaptation: how the weights differ from those of the transformer's configuration while the model is fine-tuned
            (`latentphys.training.models.adapt`); None for a plain model.
    """

    latent_mean: Tensor
    latent_std: Tensor
    increment_std: Tensor

    def __init__(
        self,
        transformer: LatentTransformer,
        conditioning: Conditioning,
        intervals: Mapping[str, float],
        latent_channels: int,
        experts: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.experts = dict(experts or {})
        self.adaptation: dict[str, Any] | None = None
        self.transformer, self.conditioning, self.intervals = transformer, conditioning, dict(intervals)
        for name, value in (("latent_mean", 0.0), ("latent_std", 1.0), ("increment_std", 1.0)):
            self.register_buffer(name, torch.full((latent_channels, 1, 1, 1), value))

    @property
    def num_frames(self) -> int:
        """Latent frames K that a step looks at."""
        return self.transformer.num_frames

    def interval(self, family: str) -> float:
        """Δt of a family [s].

        Raises:
            ValueError: a family that the model was not trained on.
        """
        if family not in self.intervals:
            raise ValueError(
                f"Expected a family of {sorted(self.intervals)}, got {family!r}; this model knows no other."
            )
        return self.intervals[family]

    def num_choices(self, family: str | None) -> int | None:
        """How many experts of each layer, the first ones, a family may choose; None for all."""
        if self.experts and family is None:
            raise ValueError(
                "Expected the family of the samples for a model with experts that only some families may choose, "
                f"got none; pass family=…, one of {sorted(self.intervals)}."
            )
        return None if family is None else self.experts.get(family)

    @torch.no_grad()
    def fit_scales(self, stores: Sequence[Store], trajectories: Sequence[Sequence[int]], stride: int) -> None:
        """Measure mean and spread of latents and of their increments, each family with the same weight."""
        means, squares, increments = [], [], []
        for store, chosen in zip(stores, trajectories, strict=True):
            latents = torch.stack([store.read("latent", i, slice(None)) for i in chosen]).double()
            axes = (0, 1, 3, 4, 5)
            means.append(latents.mean(axes))
            squares.append(latents.square().mean(axes))
            increments.append((latents[:, stride:] - latents[:, :-stride]).square().mean(axes))
        mean = torch.stack(means).mean(0)
        variance = torch.stack(squares).mean(0) - mean.square()
        for buffer, value in (
            (self.latent_mean, mean),
            (self.latent_std, variance.clamp(min=1e-12).sqrt()),
            (self.increment_std, torch.stack(increments).mean(0).clamp(min=1e-12).sqrt()),
        ):
            buffer.copy_(value.reshape(-1, 1, 1, 1))

    def forward(
        self,
        latents: Float[Tensor, "b k c x y z"],
        condition: Float[Tensor, "b p"],
        geometry: Float[Tensor, "b g x y z"],
        periodic: tuple[bool, bool, bool],
        family: str | None = None,
    ) -> Step:
        """The latent after the last of K frames; see `LatentTransformer` for the other arguments.

        Args:
            family: of all samples; only a model with experts that not every family may choose has to know.

        Raises:
            ValueError: no family for a model that has to know.
        """
        num_experts = self.num_choices(family)
        prediction = self.transformer(self._scaled(latents), condition, geometry, periodic, num_experts)
        return Step(latents[:, -1] + prediction.increment * self.increment_std, prediction.routings)

    def function_features(
        self,
        latents: Float[Tensor, "b k c x y z"],
        condition: Float[Tensor, "b p"],
        geometry: Float[Tensor, "b g x y z"],
    ) -> Float[Tensor, "b f"]:
        """What a router of whole functions looks at; see `LatentTransformer.function_features`."""
        return self.transformer.function_features(self._scaled(latents), condition, geometry)

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - self.latent_mean) / self.latent_std

    def to_dict(self) -> dict[str, Any]:
        """What, beside the weights, a checkpoint must know."""
        about: dict[str, Any] = {"conditioning": self.conditioning.to_dict(), "intervals": self.intervals}
        if self.experts:
            about["experts"] = self.experts
        if self.adaptation is not None:
            about["adaptation"] = self.adaptation
        return about
