"""The autoencoder whose latents conserve mass: three of their channels are the velocity's flux on the latent grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import exact as fixed_point
from latentphys.autoencoders.autoencoder import Autoencoder
from latentphys.autoencoders.coarse import admit, coarse_flux, exact_coarse_flux, restrict_velocity, split, with_coarse
from latentphys.autoencoders.normaliser import FieldScale
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Geometry


class ConservativeAutoencoder(Autoencoder):
    """An `Autoencoder` of solenoidal velocities whose first three latent channels are not learnt.

    They are the velocity's own flux, summed over the faces of the latent grid and given as velocities in units of the
    family's scale, the mean flow included. The latent of a solenoidal flux is solenoidal too; `admit` projects what a
    dynamics model says onto such latents, and `latent_fields` reads them in m³/s, with a net of 0.0 in every cell. The
    other channels are what the decoder needs for the detail: it decodes to a flux near to what the network says, whose
    restriction is the latent's (`coarse.with_coarse`).

    Args: those of `Autoencoder`; ``latent_channels`` counts the three.

    Raises:
        ValueError: as `Autoencoder`, a family without a solenoidal velocity, or a compression that is no power of two.
    """

    num_coarse = 3
    latent_specs: ClassVar[Mapping[str, FieldSpec]] = {VELOCITY.name: VELOCITY}

    def check_specs(self, family: str, specs: Mapping[str, FieldSpec]) -> None:
        if self.compression & (self.compression - 1):
            raise ValueError(
                f"Expected a compression that is a power of two for conservative latents, got {self.compression}."
            )
        velocity = specs.get(VELOCITY.name)
        if velocity is None or velocity.constraint != "solenoidal":
            raise ValueError(
                f"Expected a solenoidal velocity in family {family!r} for conservative latents, got "
                f"{velocity or sorted(specs)}; use autoencoder/latent=free."
            )

    def encode(
        self, packed: Float[Tensor, "b c nx ny nz"], geometry: Geometry, family: str
    ) -> Float[Tensor, "b l x y z"]:
        scale = self.scale(family)
        velocity = geometry.mask(scale.split(packed)[VELOCITY.name])
        coarse = restrict_velocity(velocity, scale[VELOCITY.name], geometry, self.compression)
        return torch.cat([coarse.float(), super().encode(packed, geometry, family)], dim=1)

    def admit(self, latent: Float[Tensor, "b l x y z"], geometry: Geometry, family: str) -> Float[Tensor, "b l x y z"]:
        """The nearest latent within the bound whose flux is solenoidal on the latent grid; differentiable."""
        coarse, tol = latent[:, : self.num_coarse].float(), self.heads.solenoidal.tol
        field = self.scale(family)[VELOCITY.name]
        # loosely for a gradient: nothing is then prepared for the geometries of a batch, which nobody meets again
        admitted = admit(coarse, field, geometry, self.compression, tol if torch.is_grad_enabled() else None)
        return torch.cat([admitted, self.bottleneck.admit(latent[:, self.num_coarse :].float())], dim=1)

    @torch.no_grad()
    def latent_fields(
        self, latent: Float[Tensor, "b l x y z"], geometry: Geometry, family: str
    ) -> dict[str, Float[Tensor, "b 3 x y z"]]:
        """The flux through the low faces of the latent grid [m³/s], FP64, net 0.0 in every latent cell bit for bit."""
        scale = self.scale(family)[VELOCITY.name]
        flux = exact_coarse_flux(latent[:, : self.num_coarse], scale, geometry, self.compression)
        return {VELOCITY.name: flux}

    def learnt_inputs(
        self, packed: Float[Tensor, "b c nx ny nz"], geometry: Geometry, family: str
    ) -> dict[str, Float[Tensor, "b _ px py pz"]]:
        """The detail of the velocity, which its coarse flux does not say."""
        scale, factor = self.scale(family), self.compression
        parts = dict(scale.split(packed))
        profile = scale[VELOCITY.name].profile.to(packed)
        fluctuation = geometry.mask(parts[VELOCITY.name] - profile)
        parts[VELOCITY.name] = split(fluctuation, geometry, factor, self.heads.solenoidal.tol).detail + profile
        return super().learnt_inputs(torch.cat(list(parts.values()), dim=1), geometry, family)

    def decoder_input(
        self, latent: Float[Tensor, "b l x y z"], geometry: Geometry, family: str
    ) -> Float[Tensor, "b l x y z"]:
        field, latent = self.scale(family)[VELOCITY.name], latent.float()
        profile = geometry.mask(field.profile.to(latent).expand(len(latent), 3, *geometry.grid.shape))
        mean = restrict_velocity(profile, field, geometry, self.compression)
        return torch.cat([latent[:, : self.num_coarse] - mean, latent[:, self.num_coarse :]], dim=1)

    def _finish(
        self, raw: Tensor, latent: Tensor, geometry: Geometry, field: FieldScale, exact: bool, total: Tensor | None
    ) -> Tensor:
        if field.spec.name != VELOCITY.name:
            return super()._finish(raw, latent, geometry, field, exact, total)
        head, kind = self.heads.solenoidal, torch.float64 if exact else torch.float32
        coarse = coarse_flux(latent[:, : self.num_coarse].to(kind), field, geometry, self.compression)
        with torch.autocast(raw.device.type, enabled=False):
            flux = head.flux(raw.to(kind), geometry, field)
            flux = with_coarse(flux, coarse, geometry, self.compression, None if exact else head.tol)
        return fixed_point.conserve(flux=flux, geometry=geometry) if exact else flux
