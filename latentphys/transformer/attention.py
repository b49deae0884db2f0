"""Full self-attention over all latent cells."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentphys.transformer.rotary import num_pairs, rotate

_KERNELS = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
BACKENDS = ("auto", *_KERNELS, "flash_attn")


class SelfAttention(nn.Module):
    """softmax(q̂ k̂ᵀ / √d) v with RMS-normalised, rotated queries and keys.

    Normalising queries and keys bounds the logits, which keeps 16-bit training stable.

    Args:
        dim: model width, a multiple of ``num_heads``.
        num_heads: attention heads.
        backend: ``auto`` lets torch choose; ``math``, ``flash`` and ``cudnn`` force one of its kernels; ``flash_attn``
            takes the package of that name.

    Raises:
        ValueError: a width that does not divide, an unknown backend, one that is missing here, or FP32 tokens for a
            kernel that has none.
    """

    def __init__(self, dim: int, num_heads: int, backend: str = "auto") -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Expected a width that {num_heads} heads divide, got dim = {dim}.")
        if backend not in BACKENDS:
            raise ValueError(f"Expected an attention backend of {' | '.join(BACKENDS)}, got {backend!r}.")
        if backend == "cudnn" and not torch.backends.cudnn.is_available():
            raise ValueError("Expected a torch with cuDNN for attention 'cudnn', got one without; use 'auto'.")
        if backend == "flash_attn" and find_spec("flash_attn") is None:
            raise ValueError("Expected the package flash-attn for attention 'flash_attn', got none; use 'auto'.")
        num_pairs(dim // num_heads)
        self.num_heads = num_heads
        self.backend = backend
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_q = nn.RMSNorm(dim // num_heads)
        self.norm_k = nn.RMSNorm(dim // num_heads)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Float[Tensor, "b token dim"], table: Float[Tensor, "2 token pair"]
    ) -> Float[Tensor, "b token dim"]:
        """Attend; ``table`` is what `rotary` makes for the tokens' positions."""
        q, k, v = rearrange(self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        # Under autocast q and k are 16-bit here: normalise and turn them in the precision of the weights.
        q = rotate(self.norm_q(q.to(self.norm_q.weight.dtype)), table).to(v.dtype)
        k = rotate(self.norm_k(k.to(self.norm_k.weight.dtype)), table).to(v.dtype)
        return self.to_out(rearrange(self._attend(q, k, v), "b h n d -> b n (h d)"))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half_only = self.backend in ("cudnn", "flash_attn") or (self.backend == "flash" and v.is_cuda)
        if half_only and v.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"Expected bfloat16 or float16 tokens for attention {self.backend!r}, got {v.dtype}; "
                "run under bf16 autocast or use 'auto'."
            )
        if self.backend == "flash_attn":
            from flash_attn import flash_attn_func

            return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        kernel = nullcontext() if self.backend == "auto" else sdpa_kernel(_KERNELS[self.backend])
        with kernel:
            return F.scaled_dot_product_attention(q, k, v)
