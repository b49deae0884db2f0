"""The Helmholtz head: the last layer of a decoder, after which a flux is solenoidal whatever the network said.

Two parameterisations of u = curl A + harmonic:

    ProjectionHead   the network says a flux, the orthogonal projection keeps its solenoidal and harmonic parts
    PotentialHead    the network says A and the harmonic part; in voxel geometry the result is masked and projected

The projection cannot raise the L² error of a solenoidal target; a potential is amplified by its wavenumber.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentphys import exact, operators
from latentphys.autoencoders.normaliser import FamilyScale
from latentphys.grid import Geometry
from latentphys.projection import project


class Head(nn.Module, ABC):
    """Turns the decoder's output into a solenoidal flux.

    Args:
        tol: tolerance of the projection in voxel geometry while training and in FP32 use. Good values: 1e-2…1e-3.
    """

    num_channels: int

    def __init__(self, tol: float = 1e-2) -> None:
        super().__init__()
        if not 0 < tol < 1:
            raise ValueError(f"Expected a projection tolerance between 0 and 1, got {tol}.")
        self.tol = tol

    @abstractmethod
    def flux(self, raw: Tensor, geometry: Geometry, scale: FamilyScale) -> Tensor:
        """The flux [m³/s] that the network means, before projection."""

    def forward(
        self, raw: Float[Tensor, "b c nx ny nz"], geometry: Geometry, scale: FamilyScale
    ) -> Float[Tensor, "b 3 nx ny nz"]:
        """Solenoidal flux [m³/s] in FP32: to rounding in an empty box, to `tol` round voxels. Differentiable."""
        with torch.autocast(raw.device.type, enabled=False):
            return project(self.flux(raw.float(), geometry, scale), geometry, self.tol)

    def exact(
        self, raw: Float[Tensor, "b c nx ny nz"], geometry: Geometry, scale: FamilyScale
    ) -> Float[Tensor, "b 3 nx ny nz"]:
        """The same in FP64, with net 0.0 in every cell and 0.0 through every solid face (`exact.conserve`)."""
        return exact.conserve(flux=self.flux(raw.double(), geometry, scale), geometry=geometry)


class ProjectionHead(Head):
    """Orthogonal Helmholtz–Hodge projection of the network's flux. The default."""

    num_channels = 3

    def flux(self, raw: Tensor, geometry: Geometry, scale: FamilyScale) -> Tensor:
        return scale.denormalise(raw, geometry.grid)


class PotentialHead(Head):
    """Curl of the network's vector potential plus a uniform flow along each periodic axis.

    Channels 0–2 are A in units of velocity scale × shortest side; channels 3–5, averaged over the box, are the uniform
    velocity in units of the velocity scale.
    """

    num_channels = 6

    def flux(self, raw: Tensor, geometry: Geometry, scale: FamilyScale) -> Tensor:
        grid = geometry.grid
        edges = grid.per_face(grid.spacing, raw) * min(grid.lengths) * scale.velocity
        uniform = raw[:, 3:].mean((-3, -2, -1), keepdim=True) * grid.per_face(grid.face_areas, raw) * scale.velocity
        periodic = torch.tensor(grid.periodic, device=raw.device).reshape(3, 1, 1, 1)
        return operators.curl(raw[:, :3] * edges, grid) + uniform * periodic + scale.profile.to(raw)
