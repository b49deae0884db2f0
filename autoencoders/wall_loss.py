"""A loss on the friction of the flow at no-slip surfaces."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.autoencoders.losses import PER_SAMPLE, FieldsLoss, root
from latentphys.autoencoders.normaliser import FieldScale
from latentphys.fields import VELOCITY
from latentphys.grid import Geometry


class WallShearLoss(FieldsLoss):
    """Root-mean-square error of the velocity's shear at no-slip surfaces, in fluctuations per finest spacing.

    The shear is that of the friction in `families.NavierStokes`: 2u/h at a surface half a cell beside a face, u/h at a
    step, where the face beside is closed by one of its two cells. Each such surface counts once. It is of the velocity
    alone, and zero without no-slip sides and solids.
    """

    def of_field(
        self, prediction: Tensor, target: Tensor, geometry: Geometry, field: FieldScale
    ) -> Float[Tensor, " b"] | None:
        if (field.spec.name, field.spec.kind) != (VELOCITY.name, VELOCITY.kind):
            return None
        error = operators.velocity(prediction - target, geometry.grid) * (geometry.grid.finest_spacing / field.size)
        squares, counts = _surfaces(geometry, error)
        return root((error.square() * squares).sum(PER_SAMPLE) / counts.sum(PER_SAMPLE).clamp(min=1))


def _surfaces(
    geometry: Geometry, like: Tensor
) -> tuple[Float[Tensor, "*#samples 3 nx ny nz"], Float[Tensor, "*#samples 3 nx ny nz"]]:
    """Beside each open face: Σ (2/h)² over the no-slip surfaces along it, (1/h)² at a step [1/m²], and their number."""
    grid, open_faces = geometry.grid, geometry.open_faces.to(like.device)
    solid = (~geometry.fluid).to(like)
    squares, counts = torch.zeros_like(open_faces, dtype=like.dtype), torch.zeros_like(open_faces, dtype=like.dtype)
    for a in range(3):
        closed = solid + solid.roll(1, a - 3)
        if grid.open_sides[a][0]:
            closed.select(a - 3, 0).copy_(2 * solid.select(a - 3, 0))
        for b in range(3):
            if a == b:
                continue
            for offset, index, boundary in zip((1, -1), (0, grid.shape[b] - 1), grid.boundaries[b], strict=True):
                beside = closed.roll(offset, b - 3)
                if boundary != "periodic":
                    beside.select(b - 3, index).fill_(2.0 if boundary == "no_slip" else 0.0)
                squares.select(-4, a).add_((beside / grid.spacing[b]).square())
                counts.select(-4, a).add_(beside > 0)
    return squares * open_faces, counts * open_faces
