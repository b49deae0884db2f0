"""What the networks are told of the box that they work in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.autoencoders.layers import extrude, geometry_features
from latentphys.grid import BOUNDARIES, Boundaries, Geometry, Grid

_NUM_BOX_CONDITIONS = 3 + 1 + 6 * len(BOUNDARIES)


class Place(NamedTuple):
    """A box as the networks see it.

    Args:
        features: fluid and wall distance in every cell (`geometry_features`), axes of one cell repeated to a patch.
        condition: what holds for the whole box; see `describe`.
        boundaries: per axis the (low, high) types, by which convolutions pad.
    """

    features: Float[Tensor, "#b g nx ny nz"]
    condition: Float[Tensor, "#b p"]
    boundaries: Boundaries

    def to(self, target: torch.device | str | torch.dtype) -> Place:
        """The same place on another device or in another precision."""
        return Place(self.features.to(target), self.condition.to(target), self.boundaries)


def num_conditions(num_fields: int) -> int:
    """Length of the condition for a model of this many field types."""
    return _NUM_BOX_CONDITIONS + num_fields


def describe(geometry: Geometry, has: Sequence[bool], cells: int) -> Place:
    """What the networks are told of a box.

    The condition is, in this order: ln(spacing / finest spacing) of each axis, 0 along axes of one cell; log₂ of the
    finest cells along the shortest side, from 32 on; the boundary type of each side, one-hot; which field types there
    are.

    Args:
        geometry: the box, for all samples or one for each.
        has: for every field type of the model whether this family has it.
        cells: cells of a patch per axis, to which axes of one cell are extruded.

    Returns:
        a place on the CPU, in FP32.
    """
    grid = geometry.grid
    sides = [float(side == name) for pair in grid.boundaries for side in pair for name in BOUNDARIES]
    condition = torch.tensor([_sizes(grid) + sides + [float(there) for there in has]])
    return Place(extrude(geometry_features(geometry), cells), condition, grid.boundaries)


def _sizes(grid: Grid) -> list[float]:
    finest = grid.finest_spacing
    ratios = [math.log(h / finest) if n > 1 else 0.0 for h, n in zip(grid.spacing, grid.shape, strict=True)]
    return [*ratios, math.log2(grid.shortest_side / finest / 32)]
