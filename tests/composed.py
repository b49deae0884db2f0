"""Checkpoints near one another, as fine-tuning makes them, in no time."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from small import Road

from latentphys.composition.sources import fixed_names
from latentphys.training import manifest, open_checkpoint


class Three(NamedTuple):
    """An anchor and two endpoints near it."""

    anchor: Path
    low: Path
    high: Path


def endpoint(source: Path, out: Path, seed: int, size: float = 0.1, **extra: Any) -> Path:
    """A copy of a checkpoint whose weights went some way, as fine-tuning with a frozen router lets them."""
    found = open_checkpoint(source)
    fixed = fixed_names(found)
    shutil.copytree(found.path, out)
    tensors, generator = load_file(found.weights(ema=True)), torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name not in fixed:
            spread = size * (tensor.std(correction=0) + 1e-3)
            tensors[name] = tensor + spread * torch.randn(tensor.shape, generator=generator)
    return rewrite(out, tensors, **extra)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changed: Any) -> Path:
    """Change what a checkpoint holds, and seal it again."""
    about = {k: v for k, v in manifest.read(folder).items() if k not in ("files", "sha256")}
    extra = about["extra"] | changed.pop("extra", {})
    for name in [name for name, value in extra.items() if value is None]:
        del extra[name]
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    (folder / "ema.safetensors").unlink(missing_ok=True)
    manifest.seal(folder, {**about, "averaged": [], **changed, "extra": extra})
    return folder


def write_files(folder: Path, *three: Mapping[str, torch.Tensor]) -> tuple[Path, Path, Path]:
    """Write the tensors of anchor, low and high endpoint; their files."""
    paths = folder / "anchor.safetensors", folder / "low.safetensors", folder / "high.safetensors"
    for path, tensors in zip(paths, three, strict=True):
        save_file(dict(tensors), path)
    return paths


def build_three(road: Road, folder: Path) -> Three:
    """Endpoints of an anchor that say at which viscosity they were trained."""
    regimes = {}
    anchor = open_checkpoint(road.dynamics).path
    for name, at in (("low", 0.01), ("high", 0.04)):
        mean = {"min": at, "max": at, "mean": at, "geometric_mean": at, "num": 2}
        regimes[name] = {"regimes": {"porous": {"viscosity": mean}, "open_channel": {"depth": mean}}}
    low, high = (endpoint(anchor, folder / n, seed, extra=regimes[n]) for seed, n in enumerate(("low", "high")))
    return Three(anchor, low, high)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
