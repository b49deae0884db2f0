"""Build models from their configuration and stores, and from checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from latentphys.autoencoders import Autoencoder, FamilyScale, FieldScale
from latentphys.autoencoders.normaliser import num_components
from latentphys.data import Store, compute_statistics
from latentphys.fields import FieldSpec
from latentphys.grid import Grid
from latentphys.routers import load_lazily
from latentphys.routers.growth import grow
from latentphys.training import lora
from latentphys.training.checkpoint import Checkpoint, open_checkpoint
from latentphys.transformer.conditioning import NUM_GEOMETRY_CHANNELS, Conditioning, WidenedLinear
from latentphys.transformer.dynamics import Dynamics
from latentphys.transformer.model import LatentTransformer

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


def check_classes(config: Any, path: Path) -> None:
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
            check_classes(value, path)
    elif isinstance(config, list):
        for value in config:
            check_classes(value, path)


def new_autoencoder(
    config: Config,
    stores: Sequence[Store],
    trajectories: Sequence[Sequence[int]] | None = None,
    scales: Mapping[str, FamilyScale] | None = None,
    fields: Sequence[str] | None = None,
) -> Autoencoder:
    """An untrained autoencoder for some stores, scaled to their statistics.

    Args:
        trajectories: per store those that the scales are measured in. Default: all.
        scales: family → its scale. Default: measured, which reads the trajectories once.
        fields: names of the fields that it takes, of each store those that are there. Default: all.

    Raises:
        ValueError: a store without such fields, or with one that no head is for, fields that are at rest or not finite,
            or a grid that the compression does not divide.
    """
    with torch.device("meta"):
        plan: Autoencoder = build(
            config, scales={s.family: unit_scale(s.grid, chosen_specs(s, fields)) for s in stores}
        )
    for store in stores:
        plan.latent_shape(store.grid)
    model: Autoencoder = build(
        config, scales=measure_scales(stores, trajectories, fields) if scales is None else scales
    )
    return model


def chosen_specs(store: Store, fields: Sequence[str] | None = None) -> dict[str, FieldSpec]:
    """The fields of a store that a model takes, in the order of their channels.

    Args:
        fields: names, of which the store may lack some. Default: all that it has.

    Raises:
        ValueError: none of them there, latents, or velocities in cells that are to be solenoidal.
    """
    if fields is None:
        chosen = dict(store.specs)
    else:
        chosen = {name: store.specs[name] for name in fields if name in store.specs}
    if not chosen or "latent" in chosen:
        wanted = "fields of a flow" if fields is None else f"fields among {list(fields)}"
        raise ValueError(f"Expected {wanted} in {store.path}, got {sorted(store.specs)}.")
    velocity = chosen.get("velocity")
    if velocity is not None and velocity.kind != "flux":
        raise ValueError(
            f"Expected face fluxes of the velocity in {store.path}, got a {velocity.kind} in cells; "
            "convert the store with latentphys.data.relayout."
        )
    return chosen


def unit_scale(grid: Grid, specs: Mapping[str, FieldSpec]) -> FamilyScale:
    """Fields whose statistics nobody has measured: no mean, fluctuations of size 1."""
    profiles = {name: torch.zeros(num_components(spec), 1, 1, 1, device="cpu") for name, spec in specs.items()}
    return FamilyScale(*(FieldScale(grid, profiles[name].double(), 1.0, spec) for name, spec in specs.items()))


def check_store(model: Autoencoder, store: Store, fields: Sequence[str] | None = None) -> None:
    """Refuse a store that a trained autoencoder cannot take; see `Autoencoder.check`.

    Args:
        fields: see `new_autoencoder`; where the model does not know the family.
    """
    known = store.family in model.scales
    model.check(store.family, store.grid, store.specs if known else chosen_specs(store, fields))


def measure_scales(
    stores: Sequence[Store],
    trajectories: Sequence[Sequence[int]] | None = None,
    fields: Sequence[str] | None = None,
) -> dict[str, FamilyScale]:
    """The scale of each family, from some trajectories of its store; see `new_autoencoder`."""
    result = {}
    for n, store in enumerate(stores):
        specs = chosen_specs(store, fields)
        chosen = None if trajectories is None else trajectories[n]
        statistics = compute_statistics(store, chosen, fields=list(specs))
        result[store.family] = FamilyScale(
            *(FieldScale.from_statistics(store.grid, statistics[name], spec) for name, spec in specs.items())
        )
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
    check_classes(checkpoint.config, checkpoint.path)
    model: Autoencoder = build(checkpoint.config, scales=checkpoint_scales(checkpoint))
    checkpoint.load_into(model, ema=True)
    return model.eval()


def new_dynamics(
    config: Config,
    latent_channels: int,
    conditioning: Conditioning,
    intervals: Mapping[str, float],
    experts: Mapping[str, int] | None = None,
) -> Dynamics:
    """An untrained dynamics model; see `Dynamics`."""
    transformer = build(
        config,
        latent_channels=latent_channels,
        condition_channels=conditioning.first_channels,
        geometry_channels=NUM_GEOMETRY_CHANNELS,
    )
    for channels in conditioning.added:
        widen_condition(transformer, channels)
    return Dynamics(transformer, conditioning, intervals, latent_channels, experts)


def widen_condition(transformer: LatentTransformer, channels: int) -> None:
    """Let a transformer take further conditioning numbers, which do nothing at first and nothing where they are zero.

    Raises:
        ValueError: a transformer whose router looks at the conditioning.
    """
    if transformer.router is not None:
        raise ValueError(
            "Expected only parameters that the model knows where routing = function, for its router looks at all of "
            f"them, got {channels} new numbers; train a model with these parameters from the start."
        )
    transformer.embed_condition[0] = WidenedLinear(transformer.embed_condition[0], channels)  # type: ignore[arg-type]
    transformer.condition_channels += channels


def adapt(dynamics: Dynamics, adaptation: Mapping[str, Any], counts: Sequence[Tensor] | None = None) -> None:
    """Give a plain model the weights that only fine-tuning has: it says in its checkpoints that it has them.

    Args:
        adaptation: ``{"adapt": "lora", "rank": r, "alpha": α}``, or ``{"adapt": "experts", "new_experts": n}``.
        counts: see `grow`.
    """
    if adaptation["adapt"] == "lora":
        lora.add(dynamics.transformer, adaptation["rank"], adaptation["alpha"])
    else:
        grow(dynamics.transformer, adaptation["new_experts"], counts)
    dynamics.adaptation = dict(adaptation)


def load_dynamics(path: str | Path, max_resident_experts: int | None = None) -> tuple[Dynamics, Autoencoder]:
    """A dynamics model and the autoencoder whose latents it advances, in evaluation mode.

    What fine-tuning put beside the weights is merged into them: the same bits, in a plain model.

    Args:
        max_resident_experts: how many routed experts each layer keeps in memory, ≥ 1: they are read from the checkpoint
            when tokens first visit them, those visited least recently make room, and dispatch is ``loop``. For
            inference only. Default: all are loaded.

    Raises:
        ValueError: see `open_checkpoint` and `LazyExperts`.
    """
    checkpoint = open_checkpoint(path, "dynamics")
    check_classes(checkpoint.config, checkpoint.path)
    extra = checkpoint.extra
    conditioning = Conditioning.from_dict(extra["conditioning"])
    experts = extra.get("experts")
    arguments = checkpoint.config, extra["latent_channels"], conditioning, extra["intervals"], experts
    adaptation = extra.get("adaptation")
    if max_resident_experts is None:
        model = new_dynamics(*arguments)
        if adaptation is not None:
            adapt(model, adaptation)
        checkpoint.load_into(model, ema=True)
        lora.merge(model)
        model.adaptation = None
    elif adaptation is not None:
        raise ValueError(
            f"Expected a plain checkpoint to read experts from, got fine-tuned weights ({adaptation['adapt']}) in "
            f"{checkpoint.path}; write a plain one with latentphys.training.finetune.merge_checkpoint."
        )
    else:
        with torch.device("meta"):
            model = new_dynamics(*arguments)
        load_lazily(model, checkpoint.weights(ema=True), max_resident_experts)
    return model.eval(), load_autoencoder(checkpoint.path / "autoencoder")


def plain_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The transformer's configuration of a dynamics checkpoint as `load_dynamics` gives it back: with all experts."""
    adaptation = checkpoint.extra.get("adaptation") or {}
    router = dict(checkpoint.config["router"])
    router["num_experts"] += adaptation.get("new_experts", 0)
    return {**checkpoint.config, "router": router}
