"""Test vectors: what the models said in Python where the artefact was made, and how far its functions are from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentphys.autoencoders import FamilyScale
from latentphys.fields import State
from latentphys.rollout import LatentStepper
from latentphys.surrogate.contract import Quantity
from latentphys.transformer.conditioning import Conditioning

Functions = Mapping[str, Callable[..., Tensor]]


def flat(parameters: Mapping[str, Any], quantities: Sequence[Quantity]) -> Tensor:
    """The numbers of one flow's parameters, (P,), one parameter after another; FP64, in physical units.

    A parameter that is missing is its mean in training.

    Raises:
        ValueError: a parameter that is not among the quantities, or one of another size or sign.
    """
    Conditioning(list(quantities)).vector(parameters, {}, 1.0)  # refused here or never
    numbers = []
    for q in quantities:
        mean = torch.tensor(q.mean, dtype=torch.float64)
        value = parameters.get(q.name, mean.exp() if q.logarithmic else mean)
        numbers.append(torch.as_tensor(value, dtype=torch.float64).cpu().reshape(-1))
    return torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.float64)


def make(
    stepper: LatentStepper, states: Sequence[State], then: Sequence[Mapping[str, Any]], quantities: Sequence[Quantity]
) -> dict[str, Tensor]:
    """Fields, parameters, their latent and the one a step later, as the models say."""
    packed = torch.stack([stepper.scale.pack(state.fields) for state in states]).double().to(stepper.device)
    now = [state.parameters for state in states]
    latent = stepper.encode(packed)
    return {
        "test.fields": packed,
        "test.now": torch.stack([flat(p, quantities) for p in now]).to(stepper.device),
        "test.then": torch.stack([flat(p, quantities) for p in then]).to(stepper.device),
        "test.latent": latent,
        "test.next": stepper.step(latent[:, None], now, then).latent,
    }


def inputs(vectors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """What each function is given."""
    return {
        "encode": (vectors["test.fields"],),
        "step": (vectors["test.latent"], vectors["test.now"], vectors["test.then"]),
        "decode": (vectors["test.latent"],),
    }


def expected(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each function is to say."""
    return {"encode": vectors["test.latent"], "step": vectors["test.next"], "decode": vectors["test.decoded"]}


@torch.no_grad()
def said(functions: Functions, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each function says."""
    return {name: functions[name](*given) for name, given in inputs(vectors).items()}


def differences(got: Mapping[str, Tensor], vectors: Mapping[str, Tensor], scale: FamilyScale) -> dict[str, float]:
    """By function, how far what it says is from what it is to say; of a decode, that of the field that is furthest."""
    fields = list(scale.channels.values())
    return {
        name: difference(got[name], want, fields if name == "decode" else [slice(None)])
        for name, want in expected(vectors).items()
    }


def difference(got: Tensor, want: Tensor, parts: Sequence[slice]) -> float:
    """Largest |difference| over largest |value|, of the worst of some parts of the channels.

    Infinite where dtype or shape are others, or values not finite.
    """
    if got.dtype != want.dtype or got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    smallest = torch.finfo(torch.float64).tiny
    pairs = [(got[:, part].double(), want[:, part].double()) for part in parts]
    return max(float((a - b).abs().amax() / b.abs().amax().clamp(min=smallest)) for a, b in pairs)
