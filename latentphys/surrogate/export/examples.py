"""Flows to export a model with: they set its geometry, and the numbers that it is tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from latentphys.data import Store
from latentphys.fields import State
from latentphys.grid import Geometry
from latentphys.rollout import num_intervals
from latentphys.surrogate.models import Models
from latentphys.transformer.conditioning import store_parameters

Examples = tuple[list[State], Sequence[Mapping[str, Any]]]
"""States, and the parameters of each one Δt later."""


def from_store(models: Models, store: Store, trajectory: int, batch: int) -> Examples:
    """Snapshots of one trajectory, the first ones, one interval apart; they begin anew where it ends.

    Raises:
        ValueError: no such trajectory, a family or fields that the models do not know, or another interval.
    """
    if not 0 <= trajectory < len(store):
        raise ValueError(f"Expected a trajectory from 0 to {len(store) - 1} of {store.path}, got {trajectory}.")
    _check_batch(batch)
    models.autoencoder.check(store.family, store.grid, store.specs)
    stride = num_intervals(store, models.dynamics.interval(store.family))
    frames = [n * stride % store.num_times for n in range(batch)]
    last = store.num_times - 1
    later = [store_parameters(store, trajectory, min(frame + stride, last)) for frame in frames]
    return [store[trajectory, frame] for frame in frames], later


def from_scale(models: Models, family: str, shape: Sequence[int] | None, batch: int) -> Examples:
    """Noise of the family's size about its mean, in an empty box, with the mean of every parameter in training.

    Args:
        shape: cells per axis. Default: those of the box that the models were trained in.

    Raises:
        ValueError: a family that the models do not know, or a shape that does not fit its box.
    """
    _check_batch(batch)
    scale, interval = models.autoencoder.scale(family), models.dynamics.interval(family)
    grid = scale.grid if shape is None else replace(scale.grid, shape=(shape[0], shape[1], shape[2]))
    scale.check(grid)
    generator = torch.Generator().manual_seed(0)
    parameters = {
        q.name: np.exp(q.mean) if q.logarithmic else np.asarray(q.mean) for q in models.contract(family).parameters
    }
    states = []
    for n in range(batch):
        noise = torch.randn(scale.num_components, *grid.shape, generator=generator, dtype=torch.float64)
        fields = scale.unpack(scale.denormalise(noise, grid))
        states.append(State(fields, Geometry(grid), n * interval, parameters, family))
    return states, [parameters] * batch


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise ValueError(f"Expected a batch of at least 1 flow, got {batch}.")
