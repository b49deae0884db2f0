"""The autoencoder: flux ↔ latent, every decode with the constraint of its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentphys.autoencoders.decoder import Decoder
from latentphys.autoencoders.encoder import Encoder
from latentphys.autoencoders.helmholtz import Head, ProjectionHead
from latentphys.autoencoders.layers import extrude, flatten, geometry_features, space_to_depth
from latentphys.autoencoders.normaliser import FamilyScale
from latentphys.grid import Geometry, Grid


class Autoencoder(nn.Module):
    """Compresses fluxes of several families into one latent space.

    Boxes of one or two dimensions, with axes of one cell, pass as boxes in which nothing changes along those axes: the
    networks see them one patch thick, and what they say is averaged over that thickness before the head.

    Args:
        scales: family → its mean profile and velocity scale.
        latent_channels: channels C of a latent.
        widths, num_blocks, stem: see `Encoder`; ``stem · 2^(levels − 1)`` cells per axis become one latent cell.
        head: the Helmholtz head. Default: `ProjectionHead`.
        latent_noise: standard deviation of noise added to latents while training, so that near latents decode alike.

    Raises:
        ValueError: levels that do not fit together.
    """

    def __init__(
        self,
        scales: Mapping[str, FamilyScale],
        latent_channels: int,
        widths: Sequence[int],
        num_blocks: Sequence[int],
        stem: int = 2,
        head: Head | None = None,
        latent_noise: float = 0.0,
    ) -> None:
        super().__init__()
        if len(widths) != len(num_blocks) or not widths:
            raise ValueError(f"Expected as many widths as num_blocks, got {list(widths)} and {list(num_blocks)}.")
        if any(width % 8 for width in widths):
            raise ValueError(f"Expected widths that are multiples of 8, got {list(widths)}.")
        if stem < 1 or latent_noise < 0:
            raise ValueError(f"Expected a stem ≥ 1 and latent_noise ≥ 0, got {stem} and {latent_noise}.")
        self.scales = dict(scales)
        self.latent_channels, self.latent_noise = latent_channels, latent_noise
        self.compression = stem * 2 ** (len(widths) - 1)
        if not 1 <= latent_channels <= 3 * self.compression**3:
            raise ValueError(
                f"Expected latent_channels from 1 to {3 * self.compression**3}, the numbers in a patch of "
                f"{self.compression}³ cells, got {latent_channels}."
            )
        self.head = head or ProjectionHead()
        self.encoder = Encoder(3, latent_channels, widths, num_blocks, stem)
        self.decoder = Decoder(self.head.num_channels, latent_channels, widths, num_blocks, stem)

    def latent_shape(self, grid: Grid) -> tuple[int, int, int]:
        """Latent cells per axis; one along an axis of one cell.

        Raises:
            ValueError: a grid that the compression does not divide.
        """
        if any(n % self.compression for n in grid.shape if n > 1):
            raise ValueError(
                f"Expected a grid divisible by the compression of {self.compression} per axis, got {grid.shape}; "
                f"choose multiples of {self.compression}."
            )
        x, y, z = (max(1, n // self.compression) for n in grid.shape)
        return x, y, z

    def scale(self, family: str) -> FamilyScale:
        """Mean profile and velocity scale of a family.

        Raises:
            ValueError: a family that the model was not trained on.
        """
        if family not in self.scales:
            raise ValueError(f"Expected a family of {sorted(self.scales)}, got {family!r}; this model knows no other.")
        return self.scales[family]

    @torch.no_grad()
    def fit_patches(self, snapshots: Mapping[str, tuple[Grid, Float[Tensor, "n 3 nx ny nz"]]]) -> None:
        """Set the linear paths to the principal components of patches, each family with the same weight.

        Training then starts from the best linear code of single patches, and learns what goes beyond it. Latents have
        unit variance. A head that takes something else than a flux learns its linear path from scratch.

        Args:
            snapshots: family → its grid and some training fluxes [m³/s].

        Raises:
            ValueError: fluxes that are not finite.
        """
        covariance = torch.zeros(())
        for family, (grid, flux) in snapshots.items():
            u = extrude(self.scale(family).normalise(flux, grid).double(), self.compression)
            patches = space_to_depth(u, self.compression)
            rows = patches.movedim(1, -1).flatten(0, -2)
            if not bool(torch.isfinite(rows).all()):
                raise ValueError(f"Expected finite fluxes of family {family!r}, got NaN or infinite values.")
            covariance = covariance + rows.mT @ rows / len(rows) / len(snapshots)
        variances, components = (t.flip(-1)[..., : self.latent_channels] for t in torch.linalg.eigh(covariance))
        deviations = variances.clamp(min=1e-12).sqrt()
        self.encoder.linear.weight.copy_((components / deviations).mT[..., None, None, None])
        if self.head.num_channels == 3:
            self.decoder.linear.weight.copy_((components * deviations)[..., None, None, None])

    def encode(
        self, flux: Float[Tensor, "b 3 nx ny nz"], geometry: Geometry, family: str
    ) -> Float[Tensor, "b c x y z"]:
        """The latent of a flux [m³/s]."""
        self.latent_shape(geometry.grid)
        u = self.scale(family).normalise(flux, geometry.grid).float()
        features = self._features(geometry).to(u.device)
        return self.encoder(extrude(geometry.mask(u), self.compression), features, geometry.grid.periodic)

    def _features(self, geometry: Geometry) -> Float[Tensor, "b 2 nx ny nz"]:
        return extrude(geometry_features(geometry), self.compression)

    def decode(
        self, latent: Float[Tensor, "b c x y z"], geometry: Geometry, family: str, exact: bool = False
    ) -> Float[Tensor, "b 3 nx ny nz"]:
        """The flux [m³/s] of any latent, solenoidal unless the head is another one.

        Args:
            exact: FP64, from a solenoidal head with a net flux of 0.0 in every cell, bit for bit; not differentiable.
                Default: FP32.
        """
        expected = (self.latent_channels, *self.latent_shape(geometry.grid))
        if tuple(latent.shape[1:]) != expected:
            raise ValueError(f"Expected latents of shape (b, {str(expected)[1:-1]}), got {tuple(latent.shape)}.")
        features = self._features(geometry).to(latent.device)
        raw = flatten(self.decoder(latent.float(), features, geometry.grid.periodic), geometry.grid.shape)
        finish = self.head.exact if exact else self.head
        return finish(raw, geometry, self.scale(family))

    def forward(self, flux: Float[Tensor, "b 3 nx ny nz"], geometry: Geometry, family: str) -> Tensor:
        """Decode of encode, with latent noise in training."""
        latent = self.encode(flux, geometry, family)
        if self.training and self.latent_noise:
            latent = latent + self.latent_noise * torch.randn_like(latent)
        return self.decode(latent, geometry, family)
