"""A scalar on the staggered complex, carried by a flux and spread by diffusion, and the flow that carries it.

    ∂c/∂t + ∇·(u c) = D Δc

Second order in space in flux form: through the open face between the cells c₋ and c goes

    J = F (c₋ + c)/2 − D (A/h) (c − c₋),

so that Σ c changes through walls alone and, where F is discretely solenoidal, advection conserves Σ c² too. Walls and
solids are insulated; on a wall of the box the scalar may be given instead, half a cell from the first cell:
J = D (A/½h) (c_wall − c) into it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.families.navier_stokes import Force, NavierStokes
from latentphys.families.solver import Fields
from latentphys.grid import SIDES, Geometry

GROWTH = 8
"""How far a scalar may grow beyond its first largest value with its total still exact."""


class ScalarTransport:
    """The rate of change of a scalar in cells.

    Args:
        geometry: the box and its solids, ``batch_shape`` () or (B,).
        diffusivity: D [m²/s], (B, 1, 1, 1); its dtype and device are those of the scalar.
        walls: value of the scalar on some walls, by the side's name (``x-``, ``x+``, … ``z+``). The others are
            insulated.

    Raises:
        ValueError: a value on a side that is no wall, or none that is finite.
    """

    def __init__(
        self, geometry: Geometry, diffusivity: Float[Tensor, "batch 1 1 1"], walls: Mapping[str, float] | None = None
    ) -> None:
        grid = geometry.grid
        names = sum(grid.boundaries, ())
        is_wall = {side: name in ("no_slip", "free_slip") for side, name in zip(SIDES, names, strict=True)}
        self.grid, self.diffusivity = grid, diffusivity
        self.open_faces = geometry.open_faces.to(diffusivity)
        fluid = geometry.fluid.to(diffusivity)
        self.exchange, self.supply = torch.zeros_like(fluid), torch.zeros_like(fluid)
        for side, value in (walls or {}).items():
            if not is_wall.get(side, False):
                found = " | ".join(side for side in SIDES if is_wall[side]) or "no side at all"
                raise ValueError(f"Expected the value of a scalar on a wall ({found}), got one for {side!r}.")
            if not math.isfinite(value):
                raise ValueError(f"Expected a finite value of the scalar on {side}, got {value}.")
            axis, index = SIDES.index(side) // 2, -(SIDES.index(side) % 2)
            to_wall = 2 / grid.spacing[axis] ** 2 * fluid.select(axis - 3, index)
            self.exchange.select(axis - 3, index).add_(to_wall)
            self.supply.select(axis - 3, index).add_(value * to_wall)
        self.is_insulated = not walls

    def rate(
        self, scalar: Float[Tensor, "batch nx ny nz"], flux: Float[Tensor, "batch 3 nx ny nz"]
    ) -> Float[Tensor, "batch nx ny nz"]:
        """∂c/∂t [unit/s] of a scalar that a flux [m³/s] carries; 0 in solids."""
        net = torch.zeros_like(scalar)
        for axis, conductance in enumerate(self.grid.conductances):
            below = scalar.roll(1, axis - 3)
            through = flux[:, axis] * (0.5 * (below + scalar)) - self.diffusivity * conductance * (scalar - below)
            through = through * self.open_faces.select(-4, axis)
            net = net + through - through.roll(-1, axis - 3)
        rate = net / self.grid.cell_volume
        if self.is_insulated:
            return rate
        return rate + self.diffusivity * (self.supply - self.exchange * scalar)

    def diffusion_rate(self) -> float:
        """The fastest rate at which the scalar diffuses away [1/s]."""
        wide = [h for h, n in zip(self.grid.spacing, self.grid.shape, strict=True) if n > 1]
        return float(self.diffusivity.amax()) * sum(4 / h**2 for h in wide)


@dataclass(frozen=True)
class Total:
    """The sum of a scalar over the fluid, kept in every bit.

    FP64 multiples of one power of two have an exact sum in any order while it stays below 2⁵³ of it. Values are rounded
    to such multiples, and what their sum is then off is given to all fluid cells alike, the remainder to the first.

    Args:
        units: the sum, in quanta; a whole number.
        quantum: the power of two.
    """

    units: Float[Tensor, "batch 1 1 1"]
    quantum: Float[Tensor, "batch 1 1 1"]

    @classmethod
    def of(cls, values: Float[Tensor, "batch nx ny nz"]) -> Total:
        """The total of a scalar, FP64."""
        largest = values.abs().amax((-3, -2, -1), keepdim=True)
        bits = 52 - math.ceil(math.log2(GROWTH * values[0].numel()))
        exponent = torch.frexp(torch.where(largest == 0, 1.0, largest)).exponent - bits
        quantum = torch.ldexp(torch.ones_like(largest), exponent)
        return cls((values / quantum).round().sum((-3, -2, -1), keepdim=True), quantum)

    def kept(self, values: Float[Tensor, "batch nx ny nz"], geometry: Geometry) -> Float[Tensor, "batch nx ny nz"]:
        """The nearest values with this total, FP64, as multiples of the quantum."""
        units = (values.double() / self.quantum).round()
        fluid = geometry.fluid.to(values.device).expand(values.shape)
        missing = self.units - units.sum((-3, -2, -1), keepdim=True)
        each = torch.div(missing, fluid.sum((-3, -2, -1), keepdim=True), rounding_mode="floor")
        left = missing - each * fluid.sum((-3, -2, -1), keepdim=True)
        is_first = fluid.flatten(1).cumsum(1).reshape(fluid.shape) <= left
        return (units + fluid * (each + is_first)) * self.quantum


class ScalarFlow(NavierStokes):
    """A batch of flows, each with a scalar that it carries. Its fields are ``velocity`` and the scalar.

    Args:
        geometry, viscosity, force: as `NavierStokes` takes them.
        diffusivity: D [m²/s], a number or one per trajectory (B,).
        scalar: name of the scalar field.
        walls: value of the scalar on some walls, by the side's name. Without any, the total of the scalar is conserved,
            and recorded states have it in every bit.
        options: `dtype`, `compiled`, `tol` and `device` of `NavierStokes`.
    """

    def __init__(
        self,
        geometry: Geometry,
        viscosity: float | Float[Tensor, " batch"],
        diffusivity: float | Float[Tensor, " batch"],
        force: Force | None = None,
        *,
        scalar: str = "scalar",
        walls: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(geometry, viscosity, force, **options)
        self.scalar = scalar
        self.transport = ScalarTransport(self.geometry, self.positive("diffusivity [m²/s]", diffusivity)[:, 0], walls)
        self.total: Total | None = None

    def working(self, fields: Fields) -> Fields:
        if self.transport.is_insulated:
            self.total = Total.of(fields[self.scalar].double().to(self.device))
        return super().working(fields)

    def recorded(self, fields: Fields) -> Fields:
        recorded = super().recorded(fields)
        if self.total is not None:
            recorded[self.scalar] = self.total.kept(fields[self.scalar], self.geometry).cpu()
        return recorded

    def memory(self) -> Fields:
        memory = super().memory()
        return memory if self.total is None else memory | {"units": self.total.units, "quantum": self.total.quantum}

    def remember(self, memory: Fields) -> None:
        super().remember(memory)
        if "units" in memory:
            self.total = Total(memory["units"].to(self.device), memory["quantum"].to(self.device))

    def diffusion_rate(self) -> float:
        return max(super().diffusion_rate(), self.transport.diffusion_rate())

    def rates(self, fields: Fields, drive: Fields) -> Fields:
        return super().rates(fields, drive) | {
            self.scalar: self.transport.rate(fields[self.scalar], fields["velocity"])
        }
