"""An exponential moving average of a model's weights, to test and keep in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latentphys.ranks import in_group


class EMA:
    """An FP32 shadow of the trainable parameters that follows them slowly.

        shadow ← d · shadow + (1 − d) · weight,    d = min(decay, (1 + step) / (10 + step))

    Early steps count less than `decay` alone would have it, so that the average forgets the initial weights. Buffers,
    such as the biases that balance the routers, are not averaged: the current ones are used. The shadow of a sharded
    parameter is sharded alike.

    Args:
        model: on the device to train on, and sharded already where it is to be; not wrapped, for the names of its
            parameters are those of `tensors`.
        decay: weight of the past at each step, in (0, 1); it averages over about 1 / (1 − decay) steps. Good values:
            0.999…0.9999, and 0.99 for runs of few thousand steps.

    Raises:
        ValueError: a decay that is none.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"Expected a decay between 0 and 1, got {decay}; good values are 0.999…0.9999.")
        self.decay = decay
        self._shadow = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in _trainable(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the shadow towards the weights after optimiser step `step` (0, 1, …)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = _trainable(model)
        shadows = [_local(shadow) for shadow in self._shadow.values()]
        current = [_local(weights[name]).to(shadow.dtype) for name, shadow in zip(self._shadow, shadows, strict=True)]
        if shadows:
            torch._foreach_lerp_(shadows, current, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the averaged weights; with its own ones, bit for bit, when the block is left, however.

        Of a sharded model every process has to enter the block.
        """
        weights = {name: _local(weight) for name, weight in _trainable(model).items()}
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            with torch.no_grad():
                for name, shadow in self._shadow.items():
                    weights[name].copy_(_local(shadow))
            yield
        finally:
            _reshard(model)
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(kept[name])

    def tensors(self) -> dict[str, Tensor]:
        """The shadow by the names of the parameters; the tensors themselves, sharded where the parameters are."""
        return dict(self._shadow)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave, each tensor whole, on any device.

        Raises:
            ValueError: tensors of other parameters, or of other shapes.
        """
        different = sorted(set(tensors) ^ set(self._shadow))
        if different:
            raise ValueError(
                f"Expected the average of the {len(self._shadow)} parameters that are trained, got {len(tensors)} "
                f"tensors, which differ in {different[0]!r}; was it made by another model?"
            )
        for name, shadow in self._shadow.items():
            whole = tensors[name]
            if whole.shape != shadow.shape:
                raise ValueError(
                    f"Expected an average of shape {tuple(shadow.shape)} for {name!r}, got {tuple(whole.shape)}; "
                    "was it made by another model?"
                )
            shadow.copy_(_part(whole, shadow))


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, those of a sharded model in the form in which the optimiser has them."""
    _reshard(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _reshard(model: nn.Module) -> None:
    """Give up gathered weights: after a forward pass without gradients FSDP2 would go on with the ones it has."""
    if not in_group():
        return
    from torch.distributed.fsdp import FSDPModule  # slow to import, and of no use to a single process

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _part(whole: Tensor, pattern: Tensor) -> Tensor:
    """This process's part of a tensor, in the form of a pattern."""
    if not hasattr(pattern, "to_local"):
        return whole
    from latentphys.training.sharding import scatter_like

    return scatter_like(whole, pattern)
