"""SwiGLU feed-forwards, alone and stacked into one tensor per weight.

Shape suffixes: T tokens, N rows (tokens repeated for each of their experts), D model width, F hidden width,
G = 2F (gate and up side by side), E experts; K and M the inner and outer width of either product.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROW_MULTIPLE = 8
"""Widths are multiples of this, so that a row of 16-bit numbers is a multiple of 16 bytes, as grouped matmul needs."""


def check_width(name: str, width: int) -> None:
    """Refuse a width whose rows grouped matmul cannot take."""
    if width < 1 or width % ROW_MULTIPLE:
        remedy = max(ROW_MULTIPLE, math.ceil(width / ROW_MULTIPLE) * ROW_MULTIPLE)
        raise ValueError(
            f"Expected {name} to be a multiple of {ROW_MULTIPLE} (rows of 16 bytes for grouped matmul), got {width}; "
            f"use {remedy}."
        )


def gate(hidden: Tensor) -> Tensor:
    """silu(gate) · up, of a last axis that holds gate and up side by side."""
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) · W_up x), for any leading axes.

    Args:
        dim: model width D.
        hidden: hidden width F.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w_in = nn.Linear(dim, 2 * hidden, bias=False)
        self.w_out = nn.Linear(hidden, dim, bias=False)
        _init(self.w_in.weight, dim)
        _init(self.w_out.weight, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(gate(self.w_in(x)))


class SwiGLUExperts(nn.Module):
    """E SwiGLU feed-forwards, in the two forms that `dispatch` needs: grouped, and one by one.

    Args:
        num_experts: number of experts E, ≥ 1.
        dim: model width D, a multiple of 8.
        hidden: hidden width F of each expert, a multiple of 8.

    Raises:
        ValueError: no expert, or a width that is not a multiple of 8.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"Expected at least 1 expert, got num_experts = {num_experts}.")
        check_width("dim", dim)
        check_width("hidden", hidden)
        self.num_experts, self.dim, self.hidden = num_experts, dim, hidden
        self.w_in_EDG = nn.Parameter(_init(torch.empty(num_experts, dim, 2 * hidden), dim))
        self.w_out_EFD = nn.Parameter(_init(torch.empty(num_experts, hidden, dim), hidden))

    def forward(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        """Grouped: expert e takes rows ends[e−1]…ends[e]−1 of ``x``; ``ends`` is int32 and ends[−1] = N."""
        w_in_EDG: Tensor = self.w_in_EDG
        w_out_EFD: Tensor = self.w_out_EFD
        if torch.is_autocast_enabled(x_ND.device.type):
            # Autocast does not know grouped matmul: without this it runs in FP32.
            dtype = torch.get_autocast_dtype(x_ND.device.type)
            x_ND, w_in_EDG, w_out_EFD = x_ND.to(dtype), w_in_EDG.to(dtype), w_out_EFD.to(dtype)
        grouped_mm = F.grouped_mm if x_ND.dtype == torch.bfloat16 else _grouped_mm
        hidden_NG = grouped_mm(x_ND, w_in_EDG, offs=ends_E)
        return grouped_mm(gate(hidden_NG), w_out_EFD, offs=ends_E)

    def one(self, x_ND: Tensor, expert: int) -> Tensor:
        """Every row through one expert."""
        return gate(x_ND @ self.w_in_EDG[expert]) @ self.w_out_EFD[expert]

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, dim={self.dim}, hidden={self.hidden}"


@torch.compiler.disable
def _grouped_mm(a_NK: Tensor, b_EKM: Tensor, offs: Tensor) -> Tensor:
    """Grouped matmul behind a graph break: torch.compile takes it in bfloat16 only (torch 2.13)."""
    return F.grouped_mm(a_NK, b_EKM, offs=offs)


def _init(weight: Tensor, fan_in: int) -> Tensor:
    """Truncated normal of variance 1/fan_in. The fans that torch reads off a stacked (E, …) tensor are wrong."""
    std = 1 / math.sqrt(fan_in)
    return nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
