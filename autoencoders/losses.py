"""Losses on fields, in units of each family's fluctuations; never on potentials."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentphys import operators
from latentphys.autoencoders.normaliser import FamilyScale
from latentphys.grid import Geometry


def _root(x: Tensor) -> Tensor:
    """The square root, with a gradient of zero instead of NaN at zero."""
    return torch.where(x > 0, x.clamp(min=torch.finfo(x.dtype).tiny).sqrt(), 0.0)


class VelocityLoss(nn.Module):
    """Root-mean-square error of the face velocities, in units of the family's fluctuations; mean over samples.

    A VRMSE whose variance is that of the family instead of that of the snapshot: 1 is as good as knowing the mean.
    """

    def forward(
        self,
        prediction: Float[Tensor, "b 3 nx ny nz"],
        target: Float[Tensor, "b 3 nx ny nz"],
        geometry: Geometry,
        scale: FamilyScale,
    ) -> Float[Tensor, ""]:
        error = operators.velocity(prediction - target, geometry.grid) / scale.velocity
        share = geometry.open_faces.to(error).mean((-4, -3, -2, -1))
        return _root(error.square().mean((-4, -3, -2, -1)) / share).mean()


class VorticityLoss(nn.Module):
    """Root-mean-square error of the vorticity, in units of the family's fluctuations over the shortest cell side.

    It weighs small scales: a mode of wavenumber k counts |k|h times what it counts in `VelocityLoss`.
    """

    def forward(
        self,
        prediction: Float[Tensor, "b 3 nx ny nz"],
        target: Float[Tensor, "b 3 nx ny nz"],
        geometry: Geometry,
        scale: FamilyScale,
    ) -> Float[Tensor, ""]:
        error = operators.vorticity(prediction - target, geometry.grid)
        return _root((error * (geometry.grid.finest_spacing / scale.velocity)).square().mean((-4, -3, -2, -1))).mean()


class WeightedSum(nn.Module):
    """A sum of losses, each with its weight.

    Args:
        losses: name → loss.
        weights: name → weight, the same names.
    """

    def __init__(self, losses: dict[str, nn.Module], weights: dict[str, float]) -> None:
        super().__init__()
        if set(losses) != set(weights):
            raise ValueError(f"Expected a weight for each loss {sorted(losses)}, got weights for {sorted(weights)}.")
        self.losses, self.weights = nn.ModuleDict(losses), dict(weights)

    def forward(
        self, prediction: Tensor, target: Tensor, geometry: Geometry, scale: FamilyScale
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The weighted sum, and each loss by itself."""
        parts = {name: loss(prediction, target, geometry, scale) for name, loss in self.losses.items()}
        total = torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()
        return total, {name: value.detach() for name, value in parts.items()}
