"""Mixing of latent cells by their Fourier modes, in place of attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class FourierMixer(nn.Module):
    """The adaptive Fourier neural operator: one small complex network for all modes.

        y = x + F⁻¹[ shrink( W₂ relu(W₁ x̂ + b₁) + b₂ ) ],      x̂ = F x

    Every axis is taken as periodic. W₁ and W₂ are complex and block diagonal, the same for every mode, so that latents
    of any shape pass. Two products per mode cost O(N log N) for N cells, where attention costs O(N²).

    Args:
        dim: model width, a multiple of ``num_blocks``.
        num_blocks: diagonal blocks.
        sparsity: threshold λ of the soft shrinkage, ≥ 0, for transforms in which a mode of unit cells has unit size.

    Raises:
        ValueError: a width that the blocks do not divide, or a negative sparsity.

    Reference: Guibas et al. 2022, arXiv 2111.13587, eq. 6–9; the mixer of DPOT (arXiv 2403.03542) and MoE-POT.
    """

    def __init__(self, dim: int, num_blocks: int = 8, sparsity: float = 0.0) -> None:
        super().__init__()
        if num_blocks < 1 or dim % num_blocks:
            raise ValueError(f"Expected a width that {num_blocks} blocks divide, got dim = {dim}.")
        if sparsity < 0:
            raise ValueError(f"Expected a sparsity ≥ 0, got {sparsity}.")
        self.num_blocks, self.sparsity = num_blocks, sparsity
        width = dim // num_blocks
        std = 1 / math.sqrt(2 * width)
        self.w1 = nn.Parameter(std * torch.randn(2, num_blocks, width, width))
        self.w2 = nn.Parameter(std * torch.randn(2, num_blocks, width, width))
        self.b1 = nn.Parameter(torch.zeros(2, num_blocks, width))
        self.b2 = nn.Parameter(torch.zeros(2, num_blocks, width))

    def forward(self, x: Float[Tensor, "b token dim"], shape: tuple[int, int, int]) -> Float[Tensor, "b token dim"]:
        """Mix the tokens of boxes of ``shape`` cells, in FP32 or more whatever the autocast around it."""
        with torch.autocast(x.device.type, enabled=False):
            values = x.to(self.w1.dtype)
            cells = rearrange(values, "b (x y z) d -> b x y z d", x=shape[0], y=shape[1], z=shape[2])
            modes = torch.view_as_real(torch.fft.rfftn(cells, dim=(1, 2, 3), norm="ortho"))
            hidden = F.relu(self._product(rearrange(modes, "b x y z (k d) r -> r (b x y z) k d", k=self.num_blocks), 1))
            out = F.softshrink(self._product(hidden, 2), self.sparsity)
            out = rearrange(out, "r n k d -> n (k d) r").reshape(modes.shape)
            back = torch.fft.irfftn(torch.view_as_complex(out.contiguous()), s=shape, dim=(1, 2, 3), norm="ortho")
        return x + rearrange(back, "b x y z d -> b (x y z) d").to(x.dtype)

    def _product(self, modes: Tensor, layer: int) -> Tensor:
        """W m + b, in real arithmetic on the leading axis of real and imaginary parts."""
        weight, bias = (self.w1, self.b1) if layer == 1 else (self.w2, self.b2)
        real, imaginary = modes

        def times(part: Tensor, factor: Tensor) -> Tensor:
            return torch.einsum("nkd,kde->nke", part, factor)

        return torch.stack(
            [
                times(real, weight[0]) - times(imaginary, weight[1]) + bias[0],
                times(real, weight[1]) + times(imaginary, weight[0]) + bias[1],
            ]
        )
