"""Open-channel flow: a turbulent layer of water on a rough-free bed, driven by a body force.

    x streamwise and y spanwise, periodic; z from the no-slip bed to the free-slip surface at the depth H.

Scaled by the depth H and the friction velocity u_τ: H = 1 m, u_τ = 1 m/s, so the force is u_τ²/H = 1 m/s² and the
viscosity 1/Re_τ. The spin-up starts from the mean profile of a turbulent layer with broadband disturbances on it.

References: Moser, Kim & Mansour, Phys. Fluids 11 (1999) for closed channels; Reichardt, ZAMM 31 (1951) for the profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from latentphys import operators
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
from latentphys.families.solver import Fields
from latentphys.grid import Boundaries, Geometry, Grid
from latentphys.sphere import Sphere


def reichardt(z_plus: Tensor) -> Tensor:
    """Mean velocity of a turbulent wall layer in wall units, U⁺(z⁺); von Kármán's constant 0.41."""
    inner = 1 - torch.exp(-z_plus / 11) - z_plus / 11 * torch.exp(-z_plus / 3)
    return torch.log1p(0.41 * z_plus) / 0.41 + 7.8 * inner


@dataclass(frozen=True)
class OpenChannel(DrivenFlow):
    """A family of turbulent open-channel flows.

    Args:
        reynolds: range of the friction Reynolds number Re_τ = u_τ H/ν. Sustained turbulence needs about 120 or more.
        lengths: box (Lx, Ly, H) [m]; H must be 1. Default: a minimal box, π × π/2 × 1.
        disturbance: root-mean-square velocity of the first disturbances [m/s], in units of u_τ.
        interval: time between frames [H/u_τ]. References: persistence has a VRMSE of 0.7 at 0.012 and 1.1 at 0.024.
        spin_up: time before the first frame [H/u_τ].
    """

    name: ClassVar[str] = "open_channel"
    parameter_units: ClassVar[Mapping[str, str]] = {"viscosity": "m2/s", "force": "m/s2"}

    reynolds: Sequence[float] = (180.0, 180.0)
    lengths: Sequence[float] = (np.pi, np.pi / 2, 1.0)
    disturbance: float = 2.5
    interval: float = 0.012
    spin_up: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.lengths) != 3 or self.lengths[2] != 1.0:
            raise ValueError(f"Expected a depth of 1 (lengths are in units of it), got lengths {list(self.lengths)}.")
        check_range("Re_τ", self.reynolds, 0, np.inf)
        check_number("disturbance [m/s]", self.disturbance, 0, or_equal=True)

    def grid(self, shape: Sequence[int]) -> Grid:
        walls: Boundaries = (("periodic", "periodic"), ("periodic", "periodic"), ("no_slip", "free_slip"))
        return box(shape, self.lengths, walls)

    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        return {"viscosity": 1.0 / uniform(self.reynolds, generator(seed, trajectory, 0))}

    def initial(self, geometry: Geometry | Sphere, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        assert isinstance(geometry, Geometry)
        grid = geometry.grid
        z = (torch.arange(grid.shape[2], dtype=torch.float64) + 0.5) * grid.spacing[2]
        u = torch.zeros(3, *grid.shape, dtype=torch.float64)
        u[0] = reichardt(z / parameters["viscosity"])
        disturbance = broadband(geometry, self.disturbance, -5 / 6, generator(seed, trajectory, 1))
        return {"velocity": operators.flux_of(u, grid) + disturbance}

    def force(self, parameters: Parameters, time: float) -> np.ndarray:
        return np.tile([1.0, 0.0, 0.0], (len(parameters["viscosity"]), 1))
