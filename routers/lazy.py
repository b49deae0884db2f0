"""Experts that stay in their checkpoint's file until a token visits them, for inference with more than memory holds.

Shape suffixes: N rows, D model width, F hidden width, G = 2F (SwiGLU) or F (GELU), E experts.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from latentphys.routers.experts import Experts
from latentphys.routers.moe import MoEFeedForward


class LazyExperts(Experts):
    """`Experts` for dispatch ``loop`` that reads one at a time from a safetensors file and forgets those visited least
    recently.

    Args:
        like: experts of the same sizes, such as ones on the meta device; their weights are not looked at.
        file: holds the stacked weights; it has to stay there, unchanged.
        name: of the experts in the file, such as ``transformer.blocks.0.feed_forward.experts``.
        max_resident: most experts that are kept in memory, ≥ 1.

    ``num_reads`` counts the experts read so far, and ``resident`` lists those in memory, the latest visited last.

    Raises:
        ValueError: max_resident < 1; a file that is missing, damaged or without weights of these shapes; on a visit,
            one that has changed since.
    """

    def __init__(self, like: Experts, file: Path, name: str, max_resident: int) -> None:
        nn.Module.__init__(self)  # not that of Experts, which makes the weights
        if max_resident < 1:
            raise ValueError(f"Expected at least 1 resident expert, got {max_resident}.")
        self.num_experts, self.dim, self.hidden = like.num_experts, like.dim, like.hidden
        self.activation, self.activate, self.group = like.activation, like.activate, None
        self.file, self.max_resident, self.num_reads = file, max_resident, 0
        self._resident: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()
        self._names = (f"{name}.w_in_EDG", f"{name}.w_out_EFD")
        with open_weights(file) as weights:
            for key, wanted in zip(self._names, (like.w_in_EDG, like.w_out_EFD), strict=True):
                found = weights.get_slice(key).get_shape() if key in weights.keys() else "none"  # noqa: SIM118
                if found != list(wanted.shape):
                    raise ValueError(f"Expected {key} of shape {list(wanted.shape)} in {file}, got {found}.")
        self._stamp = _stamp(file)

    @property
    def resident(self) -> list[int]:
        return list(self._resident)

    def forward(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        raise ValueError("Expected dispatch 'loop' for experts that are read one at a time, got 'grouped'.")

    def one(self, x_ND: Tensor, expert: int) -> Tensor:
        """Every row through one expert, which is read only where there are rows."""
        if not len(x_ND):
            return x_ND @ x_ND.new_empty(self.dim, self.dim)  # no rows, in the precision that autocast gives others
        w_in_DG, w_out_FD = (weight.to(x_ND) for weight in self._weights(expert, x_ND))
        return self.activate(x_ND @ w_in_DG) @ w_out_FD

    def _weights(self, expert: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of one expert, the latest visited from now on."""
        if expert not in self._resident:
            while len(self._resident) >= self.max_resident:
                self._resident.popitem(last=False)
            self._resident[expert] = self._read(expert, like.device)
        self._resident.move_to_end(expert)
        return self._resident[expert]

    def _read(self, expert: int, device: torch.device) -> tuple[Tensor, Tensor]:
        with open_weights(self.file) as weights:
            if _stamp(self.file) != self._stamp:
                raise ValueError(
                    f"Expected {self.file} as it was when the model was loaded, got another; load it again."
                )
            w_in_DG, w_out_FD = (weights.get_slice(name)[expert] for name in self._names)
            self.num_reads += 1
            # A copy: what was read may lie in the mapped file.
            return w_in_DG.clone().to(device), w_out_FD.clone().to(device)


def load_lazily(model: nn.Module, file: Path, max_resident: int) -> None:
    """Load weights into a model that was built on the meta device, and leave the routed experts in the file.

    Args:
        file: the model's state in safetensors.
        max_resident: most experts that each layer keeps in memory, ≥ 1.

    Raises:
        ValueError: see `LazyExperts`; or weights of another architecture.
    """
    experts = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, MoEFeedForward):
            experts |= {f"{name}.experts.{key}" for key in module.experts.state_dict()}
            module.experts = LazyExperts(module.experts, file, f"{name}.experts", max_resident)
            module.dispatch = "loop"
    with open_weights(file) as weights:
        tensors = {key: weights.get_tensor(key).clone() for key in weights.keys() if key not in experts}  # noqa: SIM118
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"Expected weights that fit the model described beside {file}, got others: {first}") from None


def open_weights(file: Path) -> Any:
    """A safetensors file to read parts of; ValueError where it is missing or damaged."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"Expected weights in {file}, got no such file.") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"Expected a readable safetensors file, got {file}: {error}.") from None


def _stamp(file: Path) -> tuple[int, ...]:
    """What changes when a file does."""
    about = os.stat(file)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
