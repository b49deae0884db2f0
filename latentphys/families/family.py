"""What a family is: a domain, parameters, solids, a first state and a solver, each drawn from one seed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from latentphys import operators
from latentphys.families.navier_stokes import NavierStokes
from latentphys.families.solver import Fields, Solver
from latentphys.fields import VELOCITY, Domain, FieldSpec
from latentphys.grid import PERIODIC, Boundaries, Geometry, Grid
from latentphys.projection import project
from latentphys.sphere import Sphere

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


def check_number(name: str, value: float, above: float = -math.inf, *, or_equal: bool = False) -> None:
    """Refuse what is not a finite number > `above`, or ≥ `above`.

    Raises:
        ValueError: NaN, infinity, or a number out of range.
    """
    if not (math.isfinite(value) and (value > above or (or_equal and value == above))):
        bound = "" if above == -math.inf else f" {'≥' if or_equal else '>'} {above:g}"
        raise ValueError(f"Expected a finite {name}{bound}, got {value}.")


def box(shape: Sequence[int], lengths: Sequence[float] = (1.0, 1.0, 1.0), boundaries: Boundaries = PERIODIC) -> Grid:
    """The box with these edge lengths [m], by default a periodic cube of side 1 m."""
    (nx, ny, nz), (lx, ly, lz) = shape, lengths
    return Grid((nx, ny, nz), (lx / nx, ly / ny, lz / nz), boundaries)


def all_round(sides: str) -> Boundaries:
    """Boundaries that are the same on all sides: ``periodic``, or ``closed`` by walls that nothing sticks to.

    Raises:
        ValueError: neither.
    """
    if sides not in ("periodic", "closed"):
        raise ValueError(f"Expected sides that are periodic | closed, got {sides!r}.")
    return PERIODIC if sides == "periodic" else (("free_slip", "free_slip"),) * 3


class Family(ABC):
    """A kind of physics that `simulate` can make.

    A dataclass of its settings, of which it checks its own after those of all families, which `__post_init__` checks.

    Attributes:
        name: the family's name in stores and reports.
        specs: its fields, by name.
        parameter_units: unit of each recorded parameter.
        interval: time between recorded frames [s].
        spin_up: time simulated before the first frame [s].
    """

    name: ClassVar[str]
    specs: ClassVar[Mapping[str, FieldSpec]]
    parameter_units: ClassVar[Mapping[str, str]]
    interval: float
    spin_up: float

    def __post_init__(self) -> None:
        check_number("interval between frames [s]", self.interval, 0)
        check_number("spin-up [s]", self.spin_up, 0, or_equal=True)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse a shape that no domain of the family can have.

        Raises:
            ValueError: another number of axes than three, an axis without cells, or a single cell in all.
        """
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"Expected a shape of three axes, such as [32, 32, 32], got {list(shape)}.")
        if max(shape) == 1:
            raise ValueError("Expected more than a single cell, got [1, 1, 1]; nothing can vary in it.")

    @abstractmethod
    def grid(self, shape: Sequence[int]) -> Domain:
        """The domain with this many cells, (nx, ny, nz), or points (nlat, nlon) on a sphere."""

    @abstractmethod
    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        """The parameters of one trajectory: numbers, or arrays of a length that all trajectories share."""

    def solid(self, grid: Grid, parameters: Mapping[str, Any], seed: int, trajectory: int) -> np.ndarray | None:
        """Solid voxels of one trajectory, or None for an empty box."""
        return None

    @abstractmethod
    def initial(self, geometry: Geometry | Sphere, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        """The fields of one trajectory at t = −spin_up, FP64, without a batch axis; fluxes that are solenoidal."""

    @abstractmethod
    def solver(
        self,
        geometry: Geometry | Sphere,
        parameters: Parameters,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> Solver:
        """A solver of a batch.

        Args:
            geometry: of the batch, (B, …) or shared.
            parameters: what `draw` gave, one array (B, …) for each name.
            dtype, device, compiled: as solvers take them.
        """

    def recorded(self, parameters: Parameters, times: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters that the store keeps, (B,), (B, k) or (B, time, k); by default all that were drawn."""
        return dict(parameters)


class DrivenFlow(Family):
    """An incompressible flow driven by a uniform body force: its one field is the velocity flux.

    ``viscosity`` [m²/s] is among the parameters that `draw` returns.
    """

    specs: ClassVar[Mapping[str, FieldSpec]] = {VELOCITY.name: VELOCITY}

    @abstractmethod
    def force(self, parameters: Parameters, time: float) -> np.ndarray:
        """Body force per unit mass of a batch of trajectories at a time, (B, 3) [m/s²]."""

    def solver(
        self,
        geometry: Geometry | Sphere,
        parameters: Parameters,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> NavierStokes:
        assert isinstance(geometry, Geometry)
        return NavierStokes(
            geometry,
            torch.from_numpy(parameters["viscosity"]),
            lambda time: torch.from_numpy(self.force(parameters, time)),
            dtype=dtype,
            device=device,
            compiled=compiled,
        )

    def recorded(self, parameters: Parameters, times: np.ndarray) -> dict[str, np.ndarray]:
        """The viscosity, and the force at every recorded time."""
        force = np.stack([self.force(parameters, t) for t in times], axis=1)
        return {"viscosity": parameters["viscosity"], "force": force}


def broadband(geometry: Geometry, rms: float, slope: float, rng: np.random.Generator) -> Tensor:
    """A random solenoidal flux with energy at every scale, FP64.

    Fourier modes of random phase with amplitude ∝ |k|^slope (k in the box's own mode numbers), projected, scaled to a
    root-mean-square velocity over the open faces.

    Args:
        rms: root-mean-square of the velocity magnitude [m/s].
        slope: exponent of the amplitude; −5/6 gives about an equal share of velocity variance to each octave.
    """
    grid = geometry.grid
    noise = coloured(rng.standard_normal((3, *grid.shape)), slope - 1)
    flux = project(operators.flux_of(noise, grid), geometry)
    speed2 = operators.velocity(flux, grid).square().sum(-4)[geometry.fluid].mean()
    return flux * (rms / speed2.sqrt())


def coloured(noise: np.ndarray, exponent: float) -> Tensor:
    """White noise (…, nx, ny, nz) whose Fourier modes are multiplied by |k|^exponent, FP64; its mean is zero.

    k is in the box's own mode numbers. An exponent of −3/2 gives an equal share of variance to each octave.
    """
    shape = noise.shape[-3:]
    frequencies = torch.meshgrid(*(torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in shape), indexing="ij")
    k = torch.stack(frequencies).square().sum(0).sqrt()
    amplitude = torch.where(k == 0, 0.0, k.clamp(min=1) ** exponent)
    modes = torch.fft.fftn(torch.from_numpy(noise), dim=(-3, -2, -1))
    return torch.fft.ifftn(modes * amplitude, dim=(-3, -2, -1)).real
