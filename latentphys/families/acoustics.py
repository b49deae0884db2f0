"""Linear acoustics in a medium whose sound speed and density vary from place to place.

    ∂p/∂t = −ρ c² ∇·u,     ρ ∂u/∂t = −∇p

The pressure sits in cells, the velocity on faces. Since ρu changes by gradients alone, it is one, ρu = −∇s with the
impulse s = ∫p dt [Pa s], and the solver advances p and s:

    ∂s/∂t = p,     ∂p/∂t = ρ c² ∇·(ρ⁻¹ ∇s)

by Störmer and Verlet's scheme: half a step of s, a step of p, half a step of s. It is time-reversible, of second order,
and conserves, to rounding,

    E = ½ Σ V p²/ρc² + ½ Σ V ρu² − ⅛ Δt² Σ V |∇p|²/ρ.

A plane wave in a uniform medium obeys sin²(ωΔt/2) = (cΔt)² Σ_a sin²(k_a h_a/2) / h_a².

References: Hairer, Lubich & Wanner, Acta Numerica 12 (2003); Virieux, Geophysics 49 (1984), the staggered grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.families.family import (
    Family,
    Parameters,
    all_round,
    box,
    check_number,
    check_range,
    coloured,
    generator,
    uniform,
)
from latentphys.families.solver import Fields, Solver
from latentphys.fields import FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.projection import decompose
from latentphys.sphere import Sphere

CFL = 0.9
"""Δt over the largest stable one, 2 over the largest frequency of the grid."""

GRADIENT_TOLERANCE = 1e-6
"""How much of a given ρu may be no gradient, of its norm."""


class Acoustics(Solver):
    """A batch of sound fields in one box, each with its own solids.

    Its stored fields are ``pressure`` [Pa], ``velocity``, a flux [m³/s], and ``sound_speed`` [m/s], which stays as it
    is. The working state has ``impulse`` s [Pa s] instead of the velocity. Walls of the box and solids are rigid: they
    reflect without loss.

    Args:
        geometry: the box and its solids, ``batch_shape`` () or (B,).
        density: ρ [kg/m³], a number, one per trajectory (B,), or one per cell (B, nx, ny, nz). Across a face it is the
            mean of the two cells.
        dtype: FP32 or FP64. Good value: FP32.
        compiled: fuse the arithmetic with `torch.compile`.

    Raises:
        ValueError: open sides, or a density that is not positive.
    """

    def __init__(
        self,
        geometry: Geometry,
        density: float | Float[Tensor, " batch"] | Float[Tensor, "batch nx ny nz"],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> None:
        super().__init__(dtype, device)
        grid = geometry.grid
        if any(sum(grid.open_sides, ())):
            raise ValueError(f"Expected a box of walls and periodic axes, got {grid.boundaries}; sound cannot leave.")
        self.geometry = geometry.to(device)
        rho = torch.as_tensor(density, dtype=torch.float64, device=device)
        rho = rho if rho.ndim == 4 else rho.reshape(-1, 1, 1, 1)
        if not bool((rho > 0).all()):
            raise ValueError(f"Expected a positive density [kg/m³], got {float(rho.amin())}.")
        open_faces = self.geometry.open_faces.reshape(-1, 3, *grid.shape).double()
        self.density = rho.to(dtype)
        self.mobility = (open_faces / _on_faces(rho)).to(dtype)
        """1/ρ on the open faces, 0 on the closed ones [m³/kg]."""
        self.fluid = self.geometry.fluid.reshape(-1, *grid.shape)
        self._update = torch.compile(self._pressure_rate, dynamic=False) if compiled else self._pressure_rate

    def working(self, fields: Fields) -> Fields:
        """The working state; an unknown constant of s stays unknown, for nothing depends on it.

        Raises:
            ValueError: a ρu that is no gradient, which no sound from rest can make, or a sound speed that is not
                positive.
        """
        if not bool((fields["sound_speed"] > 0).all()):
            raise ValueError(f"Expected a positive sound speed [m/s], got {float(fields['sound_speed'].amin())}.")
        flux = fields["velocity"].to(self.device).double()
        rho = _on_faces(self.density.double())
        momentum = self.geometry.mask(rho * flux)
        rest, potential, _ = decompose(momentum, self.geometry)
        if bool(_norm(rest).gt(GRADIENT_TOLERANCE * _norm(momentum)).any()):
            raise ValueError(
                "Expected a velocity whose momentum ρu is a gradient, got one with a rotational part; sound never "
                "changes that part, so leave it out."
            )
        pressure = torch.where(self.fluid, fields["pressure"].to(self.device), 0.0)
        return super().working(
            {"pressure": pressure, "impulse": -potential, "sound_speed": fields["sound_speed"].contiguous()}
        )

    def recorded(self, fields: Fields) -> Fields:
        """Pressure, velocity and sound speed in FP64; ρu is the gradient of an impulse to FP64's rounding."""
        impulse = fields["impulse"].double()
        conductance = self.geometry.grid.per_face(self.geometry.grid.conductances, impulse)
        mobility = self.geometry.open_faces / _on_faces(self.density.double())
        flux = -operators.grad(impulse, self.geometry.grid) * conductance * mobility
        rest = {name: value for name, value in fields.items() if name != "impulse"}
        return super().recorded(rest | {"velocity": flux})

    def stable_step(self, fields: Fields) -> float:
        """CFL of the largest stable Δt [s] of the whole batch, 2/ω, with Gershgorin's bound of the frequency ω."""
        at_faces = torch.zeros((), dtype=self.dtype, device=self.device)
        for axis, h in enumerate(self.geometry.grid.spacing):
            low = self.mobility.select(-4, axis)
            at_faces = at_faces + 2 / h**2 * (low + operators.shift(low, axis, 1, self.geometry.grid))
        squared = float((self._stiffness(fields) * at_faces).amax())
        return CFL * 2 / math.sqrt(max(squared, 1e-300))

    @torch.no_grad()
    def step(self, fields: Fields, time: float, dt: float) -> Fields:
        whole = torch.tensor(dt, dtype=self.dtype, device=self.device)
        return fields | self._update(fields["pressure"], fields["impulse"], self._stiffness(fields), whole)

    def _stiffness(self, fields: Fields) -> Tensor:
        """The bulk modulus ρ c² [Pa]."""
        return self.density * fields["sound_speed"].square()

    def _pressure_rate(self, pressure: Tensor, impulse: Tensor, stiffness: Tensor, dt: Tensor) -> Fields:
        grid = self.geometry.grid
        impulse = impulse + 0.5 * dt * pressure
        force = operators.grad(impulse, grid) * self.mobility * grid.per_face(grid.conductances, impulse)
        pressure = pressure + dt / grid.cell_volume * stiffness * operators.div(force, grid)
        return {"pressure": pressure, "impulse": impulse + 0.5 * dt * pressure}

    def energy(self, fields: Fields, dt: float = 0.0) -> Float[Tensor, " batch"]:
        """Acoustic energy of a working state [J], FP64; with Δt, that which steps of this length conserve."""
        grid = self.geometry.grid
        pressure, impulse = fields["pressure"].double(), fields["impulse"].double()
        areas_over_h = grid.per_face(grid.conductances, impulse)
        mobility = self.mobility.double() * areas_over_h

        def squared_gradient(scalar: Tensor) -> Tensor:
            return (mobility * operators.grad(scalar, grid).square()).sum((-4, -3, -2, -1))

        potential = (pressure.square() / self._stiffness(fields).double()).sum((-3, -2, -1)) * grid.cell_volume
        return 0.5 * potential + 0.5 * squared_gradient(impulse) - dt**2 / 8 * squared_gradient(pressure)


def _norm(flux: Tensor) -> Tensor:
    return flux.square().sum((-4, -3, -2, -1)).sqrt()


def _on_faces(rho: Float[Tensor, "batch nx ny nz"]) -> Float[Tensor, "batch 3 nx ny nz"]:
    """Mean density of the two cells of each low face; on a wall of the box, where nothing moves, of any two."""
    return torch.stack([0.5 * (rho + rho.roll(1, axis - 3)) for axis in range(3)], dim=-4)


@dataclass(frozen=True)
class AcousticScattering(Family):
    """A family of sound fields in smoothly varying media of uniform density, scattered by rigid balls.

    Lengths are in units of the box, times in units of the time that sound takes to cross it.

    Args:
        contrast: range of the standard deviation of ln c, the logarithm of the sound speed; its mean is 0.
        density: range of the density ρ [kg/m³].
        scatterers: largest number of rigid balls; each trajectory has from none to this many.
        diameter: range of their diameter [m], in a box of side 1 m.
        pressure: root-mean-square of the first pressure [Pa].
        sides: ``periodic``, or ``closed``: rigid walls all round.
        interval: time between frames [s].
        spin_up: time before the first frame [s].
    """

    name: ClassVar[str] = "acoustics"
    specs: ClassVar[Mapping[str, FieldSpec]] = {
        "pressure": FieldSpec("pressure", "scalar", "Pa"),
        "velocity": FieldSpec("velocity", "flux", "m3/s", "irrotational"),
        "sound_speed": FieldSpec("sound_speed", "scalar", "m/s", "positive"),
    }
    parameter_units: ClassVar[Mapping[str, str]] = {"density": "kg/m3"}

    contrast: Sequence[float] = (0.05, 0.25)
    density: Sequence[float] = (0.5, 2.0)
    scatterers: int = 3
    diameter: Sequence[float] = (0.15, 0.3)
    pressure: float = 1.0
    sides: Literal["periodic", "closed"] = "periodic"
    interval: float = 0.05
    spin_up: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("contrasts", self.contrast, 0, 1)
        check_range("densities", self.density, 0, np.inf)
        check_range("diameters", self.diameter, 0, 0.5)
        check_number("number of scatterers", self.scatterers, 0, or_equal=True)
        check_number("pressure [Pa]", self.pressure, 0)
        all_round(self.sides)

    def grid(self, shape: Sequence[int]) -> Grid:
        return box(shape, boundaries=all_round(self.sides))

    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        rng = generator(seed, trajectory, 0)
        return {"density": uniform(self.density, rng), "contrast": uniform(self.contrast, rng)}

    def solid(self, grid: Grid, parameters: Mapping[str, Any], seed: int, trajectory: int) -> np.ndarray | None:
        """Balls at random places; they may overlap, and go on beyond a side where the box is periodic."""
        if self.scatterers == 0:
            return None
        rng = generator(seed, trajectory, 2)
        solid = np.zeros(grid.shape, dtype=bool)
        middles = np.meshgrid(*((np.arange(n) + 0.5) / n for n in grid.shape), indexing="ij")
        for _ in range(rng.integers(self.scatterers + 1)):
            centre, radius = rng.random(3), uniform(self.diameter, rng) / 2
            away = [np.abs(x - c) for x, c in zip(middles, centre, strict=True)]
            if self.sides == "periodic":
                away = [np.minimum(d, 1 - d) for d in away]
            solid |= sum(d**2 for d in away) < radius**2
        return solid

    def initial(self, geometry: Geometry | Sphere, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        """Pressure at every scale, in a medium at rest of larger ones; the mean compression is zero."""
        assert isinstance(geometry, Geometry)
        grid = geometry.grid
        medium = coloured(generator(seed, trajectory, 3).standard_normal(grid.shape), -3.0)
        c = (parameters["contrast"] * medium / medium.std()).clamp(-1.0, 1.0).exp()
        p = coloured(generator(seed, trajectory, 1).standard_normal(grid.shape), -2.5)
        weight = geometry.fluid / c.square()
        p = torch.where(geometry.fluid, p - (weight * p).sum() / weight.sum(), 0.0)
        p = p * (self.pressure / p[geometry.fluid].square().mean().sqrt())
        return {"pressure": p, "velocity": torch.zeros(3, *grid.shape, dtype=torch.float64), "sound_speed": c}

    def solver(
        self,
        geometry: Geometry | Sphere,
        parameters: Parameters,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> Acoustics:
        assert isinstance(geometry, Geometry)
        density = torch.from_numpy(parameters["density"])
        return Acoustics(geometry, density, dtype=dtype, device=device, compiled=compiled)

    def recorded(self, parameters: Parameters, times: np.ndarray) -> dict[str, np.ndarray]:
        """The density; the medium is the field ``sound_speed``."""
        return {"density": parameters["density"]}
