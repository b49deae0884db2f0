"""What a surrogate steps with: trained models in Python, or an artefact exported from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from latentphys.autoencoders import FamilyScale
from latentphys.grid import Geometry
from latentphys.rollout import Frame, Parameters
from latentphys.surrogate.contract import Contract


@runtime_checkable
class Stepper(Protocol):
    """Flows of one geometry and family in latent space; `latentphys.rollout.LatentStepper` is one.

    Attributes:
        scale: the fields of the family, how they are packed, and their scales.
        interval: Δt [s].
        geometry, family: what it was made for.
        device: where it computes; what `encode` and `totals` are given may be elsewhere.
        latent_mean, latent_std: mean and spread of each latent channel in training, (C, 1, 1, 1).
    """

    scale: FamilyScale
    interval: float
    geometry: Geometry
    family: str

    @property
    def device(self) -> torch.device: ...

    @property
    def latent_mean(self) -> Tensor: ...

    @property
    def latent_std(self) -> Tensor: ...

    def check_parameters(self, parameters: Parameters) -> None:
        """Refuse, with a ValueError, parameters of one flow that the model does not know or cannot take."""

    def encode(self, packed: Tensor) -> Tensor:
        """Packed FP64 fields (b, f, nx, ny, nz) → latent (b, C, x, y, z)."""

    def decode(self, latent: Tensor, totals: Mapping[str, Tensor] | None = None) -> Tensor:
        """Latent → packed FP64 fields, with every constraint to the last bit."""

    def totals(self, packed: Tensor) -> dict[str, Tensor]:
        """What conserved scalars amount to, by name, (b,); `decode` keeps it."""

    def step(self, latents: Tensor, now: Sequence[Parameters], then: Sequence[Parameters]) -> Frame:
        """Latents (b, 1, C, x, y, z) → those an interval later, given each flow's parameters at both its ends."""


@runtime_checkable
class Factory(Protocol):
    """Makes steppers: `latentphys.surrogate.Models` of trained models, or an opened artefact.

    Attributes:
        intervals: family → Δt [s].
        digest: SHA-256 that tells the weights apart from any others; an export keeps that of its checkpoint.
    """

    @property
    def intervals(self) -> Mapping[str, float]: ...

    @property
    def digest(self) -> str: ...

    def contract(self, family: str) -> Contract:
        """What is agreed on with a solver for flows of a family; ValueError for an unknown one."""

    def stepper(self, geometry: Geometry, family: str) -> Stepper:
        """A stepper for flows in a box, its solids perhaps batched; ValueError for a box or family it cannot take."""
