"""Trajectories by their physical parameters: which lie in a regime, and which regime some of them span."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentphys.data.store import Store

Regime = Mapping[str, Sequence[float | None]]


def constants(store: Store) -> dict[str, np.ndarray]:
    """The parameters of a store that are one number for each trajectory, each of shape (trajectory,)."""
    return {
        name: values.reshape(-1)
        for name, values in store.parameters.items()
        if values.size == len(store) == len(values)
    }


def chosen_trajectories(store: Store, trajectories: Sequence[int] | None) -> list[int]:
    """Some trajectories of a store, or all where none are named.

    Raises:
        ValueError: none at all, or some that the store does not have.
    """
    chosen = list(range(len(store)) if trajectories is None else trajectories)
    if not chosen or not set(chosen) <= set(range(len(store))):
        raise ValueError(f"Expected trajectories from 0 to {len(store) - 1} of {store.path}, got {chosen}.")
    return chosen


def select(store: Store, trajectories: Sequence[int], regime: Regime) -> list[int]:
    """Those of some trajectories whose parameters lie in a regime.

    Args:
        regime: parameter → its least and greatest value, both included; None for an open end.

    Raises:
        ValueError: a parameter that is not one number for each trajectory of the store, or bounds that are none.
    """
    if not isinstance(regime, Mapping):
        raise ValueError(f"Expected a regime by parameter, such as {{viscosity: [0.0, 0.01]}}, got {regime!r}.")
    known, chosen = constants(store), list(trajectories)
    for name, bounds in regime.items():
        if name not in known:
            raise ValueError(
                f"Expected a regime of parameters that are one number for each trajectory of {store.path}, "
                f"{sorted(known)}, got {name!r}."
            )
        low, high = _bounds(name, bounds)
        chosen = [i for i in chosen if low <= known[name][i] <= high]
    return chosen


def _bounds(name: str, bounds: Any) -> tuple[float, float]:
    numbers = [] if isinstance(bounds, str) or not isinstance(bounds, Sequence) else list(bounds)
    if len(numbers) == 2 and all(x is None or (isinstance(x, int | float) and not math.isnan(x)) for x in numbers):
        low, high = -math.inf if numbers[0] is None else numbers[0], math.inf if numbers[1] is None else numbers[1]
        if low <= high:
            return low, high
    raise ValueError(f"Expected [least, greatest] of {name!r} in the regime, either may be null, got {bounds!r}.")


def measure(store: Store, trajectories: Sequence[int]) -> dict[str, dict[str, float | int | None]]:
    """Parameter → ``min``, ``max``, ``mean``, ``geometric_mean`` (None unless all are positive) and ``num`` of some
    trajectories, of every parameter that is one number for each."""
    result: dict[str, dict[str, float | int | None]] = {}
    for name, values in constants(store).items():
        chosen = values[list(trajectories)].astype(np.float64)
        positive = bool((chosen > 0).all())
        result[name] = {
            "min": float(chosen.min()),
            "max": float(chosen.max()),
            "mean": float(chosen.mean()),
            "geometric_mean": float(np.exp(np.log(chosen).mean())) if positive else None,
            "num": len(chosen),
        }
    return result
