"""The decoder: from a latent and the geometry to what the head turns into a field."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from latentphys.autoencoders.layers import BoundaryConv, Level, Periodic, depth_to_space


class Decoder(nn.Module):
    """The mirror image of `Encoder`; the same arguments, with ``channels`` as many as the head asks for."""

    def __init__(
        self, channels: int, latent_channels: int, widths: Sequence[int], num_blocks: Sequence[int], stem: int
    ) -> None:
        super().__init__()
        self.stem = stem
        self.embed = nn.Conv3d(latent_channels, widths[-1], kernel_size=1)
        self.levels = nn.ModuleList(
            Level(width, n, stem * 2**i) for i, (width, n) in enumerate(zip(widths, num_blocks, strict=True))
        )
        self.up = nn.ModuleList(
            nn.Conv3d(coarse, 8 * fine, kernel_size=1) for fine, coarse in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norm = nn.GroupNorm(8, widths[0])
        self.head = BoundaryConv(widths[0], channels * stem**3)
        self.patch = stem * 2 ** (len(widths) - 1)
        self.linear = nn.Conv3d(latent_channels, channels * self.patch**3, kernel_size=1, bias=False)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(
        self, z: Float[Tensor, "b l x y z"], features: Float[Tensor, "#b g nx ny nz"], periodic: Periodic
    ) -> Float[Tensor, "b c nx ny nz"]:
        x = self.embed(z)
        for i in reversed(range(len(self.levels))):
            x = self.levels[i](x, features, periodic)
            if i:
                x = depth_to_space(self.up[i - 1](x), 2)
        detail = depth_to_space(self.head(nn.functional.silu(self.norm(x)), periodic), self.stem)
        return depth_to_space(self.linear(z), self.patch) + detail
