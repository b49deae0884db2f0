"""The encoder: from fields on a fine grid to a latent a few cells wide."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentphys.autoencoders.layers import (
    Basis,
    BoundaryConv,
    ChannelNorm,
    Down,
    Level,
    LinearPath,
    Patches,
    condition_embedding,
    fp32,
    space_to_depth,
    unused,
    zeroed,
)
from latentphys.autoencoders.place import Place


class Encoder(nn.Module):
    """Patch stems, then residual convolutions at ever coarser resolutions, beside one linear map of patches as a whole.

    Every field type has a stem and a linear map of its own; what they say of the fields that are there is added up. The
    linear path, of a patch and its neighbours, is all there is at the start (`linear_code`); it keeps the amplitude
    that normalisation removes, and takes the cells of a patch as they are, whatever the basis.

    Args:
        fields: field type → its components.
        latent_channels: of the latent.
        widths: channels per level, from fine to coarse, 8 · each a multiple of the next; the first level works on
            `stem`³ patches, every further one at half the resolution.
        num_blocks: residual blocks per level.
        stem: cells per axis that the first level takes as one.
        basis: of the stem's patches, ``patch | haar``; see `Patches`.
        num_conditions: length of `Place.condition`.

    Attributes:
        deep: False for the linear path alone, which is all there is before training.

    Raises:
        ValueError: a stem without such a basis, or widths that do not fit together.
    """

    deep: bool = True

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
        self.stems = nn.ModuleDict(
            {name: BoundaryConv(n * stem**3, widths[0], bias=False) for name, n in fields.items()}
        )
        self.bias = nn.Parameter(torch.zeros(widths[0]))
        self.linear = nn.ModuleDict(
            {name: LinearPath(n * self.patch**3, latent_channels) for name, n in fields.items()}
        )
        self.embed = condition_embedding(num_conditions)
        self.levels = nn.ModuleList(
            Level(width, n, stem * 2**i) for i, (width, n) in enumerate(zip(widths, num_blocks, strict=True))
        )
        self.down = nn.ModuleList(Down(fine, coarse) for fine, coarse in zip(widths[:-1], widths[1:], strict=True))
        self.norm = ChannelNorm(widths[-1])
        self.head = zeroed(nn.Conv3d(widths[-1], latent_channels, kernel_size=1))

    def forward(self, fields: Mapping[str, Float[Tensor, "b _ nx ny nz"]], place: Place) -> Float[Tensor, "b l x y z"]:
        """The latent of the fields that are there, in units of order one.

        Raises:
            ValueError: no field, or one that the network does not know.
        """
        check_fields(fields, self.stems)
        if not self.deep:
            return self.code(fields, place)
        condition, x = self.embed(place.condition), self.begin(fields, place)
        for i in range(len(self.levels)):
            x = self.stage(i, x, place, condition)
        return self.finish(x, fields, place)

    def begin(self, fields: Mapping[str, Tensor], place: Place) -> Tensor:
        """What the stems say, at the resolution of the first level."""
        bias: Tensor = self.bias
        if self.training:
            absent = [name for name in self.stems if name not in fields]
            bias = bias + unused(part[name] for part in (self.stems, self.linear) for name in absent)
        parts = [self.stems[name](self.patches.split(u), place.boundaries) for name, u in fields.items()]
        return sum(parts[1:], parts[0]) + bias.reshape(-1, 1, 1, 1)

    def stage(self, i: int, x: Tensor, place: Place, condition: Tensor) -> Tensor:
        """Level i, and on to the resolution of the next one."""
        x = self.levels[i](x, place.features, condition, place.boundaries)
        return self.down[i](x) if i < len(self.down) else x

    def finish(self, x: Tensor, fields: Mapping[str, Tensor], place: Place) -> Tensor:
        """The latent: what the last level says, and the linear path."""
        with torch.autocast(x.device.type, enabled=False):
            return self.head(F.silu(self.norm(fp32(x)))) + self.code(fields, place)

    def code(self, fields: Mapping[str, Tensor], place: Place) -> Tensor:
        """What the linear path says."""
        parts = [self.linear[n](space_to_depth(fp32(u), self.patch), place.boundaries) for n, u in fields.items()]
        return sum(parts[1:], parts[0])


def check_fields(names: Collection[str], known: nn.ModuleDict) -> None:
    """Whether a network knows fields, and there are any.

    Raises:
        ValueError: no field, or one that the network does not know.
    """
    if not names or not set(names) <= set(known):
        raise ValueError(f"Expected at least one field of {list(known)} and no other, got {list(names)}.")
