"""TorchScript, one file for each function: what FTorch and older programs with libtorch load.

torch calls `jit.trace`, `jit.save` and `jit.load` deprecated from 2.10 on; they are what these readers take.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


def write(
    modules: Mapping[str, nn.Module],
    examples: Mapping[str, tuple[Tensor, ...]],
    folder: Path,
    progress: Callable[[str], None],
) -> None:
    """Write ``encode.pt``, ``step.pt`` and ``decode.pt``: traces, their constants inside."""
    for name, module in modules.items():
        progress(f"trace {name}")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # shapes are fixed, which is what it warns of
            # not the module itself: sizes are tensors in a trace, which Python code does not expect
            program = torch.export.export(module, examples[name], strict=False).module()
            traced = torch.jit.trace(program, examples[name], check_trace=False).eval()
            torch.jit.save(torch.jit.freeze(traced), folder / f"{name}.pt")


def load(folder: Path, names: tuple[str, ...], device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """The functions, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return {name: torch.jit.load(folder / f"{name}.pt", map_location=device).eval() for name in names}
