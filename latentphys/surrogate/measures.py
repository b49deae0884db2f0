"""What an alarm measures of a flow: its energy, how rough it is, and where its latent lies."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.autoencoders.normaliser import FieldScale
from latentphys.grid import Grid
from latentphys.surrogate.protocol import Stepper

SMALLEST_SPREAD = 1e-6
"""Spread in space below which a latent channel counts as constant."""


def main_scale(stepper: Stepper) -> FieldScale:
    """The field whose energy is watched: the velocity, or the first one where there is none."""
    fields = stepper.scale.fields
    return fields.get("velocity") or next(iter(fields.values()))


def main_field(packed: Float[Tensor, "b f nx ny nz"], stepper: Stepper) -> Float[Tensor, "b c nx ny nz"]:
    """That field of packed ones, a flux as velocities through the faces [m/s]."""
    spec = main_scale(stepper).spec
    values = stepper.scale.split(packed)[spec.name].double()
    return operators.velocity(values, stepper.geometry.grid) if spec.kind == "flux" else values


def energy(field: Float[Tensor, "b c nx ny nz"]) -> Float[Tensor, " b"]:
    """½⟨c²⟩ over the box, of all components together."""
    return 0.5 * field.square().mean((-3, -2, -1)).sum(-1)


def roughness(field: Float[Tensor, "b c nx ny nz"], grid: Grid) -> Float[Tensor, " b"]:
    """The share of the energy at the scale of the grid, from second differences.

        Σ_k w(k) E(k) / Σ_k E(k),    w(k) = mean over the axes of sin⁴(k_a h_a / 2)

    exactly so in a periodic box; along other axes differences across the walls are left out. 0 for a field that is
    uniform or at rest, 1 for a chequerboard, 3/8 for white noise.
    """
    axes = [axis for axis in range(3) if grid.shape[axis] > 2]
    total = torch.zeros_like(field[:, 0, 0, 0, 0])
    for axis in axes:
        dim = axis - 3
        second = field.roll(1, dim) - 2 * field + field.roll(-1, dim)
        if not grid.periodic[axis]:
            second = second.narrow(dim, 1, field.shape[dim] - 2)
        total = total + (second / 4).square().sum((-4, -3, -2, -1))
    whole = field.square().sum((-4, -3, -2, -1)) * max(1, len(axes))
    return torch.where(whole == 0, whole, total / whole)


def latent_moments(latents: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c2"]:
    """The mean of each channel in space, then the logarithm of its spread, in FP64."""
    z = latents.double().cpu().flatten(2)
    return torch.cat([z.mean(2), z.std(2, correction=0).clamp(min=SMALLEST_SPREAD).log()], dim=1)
