"""Rayleigh–Bénard convection: a layer of fluid heated from below and cooled from above (Boussinesq).

    ∂u/∂t + ∇·(u u) = −∇p + ν Δu + g α T e_z,     ∂T/∂t + ∇·(u T) = κ ΔT,     ∇·u = 0

T = ±½ΔT on the bottom and the top. Scaled by the height H, the temperature difference ΔT and the velocity of free fall
√(g α ΔT H), all of which are 1: then ν = √(Pr/Ra) and κ = 1/√(Pr Ra). The lift on a face normal to z is the mean of its
two cells, as is the heat that the face carries, so that buoyancy works at the rate g α ⟨u_z T⟩ to rounding.

References: Chandrasekhar, Hydrodynamic and Hydromagnetic Stability (1961), ch. II; Ahlers, Grossmann & Lohse, Rev. Mod.
Phys. 81 (2009).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from latentphys.families.family import Family, Parameters, box, broadband, check_number, check_range, generator
from latentphys.families.scalar_transport import ScalarFlow
from latentphys.families.solver import Fields
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Boundaries, Boundary, Geometry, Grid
from latentphys.sphere import Sphere

TEMPERATURE = FieldSpec("temperature", "scalar", "K")
EXPANSION = 1.0
"""g α [m/s²/K]."""
PLATES = {"z-": 0.5, "z+": -0.5}
"""Temperature of the bottom and the top [K]."""


class BuoyantFlow(ScalarFlow):
    """A batch of layers between a warm bottom and a cold top. Its fields are ``velocity`` and ``temperature`` [K].

    Args:
        geometry: a box with walls along z, the bottom at +0.5 K and the top at −0.5 K.
        viscosity, diffusivity: ν and κ [m²/s], a number or one per trajectory (B,).
        options: of `ScalarFlow`.
    """

    def __init__(self, geometry: Geometry, viscosity: float | Tensor, diffusivity: float | Tensor, **options: Any):
        super().__init__(geometry, viscosity, diffusivity, scalar=TEMPERATURE.name, walls=PLATES, **options)

    def stable_step(self, fields: Fields) -> float:
        """As for any flow, and short against the time that hot fluid takes to fall freely through its own height."""
        fall = math.sqrt(EXPANSION / self.geometry.grid.lengths[2])
        return 1 / math.hypot(1 / super().stable_step(fields), fall)

    def rates(self, fields: Fields, drive: Fields) -> Fields:
        rates, temperature = super().rates(fields, drive), fields[self.scalar]
        lift = (0.5 * EXPANSION) * (temperature + temperature.roll(1, -1)) * self.geometry.grid.face_areas[2]
        u, v, w = rates["velocity"].unbind(1)
        return rates | {"velocity": torch.stack([u, v, w + lift * self.open_faces.select(-4, 2)], dim=1)}


def free_fall(rayleigh: float | np.ndarray, prandtl: float | np.ndarray) -> dict[str, Any]:
    """ν and κ [m²/s] of a layer with H = ΔT = g α = 1."""
    return {"viscosity": np.sqrt(prandtl / rayleigh), "diffusivity": 1 / np.sqrt(prandtl * rayleigh)}


@dataclass(frozen=True)
class Convection(Family):
    """A family of convecting layers.

    Args:
        rayleigh: range of Ra = g α ΔT H³/(ν κ), drawn evenly in its logarithm. Convection begins at 1708 between rigid
            plates. The thermal boundary layers, H/(2 Nu) thick, want three cells or more: Nu is about 5 at 1e5 and 9
            at 1e6.
        prandtl: range of Pr = ν/κ, drawn likewise.
        lengths: box (Lx, Ly, H) [m]; H must be 1.
        plates: the bottom and the top, each ``no_slip`` or ``free_slip``.
        disturbance: root-mean-square velocity of the first disturbances [m/s], in units of the free-fall velocity.
        interval: time between frames [s], in units of the free-fall time H/√(g α ΔT H).
        spin_up: time before the first frame [s].
    """

    name: ClassVar[str] = "convection"
    specs: ClassVar[Mapping[str, FieldSpec]] = {VELOCITY.name: VELOCITY, TEMPERATURE.name: TEMPERATURE}
    parameter_units: ClassVar[Mapping[str, str]] = {"viscosity": "m2/s", "diffusivity": "m2/s"}

    rayleigh: Sequence[float] = (1e5, 3e6)
    prandtl: Sequence[float] = (0.7, 2.0)
    lengths: Sequence[float] = (2.0, 2.0, 1.0)
    plates: Sequence[Boundary] = ("no_slip", "no_slip")
    disturbance: float = 0.2
    interval: float = 0.75
    spin_up: float = 25.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("Ra", self.rayleigh, 0, np.inf)
        check_range("Pr", self.prandtl, 0, np.inf)
        if len(self.lengths) != 3 or self.lengths[2] != 1.0:
            raise ValueError(f"Expected a height of 1 (lengths are in units of it), got lengths {self.lengths}.")
        check_number("disturbance [m/s]", self.disturbance, 0, or_equal=True)
        if len(self.plates) != 2 or any(plate not in ("no_slip", "free_slip") for plate in self.plates):
            raise ValueError(f"Expected two plates, each no_slip | free_slip, got {list(self.plates)}.")

    def grid(self, shape: Sequence[int]) -> Grid:
        bottom, top = self.plates
        walls: Boundaries = (("periodic", "periodic"), ("periodic", "periodic"), (bottom, top))
        return box(shape, self.lengths, walls)

    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        rng = generator(seed, trajectory, 0)
        rayleigh, prandtl = (float(low * (high / low) ** rng.random()) for low, high in (self.rayleigh, self.prandtl))
        return {name: float(value) for name, value in free_fall(rayleigh, prandtl).items()}

    def initial(self, geometry: Geometry | Sphere, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        """The conducting layer at rest, with broadband disturbances of the velocity and of the temperature with it."""
        assert isinstance(geometry, Geometry)
        grid = geometry.grid
        flux = broadband(geometry, self.disturbance, -5 / 6, generator(seed, trajectory, 1))
        z = (torch.arange(grid.shape[2], dtype=torch.float64) + 0.5) * grid.spacing[2]
        temperature = (PLATES["z-"] - z).expand(grid.shape).contiguous()
        return {"velocity": flux, TEMPERATURE.name: temperature}

    def solver(
        self,
        geometry: Geometry | Sphere,
        parameters: Parameters,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> BuoyantFlow:
        assert isinstance(geometry, Geometry)
        viscosity, diffusivity = (torch.from_numpy(parameters[name]) for name in ("viscosity", "diffusivity"))
        return BuoyantFlow(geometry, viscosity, diffusivity, dtype=dtype, device=device, compiled=compiled)
