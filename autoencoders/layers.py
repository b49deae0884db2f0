"""Layers that know the box: patches, convolutions padded by boundary type, residual blocks told where they are.

Nothing here takes statistics over the box: what a cell becomes depends on the cells near it, on the geometry there, and
on a few numbers that the whole box shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentphys.grid import Boundaries, Geometry

Basis = Literal["patch", "haar"]
NUM_GEOMETRY_FEATURES = 2
CONDITION_WIDTH = 64
"""Channels of the embedded condition."""


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


@dataclass(frozen=True)
class Patches:
    """Blocks of factor³ cells as channels, without loss: an isometry either way.

    Args:
        factor: cells per axis of a block.
        basis: ``patch``, the cells one after another, or ``haar``, the averages and differences of each 2³ of them, and
            again of the averages: a block in which nothing changes has one coefficient, √factor³ times its value.

    Raises:
        ValueError: a basis that is none, or Haar blocks whose factor is no power of two.
    """

    factor: int
    basis: Basis = "patch"

    def __post_init__(self) -> None:
        if self.basis not in get_args(Basis):
            raise ValueError(f"Expected a basis of {' | '.join(get_args(Basis))}, got {self.basis!r}.")
        if self.factor < 1 or (self.basis == "haar" and self.factor & (self.factor - 1)):
            need = "a power of two for the Haar basis" if self.basis == "haar" else "at least 1"
            raise ValueError(f"Expected a stem of {need}, got {self.factor}.")

    def split(self, x: Float[Tensor, "b c nx ny nz"]) -> Float[Tensor, "b d x y z"]:
        if self.basis == "patch" or self.factor == 1:
            return space_to_depth(x, self.factor)
        parts = _butterflies(rearrange(x, "b c (x i) (y j) (z k) -> b i j k c x y z", i=2, j=2, k=2)).flatten(1, 3)
        half = self.factor // 2
        details = space_to_depth(parts[:, 1:].flatten(1, 2), half)
        return torch.cat([Patches(half, self.basis).split(parts[:, 0]), details], dim=1)

    def join(self, x: Float[Tensor, "b d x y z"]) -> Float[Tensor, "b c nx ny nz"]:
        """The inverse of `split`."""
        if self.basis == "patch" or self.factor == 1:
            return depth_to_space(x, self.factor)
        half = self.factor // 2
        averages, details = x.tensor_split([x.shape[1] // 8], dim=1)
        finer = [Patches(half, self.basis).join(averages), depth_to_space(details, half)]
        parts = torch.cat(finer, dim=1).unflatten(1, (2, 2, 2, -1))
        return rearrange(_butterflies(parts), "b i j k c x y z -> b c (x i) (y j) (z k)")


def _butterflies(x: Float[Tensor, "b 2 2 2 c x y z"]) -> Tensor:
    """Sums and differences along three axes of two, orthonormal; its own inverse."""
    for axis in (1, 2, 3):
        low, high = x.unbind(axis)
        x = torch.stack([low + high, low - high], dim=axis)
    return x * 8**-0.5


def pad_by_boundary(x: Float[Tensor, "b c x y z"], boundaries: Boundaries) -> Tensor:
    """One ghost cell on every side of the box.

    Beyond a periodic side the box begins again; free slip and outflow repeat the last cell, so that nothing changes
    across the side; no slip and inflow have zeros.
    """
    for axis, sides in enumerate(boundaries, start=2):
        low, high = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
        if sides[0] == "periodic":
            low, high = high, low
        else:
            low, high = (
                end if side in ("free_slip", "outflow") else torch.zeros_like(end)
                for end, side in zip((low, high), sides, strict=True)
            )
        x = torch.cat([low, x, high], dim=axis)
    return x


class BoundaryConv(nn.Conv3d):
    """A 3³ convolution padded by `pad_by_boundary`."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, bias=bias)

    def forward(self, x: Tensor, boundaries: Boundaries) -> Tensor:  # type: ignore[override]
        return super().forward(pad_by_boundary(x, boundaries))


class LinearPath(BoundaryConv):
    """A linear map of each cell and its 26 neighbours, without bias, in which every weight counts 1/27.

    Optimisers of the Adam kind move all weights by steps of one size, whose sum over 27 cells would be 27 times that of
    a map of single cells and undo a fitted code (`linear_code`) within a few steps.
    """

    GAIN = 1 / 27

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, bias=False)

    def forward(self, x: Tensor, boundaries: Boundaries) -> Tensor:  # type: ignore[override]
        return F.conv3d(pad_by_boundary(x, boundaries), self.GAIN * self.weight)

    @torch.no_grad()
    def set_map(self, weight: Float[Tensor, "o i 3 3 3"]) -> None:
        """Let it be this convolution."""
        self.weight.copy_(weight / self.GAIN)


def fp32(x: Tensor) -> Tensor:
    """In FP32 or more. Both ends of the networks work so under autocast too: eight bits would be felt in a latent."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zeroed(layer: nn.Conv3d | nn.Linear) -> nn.Conv3d | nn.Linear:
    """A layer that says zero at the start."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def unused(modules: Iterable[nn.Module]) -> Tensor | float:
    """Zero, with a gradient of zero for every parameter of modules that a step leaves out, as data-parallel training
    asks of all."""
    return sum(0.0 * p.sum() for module in modules for p in module.parameters())


class ChannelNorm(nn.Module):
    """x / √(⟨x²⟩ + ε) with the mean over the channels of each cell, times a learned gain; the mean in FP32 or more."""

    def __init__(self, channels: int, eps: float = 1e-4) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Tensor:
        square = fp32(x).square()
        size = torch.rsqrt(square.mean(dim=1, keepdim=True) + self.eps)
        return x * size.to(x.dtype) * self.gain.to(x.dtype).reshape(-1, 1, 1, 1)


def condition_embedding(num_conditions: int) -> nn.Sequential:
    """What all blocks of a network are told of the box as a whole."""
    first, second = nn.Linear(num_conditions, CONDITION_WIDTH), nn.Linear(CONDITION_WIDTH, CONDITION_WIDTH)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU())


class ResidualBlock(nn.Module):
    """x + conv(act(γ norm(conv(act(norm(x)))) + β)), with γ and β from the condition; the identity at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1, self.conv2 = BoundaryConv(channels, channels), BoundaryConv(channels, channels)
        self.film = nn.Linear(CONDITION_WIDTH, 2 * channels)
        zeroed(self.conv2)
        zeroed(self.film)

    def forward(
        self, x: Float[Tensor, "b c x y z"], condition: Float[Tensor, "#b e"], boundaries: Boundaries
    ) -> Float[Tensor, "b c x y z"]:
        scale, shift = self.film(condition)[..., None, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)), boundaries)
        return x + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift), boundaries)


class Level(nn.Module):
    """The blocks of one resolution, told of the geometry at that resolution: x (1 + γ) + β, then the blocks.

    γ and β, zero at the start, are a linear map of the features in each cell's block of factor³.

    Attributes:
        recompute: in training, keep no activations but those between the blocks, and work out the others again for the
            gradient. See `latentphys.training.recompute.set_recompute`.
    """

    recompute: bool = False

    def __init__(self, channels: int, num_blocks: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.geometry = nn.Conv3d(NUM_GEOMETRY_FEATURES * factor**3, 2 * channels, kernel_size=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(num_blocks))
        zeroed(self.geometry)

    def forward(self, x: Tensor, features: Tensor, condition: Tensor, boundaries: Boundaries) -> Tensor:
        scale, shift = self.geometry(space_to_depth(features, self.factor)).chunk(2, dim=1)
        x = x * (1 + scale) + shift
        again = self.recompute and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            if again:
                x = checkpoint(block, x, condition, boundaries, use_reentrant=False)
            else:
                x = block(x, condition, boundaries)
        return x


class Down(nn.Module):
    """Half the resolution: a linear map of each 2³ cells, beside their averages over groups of channels.

    Reference: Chen et al. 2024, Deep Compression Autoencoder (arXiv 2410.10733), section 3.2.

    Raises:
        ValueError: 8 · fine channels that are no multiple of the coarse ones.
    """

    def __init__(self, fine: int, coarse: int) -> None:
        super().__init__()
        _check_widths(fine, coarse)
        self.coarse = coarse
        self.conv = nn.Conv3d(8 * fine, coarse, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = space_to_depth(x, 2)
        return self.conv(x) + x.unflatten(1, (self.coarse, -1)).mean(dim=2)


class Up(nn.Module):
    """Twice the resolution: the mirror image of `Down`, with repeated channels in place of averages."""

    def __init__(self, coarse: int, fine: int) -> None:
        super().__init__()
        _check_widths(fine, coarse)
        self.repeats = 8 * fine // coarse
        self.conv = nn.Conv3d(coarse, 8 * fine, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(self.conv(x) + x.repeat_interleave(self.repeats, dim=1), 2)


def _check_widths(fine: int, coarse: int) -> None:
    if 8 * fine % coarse:
        raise ValueError(f"Expected widths of which 8 · finer is a multiple of the coarser, got {fine} and {coarse}.")
