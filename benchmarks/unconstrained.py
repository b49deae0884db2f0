"""The head that an autoencoder would have without its constraint: what the network says, with closed faces at zero."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.autoencoders import FieldScale, ProjectionHead
from latentphys.grid import Geometry


class UnconstrainedHead(ProjectionHead):
    """`ProjectionHead` without the projection, for comparison only.

    Its `constraint` is a pretence: it says ``solenoidal``, without which a model refuses it for a solenoidal velocity,
    and its fluxes do not balance.
    """

    def admit(self, flux: Tensor, geometry: Geometry, tol: float | None = None) -> Tensor:
        return geometry.mask(flux)

    @torch.no_grad()
    def exact(
        self, raw: Float[Tensor, "b c nx ny nz"], geometry: Geometry, scale: FieldScale
    ) -> Float[Tensor, "b 3 nx ny nz"]:
        """The same in FP64; as far from a balance as in FP32."""
        return self.admit(self.flux(raw.double(), geometry, scale), geometry)
