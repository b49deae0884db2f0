"""Fluxes whose net per cell is 0.0, bit for bit, in FP64.

A sum of FP64 numbers that are all multiples of one power of two q, and stay below 2⁵³ q, has no rounding error in any
order. So the last step of every conservative decode is fixed-point: fluxes become integers (multiples of q = 2⁻⁴⁶ of
the power of two above the largest), the small integer that each cell's balance is then off is carried along a spanning
tree of the pore space to its root, where it meets the integers of all other cells and cancels: over a connected region
closed by walls and solids, the balances of the cells sum to zero identically. The correction of a face is the sum over
the subtree that hangs on it, a few units of q for most faces.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.grid import SIDES, Geometry
from latentphys.hodge import vector_potential
from latentphys.inflow import inflow_flux, prescribed_outflow
from latentphys.projection import decompose
from latentphys.topology import spanning_forests

FLUX_BITS = 46
"""Resolution of the fixed point: q is 2⁻⁴⁶ of the power of two above the sample's largest flux."""

SINGLE_BITS = 21
"""The same for FP32: six integers of 21 bits add up to less than 2²⁴."""

LARGEST_SINGLE = 2**24 // 6

SMALLEST_EXPONENT, SMALLEST_SINGLE_EXPONENT = -1074, -149
"""Exponents of the smallest FP64 and FP32 numbers above zero."""


class Conserved(NamedTuple):
    """A conservative flux, and how far the last, fixed-point step moved it."""

    flux: Float[Tensor, "*batch 3 nx ny nz"]
    correction: float
    """Largest change of a face against the FP64 projection, relative to the largest open-face or inlet flux given."""


def conserve(
    *,
    geometry: Geometry,
    flux: Float[Tensor, "*batch 3 nx ny nz"] | None = None,
    potential: Float[Tensor, "*batch 3 nx ny nz"] | None = None,
    harmonic: Float[Tensor, "*batch 3"] | None = None,
    tol: float = 1e-13,
) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """The FP64 flux nearest to the one given with net 0.0 in every cell and 0.0 through every wall and solid face.

    Args:
        geometry: the box and its solids, batched or not.
        flux: any flux through the low faces [m³/s], or
        potential: a vector potential on the low edges, ∫A·dl [m³/s], of which the curl is taken.
        harmonic: with a potential, the uniform flux [m³/s] through every face of each axis that is periodic or open at
            both ends.
        tol: net flux that the projection before the fixed-point step may leave, ‖net‖₂ / ‖flux‖₂, in voxel geometry.
            A looser one makes the correction larger, never the result less exact.

    Returns:
        FP64 flux F with ``operators.div(F, grid) == 0.0`` everywhere, exactly, on the device of the input.

    Raises:
        ValueError: both or neither of flux and potential, a shape other than the grid's, a batch other than the
            geometry's, non-finite numbers, or numbers near the end of FP64's range.
        ConvergenceError: the projection before the fixed-point step did not reach its tolerance.
    """
    return conserve_report(geometry=geometry, flux=flux, potential=potential, harmonic=harmonic, tol=tol).flux


@torch.no_grad()
def conserve_report(
    *,
    geometry: Geometry,
    flux: Tensor | None = None,
    potential: Tensor | None = None,
    harmonic: Tensor | None = None,
    tol: float = 1e-13,
) -> Conserved:
    """`conserve`, and the size of its correction."""
    flux = _given_flux(flux, potential, harmonic, geometry)
    solenoidal = decompose(flux, geometry, tol=0.0, floor=tol).solenoidal
    _in_range(solenoidal)
    result = _on_grid_of(_quantum(solenoidal, geometry), solenoidal, geometry)
    size = _largest(geometry.mask(flux))
    if geometry.inflow:
        for given in (inflow_flux(geometry), prescribed_outflow(geometry).unsqueeze(-4)):
            size = torch.maximum(size, _largest(given).to(size))
    change = _largest(result - solenoidal)
    return Conserved(result, float(torch.where(size > 0, change / size, 0.0).amax()))


@torch.no_grad()
def quantise(
    *,
    geometry: Geometry,
    flux: Float[Tensor, "*batch 3 nx ny nz"] | None = None,
    potential: Float[Tensor, "*batch 3 nx ny nz"] | None = None,
    harmonic: Float[Tensor, "*batch 3"] | None = None,
) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """The same in FP32, for storage: net 0.0 in every cell of an empty box, added up in FP32 in any order.

    The solenoidal flux is written as the curl of a vector potential, whose integers of 2⁻²¹ of the power of two above
    the largest flux make integer fluxes: each face is within 2.4e-6 of the largest, four roundings of the potential and
    one of the uniform flow. A box with inflow or outflow has no such potential: there the nets of rounded fluxes leave
    along an axis as in `conserve`, and a face may be off by the six roundings of each cell on its line.

    Args:
        geometry: a box without solids.
        flux, potential, harmonic: as in `conserve`.

    Raises:
        ValueError: solids in the box, whose trees carry more than FP32's 24 bits hold; fluxes beyond FP32's range; and
            what `conserve` refuses.
    """
    if not geometry.is_empty:
        raise ValueError("Expected a box without solids, got voxels; store what `conserve` returns in FP64 instead.")
    flux = _given_flux(flux, potential, harmonic, geometry)
    flux = decompose(flux, geometry).solenoidal
    _in_range(flux)
    largest = _largest(flux)
    if float(largest.amax()) > torch.finfo(torch.float32).max / 2:
        raise ValueError(f"Expected fluxes within FP32's range, got {float(largest.amax()):.1e}; scale them first.")
    quantum = _power_of_two(torch.frexp(largest).exponent - SINGLE_BITS, smallest=SMALLEST_SINGLE_EXPONENT)
    if any(sum(geometry.grid.open_sides, ())):
        # Long lines of roundings that add up ask for a coarser quantum.
        while True:
            result = _on_grid_of(quantum, flux, geometry)
            if bool(((result / quantum).abs() <= LARGEST_SINGLE).all()):
                return result.float()
            quantum = 2 * quantum
    edges, uniform = vector_potential(flux, geometry)
    uniform = (uniform[..., None, None, None] / quantum).round()
    return ((operators.curl((edges / quantum).round(), geometry.grid) + uniform) * quantum).float()


def _given_flux(flux: Tensor | None, potential: Tensor | None, harmonic: Tensor | None, geometry: Geometry) -> Tensor:
    """The FP64 flux that a flux, or a potential with or without a harmonic part, stands for."""
    if (flux is None) == (potential is None):
        raise ValueError("Expected either a flux or a potential, got " + ("neither." if flux is None else "both."))
    if harmonic is not None and potential is None:
        raise ValueError("Expected a harmonic part beside a potential, got it beside a flux, which has its own.")
    if potential is not None:
        flux = operators.curl(_finite(potential.double(), "potential"), geometry.grid)
        if harmonic is not None:
            through = torch.tensor(geometry.grid.through, device=flux.device)
            flux = flux + (_finite(harmonic.double(), "harmonic part") * through)[..., None, None, None]
    assert flux is not None
    return _finite(flux.double(), "flux")


def _in_range(solenoidal: Tensor) -> None:
    if not bool(torch.isfinite(solenoidal).all()):
        raise ValueError("Expected fluxes whose sums stay within FP64's range, got an overflow; scale them first.")


def _finite(x: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"Expected a finite {name}, got {bad} NaN or infinite values among {x.numel()}.")
    return x


def _quantum(flux: Tensor, geometry: Geometry) -> Float[Tensor, "*batch 1 1 1 1"]:
    """The power of two of which a sample's fluxes become multiples.

    No branch of the tree carries more than Σ|net|. Where that is far above the largest flux (the projection has left
    little but its own residual) it sets the power, so that no integer passes 2⁵³.
    """
    outflow = prescribed_outflow(geometry).to(flux.device)
    largest = torch.maximum(_largest(flux), _largest(outflow.unsqueeze(-4)))
    carried = _net(flux, outflow, geometry).abs().sum((-3, -2, -1))[..., None, None, None, None]
    largest = torch.maximum(largest, carried / 8)
    return _power_of_two(torch.frexp(largest).exponent - FLUX_BITS, smallest=SMALLEST_EXPONENT)


def _largest(flux: Tensor) -> Float[Tensor, "*batch 1 1 1 1"]:
    return flux.abs().amax((-4, -3, -2, -1), keepdim=True)


def _power_of_two(exponent: Tensor, smallest: int) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent.clamp(min=smallest))


def _on_grid_of(quantum: Tensor, flux: Tensor, geometry: Geometry) -> Tensor:
    """A flux in multiples of a quantum, with net 0.0."""
    outflow = prescribed_outflow(geometry).to(flux.device) / quantum.squeeze(-4)
    units = (flux / quantum).round().to(torch.int64)
    return _balance(units, outflow.round().to(torch.int64), geometry).double() * quantum


def _net(flux: Tensor, outflow: Tensor, geometry: Geometry) -> Tensor:
    """What is left in each cell: `operators.div`, and what a prescribed inflow says of the last cells before it."""
    net = operators.stored_div(flux, geometry.grid) + outflow
    return operators.zero_last_cells(net, [high == "open" for _, high in geometry.ends])


def _balance(units: Tensor, outflow: Tensor, geometry: Geometry) -> Tensor:
    """Integer fluxes with the net of every cell carried away along a tree of open faces."""
    net = _net(units, outflow, geometry)
    if geometry.is_empty:
        return _balance_box(units, net, geometry)
    shape, num_cells = units.shape, geometry.grid.num_cells
    flat, net = units.reshape(-1, 3 * num_cells).clone(), net.reshape(-1, num_cells)
    samples = torch.arange(flat.shape[0]).reshape(shape[:-4])
    trees = torch.arange(math.prod(geometry.batch_shape)).reshape(geometry.batch_shape)
    which = trees.expand(samples.shape).flatten()
    for tree, forest in enumerate(spanning_forests(geometry)):
        rows = (which == tree).nonzero().flatten().to(units.device)
        flat[rows] = forest.carry(flat[rows], net[rows])
    return flat.reshape(shape)


def _balance_box(units: Tensor, net: Tensor, geometry: Geometry) -> Tensor:
    """The empty box's tree in closed form.

    Out through the open end of one axis; without one, along x, then along y in the last plane, then along z in the last
    row, and what an inflow rounded to integers leaves in the last cell back along a line to its side.
    """
    units = units.clone()
    for axis, (low, high) in enumerate(geometry.ends):
        dim, faces = axis - 3, units.select(-4, axis)
        if high == "open":
            faces.narrow(dim, 1, faces.shape[dim] - 1).sub_(net.cumsum(dim).narrow(dim, 0, faces.shape[dim] - 1))
            return units
        if low == "open":
            faces.add_(net.flip(dim).cumsum(dim).flip(dim))
            return units
    net = net.cumsum(-3)
    units[..., 0, 1:, :, :] -= net[..., :-1, :, :]
    net = net[..., -1, :, :].cumsum(-2)
    units[..., 1, -1, 1:, :] -= net[..., :-1, :]
    net = net[..., -1, :].cumsum(-1)
    units[..., 2, -1, -1, 1:] -= net[..., :-1]
    left = net[..., -1:]
    inlets = [SIDES.index(side) for side in geometry.inflow]
    if inlets and not any(side % 2 for side in inlets):
        axis = inlets[0] // 2
        line = units.select(-4, axis).movedim(axis - 3, -1)[..., -1, -1, :]
        line += left
    return units
