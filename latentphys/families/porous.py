"""Flow through a periodic porous sample, driven by a body force that pulsates or is steady.

The force turns and pulsates about its mean, f(t) = F [m + s √⅔ cos(2πt/T + φ)] with a phase for each axis, so that
inertia, viscosity and the grains act at all times; s = 0 gives the steady problem of Darcy's law. F = ν U/k by
Kozeny–Carman's estimate of the permeability k, so that the superficial velocity is about U in a sample of side 1 m.

References: Kozeny–Carman, k = ε³ d² / (180 (1 − ε)²); Zhu & Manhart, Transp. Porous Media 111 (2016), pulsating flow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from latentphys.families.family import (
    DrivenFlow,
    Parameters,
    box,
    broadband,
    check_number,
    check_range,
    generator,
    uniform,
)
from latentphys.families.media import REDRAWS, Medium, Spheres, carries_flow
from latentphys.families.solver import Fields
from latentphys.grid import Geometry, Grid
from latentphys.sphere import Sphere


def kozeny_carman(porosity: float, diameter: float) -> float:
    """Permeability k = ε³ d² / (180 (1 − ε)²) [m²]: an estimate."""
    return porosity**3 * diameter**2 / (180 * (1 - porosity) ** 2)


@dataclass(frozen=True)
class Porous(DrivenFlow):
    """A family of flows through porous media, one medium per trajectory.

    For Stokes flow choose a small U and with it small Re, so that ν stays as it is: velocity = 1e-3 and
    reynolds = (0.01, 0.04), with pulsation = 0 for a flow that becomes steady.

    Args:
        medium: `Spheres`, `RandomField` or `Image`.
        reynolds: range of Re = U d/ν, with the grain size d of the medium.
        velocity: superficial velocity U [m/s] that the force aims at.
        pulsation: amplitude s of the oscillating part of the force against its mean; 0 for a steady force.
        period: period T of the force [s].
        disturbance: root-mean-square velocity of the first disturbances, in units of U.
        interval: time between frames [s].
        spin_up: time before the first frame [s]. Momentum relaxes in about k/(ν ε), some hundredths of a second.
    """

    name: ClassVar[str] = "porous"
    parameter_units: ClassVar[Mapping[str, str]] = {"viscosity": "m2/s", "porosity": "1", "force": "m/s2"}

    medium: Medium = field(default_factory=Spheres)
    reynolds: Sequence[float] = (10.0, 40.0)
    velocity: float = 1.0
    pulsation: float = 1.0
    period: float = 0.12
    disturbance: float = 1.0
    interval: float = 0.02
    spin_up: float = 0.04

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("Re", self.reynolds, 0, np.inf)
        if not isinstance(self.medium, Medium):
            raise ValueError(f"Expected a medium: Spheres, RandomField or Image, got {self.medium!r}.")
        check_number("superficial velocity [m/s]", self.velocity, 0)
        check_number("pulsation", self.pulsation, 0, or_equal=True)
        check_number("period [s]", self.period, 0)
        check_number("disturbance", self.disturbance, 0, or_equal=True)

    def grid(self, shape: Sequence[int]) -> Grid:
        return box(shape)

    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        rng = generator(seed, trajectory, 0)
        medium = self.medium.draw(rng)
        viscosity = self.velocity * medium["diameter"] / uniform(self.reynolds, rng)
        strength = viscosity * self.velocity / kozeny_carman(medium["porosity"], medium["diameter"])
        direction = rng.standard_normal(3)
        return {
            **medium,
            "viscosity": viscosity,
            "force_mean": strength * direction / np.linalg.norm(direction),
            "force_amplitude": self.pulsation * strength,
            "force_phase": rng.uniform(0, 2 * np.pi, 3),
        }

    def solid(self, grid: Grid, parameters: Mapping[str, Any], seed: int, trajectory: int) -> np.ndarray:
        """The first medium of these parameters that lets a flow through in every direction.

        Raises:
            ValueError: there was none among the first few.
        """
        rng = generator(seed, trajectory, 2)
        for _ in range(REDRAWS):
            solid = self.medium.solid(grid, parameters, rng)
            if carries_flow(grid, solid):
                return solid
        raise ValueError(
            f"Expected pores that lead through the sample along every axis, got none in {REDRAWS} media of porosity "
            f"{parameters['porosity']:.2f} on {grid.shape} cells; choose a finer grid or a higher porosity."
        )

    def initial(self, geometry: Geometry | Sphere, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        assert isinstance(geometry, Geometry)
        rms = self.disturbance * self.velocity
        return {"velocity": broadband(geometry, rms, -5 / 6, generator(seed, trajectory, 1))}

    def force(self, parameters: Parameters, time: float) -> np.ndarray:
        wave = np.cos(2 * np.pi * time / self.period + parameters["force_phase"])
        return parameters["force_mean"] + parameters["force_amplitude"][:, None] / np.sqrt(1.5) * wave

    def recorded(self, parameters: Parameters, times: np.ndarray) -> dict[str, np.ndarray]:
        """The viscosity, the porosity, and the force at every recorded time."""
        return {**super().recorded(parameters, times), "porosity": parameters["porosity"]}
