"""What a family of flows is: a box, parameters, solids, a first state and a force, drawn from one seed a trajectory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from latentphys import operators
from latentphys.grid import Geometry, Grid
from latentphys.projection import project

Parameters = Mapping[str, np.ndarray]


def generator(seed: int, trajectory: int, purpose: int) -> np.random.Generator:
    """Random numbers that depend on the data set's seed, the trajectory and what they are for, and on nothing else."""
    return np.random.default_rng([seed, trajectory, purpose])


def uniform(bounds: Sequence[float], rng: np.random.Generator) -> float:
    """A number from a (low, high) range, the low end where both are equal."""
    low, high = bounds
    return float(low + (high - low) * rng.random())


def check_range(name: str, bounds: Sequence[float], low: float, high: float) -> None:
    """Refuse what is not a range (a, b) with low < a ≤ b < high.

    Raises:
        ValueError: another number of bounds, or bounds out of order or out of range.
    """
    if len(bounds) != 2 or not low < bounds[0] <= bounds[1] < high:
        raise ValueError(
            f"Expected a range of {name}, two numbers with {low:g} < a ≤ b < {high:g}, got {list(bounds)}."
        )


class Family(ABC):
    """A kind of incompressible flow that `simulate` can make.

    Attributes:
        name: the family's name in stores and reports.
        parameter_units: unit of each parameter.
        interval: time between recorded frames [s].
        spin_up: time simulated before the first frame [s].
    """

    name: ClassVar[str]
    parameter_units: ClassVar[Mapping[str, str]]
    interval: float
    spin_up: float

    @abstractmethod
    def grid(self, shape: Sequence[int]) -> Grid:
        """The box with this many cells."""

    @abstractmethod
    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        """The parameters of one trajectory; ``viscosity`` [m²/s] is among them."""

    def solid(self, grid: Grid, parameters: Mapping[str, Any], seed: int, trajectory: int) -> np.ndarray | None:
        """Solid voxels of one trajectory, or None for an empty box."""
        return None

    @abstractmethod
    def initial(self, geometry: Geometry, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Tensor:
        """The flux at t = −spin_up, FP64, shape (3, nx, ny, nz), solenoidal."""

    @abstractmethod
    def force(self, parameters: Parameters, time: float) -> np.ndarray:
        """Body force per unit mass of a batch of trajectories at a time, (B, 3) [m/s²]."""

    def recorded(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that the store keeps beside the force; by default all that were drawn."""
        return dict(parameters)


def broadband(geometry: Geometry, rms: float, slope: float, rng: np.random.Generator) -> Tensor:
    """A random solenoidal flux with energy at every scale, FP64.

    Fourier modes of random phase with amplitude ∝ |k|^slope (k in the box's own mode numbers), projected, scaled to a
    root-mean-square velocity over the open faces.

    Args:
        rms: root-mean-square of the velocity magnitude [m/s].
        slope: exponent of the amplitude; −5/6 gives about an equal share of velocity variance to each octave.
    """
    grid = geometry.grid
    noise = torch.from_numpy(rng.standard_normal((3, *grid.shape)))
    frequencies = torch.meshgrid(*(torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in grid.shape), indexing="ij")
    k = torch.stack(frequencies).square().sum(0).sqrt()
    amplitude = torch.where(k == 0, 0.0, k.clamp(min=1) ** (slope - 1))
    noise = torch.fft.ifftn(torch.fft.fftn(noise, dim=(-3, -2, -1)) * amplitude, dim=(-3, -2, -1)).real
    flux = project(operators.flux_of(noise, grid), geometry)
    speed2 = operators.velocity(flux, grid).square().sum(-4)[geometry.fluid].mean()
    return flux * (rms / speed2.sqrt())
