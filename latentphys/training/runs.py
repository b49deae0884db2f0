"""Training runs from configurations: open the stores, build the model and the task, call the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentphys.autoencoders import fit_linear_code
from latentphys.data import Store, Windows, open_store, split
from latentphys.data.regimes import select
from latentphys.grid import Geometry
from latentphys.rollout import num_intervals
from latentphys.routers import AuxiliaryLosses, BiasBalance
from latentphys.training.checkpoint import LAST, Checkpoint, open_checkpoint
from latentphys.training.finetune import FineTuning, prepare, prepare_autoencoder, save_autoencoder
from latentphys.training.models import (
    build,
    check_store,
    checkpoint_scales,
    chosen_specs,
    load_autoencoder,
    new_autoencoder,
    new_dynamics,
)
from latentphys.training.tasks import AutoencoderTask, DynamicsTask
from latentphys.training.trainer import Trainer
from latentphys.transformer.conditioning import Conditioning

Config = Mapping[str, Any]


def train_autoencoder(config: Config) -> Path:
    """Train an autoencoder on field stores, as ``train.yaml`` describes; returns the last checkpoint."""
    stores = _open(config["stores"])
    _check_families(stores)
    trainer: Trainer = build(config["trainer"])
    loss = build(config["loss"])
    torch.manual_seed(trainer.seed)
    train, test = _split(stores, stores, config)
    _check_fields(stores, config["fields"])
    names = {store.family: list(chosen_specs(store, config["fields"])) for store in stores}
    Windows(stores, names, 1, trajectories=train, weights=config["weights"]).check_batch(trainer.batch_size)
    before, tuning, run = _checkpoint(config, "autoencoder"), _finetuning(config), Path(config["run"])
    scales = None if before is None else checkpoint_scales(before)
    if tuning is not None:
        model, model_config = prepare_autoencoder(tuning, stores, train, scales, config["fields"])
        if tuning.adapt == "scales":
            return save_autoencoder(run, model, model_config)
    else:
        model_config = config["autoencoder"]
        model = new_autoencoder(model_config, stores, train, scales, config["fields"])
        if before is None:
            fit_linear_code(model, {s.family: _Sample(s, some, names) for s, some in zip(stores, train, strict=True)})
    for store in stores:
        check_store(model, store)
    names = {store.family: list(model.scale(store.family).fields) for store in stores}
    windows = Windows(stores, names, 1, trajectories=train, weights=config["weights"])
    if config["cache"]:
        windows.hold()
    test_windows = Windows(stores, names, 1, trajectories=test)
    task = AutoencoderTask(model, loss, windows, test_windows, model_config, config["loss_weights"])
    return trainer.fit(task, run, {**config, "autoencoder": model_config}, config["resume"])


def train_dynamics(config: Config) -> Path:
    """Train a dynamics model on latent stores, as ``train.yaml`` describes; returns the last checkpoint."""
    settings = config["dynamics_training"]
    stride = settings["stride"]
    balance, balance_losses = BiasBalance(settings["balance_rate"]), AuxiliaryLosses(settings["balance_losses"])
    stores = _open(config["stores"])
    for store in stores:
        if "latent" not in store.specs:
            raise ValueError(f"Expected a latent store, got {store.path}; make one with `latentphys encode`.")
    _check_families(stores)
    checkpoints = sorted({store.attributes["checkpoint"] for store in stores})
    if len(checkpoints) > 1:
        raise ValueError(f"Expected latents of one autoencoder, got those of {', '.join(checkpoints)}.")
    sources = _open([store.attributes["source"] for store in stores])
    for store, source in zip(stores, sources, strict=True):
        if len(store) != len(source) or not np.array_equal(store.times, source.times):
            raise ValueError(
                f"Expected {store.path} to hold the latents of {source.path}, got others; encode it again."
            )
    autoencoder = load_autoencoder(checkpoints[0])
    trainer: Trainer = build(config["trainer"])
    torch.manual_seed(trainer.seed)
    train, test = _split(stores, sources, config)
    intervals = {store.family: _interval(store, settings) for store in stores}
    tuning = _finetuning(config)
    if tuning is not None:
        dynamics, autoencoder, model_config = prepare(tuning, autoencoder, stores, sources, train, intervals, stride)
    else:
        conditioning, model_config = Conditioning.fit(sources, train), config["dynamics"]
        dynamics = new_dynamics(model_config, autoencoder.latent_channels, conditioning, intervals)
        dynamics.fit_scales(stores, train, stride)
    length = dynamics.num_frames + settings["unroll"]
    train_windows, test_windows = (
        Windows(stores, "latent", length, stride, chosen, weights=weights)
        for chosen, weights in ((train, config["weights"]), (test, None))
    )
    train_windows.check_batch(trainer.batch_size)
    train_windows.hold()
    test_windows.hold()
    task = DynamicsTask(
        dynamics,
        autoencoder,
        train_windows,
        test_windows,
        sources,
        model_config,
        open_checkpoint(checkpoints[0], "autoencoder").config,
        unroll=settings["unroll"],
        input_noise=settings["input_noise"],
        balance=balance,
        balance_losses=balance_losses,
        loss_weights=config["loss_weights"],
    )
    return trainer.fit(task, Path(config["run"]), {**config, "dynamics": model_config}, config["resume"])


def _finetuning(config: Config) -> FineTuning | None:
    """What a trained model is to become, where training starts from one."""
    settings = config["finetune"]
    return None if settings["checkpoint"] is None else FineTuning(**settings)


def _checkpoint(config: Config, kind: str) -> Checkpoint | None:
    """The newest checkpoint of a run that goes on."""
    run = Path(config["run"])
    return open_checkpoint(run, kind) if config["resume"] and (run / LAST).is_file() else None


def _check_families(stores: Sequence[Store]) -> None:
    families = [store.family for store in stores]
    for family in families:
        if families.count(family) > 1:
            raise ValueError(f"Expected one store per family, got {families.count(family)} of {family!r}.")


def _check_fields(stores: Sequence[Store], fields: Sequence[str] | None) -> None:
    """Refuse names of fields that no store has."""
    known = sorted({name for store in stores for name in store.specs})
    if fields is not None and (isinstance(fields, str) or not set(fields) <= set(known)):
        raise ValueError(f"Expected fields=[…] of names among {known}, got {fields}.")


def _interval(store: Store, settings: Config) -> float:
    """Δt of the model's steps [s] in a store with even snapshots."""
    stride, unroll = settings["stride"], settings["unroll"]
    if stride < 1 or unroll < 1 or stride >= store.num_times:
        raise ValueError(
            f"Expected unroll ≥ 1 and a stride from 1 to {store.num_times - 1} for {store.path}, "
            f"got {unroll} and {stride}."
        )
    interval = float(store.times[stride] - store.times[0])
    assert num_intervals(store, interval) == stride
    return interval


@dataclass(frozen=True)
class _Sample:
    """Snapshots spread over some trajectories of a store, packed, in FP32, each with its box."""

    store: Store
    trajectories: Sequence[int]
    names: Mapping[str, Sequence[str]]
    most: int = 64

    def __iter__(self) -> Iterator[tuple[Geometry, Tensor]]:
        stride = max(1, self.store.num_times // max(1, self.most // len(self.trajectories)))
        chosen = self.trajectories[:: max(1, len(self.trajectories) // self.most)]
        windows = Windows([self.store], self.names, 1, trajectories=[chosen])
        for i in chosen:
            for time in range(0, self.store.num_times, stride):
                yield self.store.geometry(i), windows.read(0, i, time)[0]


def _open(paths: Sequence[str]) -> list[Store]:
    stores = [open_store(path) for path in ([paths] if isinstance(paths, str) else paths)]
    if not stores:
        raise ValueError("Expected at least one store to train on, got none.")
    return stores


def _split(
    stores: Sequence[Store], sources: Sequence[Store], config: Config
) -> tuple[list[list[int]], list[list[int]]]:
    """Trajectories of each store to train on and to test on. Those held out are the same ones for every regime.

    Args:
        sources: where the parameters are that a regime is told by.
    """
    pairs = [split(len(store), config["held_out"]) for store in stores]
    regime = config["regime"]
    if regime is not None:
        for n, (source, (train, test)) in enumerate(zip(sources, pairs, strict=True)):
            pairs[n] = select(source, train, regime), select(source, test, regime)
            for some, what, whole in ((pairs[n][0], "training", train), (pairs[n][1], "held-out", test)):
                if not some:
                    raise ValueError(
                        f"Expected a {what} trajectory of {source.path} in the regime {dict(regime)}, got none among "
                        f"the trajectories {whole[0]} to {whole[-1]}; widen the regime, or change held_out."
                    )
    return [train for train, _ in pairs], [test for _, test in pairs]
