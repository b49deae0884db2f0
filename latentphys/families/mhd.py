"""Magnetohydrodynamics: decaying turbulence of a conducting fluid and its magnetic field in a periodic box.

    ∂u/∂t + ∇·(u u) = −∇p + J × B + ν Δu,     ∇·u = 0
    ∂B/∂t = −∇ × E,     E = −u × B + η J,     J = ∇ × B

B is in Alfvén units, magnetic field over √(μ₀ρ), so that it is a velocity [m/s], its flux is in m³/s and the energy per
unit mass is ½(u² + B²). Both fields are fluxes on faces; J and E live on edges. The flux of B changes by the
circulation of E round each face, whose sum over a cell is zero identically: only rounding makes a divergence.

u × B takes the mean of both neighbours on each edge, and J × B is minus its adjoint, so that what one field loses the
other gains: u·(J × B) summed over faces is −J·(u × B) summed over edges. Where u is solenoidal, ∇·(u u) is ω × u with
the same means, but for a gradient. So the nonlinear terms conserve energy, cross-helicity ⟨u·B⟩ and momentum to
rounding.

References: Liu & Wang, J. Comput. Phys. 174 (2001) for this scheme, MAC–Yee; Evans & Hawley, Astrophys. J. 332 (1988)
for constrained transport; Biskamp, Magnetohydrodynamic Turbulence (2003) for the physics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import exact, operators
from latentphys.families.family import Family, Parameters, box, broadband, check_number, check_range, generator, uniform
from latentphys.families.navier_stokes import STORED_TOLERANCE, Force, NavierStokes
from latentphys.families.solver import Fields
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.sphere import Sphere

MAGNETIC = FieldSpec("magnetic", "flux", "m3/s", "solenoidal")
"""Magnetic field in Alfvén units, B/√(μ₀ρ) [m/s], as its flux through each cell's low faces."""


class Magnetohydrodynamics(NavierStokes):
    """A batch of conducting flows in one periodic box. Its fields are ``velocity`` and ``magnetic``, fluxes [m³/s].

    Args:
        geometry: a periodic box without solids.
        viscosity: kinematic viscosity ν [m²/s], a number or one per trajectory (B,).
        resistivity: magnetic diffusivity η [m²/s], a number or one per trajectory (B,).
        force: body force per unit mass at a time, (B, 3) or (3,) [m/s²]. Default: none.
        dtype, compiled, device: as `NavierStokes` takes them.

    Raises:
        ValueError: walls, open sides or solids; a viscosity or resistivity that is not positive.
    """

    def __init__(
        self,
        geometry: Geometry,
        viscosity: float | Float[Tensor, " batch"],
        resistivity: float | Float[Tensor, " batch"],
        force: Force | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if not all(geometry.grid.periodic) or not geometry.is_empty:
            got = f"sides {geometry.grid.boundaries}" if geometry.is_empty else "solids"
            raise ValueError(f"Expected a periodic box without solids for magnetohydrodynamics, got {got}.")
        super().__init__(geometry, viscosity, force, dtype=dtype, compiled=compiled, device=device)
        self.resistivity = self.positive("resistivity [m²/s]", resistivity)

    def recorded(self, fields: Fields) -> Fields:
        magnetic = exact.conserve(flux=fields["magnetic"], geometry=self.geometry, tol=STORED_TOLERANCE)
        return super().recorded(fields) | {"magnetic": magnetic.cpu()}

    def signal_speed(self, fields: Fields) -> Float[Tensor, "batch 3 nx ny nz"]:
        """|u| + |B|: Alfvén waves travel along the field both ways, at the speed B."""
        return super().signal_speed(fields) + (fields["magnetic"] / self.areas).abs()

    def diffusion_rate(self) -> float:
        return super().diffusion_rate() * max(1.0, float(self.resistivity.amax() / self.viscosity.amax()))

    def rates(self, fields: Fields, drive: Fields) -> Fields:
        rates = super().rates(fields, drive)
        u, b = fields["velocity"] / self.areas, fields["magnetic"] / self.areas
        lorentz, induction = electrodynamics(u, b, self.resistivity, self.geometry.grid.spacing)
        return {"velocity": rates["velocity"] + lorentz * self.areas, "magnetic": induction * self.areas}


def electrodynamics(
    u: Float[Tensor, "batch 3 nx ny nz"],
    b: Float[Tensor, "batch 3 nx ny nz"],
    resistivity: Float[Tensor, "#batch 1 1 1 1"],
    spacing: tuple[float, float, float],
) -> tuple[Float[Tensor, "batch 3 nx ny nz"], Float[Tensor, "batch 3 nx ny nz"]]:
    """J × B [m/s²] and −∇ × E [m/s²] at the faces of a periodic box.

    Args:
        u, b: normal components at the low faces [m/s].
        resistivity: η [m²/s].
        spacing: cell size of each axis [m].
    """
    eta = resistivity[:, 0]
    lorentz: list[Any] = [0.0, 0.0, 0.0]
    induction: list[Any] = [0.0, 0.0, 0.0]
    for c in range(3):
        i, j = (c + 1) % 3, (c + 2) % 3
        on_i, on_j, hi, hj = i - 3, j - 3, spacing[i], spacing[j]
        bi, bj, bi_below, bj_below = b[:, i], b[:, j], b[:, i].roll(1, on_j), b[:, j].roll(1, on_i)
        bi_mean, bj_mean = 0.5 * (bi + bi_below), 0.5 * (bj + bj_below)
        ui_mean, uj_mean = 0.5 * (u[:, i] + u[:, i].roll(1, on_j)), 0.5 * (u[:, j] + u[:, j].roll(1, on_i))
        current = (bj - bj_below) / hi - (bi - bi_below) / hj
        electric = eta * current - ui_mean * bj_mean + uj_mean * bi_mean
        lorentz[i] = lorentz[i] - _mean_of_next(current * bj_mean, on_j)
        lorentz[j] = lorentz[j] + _mean_of_next(current * bi_mean, on_i)
        induction[i] = induction[i] - (electric.roll(-1, on_j) - electric) / hj
        induction[j] = induction[j] + (electric.roll(-1, on_i) - electric) / hi
    return torch.stack(lorentz, dim=1), torch.stack(induction, dim=1)


def _mean_of_next(edges: Tensor, dim: int) -> Tensor:
    return 0.5 * (edges + edges.roll(-1, dim))


@dataclass(frozen=True)
class MHD(Family):
    """A family of decaying magnetohydrodynamic turbulence in a periodic box of side 1 m.

    Args:
        reynolds: range of Re = U L/ν, with U = 1 m/s the root-mean-square of the first velocity and L = 1 m.
        prandtl: range of the magnetic Prandtl number Pm = ν/η, drawn evenly in its logarithm.
        magnetic: range of the root-mean-square of the first magnetic fluctuations [m/s], in units of U.
        mean_field: range of the uniform field |B₀| [m/s], in a random direction of each trajectory; it never changes.
        slope: exponent of the amplitude of the first Fourier modes in |k|.
        interval: time between frames [s].
        spin_up: time before the first frame [s].
    """

    name: ClassVar[str] = "mhd"
    specs: ClassVar[Mapping[str, FieldSpec]] = {VELOCITY.name: VELOCITY, MAGNETIC.name: MAGNETIC}
    parameter_units: ClassVar[Mapping[str, str]] = {"viscosity": "m2/s", "resistivity": "m2/s"}

    reynolds: Sequence[float] = (300.0, 1000.0)
    prandtl: Sequence[float] = (0.5, 2.0)
    magnetic: Sequence[float] = (0.5, 1.5)
    mean_field: Sequence[float] = (0.0, 1.0)
    slope: float = -11 / 6
    interval: float = 0.08
    spin_up: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("Re", self.reynolds, 0, np.inf)
        check_range("Pm", self.prandtl, 0, np.inf)
        check_range("magnetic fluctuations", self.magnetic, 0, np.inf)
        check_number("slope", self.slope)
        low, high = tuple(self.mean_field) if len(self.mean_field) == 2 else (1.0, 0.0)
        if not 0 <= low <= high < np.inf:
            raise ValueError(
                f"Expected a range of mean fields, two numbers with 0 ≤ a ≤ b, got {list(self.mean_field)}."
            )

    def grid(self, shape: Sequence[int]) -> Grid:
        return box(shape)

    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        rng = generator(seed, trajectory, 0)
        viscosity = 1.0 / uniform(self.reynolds, rng)
        prandtl = np.exp(uniform(np.log(self.prandtl).tolist(), rng))
        direction = rng.standard_normal(3)
        return {
            "viscosity": viscosity,
            "resistivity": viscosity / prandtl,
            "magnetic": uniform(self.magnetic, rng),
            "mean_field": uniform(self.mean_field, rng) * direction / np.linalg.norm(direction),
        }

    def initial(self, geometry: Geometry | Sphere, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        assert isinstance(geometry, Geometry)
        rng = generator(seed, trajectory, 1)
        velocity = broadband(geometry, 1.0, self.slope, rng)
        magnetic = broadband(geometry, parameters["magnetic"], self.slope, rng)
        mean = torch.as_tensor(parameters["mean_field"], dtype=torch.float64).reshape(3, 1, 1, 1)
        return {"velocity": velocity, "magnetic": magnetic + operators.flux_of(mean.expand_as(magnetic), geometry.grid)}

    def solver(
        self,
        geometry: Geometry | Sphere,
        parameters: Parameters,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> Magnetohydrodynamics:
        assert isinstance(geometry, Geometry)
        return Magnetohydrodynamics(
            geometry,
            torch.from_numpy(parameters["viscosity"]),
            torch.from_numpy(parameters["resistivity"]),
            dtype=dtype,
            device=device,
            compiled=compiled,
        )

    def recorded(self, parameters: Parameters, times: np.ndarray) -> dict[str, np.ndarray]:
        """The viscosity and the resistivity; the mean field is that of the recorded field."""
        return {name: parameters[name] for name in self.parameter_units}
