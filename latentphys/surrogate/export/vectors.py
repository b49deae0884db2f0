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
def differences(functions: Functions, vectors: Mapping[str, Tensor], scale: FamilyScale) -> dict[str, float]:
    """By function, how far it is from what it is to say: largest |difference| over largest |value|.

    Of a decode, that of the field that is furthest. Infinite where dtype or shape are others, or values not finite.
    """
    wanted, measured = expected(vectors), {}
    for name, given in inputs(vectors).items():
        got, want = functions[name](*given), wanted[name]
        if got.dtype != want.dtype or got.shape != want.shape or not bool(torch.isfinite(got).all()):
            measured[name] = float("inf")
            continue
        parts = list(scale.channels.values()) if name == "decode" else [slice(None)]
        measured[name] = max(float(_difference(got[:, part], want[:, part])) for part in parts)
    return measured


def _difference(got: Tensor, want: Tensor) -> Tensor:
    return (got - want).abs().amax().double() / want.abs().amax().double().clamp(min=torch.finfo(torch.float64).tiny)
