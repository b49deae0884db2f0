"""Rotary positions on three axes, each periodic or walled.

A pair of channels (a, b) of a query or key at index i of an axis with n cells turns by an angle linear in i, so that
attention logits depend on differences of indices only:

    periodic   2π m i / n    with integer harmonics m, from 1 to n/2: exact under wrap-around
    walled     ω i           with geometric frequencies ω, from 1 rad per cell downwards
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

_LONGEST = 100.0


def num_pairs(head_dim: int) -> int:
    """Channel pairs that turn with each axis; what three equal shares leave over stays unturned.

    Raises:
        ValueError: too few channels for one pair per axis.
    """
    if head_dim < 6 or head_dim % 2:
        raise ValueError(f"Expected an even head width of at least 6 (a pair of channels per axis), got {head_dim}.")
    return head_dim // 6


def rotary(
    shape: tuple[int, int, int],
    periodic: tuple[bool, bool, bool],
    head_dim: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "2 token pair"]:
    """Cosine and sine of every angle, tokens in C order.

    Args:
        shape: latent cells per axis.
        periodic: whether each axis wraps around.
        head_dim: channels of an attention head, even and ≥ 6.

    Raises:
        ValueError: a head that is too narrow.
    """
    pairs = num_pairs(head_dim)
    angles = []
    for axis, (n, wraps) in enumerate(zip(shape, periodic, strict=True)):
        index = torch.arange(n, device=device)[:, None]
        if wraps:
            harmonics = [round(max(n // 2, 1) ** (j / max(pairs - 1, 1))) for j in range(pairs)]
            # Reduced in integers, so that a whole turn is no turn at all. A list as a tensor would make a GPU wait.
            angle = torch.cat([index * m % n for m in harmonics], dim=-1).to(dtype) * (2 * math.pi / n)
        else:
            exponents = torch.arange(pairs, device=device, dtype=dtype) / pairs
            angle = index.to(dtype) * _LONGEST**-exponents
        spread = [1, 1, 1, pairs]
        spread[axis] = n
        angles.append(angle.reshape(spread).expand(*shape, pairs))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(
    x: Float[Tensor, "*batch token channel"], table: Float[Tensor, "2 token pair"]
) -> Float[Tensor, "*batch token channel"]:
    """Turn the channel pairs of queries or keys by the angles of their tokens."""
    cos, sin = table.to(x.dtype)
    pairs = cos.shape[-1]
    a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)
