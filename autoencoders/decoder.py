"""The decoder: from a latent and the place to what the heads turn into fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentphys.autoencoders.encoder import check_fields
from latentphys.autoencoders.layers import (
    Basis,
    ChannelNorm,
    Level,
    LinearPath,
    Patches,
    Up,
    condition_embedding,
    depth_to_space,
    fp32,
    pad_by_boundary,
    unused,
    zeroed,
)
from latentphys.autoencoders.place import Place


class Decoder(nn.Module):
    """The mirror image of `Encoder`; the same arguments, with ``fields`` the channels that their heads ask for."""

    def __init__(
        self,
        fields: Mapping[str, int],
        latent_channels: int,
        widths: Sequence[int],
        num_blocks: Sequence[int],
        stem: int,
        basis: Basis,
        num_conditions: int,
    ) -> None:
        super().__init__()
        self.patches, self.num_blocks = Patches(stem, basis), tuple(num_blocks)
        self.patch = stem * 2 ** (len(widths) - 1)
        self.start = nn.Conv3d(latent_channels, widths[-1], kernel_size=1)
        self.embed = condition_embedding(num_conditions)
        self.levels = nn.ModuleList(
            Level(width, n, stem * 2**i) for i, (width, n) in enumerate(zip(widths, num_blocks, strict=True))
        )
        self.up = nn.ModuleList(Up(coarse, fine) for fine, coarse in zip(widths[:-1], widths[1:], strict=True))
        self.norm = ChannelNorm(widths[0])
        self.heads = nn.ModuleDict(
            {name: zeroed(nn.Conv3d(widths[0], n * stem**3, kernel_size=3)) for name, n in fields.items()}
        )
        self.linear = nn.ModuleDict(
            {name: LinearPath(latent_channels, n * self.patch**3) for name, n in fields.items()}
        )

    def forward(self, z: Float[Tensor, "b l x y z"], place: Place, fields: Sequence[str]) -> dict[str, Tensor]:
        """What the network says of each field asked for, ``(b, channels, nx, ny, nz)``.

        Raises:
            ValueError: no field, or one that the network does not know.
        """
        check_fields(fields, self.heads)
        condition = self.embed(place.condition)
        if self.training:
            absent = [name for name in self.heads if name not in fields]
            z = z + unused(part[name] for part in (self.heads, self.linear) for name in absent)
        x = self.start(z)
        for i in reversed(range(len(self.levels))):
            x = self.stage(i, x, place, condition)
        return self.finish(z, self.say(x, place, fields), place)

    def stage(self, i: int, x: Tensor, place: Place, condition: Tensor) -> Tensor:
        """From the resolution of the level before, if there is one, to that of level i, and through it."""
        x = self.up[i](x) if i < len(self.up) else x
        return self.levels[i](x, place.features, condition, place.boundaries)

    def say(self, x: Tensor, place: Place, fields: Sequence[str]) -> dict[str, Tensor]:
        """What the finest level says of each field."""
        with torch.autocast(x.device.type, enabled=False):
            x = pad_by_boundary(F.silu(self.norm(fp32(x))), place.boundaries)
            return {name: self.patches.join(self.heads[name](x)) for name in fields}

    def finish(self, z: Tensor, said: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
        """The same with the linear path."""
        with torch.autocast(z.device.type, enabled=False):
            linear = {name: self.linear[name](fp32(z), place.boundaries) for name in said}
        return {name: x + depth_to_space(linear[name], self.patch) for name, x in said.items()}
