"""Tasks without data: models on stand-ins for stores that are known by their shape alone, to be counted.

The tasks are those that training runs, so that what is counted is what training does. Weights have no memory (device
``meta``); inside torch's `FakeTensorMode` neither has anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from latentphys.autoencoders import Autoencoder
from latentphys.data import Batch, Store, Windows, open_store
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import PERIODIC, Boundaries, Geometry, Grid
from latentphys.routers import AuxiliaryLosses, TreeRouter
from latentphys.training.models import build, chosen_specs, new_dynamics, unit_scale
from latentphys.training.tasks import AutoencoderTask, DynamicsTask, Task
from latentphys.transformer.conditioning import Conditioning

FAMILY = "planned"
_COMPRESSION = 2
"""Cells per latent cell and axis. Geometry is told per latent cell, whatever this is."""


@dataclass(frozen=True)
class Planned:
    """A task of a model without memory, and what one sample of it is.

    Args:
        task: to be called with what `batch` makes.
        tokens: latent cells that the model works out for one sample, over all its steps.
        sample_shape: shape of the windows of one sample.
    """

    task: Task
    tokens: int
    sample_shape: tuple[int, ...]

    def batch(self, num_samples: int) -> Batch:
        """Some samples, made where and how the mode around the call has it."""
        return _Batch(torch.zeros(num_samples, *self.sample_shape))


def plan(config: Mapping[str, Any], store: Store) -> Planned:
    """The task that a model would be trained on with a store: a dynamics model where it holds latents, else an
    autoencoder."""
    if "latent" not in store.specs:
        return plan_autoencoder(config, store.grid.shape, store.grid.boundaries, chosen_specs(store, config["fields"]))
    source = store.attributes.get("source")
    conditioning = Conditioning.fit([open_store(source)]) if source and Path(source).exists() else None
    channels = int(store.array("latent").shape[2])
    return plan_dynamics(config, store.grid.shape, channels, store.grid.boundaries, conditioning)


def plan_autoencoder(
    config: Mapping[str, Any],
    shape: Sequence[int],
    boundaries: Boundaries = PERIODIC,
    specs: Mapping[str, FieldSpec] | None = None,
) -> Planned:
    """An autoencoder to be trained on boxes of cells without solids.

    Args:
        config: the composed ``train.yaml``.
        shape: cells per axis.
        specs: the fields. Default: an incompressible velocity.

    Raises:
        ValueError: a shape that the compression does not divide, or settings that the model refuses.
    """
    grid = _grid(shape, boundaries)
    with torch.device("meta"):
        scale = unit_scale(grid, specs or {VELOCITY.name: VELOCITY})
        model: Autoencoder = build(config["autoencoder"], scales={FAMILY: scale})
        loss = build(config["loss"])
    latent_shape = model.latent_shape(grid)
    store = _Store(grid)
    with torch.no_grad():
        # What solvers keep for later is to be made of numbers.
        for field in scale.fields.values():
            head = model.heads.head(field.spec)
            head(torch.zeros(1, head.num_channels, *grid.shape), store.geometry(0), field)
    windows, sample_shape = _Windows(store, 1), (1, scale.num_components, *grid.shape)
    return Planned(AutoencoderTask(model, loss, windows, windows, {}), int(np.prod(latent_shape)), sample_shape)


def plan_dynamics(
    config: Mapping[str, Any],
    latent_shape: Sequence[int],
    latent_channels: int,
    boundaries: Boundaries = PERIODIC,
    conditioning: Conditioning | None = None,
) -> Planned:
    """A dynamics model to be trained on latents of boxes without solids.

    Args:
        config: the composed ``train.yaml``.
        latent_shape: latent cells per axis.
        latent_channels: channels of a latent.
        conditioning: default: Δt alone.

    Raises:
        ValueError: settings that the model refuses.
    """
    settings = config["dynamics_training"]
    grid = _grid([n * _COMPRESSION if n > 1 else 1 for n in latent_shape], boundaries)
    with torch.device("meta"):
        model = new_dynamics(
            {**config["dynamics"], "dispatch": _static(config["dynamics"]["dispatch"])},
            latent_channels,
            conditioning or Conditioning([]),
            {FAMILY: 1.0},
        )
    for module in model.modules():
        if isinstance(module, TreeRouter):
            module.fitted = torch.ones(1, dtype=torch.bool)
    windows = _Windows(_Store(grid), model.num_frames + settings["unroll"], settings["stride"])
    task = DynamicsTask(
        model,
        _Unused(),
        windows,
        windows,
        windows.stores,
        {},
        {},
        unroll=settings["unroll"],
        input_noise=settings["input_noise"],
        balance_losses=AuxiliaryLosses(settings["balance_losses"]),
    )
    cells = int(np.prod(list(latent_shape)))
    return Planned(task, settings["unroll"] * cells, (windows.length, latent_channels, *map(int, latent_shape)))


def _grid(shape: Sequence[int], boundaries: Boundaries) -> Grid:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"Expected three numbers of cells ≥ 1, got {list(shape)}.")
    x, y, z = (int(n) for n in shape)
    return Grid((x, y, z), (1.0, 1.0, 1.0), boundaries)


def _static(dispatch: str) -> str:
    """A dispatch whose shapes do not depend on where tokens go; it does the same work."""
    return "grouped" if dispatch in ("auto", "loop") else dispatch


class _Unused(Autoencoder):
    """The autoencoder behind the latents, of which a dynamics task asks no more than this."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.compression = _COMPRESSION


class _Store(Store):
    """A store of one family without solids and parameters, and without anything in it."""

    def __init__(self, grid: Grid) -> None:
        self.path, self.family, self.domain = Path(FAMILY), FAMILY, grid
        self.__dict__["parameters"] = {}
        self._geometry = Geometry(grid)
        _ = self._geometry.open_faces, self._geometry.wall_distance

    def geometry(self, trajectory: int) -> Geometry:
        return self._geometry


class _Windows(Windows):
    """Windows of such a store, of which there are none."""

    def __init__(self, store: Store, length: int, stride: int = 1) -> None:
        self.stores, self.length, self.stride = [store], length, stride


class _Batch(Batch):
    """Samples whose origin is known without reading a tensor."""

    def __init__(self, values: Tensor) -> None:
        origin = cast(Tensor, np.zeros(len(values), dtype=np.int64))
        for name, value in (("values", values), ("store", 0), ("trajectories", origin), ("starts", origin)):
            object.__setattr__(self, name, value)
