"""FLOPs counted while a model runs, by part of the model.

A FLOP is one multiplication or one addition. What counts is products: matrix products, convolutions, attention, and
Fourier transforms as 5 n log₂ n per complex and 2.5 n log₂ n per real transform of n numbers, whatever the algorithm.
Pointwise work, normalisations, sums and sorting do not count, as is the custom with models; only a router's squared
distances do, at 3 per number, for they are all that a tree of centroids does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten
ROUTING = "routing"
"""The part whose squared distances count."""


def count_flops(call: Callable[[], Any], parts: Mapping[nn.Module, str], skipped: Collection[str] = ()) -> Counter[str]:
    """FLOPs of a call, by the part in which they are done.

    Args:
        parts: modules that stand for a part. What runs inside several belongs to the innermost, what runs in none to
            ``rest``.
        skipped: parts whose products are counted, and not worked out: their results are zeros.
    """
    running: list[str] = ["rest"]
    handles = []
    for module, part in parts.items():
        handles.append(module.register_forward_pre_hook(lambda *_, part=part: running.append(part)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        with counting(running, skipped) as flops:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return flops


@contextmanager
def counting(running: Sequence[str], skipped: Collection[str] = ()) -> Iterator[Counter[str]]:
    """FLOPs of all that runs in the block, forward and backward, each for the part that stands last at that time.

    Args:
        running: parts, the one that runs last; the caller changes it on the way.
        skipped: see `count_flops`.
    """
    with _FlopMode(running, skipped) as mode:
        yield mode.flops


class _FlopMode(TorchDispatchMode):
    """Sums up the FLOPs of all operations, each for the part that runs at that time."""

    def __init__(self, running: Sequence[str], skipped: Collection[str]) -> None:
        super().__init__()
        self.running, self.skipped = running, skipped
        self.flops = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        part = self.running[-1]
        formula = (_ROUTER_FORMULAS if part == ROUTING else _FORMULAS).get(func.overloadpacket)
        if formula is None:
            out = NotImplemented
            if func.namespace == "aten":
                with self:  # inference mode leaves composite operations whole
                    out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = _zeros_of(func, args, kwargs) if part in self.skipped else func(*args, **kwargs)
        self.flops[part] += formula(*args, **kwargs, out_val=out)
        return out


def _zeros_of(func: Any, args: Any, kwargs: Any) -> Any:
    """Zeros of the shape of an operation's result."""
    device = args[0].device
    if func.overloadpacket is _ATEN._grouped_mm:  # torch 2.13 knows its shape in bfloat16 only
        return args[0].new_zeros(args[0].shape[0], args[1].shape[-1])
    args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
    return tree_map_only(Tensor, lambda x: torch.zeros_like(x, device=device), func(*args, **kwargs))


def _grouped(a: Tensor, b: Tensor, offs: Tensor, *_: Any, **__: Any) -> int:
    """Rows (N, K) times the matrices (E, K, M) of their groups; or the products (K, N) × (N, M) of each group's rows,
    which are the gradients of these matrices. Rows behind the last group are never multiplied."""
    of_matrices = b.ndim == 2
    rows = int(a.shape[-1] if of_matrices else a.shape[0]) if isinstance(offs, FakeTensor) else int(offs[-1])
    return 2 * rows * (a.shape[0] if of_matrices else b.shape[-2]) * b.shape[-1]


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Five products where forward has two: the scores are worked out anew."""
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _times_vector(*operands: Any, out_val: Tensor, **_: Any) -> int:
    """A matrix or a vector times a vector: the largest operand is read once."""
    return 2 * max(operand.numel() for operand in operands if isinstance(operand, Tensor))


def _transform(x: Tensor, axes: Sequence[int], *_: Any, out_val: Tensor, **__: Any) -> int:
    """A Fourier transform along some axes; one with a real side costs half of a complex one as large as that side."""
    real = [side for side in (x, out_val) if not side.is_complex()]
    signal, each = (real[0], 2.5) if real else (x, 5.0)
    return round(each * signal.numel() * math.log2(math.prod(signal.shape[axis] for axis in axes)))


def _squares(x: Tensor, exponent: float, *_: Any, **__: Any) -> int:
    """Squared differences: one subtraction, one product and one sum per number."""
    return 3 * x.numel() if exponent == 2 else 0


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._grouped_mm: _grouped,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **dict.fromkeys((_ATEN.mv, _ATEN.addmv, _ATEN.dot), _times_vector),
    **dict.fromkeys((_ATEN._fft_r2c, _ATEN._fft_c2r, _ATEN._fft_c2c), _transform),
}

_ROUTER_FORMULAS = {**_FORMULAS, _ATEN.pow: _squares}
