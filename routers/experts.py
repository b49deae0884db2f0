"""Feed-forwards, alone and stacked into one tensor per weight.

Shape suffixes: T tokens, N rows (tokens repeated for each of their experts), D model width, F hidden width,
G = 2F (SwiGLU, gate and up side by side) or F (GELU), E experts; K and M the inner and outer width of either product.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

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


def _swiglu(hidden: Tensor) -> Tensor:
    """silu(gate) · up, of a last axis that holds gate and up side by side."""
    if hidden.requires_grad and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        return _SwiGLU.apply(hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """The same, with a gradient that is written in place: autograd would keep silu(gate), and join two halves."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        gate, up = hidden.chunk(2, dim=-1)
        result = torch.empty_like(hidden)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


def _gelu(hidden: Tensor) -> Tensor:
    return F.gelu(hidden, approximate="tanh")


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {"swiglu": (_swiglu, 2), "gelu": (_gelu, 1)}
"""What stands between the two products, and how many times the hidden width it takes."""


def activation_of(name: str) -> tuple[Callable[[Tensor], Tensor], int]:
    """An activation and its width factor; ValueError where there is none of that name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"Expected an activation of {' | '.join(ACTIVATIONS)}, got {name!r}.")
    return ACTIVATIONS[name]


class FeedForward(nn.Module):
    """W_out (silu(W_gate x) · W_up x), or W_out gelu(W_in x), for any leading axes.

    Args:
        dim: model width D.
        hidden: hidden width F.
        activation: ``swiglu | gelu``.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(self, dim: int, hidden: int, activation: str = "swiglu") -> None:
        super().__init__()
        self.activate, factor = activation_of(activation)
        self.w_in = nn.Linear(dim, factor * hidden, bias=False)
        self.w_out = nn.Linear(hidden, dim, bias=False)
        _init(self.w_in.weight, dim)
        _init(self.w_out.weight, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(self.activate(self.w_in(x)))


class Experts(nn.Module):
    """E feed-forwards, in the two forms that `dispatch` needs: grouped, and one by one.

    `latentphys.training.sharding` may spread them over the ranks of a process `group`. Each rank then holds L = E/P of
    them, one slice of the stacked weights, and takes rows and counts for these alone; see `run_across_ranks`.

    Args:
        num_experts: number of experts E, ≥ 1.
        dim: model width D, a multiple of 8.
        hidden: hidden width F of each expert, a multiple of 8.
        activation: ``swiglu | gelu``.

    Raises:
        ValueError: no expert, a width that is not a multiple of 8, or an unknown activation.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, activation: str = "swiglu") -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"Expected at least 1 expert, got num_experts = {num_experts}.")
        check_width("dim", dim)
        check_width("hidden", hidden)
        self.num_experts, self.dim, self.hidden, self.activation = num_experts, dim, hidden, activation
        self.activate, factor = activation_of(activation)
        self.w_in_EDG = nn.Parameter(_init(torch.empty(num_experts, dim, factor * hidden), dim))
        self.w_out_EFD = nn.Parameter(_init(torch.empty(num_experts, hidden, dim), hidden))
        self.group: ProcessGroup | None = None

    def forward(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        """Grouped: expert e takes rows ends[e−1]…ends[e]−1 of ``x``; ``ends`` is int32 and ends[−1] = N."""
        w_in_EDG, w_out_EFD = self.weights()
        if torch.is_autocast_enabled(x_ND.device.type):
            # Autocast does not know grouped matmul: without this it runs in FP32.
            dtype = torch.get_autocast_dtype(x_ND.device.type)
            x_ND, w_in_EDG, w_out_EFD = x_ND.to(dtype), w_in_EDG.to(dtype), w_out_EFD.to(dtype)
        if _runs_now_on_the_cpu(x_ND) and not torch.is_grad_enabled():
            return self._few_at_a_time(x_ND, ends_E, w_in_EDG, w_out_EFD)
        grouped_mm = F.grouped_mm if x_ND.dtype == torch.bfloat16 else _grouped_mm
        hidden_NG = grouped_mm(x_ND, w_in_EDG, offs=ends_E)
        return grouped_mm(self.activate(hidden_NG), w_out_EFD, offs=ends_E)

    def _few_at_a_time(self, x_ND: Tensor, ends_E: Tensor, w_in_EDG: Tensor, w_out_EFD: Tensor) -> Tensor:
        """The same where values can be read for nothing and no gradient is asked for.

        As many experts at a time as there are threads, rows filled up with zeros to the most that one of them has: each
        thread then has a whole product, where threads that share small ones wait for each other, and hidden rows stay
        in the cache. Where that would fill up more than half as many rows again, as with one busy expert, or there is
        one thread, they run one by one.
        """
        ends, num_threads = ends_E.tolist(), torch.get_num_threads()
        # Idle experts behind the last busy one do not change how the others are grouped, nor how they round.
        ends = ends[: bisect_left(ends, ends[-1]) + 1]
        y_ND, starts = torch.empty_like(x_ND), [0, *ends[:-1]]
        for first in range(0, len(ends), num_threads):
            few = slice(first, min(first + num_threads, len(ends)))
            bounds = list(zip(starts[few], ends[few], strict=True))
            counts = [end - start for start, end in bounds]
            if num_threads == 1 or max(counts) * len(counts) > 1.5 * sum(counts):
                for expert, (start, end) in enumerate(bounds, first):
                    y_ND[start:end] = self.activate(x_ND[start:end] @ w_in_EDG[expert]) @ w_out_EFD[expert]
                continue
            rows = x_ND.new_zeros(len(counts), max(counts), self.dim)
            for row, (start, end) in zip(rows, bounds, strict=True):
                row[: end - start] = x_ND[start:end]
            rows = self.activate(rows @ w_in_EDG[few]) @ w_out_EFD[few]
            for row, (start, end) in zip(rows, bounds, strict=True):
                y_ND[start:end] = row[: end - start]
        return y_ND

    def each(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        """The same, one expert after the other and in any precision; waits for the device to read ``ends``."""
        starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
        rows = x_ND.split((ends_E - starts_E).tolist())
        return torch.cat([self.one(x, expert) for expert, x in enumerate(rows)])

    def one(self, x_ND: Tensor, expert: int) -> Tensor:
        """Every row through one expert."""
        w_in_EDG, w_out_EFD = self.weights()
        return self.activate(x_ND @ w_in_EDG[expert]) @ w_out_EFD[expert]

    def weights(self) -> tuple[Tensor, Tensor]:
        """The weights of the experts that this rank holds."""
        if self.group is None:
            return self.w_in_EDG, self.w_out_EFD
        return cast("DTensor", self.w_in_EDG).to_local(), cast("DTensor", self.w_out_EFD).to_local()

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, dim={self.dim}, hidden={self.hidden}, activation={self.activation}"


def _runs_now_on_the_cpu(x: Tensor) -> bool:
    """Whether reading a value waits for nothing: neither a GPU, nor numbers that a compiler or a count leaves out."""
    followed = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return type(x) is Tensor and x.device.type == "cpu" and not followed


@torch.compiler.disable
def _grouped_mm(a_NK: Tensor, b_EKM: Tensor, offs: Tensor) -> Tensor:
    """Grouped matmul behind a graph break: torch.compile takes it in bfloat16 only (torch 2.13)."""
    return F.grouped_mm(a_NK, b_EKM, offs=offs)


def _init(weight: Tensor, fan_in: int) -> Tensor:
    """Truncated normal of variance 1/fan_in. The fans that torch reads off a stacked (E, …) tensor are wrong."""
    std = 1 / math.sqrt(fan_in)
    return nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
