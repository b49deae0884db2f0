"""Build models from their configuration and stores, and from checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from latentphys.autoencoders import Autoencoder, FamilyScale
from latentphys.data import Store, compute_statistics
from latentphys.routers import load_lazily
from latentphys.training.checkpoint import Checkpoint, open_checkpoint
from latentphys.transformer.conditioning import NUM_GEOMETRY_CHANNELS, Conditioning
from latentphys.transformer.dynamics import Dynamics

Config = Mapping[str, Any]


def build(config: Config, **arguments: Any) -> Any:
    """Instantiate a configuration that names its class with ``_target_``; further arguments reach it as they are.

    Raises:
        ValueError: arguments that the class refuses.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate({**config, "_partial_": True, "_convert_": "all"})(**arguments)
    except (InstantiationException, TypeError) as error:
        raise ValueError(
            f"Expected settings that {config.get('_target_')} takes: {' '.join(str(error).split())}"
        ) from error


def _check_classes(config: Any, path: Path) -> None:
    """Refuse a checkpoint that would call anything but network modules when it is loaded."""
    if isinstance(config, Mapping):
        if "_target_" in config:
            try:
                target = resolve_name(str(config["_target_"]))
            except (ImportError, AttributeError, ValueError):
                target = None
            if not (isinstance(target, type) and issubclass(target, nn.Module)):
                raise ValueError(f"Expected network modules that can be imported in {path}, got {config['_target_']}.")
        for value in config.values():
            _check_classes(value, path)
    elif isinstance(config, list):
        for value in config:
            _check_classes(value, path)


def new_autoencoder(
    config: Config,
    stores: Sequence[Store],
    trajectories: Sequence[Sequence[int]] | None = None,
    scales: Mapping[str, FamilyScale] | None = None,
) -> Autoencoder:
    """An untrained autoencoder for some stores, scaled to their statistics.

    Args:
        trajectories: per store those that the scales are measured in. Default: all.
        scales: family → its scale. Default: measured, which reads the trajectories once.

    Raises:
        ValueError: a store without face fluxes of a velocity, fluxes that are at rest or not finite, a head whose
            fluxes do not obey the velocity's constraint, or a grid that the compression does not divide.
    """
    for store in stores:
        if "velocity" not in store.specs:
            raise ValueError(f"Expected a field 'velocity' in {store.path}, got {sorted(store.specs)}.")
        if store.specs["velocity"].kind != "flux":
            raise ValueError(
                f"Expected face fluxes of the velocity in {store.path}, got a {store.specs['velocity'].kind} in cells; "
                "convert the store with latentphys.data.relayout."
            )
    model: Autoencoder = build(config, scales={})
    for store in stores:
        model.latent_shape(store.grid)
        wanted, head = store.specs["velocity"].constraint, model.head
        if wanted in ("solenoidal", "irrotational") and head.constraint != wanted:
            raise ValueError(
                f"Expected a head for the {wanted} velocity in {store.path}, got {type(head).__name__}, whose fluxes "
                f"have the constraint {head.constraint!r}; choose another autoencoder/head."
            )
    model.scales.update(_scales(stores, trajectories) if scales is None else scales)
    return model


def _scales(stores: Sequence[Store], trajectories: Sequence[Sequence[int]] | None) -> dict[str, FamilyScale]:
    """The scale of each family, from some trajectories of its store."""
    result = {}
    for n, store in enumerate(stores):
        statistics = (
            store.statistics()
            if trajectories is None
            else compute_statistics(store, trajectories[n], fields=["velocity"])
        )
        result[store.family] = FamilyScale.from_statistics(store.grid, statistics["velocity"])
    return result


def autoencoder_extra(model: Autoencoder) -> dict[str, Any]:
    """What an autoencoder's checkpoint must know beside the weights."""
    return {"scales": {family: scale.to_dict() for family, scale in model.scales.items()}}


def checkpoint_scales(checkpoint: Checkpoint) -> dict[str, FamilyScale]:
    """The scales that `autoencoder_extra` wrote."""
    return {family: FamilyScale.from_dict(data) for family, data in checkpoint.extra["scales"].items()}


def load_autoencoder(path: str | Path) -> Autoencoder:
    """An autoencoder from a checkpoint or run directory, in evaluation mode.

    Raises:
        ValueError: see `open_checkpoint`.
    """
    checkpoint = open_checkpoint(path, "autoencoder")
    _check_classes(checkpoint.config, checkpoint.path)
    model: Autoencoder = build(checkpoint.config, scales=checkpoint_scales(checkpoint))
    checkpoint.load_into(model)
    return model.eval()


def new_dynamics(
    config: Config, latent_channels: int, conditioning: Conditioning, intervals: Mapping[str, float]
) -> Dynamics:
    """An untrained dynamics model."""
    transformer = build(
        config,
        latent_channels=latent_channels,
        condition_channels=conditioning.num_channels,
        geometry_channels=NUM_GEOMETRY_CHANNELS,
    )
    return Dynamics(transformer, conditioning, intervals, latent_channels)


def load_dynamics(path: str | Path, max_resident_experts: int | None = None) -> tuple[Dynamics, Autoencoder]:
    """A dynamics model and the autoencoder whose latents it advances, in evaluation mode.

    Args:
        max_resident_experts: how many routed experts each layer keeps in memory, ≥ 1: they are read from the checkpoint
            when tokens first visit them, those visited least recently make room, and dispatch is ``loop``. For
            inference only. Default: all are loaded.

    Raises:
        ValueError: see `open_checkpoint` and `LazyExperts`.
    """
    checkpoint = open_checkpoint(path, "dynamics")
    _check_classes(checkpoint.config, checkpoint.path)
    extra = checkpoint.extra
    conditioning = Conditioning.from_dict(extra["conditioning"])
    arguments = checkpoint.config, extra["latent_channels"], conditioning, extra["intervals"]
    if max_resident_experts is None:
        model = new_dynamics(*arguments)
        checkpoint.load_into(model)
    else:
        with torch.device("meta"):
            model = new_dynamics(*arguments)
        load_lazily(model, checkpoint.path / "model.safetensors", max_resident_experts)
    return model.eval(), load_autoencoder(checkpoint.path / "autoencoder")
