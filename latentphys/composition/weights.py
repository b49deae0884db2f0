"""Tensors of safetensors files, read a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PIECE = 1 << 16
"""Numbers of one tensor that are in memory at a time."""
MOVED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
}
"""Types of weights, by their safetensors names. Tensors of all others, such as counts and masks, have to be equal."""

Spec = tuple[str, tuple[int, ...]]


class Weights:
    """The tensors of a safetensors file, read when they are asked for.

    Raises:
        ValueError: no such file, or a damaged one.
    """

    def __init__(self, path: str | Path, stack: ExitStack) -> None:
        self.path = Path(path)
        try:
            self._file = stack.enter_context(safe_open(self.path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"Expected a readable safetensors file, got {self.path}: {error}. Copy it again from where it came."
            ) from None
        self._slices = {name: self._file.get_slice(name) for name in sorted(self._file.keys())}
        self.specs: dict[str, Spec] = {
            name: (part.get_dtype(), tuple(part.get_shape())) for name, part in self._slices.items()
        }

    def read(self, name: str, index: Any) -> Tensor:
        """A piece of a tensor in its own type; see `pieces`."""
        return self._slices[name][index]


def check_same_specs(anchor: Weights, other: Weights) -> None:
    """Refuse tensors of other names, shapes or kinds than the anchor's, with a ValueError."""
    different = sorted(set(anchor.specs) ^ set(other.specs))
    if different:
        has, lacks = (anchor, other) if different[0] in anchor.specs else (other, anchor)
        raise ValueError(
            f"Expected the tensors of {anchor.path} in {other.path}, got {different[0]!r} in {has.path} and not in "
            f"{lacks.path}; both endpoints are to be fine-tuned from the anchor."
        )
    for name, (dtype, shape) in anchor.specs.items():
        got_dtype, got_shape = other.specs[name]
        if shape != got_shape:
            raise ValueError(
                f"Expected {name!r} of shape {shape}, as in {anchor.path}, got {got_shape} in {other.path}; both "
                "endpoints are to be fine-tuned from the anchor."
            )
        if dtype != got_dtype and not (dtype in MOVED and got_dtype in MOVED and "C64" not in (dtype, got_dtype)):
            raise ValueError(
                f"Expected {name!r} of type {dtype}, as in {anchor.path}, got {got_dtype} in {other.path}; both "
                "endpoints are to be fine-tuned from the anchor."
            )


def pieces(shape: tuple[int, ...], most: int | None = None) -> Iterator[Any]:
    """Indices that go through a tensor in C order, `most` numbers at a time (default: `PIECE`)."""
    most = PIECE if most is None else most
    if math.prod(shape) <= most:
        yield ...
    elif math.prod(shape[1:]) <= most:
        rows = most // math.prod(shape[1:])
        yield from (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))
    else:
        for i in range(shape[0]):
            for rest in pieces(shape[1:], most):
                yield (i, ...) if rest is ... else (i, *rest) if isinstance(rest, tuple) else (i, rest)


def item_size(weights: Weights, name: str) -> int:
    """Bytes of one number of a tensor."""
    dtype, shape = weights.specs[name]
    return MOVED[dtype].itemsize if dtype in MOVED else weights.read(name, _first(shape)).element_size()


def _first(shape: tuple[int, ...]) -> Any:
    return tuple(slice(0, 1) for _ in shape) or ...
