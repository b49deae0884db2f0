"""The Helmholtz–Hodge decomposition of a flux, the vector potential of its curl part, and the isometric curl.

    F = curl A + harmonic + C M G φ

- the **gradient** part C M G φ is what `projection` removes;
- the **harmonic** part carries the net flows that a geometry has room for: between its open sides in a pore space that
  has some, along the periodic axes round which it winds in any other. It is curl-free and divergence-free, and as large
  a space as `topology.harmonic_dimension` says;
- the **curl** part is the rest. It carries none of these flows, so it is the curl of a potential over the whole box.
  That need not vanish in the solid, and must not: flow through a throat that a solid encircles is of this part.

The three are orthogonal in the inner product of kinetic energy, Σ F·H / C over the faces.

Reference: Arnold, Falk & Winther, Acta Numerica 15 (2006), for the complex; Cappell, DeTurck, Gluck & Miller, Forum
Math. 18 (2006), for the boundary.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.grid import Geometry, Grid, per_geometry
from latentphys.pressure import face_conductance, side_conductance, solve, subtract_gradient
from latentphys.projection import decompose
from latentphys.separable import Separable
from latentphys.topology import regions, spanning_forests


class Hodge(NamedTuple):
    """The three parts of a flux [m³/s]; they add up to it on the free faces."""

    curl: Float[Tensor, "*batch 3 nx ny nz"]
    harmonic: Float[Tensor, "*batch 3 nx ny nz"]
    gradient: Float[Tensor, "*batch 3 nx ny nz"]


class Potential(NamedTuple):
    """A vector potential and the uniform flux beside it; `exact.conserve` takes both."""

    potential: Float[Tensor, "*batch 3 nx ny nz"]
    """∫A·dl along each low edge [m³/s]."""
    harmonic: Float[Tensor, "*batch 3"]
    """Uniform flux through every face of each periodic axis [m³/s]."""


@torch.no_grad()
def hodge(flux: Float[Tensor, "*batch 3 nx ny nz"], geometry: Geometry, tol: float | None = None) -> Hodge:
    """Split a flux into its curl, harmonic and gradient parts.

    Args:
        flux: any flux [m³/s], FP32 or FP64. Faces of walls, solids and prescribed inflows do not count; take
            `inflow.inflow_flux` off first where there is an inflow.
        geometry: the box and its solids, batched or not.
        tol: relative residual of the projection round solids, to which the parts are orthogonal. Default 1e-6 (FP32),
            1e-13 (FP64).

    Raises:
        ValueError: as `project`.
        ConvergenceError: as `project`.
    """
    if geometry.inflow:
        raise ValueError(
            "Expected a geometry without a prescribed inflow, got one; subtract inflow.inflow_flux(geometry) from "
            "the flux and make those sides walls."
        )
    tol = {torch.float32: 1e-6, torch.float64: 1e-13}.get(flux.dtype) if tol is None else tol
    solenoidal = decompose(flux, geometry, tol).solenoidal
    gradient = geometry.mask(flux) - solenoidal
    harmonic = _harmonic_part(solenoidal.double(), geometry).to(flux.dtype)
    return Hodge(solenoidal - harmonic, harmonic, gradient)


def energy_product(
    one: Float[Tensor, "*batch 3 nx ny nz"], other: Float[Tensor, "*batch 3 nx ny nz"], geometry: Geometry
) -> Float[Tensor, "*batch"]:
    """⟨F, H⟩ = Σ F·H / C over the free faces, those of open high sides included [m⁵/s²]: twice the kinetic energy."""
    return _energy_density(one, other, geometry).sum((-3, -2, -1))


def _energy_density(one: Tensor, other: Tensor, geometry: Geometry) -> Tensor:
    """What each cell's low faces and open high sides add to the energy product."""
    free = geometry.free_faces.to(one.device)
    # Dividing first keeps the squares of fluxes in micrometre pores within FP32's range.
    density = torch.where(free, one / face_conductance(geometry, one) * other, 0.0).sum(-4)
    if any(high == "open" for _, high in geometry.ends):
        grid, last = geometry.grid, torch.zeros(geometry.grid.shape, dtype=one.dtype, device=one.device)
        for axis, (_, high) in enumerate(geometry.ends):
            if high == "open":
                last.select(axis - 3, -1).add_(2 * grid.conductances[axis])
        out = [operators.stored_div(torch.where(free, flux, 0.0), grid) for flux in (one, other)]
        density = density + torch.where(last > 0, out[0] / last * out[1], 0.0)
    return density


def _harmonic_part(solenoidal: Tensor, geometry: Geometry) -> Tensor:
    """The part of a solenoidal flux in the span of `harmonic_fields`, pore space by pore space."""
    fields = harmonic_fields(geometry).to(solenoidal)
    if fields.shape[0] == 0:
        return torch.zeros_like(solenoidal)
    label = (regions(geometry) + 1).to(solenoidal.device).flatten(-3)
    num_labels = int(label.max()) + 1

    def sums(density: Tensor) -> Tensor:
        """Per pore space, from a density in cells."""
        density = density.flatten(-3)
        zero = density.new_zeros((*density.shape[:-1], num_labels))
        return zero.scatter_add_(-1, label.expand(density.shape), density)

    num_fields = fields.shape[0]
    basis = _orthonormal(geometry).to(solenoidal)  # (fields, modes, *batch, labels)
    moments = torch.stack([sums(_energy_density(solenoidal, f, geometry)) for f in fields])  # (fields, *b, labels)
    weights = torch.einsum("fm...r,gm...r,g...r->f...r", basis, basis, moments)
    part = torch.zeros_like(solenoidal)
    for f in range(num_fields):
        weight = weights[f].gather(-1, label.expand(*weights[f].shape[:-1], label.shape[-1]))
        part += fields[f] * weight.reshape(*weight.shape[:-1], 1, *geometry.grid.shape)
    return part


@per_geometry
@torch.no_grad()
def harmonic_fields(geometry: Geometry) -> Float[Tensor, "m *batch 3 nx ny nz"]:
    """Solenoidal fluxes whose restrictions to single pore spaces span the harmonic part, in FP64 [m³/s].

    One for each periodic axis, the projection of a uniform flow of 1 m/s, in the pore spaces without open sides; one
    for each open side, what a pressure of 1 m²/s on it alone drives, in those with some.
    """
    grid, fluid = geometry.grid, geometry.fluid
    empty = torch.zeros((*geometry.batch_shape, 3, *grid.shape), dtype=torch.float64, device=fluid.device)
    sink = side_conductance(geometry, empty)
    fields = []
    if sink is not None:
        for axis, pair in enumerate(geometry.ends):
            for index, end in zip((0, -1), pair, strict=True):
                if end != "open":
                    continue
                source = torch.zeros_like(empty[..., 0, :, :, :])
                beside = 2 * grid.conductances[axis] * fluid.select(axis - 3, index).double()
                source.select(axis - 3, index).copy_(-beside)
                size = geometry.mask(empty + face_conductance(geometry, empty))
                potential = solve(source, size, geometry, tol=1e-14)[0]
                field = empty.clone()
                subtract_gradient(field, potential, geometry)
                if index == 0:
                    field.select(-4, axis).select(axis - 3, 0).add_(beside)
                fields.append(field)
    drained = _drained(geometry, sink)
    for axis, periodic in enumerate(grid.periodic):
        if periodic and not bool(drained.all()):
            field = empty.clone()
            field.select(-4, axis).fill_(grid.face_areas[axis])
            field = decompose(field, geometry, 1e-14).solenoidal
            fields.append(torch.where(drained.unsqueeze(-4), 0.0, field))
    return torch.stack(fields) if fields else empty.new_zeros((0, *empty.shape))


def _drained(geometry: Geometry, sink: Tensor | None) -> Tensor:
    """True in the cells of pore spaces that have an open side."""
    label = regions(geometry) + 1
    if sink is None:
        return torch.zeros(label.shape, dtype=torch.bool, device=label.device)
    flat = label.flatten(-3)
    opening = sink.new_zeros((*flat.shape[:-1], int(flat.max()) + 1)).scatter_add_(-1, flat, sink.flatten(-3))
    return (opening.gather(-1, flat) > 0).reshape(label.shape) & (label > 0)


@per_geometry
def _orthonormal(geometry: Geometry) -> Float[Tensor, "f f *batch r"]:
    """Weights of the harmonic fields that make an orthonormal basis of each pore space, mode by mode.

    As many modes as `SpanningForest.harmonic_ranks` counts are kept, those of the largest eigenvalues; what rounding
    makes of the others is not taken for flow.
    """
    fields = harmonic_fields(geometry)
    label = (regions(geometry) + 1).flatten(-3)
    num_labels = int(label.max()) + 1
    m = fields.shape[0]
    gram = fields.new_zeros((m, m, *geometry.batch_shape, num_labels))
    for i in range(m):
        for j in range(m):
            density = _energy_density(fields[i], fields[j], geometry).flatten(-3)
            gram[i, j].scatter_add_(-1, label, density)
    values, vectors = torch.linalg.eigh(gram.movedim((0, 1), (-2, -1)))
    ranks = torch.zeros((*geometry.batch_shape, num_labels), dtype=torch.int64, device=fields.device)
    for row, forest in zip(ranks.reshape(-1, num_labels), spanning_forests(geometry), strict=True):
        found = torch.from_numpy(forest.harmonic_ranks).to(ranks)
        row[1 : 1 + found.numel()] = found
    kept = torch.arange(m, device=fields.device) >= m - ranks[..., None]
    scale = torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    return (vectors * scale[..., None, :]).movedim((-2, -1), (0, 1))


@torch.no_grad()
def vector_potential(
    flux: Float[Tensor, "*batch 3 nx ny nz"], geometry: Geometry, tol: float | None = None
) -> Potential:
    """The vector potential of the solenoidal part of a flux, in the Coulomb gauge of the whole box.

    −Δ A = ∇×u component by component, with A tangential = 0 on walls: then ∇·A = 0, and `operators.curl` of the
    potential plus the uniform flux is the projected flux, to rounding. In the solid A is what the flow round it needs.

    Raises:
        ValueError: a box with open sides, beyond which a stored potential cannot reach.
        ConvergenceError: as `project`.
    """
    grid = geometry.grid
    _check_closed(grid)
    if not geometry.is_empty:
        flux = decompose(flux, geometry, tol).solenoidal
    through = torch.tensor(grid.periodic, device=flux.device)
    uniform = torch.where(through, flux.mean((-3, -2, -1)), 0.0)
    vorticity = operators.vorticity(flux, grid)
    return Potential(edge_laplacian_power(vorticity, grid, -1.0) * grid.per_face(grid.spacing, flux), uniform)


def isometric_curl(raw: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """∇× (−Δ)^(−½) of a vector on the edges [m/s], as a flux [m³/s]: the Riesz curl.

    It keeps the kinetic energy of the solenoidal part of its argument and forgets the rest (gradients, and uniform
    vectors), where a plain curl multiplies every mode by its wavenumber. Differentiable.

    Raises:
        ValueError: a box with open sides.
    """
    _check_closed(grid)
    return operators.curl(edge_laplacian_power(raw, grid, -0.5) * grid.per_face(grid.spacing, raw), grid)


def edge_laplacian_power(
    vector: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid, power: float
) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """(−Δ)^power of a vector on the edges, Δ in 1/m², with its tangential components zero on walls."""
    operators.check_shape(vector, grid, components=True)
    powers = [_edge_power(grid, axis, power, vector.dtype, vector.device) for axis in range(3)]
    return torch.stack([apply(vector[..., axis, :, :, :]) for axis, apply in enumerate(powers)], dim=-4)


@lru_cache(maxsize=64)
def _edge_power(grid: Grid, axis: int, power: float, dtype: torch.dtype, device: torch.device) -> Separable:
    x, y, z = (1 / h**2 for h in grid.spacing)
    ends = Geometry(grid).ends
    on_corners = (axis != 0, axis != 1, axis != 2)
    return Separable(grid, ends, (x, y, z), lambda e: e**power, corners=on_corners, dtype=dtype, device=device)


def _check_closed(grid: Grid) -> None:
    if any(sum(grid.open_sides, ())):
        raise ValueError(f"Expected a box of walls and periodic axes, got {grid.boundaries}; use a projection instead.")
