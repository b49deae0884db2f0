"""Porous-media flow: a periodic sample of randomly packed spheres, driven by a pulsating body force.

The force turns and pulsates about its mean, f(t) = F [m + s √⅔ cos(2πt/T + φ)] with a phase for each axis, so that
inertia, viscosity and the grains act at all times; s = 0 gives the steady problem of Darcy's law. F is chosen by
Kozeny–Carman so that the superficial velocity is about U = 1 m/s in a sample of side 1 m.

References: Kozeny–Carman, k = ε³ d² / (180 (1 − ε)²); Zhu & Manhart, Transp. Porous Media 111 (2016), pulsating flow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from latentphys.families.family import DrivenFlow, Parameters, broadband, check_range, generator, uniform
from latentphys.families.solver import Fields
from latentphys.grid import Geometry, Grid


def sphere_pack(
    grid: Grid, porosity: float, diameter: float, rng: np.random.Generator, overlap: float = 0.15, tries: int = 20000
) -> np.ndarray:
    """Voxels of equal spheres placed at random in a periodic box until only `porosity` of it is left open.

    A sphere may sink into another by at most `overlap` of the diameter, as sintered grains do.

    Raises:
        ValueError: the porosity was not reached in `tries` placements; a larger overlap or porosity would.
    """
    lengths, spacing = np.array(grid.lengths), np.array(grid.spacing)
    centres = [(np.arange(n) + 0.5) * h for n, h in zip(grid.shape, spacing, strict=True)]
    solid = np.zeros(grid.shape, dtype=bool)
    placed = np.empty((0, 3))
    for _ in range(tries):
        if solid.mean() >= 1 - porosity:
            return solid
        centre = rng.random(3) * lengths
        apart = np.abs(placed - centre)
        apart = np.minimum(apart, lengths - apart)
        if placed.size and np.sqrt((apart**2).sum(1)).min() < (1 - overlap) * diameter:
            continue
        placed = np.vstack([placed, centre])
        distance2 = np.zeros(grid.shape)
        for axis in range(3):
            d = np.abs(centres[axis] - centre[axis])
            d = np.minimum(d, lengths[axis] - d)
            distance2 = distance2 + (d**2).reshape([-1 if a == axis else 1 for a in range(3)])
        solid |= distance2 < (diameter / 2) ** 2
    raise ValueError(
        f"Expected to reach a porosity of {porosity:.2f} with spheres of diameter {diameter:.3g} m, stopped at "
        f"{1 - solid.mean():.2f} after {tries} placements; allow more overlap or a higher porosity."
    )


@dataclass(frozen=True)
class Porous(DrivenFlow):
    """A family of flows through random sphere packs, one pack per trajectory.

    Args:
        porosity: range of the fluid share ε.
        diameter: range of the sphere diameter d [m], in a box of side 1 m.
        reynolds: range of Re = U d/ν with U = 1 m/s.
        pulsation: amplitude s of the oscillating part of the force against its mean; 0 for a steady force.
        period: period T of the force [s].
        disturbance: root-mean-square velocity of the first disturbances [m/s].
        interval: time between frames [s].
        spin_up: time before the first frame [s]. Momentum relaxes in about k/(ν ε), some hundredths of a second.
    """

    name: ClassVar[str] = "porous"
    parameter_units: ClassVar[Mapping[str, str]] = {"viscosity": "m2/s", "force": "m/s2"}

    porosity: Sequence[float] = (0.55, 0.75)
    diameter: Sequence[float] = (0.3, 0.42)
    reynolds: Sequence[float] = (10.0, 40.0)
    pulsation: float = 1.0
    period: float = 0.12
    disturbance: float = 1.0
    interval: float = 0.02
    spin_up: float = 0.04

    def __post_init__(self) -> None:
        check_range("porosities", self.porosity, 0.2, 1)
        check_range("sphere diameters", self.diameter, 0, 1)
        check_range("Re", self.reynolds, 0, np.inf)

    def grid(self, shape: Sequence[int]) -> Grid:
        nx, ny, nz = shape
        return Grid((nx, ny, nz), (1 / nx, 1 / ny, 1 / nz))

    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        rng = generator(seed, trajectory, 0)
        porosity, diameter = uniform(self.porosity, rng), uniform(self.diameter, rng)
        viscosity = diameter / uniform(self.reynolds, rng)
        permeability = porosity**3 * diameter**2 / (180 * (1 - porosity) ** 2)
        direction = rng.standard_normal(3)
        return {
            "viscosity": viscosity,
            "porosity": porosity,
            "diameter": diameter,
            "force_mean": viscosity / permeability * direction / np.linalg.norm(direction),
            "force_amplitude": self.pulsation * viscosity / permeability,
            "force_phase": rng.uniform(0, 2 * np.pi, 3),
        }

    def solid(self, grid: Grid, parameters: Mapping[str, Any], seed: int, trajectory: int) -> np.ndarray:
        rng = generator(seed, trajectory, 2)
        return sphere_pack(grid, parameters["porosity"], parameters["diameter"], rng)

    def initial(self, geometry: Geometry, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        return {"velocity": broadband(geometry, self.disturbance, -5 / 6, generator(seed, trajectory, 1))}

    def force(self, parameters: Parameters, time: float) -> np.ndarray:
        wave = np.cos(2 * np.pi * time / self.period + parameters["force_phase"])
        return parameters["force_mean"] + parameters["force_amplitude"][:, None] / np.sqrt(1.5) * wave
