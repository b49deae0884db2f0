"""Homogeneous turbulence in a periodic box, sustained by a force on its largest scales.

    ∂u/∂t + ∇·(u u) = −∇p + ν Δu + f,     f = P u_< / ⟨u_<·u_<⟩

where u_< are the Fourier modes 0 < |k| ≤ k_f of u. The force is parallel to the large scales and does the work P per
unit mass and time at every instant, ⟨f·u⟩ = P, so that dE/dt = P − ε. Its sums are those of the staggered complex:
the same modes of each component at its own faces, hence solenoidal where u is.

References: Ghosal, Lund, Moin & Akselvoll, J. Fluid Mech. 286 (1995); Lamorgese, Caughey & Pope, Phys. Fluids 17
(2005).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.families.family import Family, Parameters, box, broadband, check_number, check_range, generator, uniform
from latentphys.families.navier_stokes import NavierStokes
from latentphys.families.solver import Fields
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.sphere import Sphere


class Stirring:
    """A force along the largest scales of a velocity that does a given work.

    Args:
        geometry: a periodic box without solids.
        power: P [m²/s³], (B, 1, 1, 1, 1); its dtype and device are those of the velocity.
        modes: k_f in the box's own mode numbers, at least 1 and below half the cells along each axis.

    Raises:
        ValueError: walls or solids, or modes that the grid does not have.
    """

    def __init__(self, geometry: Geometry, power: Float[Tensor, "batch 1 1 1 1"], modes: int) -> None:
        grid = geometry.grid
        if not all(grid.periodic) or not geometry.is_empty:
            raise ValueError(f"Expected a periodic box without solids, got {grid.boundaries} or solids in it.")
        if not 1 <= modes < min(grid.shape) / 2:
            raise ValueError(f"Expected forced modes from 1 to below {min(grid.shape) / 2:g}, got {modes}.")
        self.power, self.num_cells = power, grid.num_cells
        k = torch.arange(-modes, modes + 1, dtype=torch.float64)
        k2 = k[:, None, None] ** 2 + k[:, None] ** 2 + k**2
        self.is_forced = ((k2 > 0) & (k2 <= modes**2)).to(power)
        self.bases = [_harmonics(n, k).to(power) for n in grid.shape]

    def __call__(self, u: Float[Tensor, "batch 3 nx ny nz"]) -> Float[Tensor, "batch 3 nx ny nz"]:
        """f at each face [m/s²]."""
        low = u
        for axis in (2, 1, 0):
            low = torch.tensordot(low, self.bases[axis], dims=([axis + 2], [0])).movedim(-1, axis + 2)
        low = low * self.is_forced
        work = low.square().sum((1, 2, 3, 4), keepdim=True) / self.num_cells
        low = low * (self.power / work.clamp(min=torch.finfo(u.dtype).tiny))
        for axis in range(3):
            low = torch.tensordot(low, self.bases[axis], dims=([axis + 2], [1])).movedim(-1, axis + 2)
        return low


def _harmonics(n: int, k: Tensor) -> Float[Tensor, "n modes"]:
    """Orthonormal cosines (k > 0), sines (k < 0) and the constant along an axis of n cells."""
    theta = 2 * math.pi * torch.outer(torch.arange(n, dtype=torch.float64), k) / n
    waves = torch.where(k < 0, theta.sin(), theta.cos())
    return waves / waves.norm(dim=0)


class StirredFlow(NavierStokes):
    """A batch of flows in one periodic box, stirred at its largest scales.

    Args:
        geometry, viscosity: as `NavierStokes` takes them; no walls, no solids.
        power: P [m²/s³], a number or one per trajectory (B,).
        modes: the largest forced mode number k_f.
        options: `dtype`, `compiled` and `device` of `NavierStokes`.
    """

    def __init__(
        self,
        geometry: Geometry,
        viscosity: float | Float[Tensor, " batch"],
        power: float | Float[Tensor, " batch"],
        modes: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(geometry, viscosity, **options)
        self.stirring = Stirring(geometry, self.positive("power [m²/s³]", power), modes)

    def drive(self, fields: Fields, time: float) -> Fields:
        return {"force": self.stirring(fields["velocity"] / self.areas)}


@dataclass(frozen=True)
class Turbulence(Family):
    """A family of statistically stationary homogeneous flows in a box of side 2π m.

    Args:
        viscosity: range of ν [m²/s]. With P = 1 the Kolmogorov scale is ν^¾ and Re_λ about 8/√ν: 45 at 0.03, 80 at
            0.01. Good values keep k_max η = ½ n ν^¾ above 1.
        power: work P of the force, and so the mean dissipation ε [m²/s³].
        modes: the force acts on 0 < |k| ≤ modes, in rad/m.
        disturbance: root-mean-square velocity of the first state [m/s].
        interval: time between frames [s]. A large eddy turns over in about 1 s.
        spin_up: time before the first frame [s].
    """

    name: ClassVar[str] = "turbulence"
    specs: ClassVar[Mapping[str, FieldSpec]] = {VELOCITY.name: VELOCITY}
    parameter_units: ClassVar[Mapping[str, str]] = {"viscosity": "m2/s", "power": "m2/s3"}

    viscosity: Sequence[float] = (0.01, 0.03)
    power: float = 1.0
    modes: int = 2
    disturbance: float = 2.0
    interval: float = 0.2
    spin_up: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("viscosities", self.viscosity, 0, np.inf)
        check_number("power [m²/s³]", self.power, 0)
        check_number("number of forced modes", self.modes, 1, or_equal=True)
        check_number("disturbance [m/s]", self.disturbance, 0)

    def grid(self, shape: Sequence[int]) -> Grid:
        if self.modes >= min(shape) / 2:
            raise ValueError(f"Expected more than {2 * self.modes} cells along each axis, got {tuple(shape)}.")
        return box(shape, (2 * np.pi,) * 3)

    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        return {"viscosity": uniform(self.viscosity, generator(seed, trajectory, 0)), "power": self.power}

    def initial(self, geometry: Geometry | Sphere, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        assert isinstance(geometry, Geometry)
        return {"velocity": broadband(geometry, self.disturbance, -5 / 6, generator(seed, trajectory, 1))}

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
        viscosity, power = (torch.from_numpy(parameters[name]) for name in ("viscosity", "power"))
        return StirredFlow(geometry, viscosity, power, self.modes, dtype=dtype, device=device, compiled=compiled)
