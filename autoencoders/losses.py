"""Losses on packed fields, in units of each field's fluctuations, and on latents; never on potentials.

    FieldLoss, CellVelocityLoss, GradientLoss            here
    SpectrumLoss                                         `spectral_loss`
    WallShearLoss                                        `wall_loss`
    LatentKL                                             here, of the latents

Every loss on fields is a mean over the samples of a batch, and over those fields of the family that it is of.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from latentphys import operators
from latentphys.autoencoders.bottleneck import Reconstruction
from latentphys.autoencoders.normaliser import FamilyScale, FieldScale, present
from latentphys.grid import Geometry

PER_SAMPLE = (-4, -3, -2, -1)


def root(x: Tensor) -> Tensor:
    """The square root, with a gradient of zero instead of NaN at zero."""
    return torch.where(x > 0, x.clamp(min=torch.finfo(x.dtype).tiny).sqrt(), 0.0)


def rms(error: Float[Tensor, "b c nx ny nz"], where: Bool[Tensor, "*#samples #c nx ny nz"]) -> Float[Tensor, " b"]:
    """Root of the mean square over the places that count, per sample; 0 where none does."""
    counted = where.expand_as(error)
    squares = torch.where(counted, error, 0.0).square().sum(PER_SAMPLE)
    return root(squares / counted.sum(PER_SAMPLE).clamp(min=1))


class FieldsLoss(nn.Module, ABC):
    """A loss on packed fields: the mean over samples and fields of what it says of each."""

    @abstractmethod
    def of_field(
        self,
        prediction: Float[Tensor, "b c nx ny nz"],
        target: Float[Tensor, "b c nx ny nz"],
        geometry: Geometry,
        field: FieldScale,
    ) -> Float[Tensor, " b"] | None:
        """The loss of one field, in units of its fluctuations, per sample; None where it is not of this field."""

    def forward(
        self,
        prediction: Float[Tensor, "b c nx ny nz"],
        target: Float[Tensor, "b c nx ny nz"],
        geometry: Geometry,
        scale: FamilyScale,
    ) -> Float[Tensor, ""]:
        parts, wanted = scale.split(prediction), scale.split(target)
        found = [self.of_field(parts[name], wanted[name], geometry, field) for name, field in scale.fields.items()]
        counted = [loss for loss in found if loss is not None]
        return torch.stack(counted).mean() if counted else 0.0 * prediction.sum()


class FieldLoss(FieldsLoss):
    """Root-mean-square error of the values: velocities on open faces of a flux, values in fluid cells of others.

    A VRMSE whose variance is that of the family instead of that of the snapshot: 1 is as good as knowing the mean.
    """

    def of_field(
        self, prediction: Tensor, target: Tensor, geometry: Geometry, field: FieldScale
    ) -> Float[Tensor, " b"] | None:
        error = prediction - target
        if field.spec.kind == "flux":
            error = operators.velocity(error, geometry.grid)
        return rms(error / field.size, present(geometry, field.spec, error.device))


class CellVelocityLoss(FieldsLoss):
    """Root-mean-square error of a flux's velocities at the centres of fluid cells, which is what pictures show."""

    def of_field(
        self, prediction: Tensor, target: Tensor, geometry: Geometry, field: FieldScale
    ) -> Float[Tensor, " b"] | None:
        if field.spec.kind != "flux":
            return None
        error = operators.cell_velocity(prediction - target, geometry.grid) / field.size
        return rms(error, geometry.fluid.unsqueeze(-4).to(error.device))


class GradientLoss(FieldsLoss):
    """Root-mean-square error of the vorticity of fluxes and gradient of others, in fluctuations per finest spacing.

    It weighs small scales: a mode of wavenumber k counts |k|h times what it counts in `FieldLoss`. Gradients are those
    across open faces between cells; vorticity counts walls and solids as at rest.
    """

    def of_field(
        self, prediction: Tensor, target: Tensor, geometry: Geometry, field: FieldScale
    ) -> Float[Tensor, " b"] | None:
        grid, error = geometry.grid, (prediction - target) * (geometry.grid.finest_spacing / field.size)
        if field.spec.kind == "flux":
            return root(operators.vorticity(error, grid).square().mean(PER_SAMPLE))
        between = geometry.open_faces.to(error.device, copy=True)
        for axis, (low, _) in enumerate(grid.open_sides):
            if low:
                between.select(-4, axis).select(axis - 3, 0).fill_(False)
        slopes = operators.grad(error, grid) / grid.per_face(grid.spacing, error)
        # Three axes add up to the square of a gradient, of which the places give the mean.
        components = [rms(slope, between) for slope in slopes.unbind(1)]
        return root(3 * torch.stack(components).square().mean(0))


class LatentLoss(nn.Module, ABC):
    """A loss on latents."""

    @abstractmethod
    def forward(self, reconstruction: Reconstruction) -> Float[Tensor, ""]:
        """The mean over all numbers of the latents."""


class LatentKL(LatentLoss):
    """Kullback–Leibler divergence of N(z, σ²) from N(0, 1) per latent number [nats]: ½ (z² + σ² − 1 − ln σ²).

    σ is the bottleneck's noise on each channel. With noise that is a share s of the channel's RMS it is least at an
    RMS of 1/√(1 + s²) and thus holds every channel near unit size.

    References: Kingma & Welling, ICLR 2014, appendix B; with a variance that does not depend on the sample, Ghosh et
    al., ICLR 2020.
    """

    def forward(self, reconstruction: Reconstruction) -> Float[Tensor, ""]:
        """The mean over all numbers of the latents.

        Raises:
            ValueError: latents without noise, whose divergence is infinite.
        """
        z, noise = reconstruction.latent, reconstruction.noise
        if noise is None:
            raise ValueError("Expected latents with noise, got none; give the bottleneck noise or leave this loss out.")
        z = z[:, -len(noise) :]  # the learnt ones
        variance = noise.square()
        entropy = variance.clamp(min=torch.finfo(variance.dtype).tiny).log()
        return 0.5 * (z.square() + variance - 1 - entropy).mean()


class WeightedSum(nn.Module):
    """A sum of losses, each with its weight.

    Args:
        losses: name → loss.
        weights: name → weight ≥ 0, the same names. A loss of weight 0 is never worked out.

    Raises:
        ValueError: names that differ, or weights that are no finite numbers ≥ 0 or all of them 0.
    """

    def __init__(self, losses: Mapping[str, FieldsLoss | LatentLoss], weights: Mapping[str, float]) -> None:
        super().__init__()
        if set(losses) != set(weights):
            raise ValueError(f"Expected a weight for each loss {sorted(losses)}, got weights for {sorted(weights)}.")
        if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"Expected finite weights ≥ 0 of the losses, one of them positive, got {dict(weights)}.")
        self.losses = nn.ModuleDict({name: loss for name, loss in losses.items() if weights[name]})
        self.weights = {name: float(weights[name]) for name in self.losses}

    def forward(
        self,
        reconstruction: Reconstruction,
        target: Float[Tensor, "b c nx ny nz"],
        geometry: Geometry,
        scale: FamilyScale,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The weighted sum, and each loss by itself.

        Args:
            reconstruction: what an autoencoder made of the fields.
            target: the fields themselves, packed.
            geometry: their box.
            scale: that of their family.
        """
        parts = {
            name: loss(reconstruction)
            if isinstance(loss, LatentLoss)
            else loss(reconstruction.fields, target, geometry, scale)
            for name, loss in self.losses.items()
        }
        total = torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()
        return total, {name: value.detach() for name, value in parts.items()}
