"""Composition of checkpoints: three of one model make another complete one."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from latentphys.composition.choices import Choice
from latentphys.composition.files import Progress, merge_files
from latentphys.composition.sources import OWN, Source, fixed_names, open_relatives
from latentphys.training import manifest
from latentphys.training.checkpoint import SCHEMA, Checkpoint
from latentphys.training.durable import whole_folder

ROLES = ("anchor", "low", "high")


def compose(
    anchor: Source,
    low: Source,
    high: Source,
    out: str | Path,
    choice: Choice | float,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done: None,
) -> Path:
    """Write θ(α) of three checkpoints as a checkpoint that is like any other; returns its folder.

    It has averaged weights where the three have them, the autoencoder of the anchor, and in ``composition.json`` where
    it comes from. It is there when it is whole.

    Args:
        anchor, low, high: checkpoints, runs, or checkpoints that are open.
        choice: α, or α with how it was found.
        progress: called with the numbers done since the last call; `files.num_numbers` of the anchor's weights in all.

    Raises:
        ValueError: checkpoints that cannot be read or are no relatives, an existing path, or no matplotlib for a
            picture of how α was found.
        OSError: a full disk; what was there before is as it was.
    """
    choice = choice if isinstance(choice, Choice) else Choice(float(choice), "given")
    found, out = open_relatives(anchor, low, high), Path(out)
    check_out(out, found, overwrite)
    if choice.is_drawn:
        from latentphys.training import pictures

        pictures.check()
    with whole_folder(out) as temporary:
        about = {"alpha": choice.alpha, "found": choice.to_dict(), **_provenance(found)}
        relation = merge_files(
            found[0].weights(ema=True),
            found[1].weights(ema=True),
            found[2].weights(ema=True),
            temporary / "model.safetensors",
            choice.alpha,
            fixed=fixed_names(found[0]),
            metadata={"format": "pt", "composition": json.dumps(about)},
            progress=progress,
        )
        about["relation"] = relation.to_dict()
        (temporary / "composition.json").write_text(json.dumps(about, indent=1) + "\n")
        choice.draw(temporary / "composition.png")
        if (found[0].path / "autoencoder").is_dir():
            shutil.copytree(found[0].path / "autoencoder", temporary / "autoencoder")
        extra = {name: value for name, value in found[0].extra.items() if name not in OWN}
        manifest.seal(
            temporary,
            {
                "schema": SCHEMA,
                "kind": found[0].kind,
                "step": found[0].step,
                "config": found[0].config,
                "extra": {**extra, "composition": about},
                "state": {},
                "averaged": [],
            },
        )
    return out


def check_out(out: str | Path, found: Sequence[Checkpoint], overwrite: bool) -> None:
    """Refuse a path for a composition that is taken, with a ValueError."""
    out = Path(out)
    for one in found:
        if out.resolve() in (one.path.resolve(), *one.path.resolve().parents):
            raise ValueError(f"Expected another path than that of {one.path}, got {out}, which holds it.")
    if out.exists() and not overwrite:
        raise ValueError(f"Expected a path that is free, got {out}, which exists; pass --overwrite to replace it.")
    if out.exists() and not (out / manifest.NAME).is_file():
        raise ValueError(f"Expected a checkpoint to replace, got {out}, which is none; choose another path.")


def _provenance(found: Sequence[Checkpoint]) -> dict[str, Any]:
    files = [one.weights(ema=True) for one in found]
    sources = {
        role: {"path": str(file.resolve()), "sha256": digest(one), "averaged": one.has_ema, "step": one.step}
        for role, one, file in zip(ROLES, found, files, strict=True)
    }
    packages = ("latentphys", "torch", "safetensors")
    return {**sources, "versions": {"python": platform.python_version(), **{n: metadata.version(n) for n in packages}}}


def digest(source: Checkpoint) -> str:
    """SHA-256 of a checkpoint's weights, which they had when it was opened."""
    return str(manifest.read(source.path)["files"][source.weights(ema=True).name]["sha256"])
