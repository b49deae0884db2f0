"""The encoder: from velocities on faces to a latent a few cells wide."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentphys.autoencoders.layers import BoundaryConv, Level, Periodic, space_to_depth

SATURATION = 5.0
"""Latents are bounded by this; near zero they are what the network says."""


def saturate(z: Tensor) -> Tensor:
    """z / √(1 + (z/B)²): the identity near zero, bounded by B = `SATURATION`."""
    return z * torch.rsqrt(1 + (z / SATURATION).square())


class Encoder(nn.Module):
    """Patch stem, then residual convolutions at ever coarser resolutions, beside one linear map of each whole patch.

    The linear path is all there is at the start (see `Autoencoder.fit_patches`); it keeps the amplitude that
    normalisation removes.

    Args:
        channels: of the field.
        latent_channels: of the latent.
        widths: channels per level, from fine to coarse, multiples of 8; the first level works on `stem`³ patches, every
            further one at half the resolution.
        num_blocks: residual blocks per level.
        stem: cells per axis that the first level takes as one.
    """

    def __init__(
        self, channels: int, latent_channels: int, widths: Sequence[int], num_blocks: Sequence[int], stem: int
    ) -> None:
        super().__init__()
        self.stem = stem
        self.embed = BoundaryConv(channels * stem**3, widths[0])
        self.levels = nn.ModuleList(
            Level(width, n, stem * 2**i) for i, (width, n) in enumerate(zip(widths, num_blocks, strict=True))
        )
        self.down = nn.ModuleList(
            nn.Conv3d(8 * fine, coarse, kernel_size=1) for fine, coarse in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norm = nn.GroupNorm(8, widths[-1])
        self.head = nn.Conv3d(widths[-1], latent_channels, kernel_size=1)
        self.patch = stem * 2 ** (len(widths) - 1)
        self.linear = nn.Conv3d(channels * self.patch**3, latent_channels, kernel_size=1, bias=False)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(
        self, u: Float[Tensor, "b c nx ny nz"], features: Float[Tensor, "#b g nx ny nz"], periodic: Periodic
    ) -> Float[Tensor, "b l x y z"]:
        x = self.embed(space_to_depth(u, self.stem), periodic)
        for i, level in enumerate(self.levels):
            if i:
                x = self.down[i - 1](space_to_depth(x, 2))
            x = level(x, features, periodic)
        return saturate(self.linear(space_to_depth(u, self.patch)) + self.head(nn.functional.silu(self.norm(x))))
