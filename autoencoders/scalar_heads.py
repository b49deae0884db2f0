"""Heads of scalars, and of vectors without a constraint: after them a field obeys its constraint whatever came before.

    PlainHead        none        what the network says
    ConservedHead    conserved   the same, with a given total over the fluid, in every bit
    PositiveHead     positive    ½ (y + √(y² + ε²)) of the y that the network says

In solids a plain field is 0.0, as stores hold a pressure or a velocity there, and so is a conserved one, whose total
over the box is then that over the fluid. A positive field goes on through solids, as stores hold a sound speed: it is a
property of the place and positive everywhere.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.autoencoders.head import Head
from latentphys.autoencoders.normaliser import FieldScale
from latentphys.families.scalar_transport import Total
from latentphys.fields import Constraint
from latentphys.grid import Geometry, Grid

SOFTNESS = 1e-2
"""ε of the positive head in units of the field's fluctuations: at y ≫ ε values are ε²/4y above y."""

LOWEST = -1e6
"""Least y in the same units; the value there is 2.5e-11 of them, and lower ones no longer lower it."""

HEADROOM = 8.0
"""How large the mean |value| of a snapshot may be, in fluctuations above the largest mean, before its quantum grows."""

TOTAL_BITS = 50
"""Σ|value| stays below 2⁵⁰ quanta: three bits for the shift, the rounding, and a total that was itself rounded."""


class PointwiseHead(Head):
    """A head of one formula, in FP32 and in FP64."""

    @abstractmethod
    def field(self, raw: Tensor, geometry: Geometry, scale: FieldScale) -> Tensor:
        """The field in the dtype of its channels."""

    def forward(
        self, raw: Float[Tensor, "b c nx ny nz"], geometry: Geometry, scale: FieldScale
    ) -> Float[Tensor, "b c nx ny nz"]:
        with torch.autocast(raw.device.type, enabled=False):
            return self.field(raw.float(), geometry, scale)

    @torch.no_grad()
    def exact(
        self, raw: Float[Tensor, "b c nx ny nz"], geometry: Geometry, scale: FieldScale
    ) -> Float[Tensor, "b c nx ny nz"]:
        return self.field(raw.double(), geometry, scale)


class PlainHead(PointwiseHead):
    """A scalar or vector in cells as the network says it; 0.0 in solids.

    Args:
        num_channels: 1 of a scalar, 3 of a vector.
    """

    constraint: Constraint = "none"

    def __init__(self, num_channels: int = 1) -> None:
        super().__init__()
        self.num_channels = num_channels

    def field(self, raw: Tensor, geometry: Geometry, scale: FieldScale) -> Tensor:
        return _in_fluid(raw, geometry, scale)


class ConservedHead(Head):
    """A scalar with a total ∫ c dV over the fluid: a given one, or else the network's own; 0.0 in solids.

    What is said is shifted by a constant, which makes the nearest field with that total. `exact` then makes it exact in
    every bit: values are whole multiples of a quantum q, a power of two, so few of them that FP64 adds them up without
    rounding in any order. Their sum is the multiple of q nearest to ``total / grid.cell_volume``; with ``s`` the sum of
    a field of this head, ``s * grid.cell_volume`` as the total gives ``s`` again.

    q depends on the grid and the field's scale only, so that one total is one sum in every snapshot, unless the mean
    |value| of a snapshot passes the largest mean by `HEADROOM` times the fluctuations: then q doubles for that snapshot
    until it fits. At 128³ with a mean of zero q is 1.5e-8 of the fluctuations; values move by less than 2 q.
    """

    num_channels = 1
    constraint: Constraint = "conserved"

    def forward(
        self,
        raw: Float[Tensor, "b 1 nx ny nz"],
        geometry: Geometry,
        scale: FieldScale,
        total: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b 1 nx ny nz"]:
        """The field in FP32, under autocast too, its total to rounding. Differentiable.

        Args:
            total: ∫ c dV over the fluid [unit·m³], of each sample. Default: the network's own.

        Raises:
            ValueError: a box that the scale does not know, or totals that are not one finite number per sample.
        """
        with torch.autocast(raw.device.type, enabled=False):
            values = _in_fluid(raw.float(), geometry, scale)
            return values if total is None else _shifted(values, _sums(total, values, geometry.grid), geometry)

    @torch.no_grad()
    def exact(
        self,
        raw: Float[Tensor, "b 1 nx ny nz"],
        geometry: Geometry,
        scale: FieldScale,
        total: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b 1 nx ny nz"]:
        """The field in FP64, its sum exact in every bit. Not differentiable.

        Args:
            total: as in `forward`.

        Raises:
            ValueError: as `forward`, and channels that are not finite.
        """
        if not bool(torch.isfinite(raw).all()):
            bad = int((~torch.isfinite(raw)).sum())
            raise ValueError(f"Expected finite channels, got {bad} NaN or infinite values among {raw.numel()}.")
        values = _in_fluid(raw.double(), geometry, scale)
        if total is None:
            sums = values.sum((-3, -2, -1), keepdim=True)
        else:
            sums = _sums(total, values, geometry.grid)
            values = _shifted(values, sums, geometry)
        quantum = _quantum(values, scale, geometry.grid)
        kept = Total((sums / quantum)[:, 0].round(), quantum[:, 0]).kept(values[:, 0], geometry)
        return kept[:, None]


class PositiveHead(PointwiseHead):
    """A scalar above zero: ½ (y + √(y² + ε²)) of what the network says, y, with ε = `SOFTNESS` × the fluctuations.

    Where y ≫ ε it is y; where y ≪ −ε it is ε²/4|y|, above zero in FP32 and FP64 alike.
    """

    num_channels = 1
    constraint: Constraint = "positive"

    def field(self, raw: Tensor, geometry: Geometry, scale: FieldScale) -> Tensor:
        y = (scale.denormalise(raw, geometry.grid) / scale.size).clamp(min=LOWEST)
        root = torch.hypot(y, torch.full_like(y, SOFTNESS))
        # each side without cancellation, and finite on the other, where its gradient is multiplied by zero
        below = 0.5 * SOFTNESS**2 / (root - y.clamp(max=0.0))
        return scale.size * torch.where(y > 0, 0.5 * (y + root), below)


def usual_load(scale: FieldScale, grid: Grid) -> float:
    """What Σ|value| [unit of the field] is taken for where it is less: it sets the quantum of `ConservedHead`."""
    return grid.num_cells * (float(scale.profile.abs().amax()) + HEADROOM * scale.size)


def _in_fluid(raw: Tensor, geometry: Geometry, scale: FieldScale) -> Tensor:
    """What the network says in the unit of the field, 0.0 in solids."""
    values = scale.denormalise(raw, geometry.grid)
    return values if geometry.is_empty else torch.where(geometry.fluid.unsqueeze(-4).to(raw.device), values, 0.0)


def _sums(total: Tensor, values: Tensor, grid: Grid) -> Float[Tensor, "b 1 1 1 1"]:
    """Σ over the cells for a total, FP64."""
    if tuple(total.shape) != tuple(values.shape[:1]) or not bool(torch.isfinite(total).all()):
        raise ValueError(
            f"Expected a finite total for each of {len(values)} samples, got {total.tolist()}; pass a tensor of shape "
            f"({len(values)},)."
        )
    return (total.to(values.device).double() / grid.cell_volume).reshape(-1, 1, 1, 1, 1)


def _shifted(values: Tensor, sums: Tensor, geometry: Geometry) -> Tensor:
    """The nearest values with some sums over the fluid, to rounding; what is missing is worked out in FP64."""
    fluid = geometry.fluid.unsqueeze(-4).to(values.device)
    missing = sums - values.double().sum((-3, -2, -1), keepdim=True)
    return values + fluid * (missing / fluid.sum((-3, -2, -1), keepdim=True)).to(values)


def _quantum(values: Tensor, scale: FieldScale, grid: Grid) -> Float[Tensor, "b 1 1 1 1"]:
    """The power of two of which values become multiples."""
    load = values.abs().sum((-3, -2, -1), keepdim=True).clamp(min=usual_load(scale, grid))
    return torch.ldexp(torch.ones_like(load), torch.frexp(load).exponent - TOTAL_BITS)
