"""The families of `study_ccm.py`, each with one physical coordinate x."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from latentphys import operators
from latentphys.families import DrivenFlow, Family, GrayScottPatterns, Porous
from latentphys.families.family import Parameters, box, coloured, generator
from latentphys.families.media import Spheres
from latentphys.families.solver import Fields
from latentphys.grid import Geometry, Grid
from latentphys.projection import project
from latentphys.sphere import Sphere


@dataclass(frozen=True)
class Vortices(DrivenFlow):
    """Decaying vortices in the plane, in a periodic box of side 2π m."""

    name: ClassVar[str] = "navier_stokes"
    parameter_units: ClassVar[Mapping[str, str]] = {"viscosity": "m2/s"}

    viscosity: float = 0.02
    speed: float = 0.25
    interval: float = 0.3
    spin_up: float = 0.5

    def grid(self, shape: Sequence[int]) -> Grid:
        return box(shape, (2 * np.pi,) * 3)

    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        return {"viscosity": self.viscosity}

    def initial(self, geometry: Geometry | Sphere, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        """A flow of this RMS speed whose stream function has the modes 2 ≤ |k| ≤ 6, energy as |k|⁻¹ per mode."""
        assert isinstance(geometry, Geometry)
        grid = geometry.grid
        k = torch.meshgrid(*(torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in grid.shape[:2]), indexing="ij")
        k2 = (k[0].square() + k[1].square())[..., None]
        noise = coloured(generator(seed, trajectory, 1).standard_normal(grid.shape), -1.5)
        modes = torch.fft.fft2(noise, dim=(0, 1)) * ((k2 >= 4) & (k2 <= 36))
        potential = torch.zeros(3, *grid.shape, dtype=torch.float64)
        potential[2] = torch.fft.ifft2(modes, dim=(0, 1)).real
        flux = operators.curl(potential, grid)
        return {"velocity": flux * (self.speed / operators.velocity(flux, grid).square().sum(0).mean().sqrt())}

    def force(self, parameters: Parameters, time: float) -> np.ndarray:
        return np.zeros((len(parameters["viscosity"]), 3))

    def recorded(self, parameters: Parameters, times: np.ndarray) -> dict[str, np.ndarray]:
        return {"viscosity": parameters["viscosity"]}


@dataclass(frozen=True)
class Pushed(Porous):
    """Flow through one and the same sphere pack, from a random flow to what a steady force along x drives."""

    parameter_units: ClassVar[Mapping[str, str]] = {"push": "m/s2"}

    strength: float = 10.0
    viscosity: float = 0.02

    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        return {**self.medium.draw(generator(0, 0, 0)), "viscosity": self.viscosity, "strength": self.strength}

    def solid(self, grid: Grid, parameters: Mapping[str, Any], seed: int, trajectory: int) -> np.ndarray:
        return super().solid(grid, parameters, 0, 0)

    def initial(self, geometry: Geometry | Sphere, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        """Eddies, and a flow along x of any speed up to 0.6 m/s, so that the speed does not tell the force."""
        assert isinstance(geometry, Geometry)
        along = torch.zeros(3, *geometry.grid.shape, dtype=torch.float64)
        along[0] = geometry.grid.face_areas[0] * generator(seed, trajectory, 3).uniform(0.0, 0.6)
        eddies = super().initial(geometry, parameters, seed, trajectory)["velocity"]
        return {"velocity": eddies + project(along, geometry)}

    def force(self, parameters: Parameters, time: float) -> np.ndarray:
        return np.outer(parameters["strength"], (1.0, 0.0, 0.0))

    def recorded(self, parameters: Parameters, times: np.ndarray) -> dict[str, np.ndarray]:
        """The force as a vector, which models see as it is; of a number they would see the logarithm."""
        return {"push": self.force(parameters, 0.0)}


def reaction_diffusion(x: float) -> Family:
    d = diffusivity(x)
    return GrayScottPatterns(feed=(0.022, 0.022), excess=(-0.001, -0.001), diffusivity=(d, d), interval=10.0)


def navier_stokes(x: float) -> Family:
    return Vortices(viscosity=viscosity(x))


def porous(x: float) -> Family:
    medium = Spheres(porosity=(0.65, 0.75), diameter=(0.35, 0.42))
    return Pushed(strength=strength(x), medium=medium, velocity=0.25, disturbance=0.4, interval=0.01, spin_up=0.01)


def diffusivity(x: float) -> float:
    return 1e-4 * 1.35**x


def viscosity(x: float) -> float:
    return 0.02 * 2**x


def strength(x: float) -> float:
    return 10.0 + 4.0 * x


@dataclass(frozen=True)
class Problem:
    """A family with one coordinate x: endpoints at ∓1, the anchor's training data between them.

    Args:
        parameter: name and unit of what changes.
        value: x → the parameter.
        family: x → the settings that `simulate` takes.
        shape: cells.
        model: overrides of the dynamics model.
        latent_channels: of the autoencoder.
        num_anchor, num_tuning: trajectories that the anchor and whatever starts from it are trained on.
        other_scale: the scale of the parameter on which x is not linear, ``linear | log``.
    """

    parameter: str
    value: Callable[[float], float]
    family: Callable[[float], Family]
    shape: tuple[int, int, int]
    model: tuple[str, ...]
    latent_channels: int
    num_anchor: int
    num_tuning: int
    other_scale: str


PROBLEMS = {
    "reaction_diffusion": Problem(
        "diffusivity_u [m2/s]",
        diffusivity,
        reaction_diffusion,
        (32, 32, 1),
        ("experiment=dense", "dynamics.mixer=fourier"),
        16,
        24,
        12,
        "linear",
    ),
    "navier_stokes": Problem(
        "viscosity [m2/s]", viscosity, navier_stokes, (32, 32, 1), ("experiment=dense",), 16, 48, 16, "linear"
    ),
    "porous": Problem("body force [m/s2]", strength, porous, (16, 16, 16), ("router=top1",), 32, 32, 8, "log"),
}
