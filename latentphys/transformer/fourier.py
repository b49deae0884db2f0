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

    F is the orthonormal transform of real fields. W₁ and W₂ are complex and block diagonal, the same for every mode, so
    that latents of any shape pass; relu and shrink act on real and imaginary parts. N cells cost O(N log N), where
    attention costs O(N²).

    Every axis is taken as periodic, walls too. Since relu sees phases, and phases say where the origin stands, the
    mixer does not commute with translations, and since the transform keeps half of the modes of the z axis, nor with
    reflections or with turns that move z. Both are so in the reference.

    Args:
        dim: model width, a multiple of ``num_blocks``.
        num_blocks: diagonal blocks.
        sparsity: threshold λ ≥ 0 of the soft shrinkage, sign(a) max(|a| − λ, 0), in units in which white noise of unit
            variance has modes of unit variance. In the reference: 0.01.

    Raises:
        ValueError: a width that the blocks do not divide, a negative sparsity, or tokens that do not fill the box.

    Reference: Guibas et al. 2022, arXiv 2111.13587, eq. 6–9; the mixer of DPOT (arXiv 2403.03542) and MoE-POT.
    """

    def __init__(self, dim: int, num_blocks: int = 8, sparsity: float = 0.0) -> None:
        super().__init__()
        if num_blocks < 1 or dim < 1 or dim % num_blocks:
            raise ValueError(f"Expected a width that {num_blocks} blocks divide, got dim = {dim}.")
        if not sparsity >= 0:
            raise ValueError(f"Expected a sparsity ≥ 0, got {sparsity}.")
        self.dim, self.num_blocks, self.sparsity = dim, num_blocks, sparsity
        width = dim // num_blocks
        std = 1 / math.sqrt(2 * width)
        # The leading axis holds real and imaginary parts: exported graphs have no complex parameters or products.
        self.w1 = nn.Parameter(std * torch.randn(2, num_blocks, width, width))
        self.w2 = nn.Parameter(std * torch.randn(2, num_blocks, width, width))
        self.b1 = nn.Parameter(torch.zeros(2, num_blocks, width))
        self.b2 = nn.Parameter(torch.zeros(2, num_blocks, width))

    def forward(self, x: Float[Tensor, "b token dim"], shape: tuple[int, int, int]) -> Float[Tensor, "b token dim"]:
        """Mix the tokens of boxes of ``shape`` cells, in FP32 or more whatever the autocast around it."""
        if (int(x.shape[1]), x.shape[2]) != (math.prod(shape), self.dim):
            raise ValueError(
                f"Expected tokens of shape (b, {math.prod(shape)}, {self.dim}) for {shape} cells, got {tuple(x.shape)}."
            )
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(self.w1.dtype, torch.float32)  # there is no transform in bfloat16
            cells = rearrange(x.to(dtype), "b (x y z) d -> b x y z d", x=shape[0], y=shape[1], z=shape[2])
            modes = torch.view_as_real(torch.fft.rfftn(cells, dim=(1, 2, 3), norm="ortho"))
            parts = rearrange(modes, "b x y z (k d) r -> r (b x y z) k d", k=self.num_blocks)
            out = _affine(F.relu(_affine(parts, self.w1, self.b1)), self.w2, self.b2)
            if self.sparsity:
                out = F.softshrink(out, self.sparsity)
            out = rearrange(out, "r n k d -> n (k d) r").reshape(modes.shape)
            back = torch.fft.irfftn(torch.view_as_complex(out.contiguous()), s=shape, dim=(1, 2, 3), norm="ortho")
        return x + rearrange(back, "b x y z d -> b (x y z) d").to(x.dtype)


def _affine(
    parts: Float[Tensor, "2 mode block width"],
    weight: Float[Tensor, "2 block width width"],
    bias: Float[Tensor, "2 block width"],
) -> Float[Tensor, "2 mode block width"]:
    """W m + b for complex numbers whose real and imaginary parts stand along the leading axis."""
    weight, bias = weight.to(parts.dtype), bias.to(parts.dtype)
    by_real, by_imaginary = (torch.einsum("rnkd,kde->rnke", parts, w) for w in weight)
    return by_real + torch.stack([-by_imaginary[1], by_imaginary[0]]) + bias[:, None]
