"""Layers that know the box: convolutions padded by boundary type, residual blocks, and the geometry as input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentphys.grid import Geometry

Periodic = tuple[bool, bool, bool]
NUM_GEOMETRY_FEATURES = 2


def geometry_features(geometry: Geometry) -> Float[Tensor, "batch 2 nx ny nz"]:
    """What the networks are told of the box: fluid (1) or solid (0), and the wall distance in half shortest sides."""
    shape = (-1, *geometry.grid.shape)
    distance = geometry.wall_distance.reshape(shape) * (2 / geometry.grid.shortest_side)
    fluid = geometry.fluid.reshape(shape).to(distance).expand_as(distance)
    return torch.stack([fluid, distance], dim=1).float()


def space_to_depth(x: Float[Tensor, "b c x y z"], factor: int) -> Tensor:
    """Blocks of factor³ cells as channels."""
    return rearrange(x, "b c (x i) (y j) (z k) -> b (c i j k) x y z", i=factor, j=factor, k=factor)


def depth_to_space(x: Float[Tensor, "b c x y z"], factor: int) -> Tensor:
    """The inverse of `space_to_depth`."""
    return rearrange(x, "b (c i j k) x y z -> b c (x i) (y j) (z k)", i=factor, j=factor, k=factor)


def extrude(x: Float[Tensor, "*b x y z"], cells: int) -> Tensor:
    """A field of one or two dimensions as one of three: axes of one cell repeated to a number of cells."""
    return x.expand(*x.shape[:-3], *(cells if n == 1 else n for n in x.shape[-3:]))


def flatten(x: Float[Tensor, "*b x y z"], shape: Sequence[int]) -> Tensor:
    """The mean over the axes along which a box of this shape has one cell: what `extrude` is undone by."""
    thin = [axis for axis, n in enumerate(shape, start=-3) if n == 1]
    return x.mean(thin, keepdim=True) if thin else x


def pad_by_boundary(x: Float[Tensor, "b c x y z"], periodic: Periodic) -> Tensor:
    """One ghost cell on every side: wrapped along periodic axes, zero beyond walls."""
    wrap = [int(p) for p in reversed(periodic) for _ in range(2)]
    if any(wrap):
        x = F.pad(x, wrap, mode="circular")
    return x if all(wrap) else F.pad(x, [1 - w for w in wrap])


class BoundaryConv(nn.Conv3d):
    """A 3³ convolution padded by `pad_by_boundary`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3)

    def forward(self, x: Tensor, periodic: Periodic) -> Tensor:  # type: ignore[override]
        return super().forward(pad_by_boundary(x, periodic))


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))); the identity at the start."""

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1, self.conv2 = BoundaryConv(channels, channels), BoundaryConv(channels, channels)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, periodic: Periodic) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), periodic)
        return x + self.conv2(F.silu(self.norm2(h)), periodic)


class Level(nn.Module):
    """The blocks of one resolution, told of the geometry at that resolution.

    Attributes:
        recompute: in training, keep no activations but those between the blocks, and work out the others again for the
            gradient. See `latentphys.training.recompute.set_recompute`.
    """

    recompute: bool = False

    def __init__(self, channels: int, num_blocks: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.geometry = nn.Conv3d(NUM_GEOMETRY_FEATURES * factor**3, channels, kernel_size=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(num_blocks))

    def forward(self, x: Tensor, features: Tensor, periodic: Periodic) -> Tensor:
        x = x + self.geometry(space_to_depth(features, self.factor))
        again = self.recompute and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, periodic, use_reentrant=False) if again else block(x, periodic)
        return x
