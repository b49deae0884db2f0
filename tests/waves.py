"""A smooth solenoidal flow with closed forms at points and over faces, for orders of convergence."""

import math
from collections.abc import Sequence

import torch
from reference import face_points, points
from torch import Tensor

from latentphys.grid import Grid


class Wave:
    """u_a = c_a sin(k_a x_a + p_a) Π_b cos(k_b x_b + p_b) with Σ c_a k_a = 0, one wave per box.

    Whole waves out of phase along periodic axes, half waves that end on walls along the others; along an axis with open
    sides, 0.7 of a half wave that flows through both.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.k, self.phase = [], []
        for length, periodic, pair in zip(grid.lengths, grid.periodic, grid.open_sides, strict=True):
            self.k.append(math.pi / length * (2.0 if periodic else 0.7 if any(pair) else 1.0))
            self.phase.append(0.3 if periodic or any(pair) else 0.0)
        self.amplitude = [1.0 / self.k[0], 0.6 / self.k[1], -1.6 / self.k[2]]
        self.dampings = [math.sin(k * h / 2) / (k * h / 2) for k, h in zip(self.k, grid.spacing, strict=True)]
        """Mean of cos(kx) over a cell, relative to its middle."""

    def at(self, place: Sequence[Tensor], component: int) -> Tensor:
        """A component of the velocity [m/s]."""
        value = torch.tensor(self.amplitude[component], dtype=torch.float64)
        for axis, (x, k, phase) in enumerate(zip(place, self.k, self.phase, strict=True)):
            value = value * ((k * x + phase).sin() if axis == component else (k * x + phase).cos())
        return value

    def samples(self, offset: float = 0.5) -> Tensor:
        """Velocity at one point of each cell [m/s]."""
        return torch.stack([self.at(points(self.grid, [offset] * 3), component) for component in range(3)])

    def face_means(self) -> Tensor:
        """Normal velocity, averaged over each low face [m/s]; times the areas, a flux with net zero."""
        x, y, z = self.dampings
        means = [self.at(face_points(self.grid, a), a) * d for a, d in enumerate((y * z, x * z, x * y))]
        return torch.stack(means)
