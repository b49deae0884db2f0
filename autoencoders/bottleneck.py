"""The bottleneck: latents are bounded, and noise says how finely they may be told apart."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

SATURATION = 10.0
"""Latents of unit variance are bounded by this; up to half of it they are what the network says. Flows in pores are
intermittent: a bound of 5 doubles the error of a linear code there."""


class Reconstruction(NamedTuple):
    """What an autoencoder makes of the packed fields of a family.

    Args:
        fields: the decoded fields, packed, in the stores' units, FP32.
        latent: what the encoder said of them, before any noise, FP32.
        noise: standard deviations of the noise on each latent channel, which acts in training; None without noise.
    """

    fields: Float[Tensor, "b c nx ny nz"]
    latent: Float[Tensor, "b l x y z"]
    noise: Float[Tensor, "l 1 1 1"] | None = None


class Bottleneck(nn.Module):
    """Bounds latents and, in training, disturbs them, so that near latents decode alike.

    Noise is a share of each channel's RMS over the batch. The encoder cannot escape it: not in what the decoder sees,
    since a channel ten times as large gets ten times the noise, and not in the gradient either, which flows through
    the RMS as well. Were the RMS taken as a constant, the gradient would promise a better ratio for larger latents and
    drive them into the bound, step by step, without ever getting it.

    Learned noise has a standard deviation of its own for each channel, in the latents' units. Nothing but `LatentKL`
    keeps it from vanishing, and the latents from outgrowing it.

    Args:
        channels: learnt channels of the latent; needed where noise is learned. Default: any.
        bound: B, the largest magnitude of a latent number. Default: 10; `math.inf` for none.
        noise: standard deviation, as a share of the RMS of each channel, or, learned, the one to start from. Good
            values: 0.01…0.05, learned 0.1. Default: none.
        learned: whether the noise is learned.

    Raises:
        ValueError: a bound or noise that is none, or learned noise without channels or a value to start from.
    """

    def __init__(
        self, channels: int | None = None, bound: float = SATURATION, noise: float = 0.0, learned: bool = False
    ) -> None:
        super().__init__()
        if not bound > 0:
            raise ValueError(f"Expected a positive bound of the latents, got {bound}; math.inf is none.")
        if not 0 <= noise < math.inf:
            raise ValueError(f"Expected finite latent noise ≥ 0, got {noise}.")
        if learned and (not channels or not noise):
            raise ValueError(
                "Expected the number of channels and a positive noise to start from where noise is learned, got "
                f"channels = {channels} and noise = {noise}."
            )
        self.channels, self.bound, self.noise = channels, float(bound), float(noise)
        start = torch.full((channels or 0, 1, 1, 1), math.log(noise)) if learned else None
        self.log_deviation = None if start is None else nn.Parameter(start)

    def forward(self, z: Float[Tensor, "b l x y z"]) -> Float[Tensor, "b l x y z"]:
        """z / (1 + (z/B)⁴)^(¼), the identity up to half of B and bounded by B, in FP32 whatever autocast made of z.

        Raises:
            ValueError: another number of channels than the bottleneck has.
        """
        if self.channels not in (None, z.shape[1]):
            raise ValueError(f"Expected latents of {self.channels} channels, got {z.shape[1]}.")
        z = z.float()
        return z * torch.rsqrt(torch.sqrt(1 + (z / self.bound).square().square()))

    def admit(self, latent: Float[Tensor, "b l x y z"]) -> Float[Tensor, "b l x y z"]:
        """The nearest latent within the bound: beyond it there are none that an encoder says."""
        return latent.clamp(-self.bound, self.bound)

    def deviation(self, latent: Float[Tensor, "b l x y z"]) -> Float[Tensor, "l 1 1 1"]:
        """Standard deviation of the noise on each channel."""
        if self.log_deviation is not None:
            return self.log_deviation.exp()
        size = torch.linalg.vector_norm(latent, dim=(0, 2, 3, 4)) / math.sqrt(latent[:, 0].numel())
        return (self.noise * size).reshape(-1, 1, 1, 1)

    def disturb(
        self, latent: Float[Tensor, "b l x y z"]
    ) -> tuple[Float[Tensor, "b l x y z"], Float[Tensor, "l 1 1 1"] | None]:
        """The latent with noise while training, as it is otherwise; and the noise's standard deviations, if any."""
        if not self.noise:
            return latent, None
        deviation = self.deviation(latent)
        return (latent + deviation * torch.randn_like(latent) if self.training else latent), deviation
