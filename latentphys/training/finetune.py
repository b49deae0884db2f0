"""Fine-tuning: start from a trained model, and teach it families that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentphys.autoencoders import Autoencoder, FamilyScale
from latentphys.data import Store
from latentphys.routers import expert_counts
from latentphys.training import checkpoint as checkpoints
from latentphys.training.models import (
    adapt,
    autoencoder_extra,
    check_store,
    load_autoencoder,
    load_dynamics,
    measure_scales,
    plain_config,
    widen_condition,
)
from latentphys.transformer.conditioning import latent_geometry, store_parameters
from latentphys.transformer.dynamics import Dynamics

ADAPT = {"dynamics": ("full", "lora", "experts"), "autoencoder": ("full", "scales")}


@dataclass(frozen=True)
class FineTuning:
    """How a trained model goes on.

    Args:
        checkpoint: the trained model's checkpoint or run.
        adapt: what trains. Of a dynamics model: ``full``, all weights; ``lora``, low-rank updates of attention, mixers
            and experts; ``experts``, new experts that only new families may choose, everything old staying as it is. Of
            an autoencoder: ``full``; or ``scales``, nothing, the new families' scales only being added.
        rank: of the low-rank updates. Good values: 4…16.
        alpha: they are scaled by alpha / rank. Default: the rank.
        freeze_router: neither gradients nor balance reach the routing of the experts that were there.
        new_experts: new experts of each layer, ≥ 1 with ``experts`` and 0 without.

    Raises:
        ValueError: an unknown way to adapt, or a number of new experts that does not go with it.
    """

    checkpoint: str | Path
    adapt: str = "full"
    rank: int = 8
    alpha: float | None = None
    freeze_router: bool = True
    new_experts: int = 0

    def __post_init__(self) -> None:
        known = sorted({name for names in ADAPT.values() for name in names})
        if self.adapt not in known:
            raise ValueError(f"Expected adapt = {' | '.join(known)}, got {self.adapt!r}.")
        if (self.new_experts >= 1) != (self.adapt == "experts") or self.new_experts < 0:
            raise ValueError(
                f"Expected new_experts ≥ 1 with adapt = experts and 0 without, got {self.new_experts} with "
                f"adapt = {self.adapt}."
            )
        if self.adapt == "experts" and not self.freeze_router:
            raise ValueError(
                "Expected freeze_router = true with adapt = experts, got false: the routing that was there cannot "
                "change, and that of the new experts always trains."
            )

    def check(self, kind: str) -> None:
        """Refuse what does not go with a kind of model."""
        if self.adapt not in ADAPT[kind]:
            raise ValueError(
                f"Expected adapt = {' | '.join(ADAPT[kind])} for a model of kind {kind!r}, got {self.adapt!r}."
            )


def prepare(
    settings: FineTuning,
    autoencoder: Autoencoder,
    stores: Sequence[Store],
    sources: Sequence[Store],
    trajectories: Sequence[Sequence[int]],
    intervals: Mapping[str, float],
    stride: int = 1,
) -> tuple[Dynamics, Autoencoder, dict[str, Any]]:
    """A trained dynamics model, ready to be trained on latents of further families.

    What the families of the checkpoint see stays as it is, to the last bit: their conditioning, the scales of latents
    and increments, and so their outputs until training starts. The model carries ``requires_grad``, and says in
    `Dynamics.to_dict` what rebuilds it.

    Args:
        autoencoder: which made the latents.
        stores, sources: latents to train on, and the field stores that they were encoded from.
        trajectories: training trajectories of each store, for the scales of new parameters and for the use of experts.
        intervals: family → Δt [s] of each store.
        stride: snapshots of a store that make one Δt.

    Returns:
        the model; the autoencoder with the scales of all families, old and new; and the transformer's configuration,
        for checkpoints.

    Raises:
        ValueError: no dynamics checkpoint, latents of another autoencoder, another Δt of a family that the model knows,
            parameters that it cannot take, or, for new experts, families that it knows or routers that cannot grow.
    """
    settings.check("dynamics")
    found = checkpoints.open_checkpoint(settings.checkpoint, "dynamics")
    dynamics, trained_on = load_dynamics(found.path)
    both = _joined(trained_on, autoencoder, found.path)
    families = [store.family for store in stores]
    known = sorted(set(families) & set(dynamics.intervals))
    for family in known:
        if abs(intervals[family] / dynamics.intervals[family] - 1) > 1e-6:
            raise ValueError(
                f"Expected the interval of {dynamics.intervals[family]:g} s that the model knows for family "
                f"{family!r}, got {intervals[family]:g} s; choose another stride."
            )
    if settings.adapt == "experts" and known:
        raise ValueError(
            f"Expected only new families to train new experts on, got {known[0]!r}, which may not choose them; leave "
            "it out, its results stay as they are."
        )
    conditioning = dynamics.conditioning.extended(sources, trajectories)
    for channels in conditioning.added[len(dynamics.conditioning.added) :]:
        widen_condition(dynamics.transformer, channels)
    widened = len(conditioning.added) > len(dynamics.conditioning.added)
    before = list(dynamics.intervals)
    dynamics.conditioning = conditioning
    dynamics.intervals |= {family: float(intervals[family]) for family in families}
    config = plain_config(found)
    if settings.adapt == "experts":
        num_experts = dynamics.transformer.routers()[0].num_experts
        counts = _use(dynamics, both.compression, stores, sources, trajectories, stride)
        adapt(dynamics, {"adapt": "experts", "new_experts": settings.new_experts}, counts)
        dynamics.experts = {family: dynamics.experts.get(family, num_experts) for family in before}
    elif settings.adapt == "lora":
        adapt(dynamics, {"adapt": "lora", "rank": settings.rank, "alpha": settings.alpha})
    _choose_what_trains(dynamics, settings, widened)
    return dynamics, both, config


def _choose_what_trains(dynamics: Dynamics, settings: FineTuning, widened: bool) -> None:
    routers = dynamics.transformer.routers()
    dynamics.requires_grad_(settings.adapt == "full")
    trained = {"lora": (".a", ".b"), "experts": (".new",), "full": ()}[settings.adapt]
    for name, parameter in dynamics.named_parameters():
        if ".parametrizations." in name and name.endswith(trained):
            parameter.requires_grad_(True)
    if widened:
        dynamics.transformer.embed_condition[0].added.requires_grad_(True)
    if settings.adapt != "experts":  # `grow` has frozen all but the new rows
        for router in routers:
            router.requires_grad_(True)
            if settings.freeze_router:
                router.freeze()


@torch.no_grad()
def _use(
    dynamics: Dynamics,
    compression: int,
    stores: Sequence[Store],
    sources: Sequence[Store],
    trajectories: Sequence[Sequence[int]],
    stride: int,
    most: int = 8,
) -> list[Tensor]:
    """Tokens that each expert of each router takes of a few windows of the stores, each store with the same weight."""
    total: list[Tensor] = []
    for store, source, chosen in zip(stores, sources, trajectories, strict=True):
        interval, k, counts = dynamics.interval(store.family), dynamics.num_frames, []
        for trajectory in chosen[:most]:
            window = store.read("latent", trajectory, slice(0, k * stride, stride))[None].float()
            last = (k - 1) * stride
            now, then = (store_parameters(source, trajectory, time) for time in (last, last + stride))
            condition = dynamics.conditioning.vector(now, then, interval)[None]
            geometry = latent_geometry(source.geometry(trajectory), compression)
            step = dynamics(window, condition, geometry.float(), source.grid.periodic, store.family)
            counts.append([expert_counts(r.ids, r.num_experts).double() for r in step.routings])
        shares = [torch.stack(layer).mean(0) / torch.stack(layer).mean(0).sum() for layer in zip(*counts, strict=True)]
        total = shares if not total else [a + b for a, b in zip(total, shares, strict=True)]
    return total


def _joined(trained_on: Autoencoder, autoencoder: Autoencoder, path: Path) -> Autoencoder:
    """The autoencoder of some latents, once it is seen to be that of a dynamics model, with the scales of both."""
    theirs, ours = trained_on.state_dict(), autoencoder.state_dict()
    same = (
        theirs.keys() == ours.keys()
        and all(torch.equal(theirs[name].cpu(), ours[name].cpu()) for name in theirs)
        and repr(trained_on.heads) == repr(autoencoder.heads)
    )
    if not same:
        raise ValueError(
            f"Expected latents of the autoencoder of {path}, got those of one with other weights; encode the stores "
            f"with {path / 'autoencoder'}, or with what adapt = scales makes of it."
        )
    for family in trained_on.scales.keys() & autoencoder.scales.keys():
        if trained_on.scales[family].to_dict() != autoencoder.scales[family].to_dict():
            raise ValueError(
                f"Expected the scale of family {family!r} in the autoencoder of {path}, got another; encode the stores "
                f"with {path / 'autoencoder'}, or with what adapt = scales makes of it."
            )
    autoencoder.scales = {**trained_on.scales, **autoencoder.scales}
    return autoencoder


def prepare_autoencoder(
    settings: FineTuning,
    stores: Sequence[Store],
    trajectories: Sequence[Sequence[int]],
    scales: Mapping[str, FamilyScale] | None = None,
    fields: Sequence[str] | None = None,
) -> tuple[Autoencoder, dict[str, Any]]:
    """A trained autoencoder with the scales of further families, ready to be trained on their fields.

    The scales of the families that it knows stay as they are, and so does, until training starts, all that it does
    to them.

    Args:
        settings: ``full`` or ``scales``; the checkpoint may be a dynamics model's, whose autoencoder is taken.
        trajectories: of each store those that the scale of a new family is measured in.
        scales: family → its scale, where they are known, as in a run that goes on. Default: measured.
        fields: which ones it takes of new families; see `new_autoencoder`.

    Returns:
        the model, and its configuration for checkpoints. With ``scales`` nothing of it trains: it is done.

    Raises:
        ValueError: no such checkpoint, a store that the autoencoder cannot take, or a known family on another grid.
    """
    settings.check("autoencoder")
    found = checkpoints.open_checkpoint(settings.checkpoint)
    if found.kind == "dynamics":
        found = checkpoints.open_checkpoint(found.path / "autoencoder", "autoencoder")
    model = load_autoencoder(found.path)
    for store in stores:
        check_store(model, store, fields)
    if scales is None:
        new = [
            (store, some) for store, some in zip(stores, trajectories, strict=True) if store.family not in model.scales
        ]
        scales = measure_scales([store for store, _ in new], [some for _, some in new], fields)
    model.scales = {**scales, **model.scales}
    model.requires_grad_(settings.adapt == "full")
    return model, found.config


def save_autoencoder(run: Path, model: Autoencoder, config: Mapping[str, Any]) -> Path:
    """Write an autoencoder that needs no training as the run directory of one; returns the checkpoint."""
    path = run / "step-000000"
    checkpoints.save(path, kind="autoencoder", model=model, config=config, extra=autoencoder_extra(model), step=0)
    checkpoints.write_json(run / checkpoints.LAST, {"checkpoint": path.name})
    return path


def merge_checkpoint(path: str | Path, out: str | Path) -> Path:
    """Write a fine-tuned dynamics model as a plain checkpoint with the same outputs, bit for bit.

    It needs no knowledge of the fine-tuning, its experts can be read one at a time, and training it starts from its
    weights; the optimiser's moments stay behind.

    Raises:
        ValueError: no dynamics checkpoint, or an existing path.
    """
    found, out = checkpoints.open_checkpoint(path, "dynamics"), Path(out)
    if out.exists():
        raise ValueError(f"Expected a path that is free, got {out}, which exists.")
    dynamics, autoencoder = load_dynamics(found.path)
    part = checkpoints.open_checkpoint(found.path / "autoencoder", "autoencoder")
    checkpoints.save(
        out,
        kind="dynamics",
        model=dynamics,
        config=plain_config(found),
        extra={
            **dynamics.to_dict(),
            "latent_channels": autoencoder.latent_channels,
            **({"regimes": found.extra["regimes"]} if "regimes" in found.extra else {}),
        },
        step=found.step,
        parts=lambda folder: checkpoints.save(
            folder / "autoencoder",
            kind="autoencoder",
            model=autoencoder,
            config=part.config,
            extra=autoencoder_extra(autoencoder),
            step=part.step,
        ),
    )
    return out
