"""Flows in and out through the sides of a box: prescribed inflow, and what passes through every open side."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.grid import SIDES, Geometry, per_geometry
from latentphys.pressure import solve, subtract_gradient
from latentphys.topology import regions

NOTHING = 1e-13
"""What is left of an inflow that has nowhere to go, relative to it, counts as rounding."""


@per_geometry
@torch.no_grad()
def inflow_flux(geometry: Geometry) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """The solenoidal flux of least energy [m³/s] with the geometry's prescribed inflow, in FP64; zero without one.

    What flows in leaves through the open sides. Into a pore space that has none nothing can flow on balance: there the
    inflow is lowered by the same velocity on every face of it.
    """
    flux = geometry.fluid.new_zeros((*geometry.batch_shape, 3, *geometry.grid.shape), dtype=torch.float64)
    size = torch.zeros_like(flux[..., :1, :, :, :])
    for side, values in _balanced_inflow(geometry).items():
        axis, high = divmod(SIDES.index(side), 2)
        size.select(axis - 3, -high).add_(values.abs().unsqueeze(-3))
        if not high:
            flux.select(-4, axis).select(axis - 3, 0).copy_(values)
    net = operators.stored_div(flux, geometry.grid) + prescribed_outflow(geometry)
    potential = solve(net, size, geometry, tol=1e-13)[0]
    subtract_gradient(flux, potential, geometry)
    return flux


@per_geometry
def prescribed_outflow(geometry: Geometry) -> Float[Tensor, "*batch nx ny nz"]:
    """What the prescribed inflow through high sides, which no array stores, adds to the net of each cell [m³/s]."""
    net = geometry.fluid.new_zeros((*geometry.batch_shape, *geometry.grid.shape), dtype=torch.float64)
    for side, values in _balanced_inflow(geometry).items():
        axis, high = divmod(SIDES.index(side), 2)
        if high:
            net.select(axis - 3, -1).sub_(values)
    return net


@per_geometry
def _balanced_inflow(geometry: Geometry) -> dict[str, Float[Tensor, "*batch n m"]]:
    """Flux into the box through each cell's face on the sides with a prescribed inflow [m³/s].

    Over every pore space that has no opening it is lowered, by the same velocity on every face, to zero in total.
    """
    if not geometry.inflow:
        return {}
    fluid, label = geometry.fluid.double(), regions(geometry) + 1
    zeros = fluid.new_zeros((*geometry.batch_shape, int(label.max()) + 1))
    area, opening = zeros.clone(), zeros.clone()
    inward, beside, faces = {}, {}, {}
    for side, end in zip(SIDES, sum(geometry.ends, ()), strict=True):
        axis, high = divmod(SIDES.index(side), 2)
        beside[side] = label.select(axis - 3, -high)
        faces[side] = fluid.select(axis - 3, -high) * geometry.grid.face_areas[axis]
        if side in geometry.inflow:
            velocity = torch.as_tensor(geometry.inflow[side], dtype=torch.float64, device=fluid.device)
            inward[side] = velocity * faces[side]
            area.scatter_add_(-1, beside[side].flatten(-2), faces[side].flatten(-2))
        elif end == "open":
            opening.scatter_add_(-1, beside[side].flatten(-2), faces[side].flatten(-2))

    def sums(values: dict[str, Tensor]) -> Tensor:
        """Per pore space."""
        total = zeros.clone()
        for side, inflow in values.items():
            total.scatter_add_(-1, beside[side].flatten(-2), inflow.flatten(-2))
        return total

    def at(side: str, per_region: Tensor) -> Tensor:
        return per_region.gather(-1, beside[side].flatten(-2)).reshape(faces[side].shape)

    given, is_dead_end = sums({s: v.abs() for s, v in inward.items()}), (opening == 0) & (area > 0)
    for _ in range(2):  # the second time takes off what rounding left of large inflows
        excess = torch.where(is_dead_end, sums(inward) / area, 0.0)
        inward = {s: v - faces[s] * at(s, excess) for s, v in inward.items()}
    is_rounding = is_dead_end & (sums({s: v.abs() for s, v in inward.items()}) <= NOTHING * given)
    return {s: torch.where(at(s, is_rounding), 0.0, v) for s, v in inward.items()}


def through_sides(
    flux: Float[Tensor, "*batch 3 nx ny nz"], geometry: Geometry
) -> dict[str, Float[Tensor, "*batch n m"]]:
    """Flux through each face of the inflow and outflow sides of a box, along the axis [m³/s], by the side's name.

    A prescribed inflow through a high side is what the geometry says; the other high sides carry what then closes the
    balance of their cells, shared as in `operators.high_faces`.
    """
    grid, given = geometry.grid, prescribed_outflow(geometry).to(flux)
    left = -(operators.stored_div(flux, grid) + given)
    sinks = torch.zeros_like(left)
    metric = grid.conductances
    for axis, (_, high) in enumerate(geometry.ends):
        if high == "open":
            sinks.select(axis - 3, -1).add_(metric[axis])
    inward = _balanced_inflow(geometry)
    sides = {}
    for axis, (has_low, has_high) in enumerate(grid.open_sides):
        if has_low:
            sides[SIDES[2 * axis]] = flux.select(-4, axis).select(axis - 3, 0)
        if (side := SIDES[2 * axis + 1]) in inward:
            sides[side] = -inward[side].to(flux).expand(left.select(axis - 3, -1).shape)
        elif has_high:
            sides[side] = left.select(axis - 3, -1) * (metric[axis] / sinks.select(axis - 3, -1))
    return sides
