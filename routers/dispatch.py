"""Send tokens to their experts and bring the weighted results back.

Shape suffixes: T tokens, k experts per token, N = T·k rows, D model width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentphys.routers.experts import Experts

BACKENDS = ("auto", "grouped", "loop", "dense_static")


def check_backend(backend: str) -> None:
    """Refuse a dispatch backend that does not exist."""
    if backend not in BACKENDS:
        raise ValueError(f"Expected a dispatch backend of {' | '.join(BACKENDS)}, got {backend!r}.")


def dispatch(x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, experts: Experts, backend: str = "auto") -> Tensor:
    """y_t = Σ_j w_tj · expert_{ids_tj}(x_t).

    Args:
        x_TD: tokens, ``(T, D)``; T may be 0.
        ids_Tk: the experts of each token, ``(T, k)`` int64 in 0…E−1.
        weights_Tk: their weights, ``(T, k)``.
        experts: the experts; any of them may get no token.
        backend: ``grouped`` sorts the tokens by expert and runs one grouped matmul per weight, in FP32 or 16 bits.
            ``loop`` runs the experts one after the other in any precision; it is the reference. ``dense_static`` runs
            every expert on every token, E/k times the work, and its graph is static. ``auto`` is dense_static in an
            export or trace, loop in FP64, else grouped.

    Returns:
        the combined outputs, ``(T, D)``, in the dtype in which the experts ran.

    Raises:
        ValueError: an unknown backend, shapes that do not match, or FP64 tokens for ``grouped``.
    """
    check_backend(backend)
    if x_TD.ndim != 2 or x_TD.shape[1] != experts.dim:
        raise ValueError(f"Expected tokens of shape (T, {experts.dim}), got {tuple(x_TD.shape)}.")
    if ids_Tk.ndim != 2 or ids_Tk.shape[0] != x_TD.shape[0] or ids_Tk.shape != weights_Tk.shape:
        raise ValueError(
            f"Expected ids and weights of one shape (T, k) with T = {x_TD.shape[0]}, "
            f"got {tuple(ids_Tk.shape)} and {tuple(weights_Tk.shape)}."
        )
    if backend == "auto":
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            backend = "dense_static"
        else:
            backend = "loop" if x_TD.dtype == torch.float64 else "grouped"
    if backend == "grouped":
        return _grouped(x_TD, ids_Tk, weights_Tk, experts)
    if backend == "loop":
        return _loop(x_TD, ids_Tk, weights_Tk, experts)
    return _dense_static(x_TD, ids_Tk, weights_Tk, experts)


def _grouped(x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, experts: Experts) -> Tensor:
    if x_TD.dtype == torch.float64:
        raise ValueError("Expected FP32 or a 16-bit type for dispatch 'grouped', got FP64; use 'loop' or 'auto'.")
    ids_N = ids_Tk.flatten()
    order_N = ids_N.argsort(stable=True)
    # searchsorted rather than bincount, which makes a GPU wait for the host.
    all_E = torch.arange(experts.num_experts, device=ids_N.device)
    ends_E = torch.searchsorted(ids_N[order_N], all_E, right=True, out_int32=True)
    rank_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
    k = ids_Tk.shape[1]
    y_ND = experts(_ToExperts.apply(x_TD, order_N, rank_N, k), ends_E)
    y_TkD = _FromExperts.apply(y_ND, order_N, rank_N).unflatten(0, (-1, k))
    return (y_TkD * weights_Tk[..., None]).sum(1).to(y_ND.dtype)


class _ToExperts(torch.autograd.Function):
    """Rows in expert order. The gradient is a gather as well: no atomics, so the same bits each time, and dense."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, rank_N: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(rank_N)
        ctx.k = k
        return x_TD[order_N // k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (rank_N,) = ctx.saved_tensors
        return grads[0][rank_N].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _FromExperts(torch.autograd.Function):
    """Rows back in token order; the gradient is the inverse gather."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, order_N: Tensor, rank_N: Tensor) -> Tensor:
        ctx.save_for_backward(order_N)
        return y_ND[rank_N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order_N,) = ctx.saved_tensors
        return grads[0][order_N], None, None


def _loop(x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, experts: Experts) -> Tensor:
    places = [(ids_Tk == expert).nonzero(as_tuple=True) for expert in range(experts.num_experts)]
    token_N = torch.cat([token for token, _ in places])
    slot_N = torch.cat([slot for _, slot in places])
    y_ND = torch.cat([experts.one(x_TD[token], expert) for expert, (token, _) in enumerate(places)])
    weighted_ND = y_ND * weights_Tk[token_N, slot_N, None]
    return weighted_ND.new_zeros(len(x_TD), experts.dim).index_add(0, token_N, weighted_ND).to(y_ND.dtype)


def _dense_static(x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, experts: Experts) -> Tensor:
    weights_TE = weights_Tk.new_zeros(len(x_TD), experts.num_experts).scatter_add(1, ids_Tk, weights_Tk)
    # Expert after expert: one batched product for all of them holds E·T·2F numbers and is twice as slow.
    y_TD = experts.one(x_TD, 0)
    total_TD = y_TD * weights_TE[:, :1]
    for expert in range(1, experts.num_experts):
        total_TD = total_TD + experts.one(x_TD, expert) * weights_TE[:, expert, None]
    return total_TD.to(y_TD.dtype)
