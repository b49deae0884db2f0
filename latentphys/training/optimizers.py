"""Optimisers by name, with groups of parameters that one operation can take together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from latentphys.training.sharding import by_mesh

OPTIMIZERS = ("adamw", "soap")

_FUSED_DEVICES = ("cpu", "cuda")


def new_optimizer(name: str, model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """An optimiser of a model's trainable parameters; matrices decay, vectors do not.

    Parameters are grouped by device mesh, for no operation takes those of two, and by weight decay: what has two axes
    or more decays, such as a matrix or a stack of experts; biases and the scales of norms do not. Every group has an
    ``lr``, to be set from step to step.

    Args:
        name: ``adamw``, in one fused kernel per group where there is one; or ``soap``, Adam in the eigenbasis of
            Shampoo's preconditioner, which takes fewer steps. SOAP keeps a square matrix for each axis of a weight,
            experts of a stack sharing theirs; it sets up its basis in the first step, which leaves the weights alone.
        model: on the device to train on, and sharded already where it is to be.
        learning_rate: initial. Good values: 3e-4…1e-3 for AdamW, 1e-3…3e-3 for SOAP.
        weight_decay: decoupled, times the learning rate.

    Raises:
        ValueError: an unknown name, nothing to train, SOAP without its package, or SOAP for a sharded model.

    Reference: Loshchilov & Hutter 2019, arXiv 1711.05101; SOAP, Vyas et al. 2024, arXiv 2409.11321.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"Expected an optimiser of {' | '.join(OPTIMIZERS)}, got {name!r}.")
    groups = _groups(model, learning_rate, weight_decay)
    if not groups:
        raise ValueError("Expected a model with parameters to train, got one whose parameters are all frozen or none.")
    if name == "adamw":
        return torch.optim.AdamW([{**group, "fused": _has_fused(group["params"])} for group in groups])
    if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        raise ValueError(
            "Expected a model that every process has as a whole for optimiser 'soap', whose preconditioners need whole "
            "gradients, got one sharded over processes; use 'adamw', or train without sharding."
        )
    try:
        from pytorch_optimizer import SOAP
    except ImportError:
        raise ValueError(
            "Expected the package pytorch-optimizer for optimiser 'soap', got none; run `pip install latentphys[soap]`."
        ) from None
    return SOAP(groups)


def _groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    groups = []
    for parameters in by_mesh(parameter for parameter in model.parameters() if parameter.requires_grad):
        for decay, chosen in (
            (weight_decay, [p for p in parameters if p.ndim >= 2]),
            (0.0, [p for p in parameters if p.ndim < 2]),
        ):
            if chosen:
                groups.append({"params": chosen, "lr": learning_rate, "weight_decay": decay})
    return groups


def _has_fused(parameters: list[nn.Parameter]) -> bool:
    return all(p.is_floating_point() and p.device.type in _FUSED_DEVICES for p in parameters)
