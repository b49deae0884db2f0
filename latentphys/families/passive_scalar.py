"""A passive scalar in homogeneous turbulence, fed by a mean gradient.

    ∂c/∂t + ∇·(u c) = D Δc − G u_x

c is what the concentration differs from its mean G x. The gradient keeps the fluctuations alive as the force does the
flow; with G = 0 they are mixed away. In both cases Σ c is conserved, for the mean flow is zero, and its variance obeys
d⟨c²⟩/dt = −2G⟨u_x c⟩ − 2χ with χ = D⟨|∇c|²⟩.

References: Overholt & Pope, Phys. Fluids 8 (1996), the mean gradient; Warhaft, Annu. Rev. Fluid Mech. 32 (2000).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.families.family import Parameters, check_number, check_range, coloured, generator, uniform
from latentphys.families.scalar_transport import ScalarFlow
from latentphys.families.solver import Fields
from latentphys.families.turbulence import Stirring, Turbulence
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.sphere import Sphere

CONCENTRATION = FieldSpec("concentration", "scalar", "kg/m3", "conserved")


def blotches(grid: Grid, rms: float, rng: np.random.Generator) -> Float[Tensor, "nx ny nz"]:
    """A random scalar of zero mean with the same variance in every octave, FP64.

    Args:
        rms: its root mean square.
    """
    values = coloured(rng.standard_normal(grid.shape), -3 / 2)
    return values * (rms / values.square().mean().sqrt())


class StirredScalar(ScalarFlow):
    """A batch of stirred flows in one periodic box, each with a scalar on a mean gradient.

    Args:
        geometry, viscosity, diffusivity: as `ScalarFlow` takes them; no walls, no solids.
        power, modes: of the force, as in `StirredFlow`.
        gradient: G along x [unit/m], a number or one per trajectory (B,).
        options: `scalar`, `dtype`, `compiled` and `device` of `ScalarFlow`.
    """

    def __init__(
        self,
        geometry: Geometry,
        viscosity: float | Float[Tensor, " batch"],
        diffusivity: float | Float[Tensor, " batch"],
        power: float | Float[Tensor, " batch"],
        modes: int = 2,
        gradient: float | Float[Tensor, " batch"] = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(geometry, viscosity, diffusivity, **options)
        self.stirring = Stirring(geometry, self.positive("power [m²/s³]", power), modes)
        self.gradient = torch.as_tensor(gradient, dtype=self.dtype, device=self.device).reshape(-1, 1, 1, 1)

    def drive(self, fields: Fields, time: float) -> Fields:
        return {"force": self.stirring(fields["velocity"] / self.areas)}

    def rates(self, fields: Fields, drive: Fields) -> Fields:
        rates, through = super().rates(fields, drive), fields["velocity"][:, 0]
        u = 0.5 * (through + through.roll(-1, -3)) / self.geometry.grid.face_areas[0]
        return rates | {self.scalar: rates[self.scalar] - self.gradient * u}


@dataclass(frozen=True)
class PassiveScalar(Turbulence):
    """A family of scalars mixed by stationary homogeneous turbulence in a box of side 2π m.

    Args:
        viscosity, power, modes, disturbance: of the flow, as in `Turbulence`.
        schmidt: range of Sc = ν/D. Scales down to η/√Sc have to be resolved.
        gradient: G [kg/m⁴]; 0 lets the scalar decay from its first state.
        scalar_rms: root mean square of the first scalar [kg/m³].
        interval: time between frames [s].
        spin_up: time before the first frame [s].
    """

    name: ClassVar[str] = "passive_scalar"
    specs: ClassVar[Mapping[str, FieldSpec]] = {VELOCITY.name: VELOCITY, CONCENTRATION.name: CONCENTRATION}
    parameter_units: ClassVar[Mapping[str, str]] = {
        "viscosity": "m2/s",
        "power": "m2/s3",
        "diffusivity": "m2/s",
        "gradient": "kg/m4",
    }

    schmidt: Sequence[float] = (0.5, 1.0)
    gradient: float = 1.0
    scalar_rms: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("Sc", self.schmidt, 0, np.inf)
        check_number("mean gradient [kg/m⁴]", self.gradient)
        check_number("root-mean-square [kg/m³] of the scalar", self.scalar_rms, 0, or_equal=True)

    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        parameters = super().draw(seed, trajectory)
        diffusivity = parameters["viscosity"] / uniform(self.schmidt, generator(seed, trajectory, 3))
        return parameters | {"diffusivity": diffusivity, "gradient": self.gradient}

    def initial(self, geometry: Geometry | Sphere, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        assert isinstance(geometry, Geometry)
        scalar = blotches(geometry.grid, self.scalar_rms, generator(seed, trajectory, 4))
        return super().initial(geometry, parameters, seed, trajectory) | {CONCENTRATION.name: scalar}

    def solver(
        self,
        geometry: Geometry | Sphere,
        parameters: Parameters,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> StirredScalar:
        assert isinstance(geometry, Geometry)
        names = ("viscosity", "diffusivity", "power", "gradient")
        viscosity, diffusivity, power, gradient = (torch.from_numpy(parameters[name]) for name in names)
        return StirredScalar(
            geometry,
            viscosity,
            diffusivity,
            power,
            self.modes,
            gradient,
            scalar=CONCENTRATION.name,
            dtype=dtype,
            device=device,
            compiled=compiled,
        )
