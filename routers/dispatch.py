"""Send tokens to their experts and bring the weighted results back.

Shape suffixes: T tokens, k experts per token, N = T·k rows, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from latentphys.routers.experts import Experts
from latentphys.routers.order import ExpertOrder, sum_slots
from latentphys.routers.parallel import run_across_ranks

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
            export or trace, loop in FP64, else grouped. Experts that are spread over ranks (`experts.group`) run
            grouped or as a loop on the rank that holds them.

    Returns:
        the combined outputs, ``(T, D)``, in the dtype in which the experts ran.

    Raises:
        ValueError: an unknown backend, shapes that do not match, FP64 tokens for ``grouped``, or
            ``dense_static`` for experts that are spread over ranks.
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
    if backend == "grouped" and x_TD.dtype == torch.float64:
        raise ValueError("Expected FP32 or a 16-bit type for dispatch 'grouped', got FP64; use 'loop' or 'auto'.")
    if experts.group is not None:
        return _across_ranks(x_TD, ids_Tk, weights_Tk, experts, backend)
    if backend == "grouped":
        return _sorted(x_TD, ids_Tk, weights_Tk, experts.num_experts, experts)
    if backend == "loop":
        return _loop(x_TD, ids_Tk, weights_Tk, experts)
    return _dense_static(x_TD, ids_Tk, weights_Tk, experts)


def _across_ranks(x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, experts: Experts, backend: str) -> Tensor:
    if backend == "dense_static":
        raise ValueError(
            "Expected 'grouped' or 'loop' for experts that are spread over ranks, got 'dense_static'; "
            "load the checkpoint into a model on one process to export it."
        )
    run = partial(run_across_ranks, experts=experts, one_by_one=backend == "loop")
    return _sorted(x_TD, ids_Tk, weights_Tk, experts.num_experts, run)


def _sorted(
    x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, num_experts: int, run: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """What `run` makes of rows sorted by expert, given these and ``ends_E``, combined in the order of the tokens."""
    k = ids_Tk.shape[1]
    order = ExpertOrder.of(ids_Tk.flatten(), num_experts)
    y_ND = run(order.sort(x_TD, k), order.ends_E)
    return sum_slots(order.restore(y_ND) * weights_Tk.reshape(-1, 1), k).to(y_ND.dtype)


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
