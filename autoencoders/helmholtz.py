"""Helmholtz heads: the last layer of a decoder, after which a flux obeys its constraint whatever the network said.

    ProjectionHead     solenoidal     the network says a flux, of which the projection keeps the solenoidal part
    RieszHead          solenoidal     it says w on the edges: ∇× (−Δ)^(−½) w, plus a uniform flow
    PotentialHead      solenoidal     it says A on the edges: ∇× A, plus a uniform flow
    IrrotationalHead   irrotational   it says a flux, of which the gradient part is kept
    GeneralHead        none           it says a flux, of which the part through free faces is kept

Each is linear up to the field's mean flux. With H for the map from what the network says to velocities, the first
two have H Hᵀ = P, the orthogonal projection, in boxes and round voxels: no mode is learnt faster than another,
on any mesh. The plain curl has H Hᵀ = P (−Δ) P, whose condition number grows as the square of the cells per side.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import exact, hodge, operators
from latentphys.autoencoders.head import Head
from latentphys.autoencoders.normaliser import FieldScale
from latentphys.fields import Constraint
from latentphys.grid import Geometry, Grid
from latentphys.inflow import inflow_flux
from latentphys.projection import project


class FluxHead(Head):
    """Turns the decoder's channels into a flux through the low faces.

    Args:
        tol: tolerance of the projection in voxel geometry while training and in FP32 use. Good values: 1e-2…1e-3.

    Raises:
        ValueError: a tolerance that is none.
    """

    num_channels: int = 3

    def __init__(self, tol: float = 1e-2) -> None:
        super().__init__()
        if not 0 < tol < 1:
            raise ValueError(f"Expected a projection tolerance between 0 and 1, got {tol}.")
        self.tol = tol

    def flux(self, raw: Tensor, geometry: Geometry, scale: FieldScale) -> Tensor:
        """The flux [m³/s] that the network means, before the constraint, in the dtype of its channels.

        Unless a head says otherwise the channels are velocities on the faces, in units of the field's size.
        """
        return scale.denormalise(raw, geometry.grid)

    @abstractmethod
    def admit(self, flux: Tensor, geometry: Geometry, tol: float | None = None) -> Tensor:
        """The flux nearest to one [m³/s], in kinetic energy, that obeys the constraint; differentiable.

        Args:
            tol: as for `projection.project`.
        """

    def forward(
        self, raw: Float[Tensor, "b c nx ny nz"], geometry: Geometry, scale: FieldScale
    ) -> Float[Tensor, "b 3 nx ny nz"]:
        """Flux [m³/s] in FP32, under autocast too; 0.0 through every wall and solid face. Differentiable."""
        with torch.autocast(raw.device.type, enabled=False):
            return self.admit(self.flux(raw.float(), geometry, scale), geometry, self.tol)

    @torch.no_grad()
    def exact(
        self, raw: Float[Tensor, "b c nx ny nz"], geometry: Geometry, scale: FieldScale
    ) -> Float[Tensor, "b 3 nx ny nz"]:
        """The same in FP64, with the projection's FP64 tolerance."""
        return self.admit(self.flux(raw.double(), geometry, scale), geometry)


class SolenoidalHead(FluxHead):
    """A head whose fluxes balance in every cell: `operators.div` of the fluxes through the low faces is zero.

    `forward`, in FP32: to the rounding of the direct solve in an empty box, to `tol` of the net before round voxels.
    `exact`, in FP64: 0.0, bit for bit. A prescribed inflow is kept.
    """

    constraint: Constraint = "solenoidal"

    def admit(self, flux: Tensor, geometry: Geometry, tol: float | None = None) -> Tensor:
        return project(flux, geometry, tol)

    @torch.no_grad()
    def exact(
        self, raw: Float[Tensor, "b c nx ny nz"], geometry: Geometry, scale: FieldScale
    ) -> Float[Tensor, "b 3 nx ny nz"]:
        """The same in FP64, with net 0.0 in every cell and 0.0 through every solid face (`exact.conserve`)."""
        return exact.conserve(flux=self.flux(raw.double(), geometry, scale), geometry=geometry)


class ProjectionHead(SolenoidalHead):
    """Orthogonal Helmholtz–Hodge projection of the network's flux. The default.

    It cannot raise the L² error of a solenoidal target, and reaches every one, in any geometry.
    """


class RieszHead(SolenoidalHead):
    """The isometric curl of the network's vector on the edges plus a uniform flow along each periodic axis.

    F = ∇× (−Δ)^(−½) w + U + the field's mean flux, projected.

    Channels 0–2 are w on the low edges, channels 3–5, averaged over the box, the uniform velocity, both in units of
    the field's size. In an empty box F keeps the kinetic energy of w's solenoidal part, and its size where a plain
    curl multiplies by the wavenumber; gradients in w do nothing. It reaches every solenoidal flux, round voxels too.

    Raises:
        ValueError: in `forward` and `exact`, a box with open sides.
    """

    num_channels = 6

    def flux(self, raw: Tensor, geometry: Geometry, scale: FieldScale) -> Tensor:
        return hodge.isometric_curl(raw[:, :3] * scale.size, geometry.grid) + _mean_flow(raw[:, 3:], geometry, scale)

    def channels_of(
        self, field: Float[Tensor, "b 3 nx ny nz"], geometry: Geometry, scale: FieldScale
    ) -> Float[Tensor, "b 6 nx ny nz"]:
        """w = (−Δ)^(½) A of the vector potential A in the Coulomb gauge."""
        return _potential_channels(super().channels_of(field, geometry, scale), geometry.grid, -0.5)


class PotentialHead(SolenoidalHead):
    """The plain curl of the network's vector potential plus a uniform flow along each axis that one can pass.

    F = ∇× A + U + the field's mean flux, projected.

    Channels 0–2 are A on the low edges in units of the field's size × shortest side; channels 3–5, averaged over the
    box, are the uniform velocity in units of the field's size, along axes that are periodic or open at both ends.
    Between walls and periodic axes it reaches every solenoidal flux, round voxels too. Before an open high side A
    continues unchanged, so that in an empty box what leaves is what passes the faces before: `ProjectionHead` says
    more.
    """

    num_channels = 6

    def flux(self, raw: Tensor, geometry: Geometry, scale: FieldScale) -> Tensor:
        grid = geometry.grid
        edges = grid.per_face(grid.spacing, raw) * grid.shortest_side * scale.size
        return operators.curl(raw[:, :3] * edges, grid) + _mean_flow(raw[:, 3:], geometry, scale)

    def channels_of(
        self, field: Float[Tensor, "b 3 nx ny nz"], geometry: Geometry, scale: FieldScale
    ) -> Float[Tensor, "b 6 nx ny nz"]:
        """The vector potential in the Coulomb gauge; 0, with the uniform flow alone, where there are open sides."""
        u = super().channels_of(field, geometry, scale)
        if any(sum(geometry.grid.open_sides, ())):
            return torch.cat([torch.zeros_like(u), _uniform(u, geometry.grid)], dim=1)
        channels = _potential_channels(u, geometry.grid, -1.0)
        channels[:, :3] /= geometry.grid.shortest_side
        return channels


class IrrotationalHead(FluxHead):
    """The gradient part of the network's flux, what `ProjectionHead` removes: C·grad φ with C = face area / cell size.

    It is orthogonal (`hodge.energy_product`) to every solenoidal flux and has no `operators.vorticity` on edges amid
    free faces, both to the rounding of its dtype whatever `tol` says: that only says how near it comes to the nearest
    such flux round voxels, and how orthogonal it is where there are open high sides beside them.

    Raises:
        ValueError: in `forward` and `exact`, a prescribed inflow, over which a gradient has no say.
    """

    constraint: Constraint = "irrotational"

    def admit(self, flux: Tensor, geometry: Geometry, tol: float | None = None) -> Tensor:
        if geometry.inflow:
            raise ValueError(
                f"Expected a geometry without a prescribed inflow for an irrotational flux, got one through "
                f"{sorted(geometry.inflow)}; leave the inflow open, or use GeneralHead."
            )
        return geometry.mask(flux) - project(flux, geometry, tol)


class GeneralHead(FluxHead):
    """Any flux through the free faces, with its curl, harmonic and gradient parts; for compressible flow.

    Nothing flows through walls and solids, and what is prescribed through inflow sides; both hold in either dtype.
    """

    constraint: Constraint = "none"

    def __init__(self) -> None:
        super().__init__()

    def admit(self, flux: Tensor, geometry: Geometry, tol: float | None = None) -> Tensor:
        if not geometry.inflow:
            return geometry.mask(flux)
        return torch.where(geometry.free_faces.to(flux.device), flux, inflow_flux(geometry).to(flux))

    def parts(self, raw: Float[Tensor, "b c nx ny nz"], geometry: Geometry, scale: FieldScale) -> hodge.Hodge:
        """The Hodge decomposition of `exact` [m³/s], in FP64: orthogonal parts that add up to it.

        Raises:
            ValueError: a geometry with a prescribed inflow.
            ConvergenceError: as `projection.project`.
        """
        return hodge.hodge(self.exact(raw, geometry, scale), geometry)


def _mean_flow(
    channels: Float[Tensor, "b 3 nx ny nz"], geometry: Geometry, scale: FieldScale
) -> Float[Tensor, "b 3 px py pz"]:
    """What no curl carries through the box: the mean of the channels, as a uniform flux, and the field's mean flux."""
    scale.check(geometry.grid)
    through = torch.tensor(geometry.grid.through, device=channels.device).reshape(3, 1, 1, 1)
    uniform = torch.where(through, channels.mean((-3, -2, -1), keepdim=True), 0.0) * scale.size
    return operators.flux_of(uniform, geometry.grid) + scale.profile.to(channels)


def _potential_channels(u: Float[Tensor, "b 3 nx ny nz"], grid: Grid, power: float) -> Float[Tensor, "b 6 nx ny nz"]:
    """(−Δ)^power ∇× of a normalised flow on the edges, and the uniform flow."""
    vorticity = operators.vorticity(operators.flux_of(u, grid), grid)
    return torch.cat([hodge.edge_laplacian_power(vorticity, grid, power), _uniform(u, grid)], dim=1)


def _uniform(u: Float[Tensor, "b 3 nx ny nz"], grid: Grid) -> Float[Tensor, "b 3 nx ny nz"]:
    """The mean of a normalised flow along the axes that one can pass, in every cell."""
    through = torch.tensor(grid.through, device=u.device).reshape(3, 1, 1, 1)
    return torch.where(through, u.mean((-3, -2, -1), keepdim=True), 0.0).expand_as(u)
