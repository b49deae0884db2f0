"""The checkpoints that a composition is made of: three of one model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentphys.composition.weights import Weights
from latentphys.routers import Router
from latentphys.training.checkpoint import Checkpoint, open_checkpoint
from latentphys.training.models import build, check_classes, checkpoint_scales, new_dynamics
from latentphys.training.provenance import differences
from latentphys.transformer.conditioning import Conditioning

OWN = ("regimes", "composition")
"""What a checkpoint's extra says of how its weights were made, and not of how they are used."""


Source = str | Path | Checkpoint
"""A checkpoint: its folder, a run, or one that is open. What is open stays the same one while a run goes on."""


def open_relatives(anchor: Source, low: Source, high: Source) -> list[Checkpoint]:
    """Three checkpoints of one model: of one kind, configuration, scales, families and autoencoder.

    Those that are open already are not read again.

    Raises:
        ValueError: what differs, or fine-tuned weights that are not merged yet.
    """
    found = [one if isinstance(one, Checkpoint) else open_checkpoint(one) for one in (anchor, low, high)]
    first = found[0]
    for one in found:
        adaptation = one.extra.get("adaptation")
        if adaptation is not None:
            raise ValueError(
                f"Expected plain weights in {one.path}, got fine-tuned ones beside them ({adaptation['adapt']}); merge "
                "them first with latentphys.training.finetune.merge_checkpoint."
            )
    for one in found[1:]:
        if one.kind != first.kind:
            raise ValueError(
                f"Expected a checkpoint of kind {first.kind!r}, as {first.path}, got one of kind {one.kind!r} in "
                f"{one.path}; give an anchor and endpoints of one kind."
            )
        extras = [{name: value for name, value in c.extra.items() if name not in OWN} for c in (first, one)]
        pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "configuration": (first.config, one.config),
            "description": (extras[0], extras[1]),
        }
        for what, (before, after) in pairs.items():
            for name, (a, b) in differences(before, after).items():
                raise ValueError(
                    f"Expected relatives of {first.path}, got another {what} in {one.path}: {name} is {_short(b)} and "
                    f"not {_short(a)}; fine-tune both endpoints from this anchor, with its families."
                )
        if first.kind == "dynamics":
            _check_same_autoencoder(first, one)
    return found


def fixed_names(checkpoint: Checkpoint) -> set[str]:
    """Tensors of a model that composition must not move: all buffers, and all that a router has."""
    model = bare_model(checkpoint)
    fixed = set(model.state_dict()) - {name for name, _ in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, Router):
            fixed |= {f"{path}.{name}" for name, _ in module.named_parameters()}
    return fixed


def bare_model(checkpoint: Checkpoint) -> nn.Module:
    """The model that a plain checkpoint describes, without memory for its weights."""
    check_classes(checkpoint.config, checkpoint.path)
    extra = checkpoint.extra
    if checkpoint.kind == "autoencoder":
        scales = checkpoint_scales(checkpoint)
        with torch.device("meta"):
            model: nn.Module = build(checkpoint.config, scales=scales)
        return model
    conditioning = Conditioning.from_dict(extra["conditioning"])
    with torch.device("meta"):
        return new_dynamics(
            checkpoint.config, extra["latent_channels"], conditioning, extra["intervals"], extra.get("experts")
        )


def _check_same_autoencoder(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse latents of another autoencoder, or in other scales."""
    parts = [open_checkpoint(one.path / "autoencoder", "autoencoder") for one in (first, other)]
    same = parts[0].config == parts[1].config and parts[0].extra["scales"] == parts[1].extra["scales"]
    if same:
        with ExitStack() as stack:
            a, b = (Weights(part.weights(ema=True), stack) for part in parts)
            same = a.specs == b.specs and all(torch.equal(a.read(name, ...), b.read(name, ...)) for name in a.specs)
    if not same:
        raise ValueError(
            f"Expected the autoencoder of {first.path} in {other.path}, got another one: latents of different "
            "autoencoders have nothing in common. Fine-tune both endpoints on latents of the anchor's."
        )


def _short(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
