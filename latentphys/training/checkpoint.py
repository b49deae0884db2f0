"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all, and never needs a pickle.

checkpoint.json        schema, kind, the model's configuration and everything it needs beside its weights; the trainer's
                       own state; size and SHA-256 of all files
model.safetensors      weights and buffers
ema.safetensors        the same with averaged weights; only of a run that averages
optimizer.safetensors  moments of the optimiser, by the name of the parameter; absent where training is over
optimizer.json         what the optimiser keeps beside tensors

A checkpoint knows nothing of the number of processes that wrote it: tensors are whole, and a model that is sharded over
any number of processes (`latentphys.training.sharding`) takes its own parts of them.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentphys.ranks import in_group
from latentphys.training import manifest, optimizer_state
from latentphys.training.durable import aside_of, is_disk_full, present, whole_folder, write_json

__all__ = ["LAST", "SCHEMA", "Checkpoint", "open_checkpoint", "save", "verify", "write_json"]

SCHEMA = "latentphys.checkpoint/2"
LAST, BEST = "last.json", "best.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder says of itself.

    Attributes:
        state: what the trainer remembers beside the model and the optimiser.
        averaged: names of the weights of which it has an average beside the last ones.
    """

    path: Path
    kind: str
    config: dict[str, Any]
    extra: dict[str, Any]
    step: int
    state: dict[str, Any] = field(default_factory=dict)
    averaged: tuple[str, ...] = ()

    @property
    def has_ema(self) -> bool:
        return bool(self.averaged)

    def weights(self, ema: bool = False) -> Path:
        """The file with a model's whole state: with averaged weights where asked for and there are any."""
        return self.path / ("ema.safetensors" if ema and self.has_ema else "model.safetensors")

    def load_into(self, model: nn.Module, ema: bool = False) -> None:
        """Load the weights.

        Args:
            ema: the averaged ones, where there are any. Default: the last ones, to train on with.

        Raises:
            ValueError: missing or damaged weights, or weights of another architecture.
        """
        tensors = read_tensors(self.weights(ema))
        current = model.state_dict()
        try:
            model.load_state_dict({name: _part(whole, current.get(name)) for name, whole in tensors.items()})
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise ValueError(
                f"Expected weights that fit the model described in {self.path}, got others: {first}"
            ) from None

    def average(self) -> dict[str, Tensor]:
        """The averaged weights by name, each whole.

        Raises:
            ValueError: a checkpoint without them.
        """
        if not self.has_ema:
            raise ValueError(
                f"Expected averaged weights in {self.path}, got none; go on without an average (trainer.ema=null), or "
                "start another run."
            )
        tensors = read_tensors(self.weights(ema=True))
        return {name: tensors[name] for name in self.averaged}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"Expected weights in {path}, got no such file.") from None
    except SafetensorError as error:
        raise ValueError(f"Expected a readable safetensors file, got {path}: {error}.") from None


def save(
    path: Path,
    *,
    kind: str,
    model: nn.Module,
    config: Mapping[str, Any],
    extra: Mapping[str, Any],
    step: int,
    optimizer: torch.optim.Optimizer | None = None,
    ema: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
    parts: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint folder; it has its name only when it is complete and on the disk.

    Of a sharded model every process has to call this; of any other, rank 0 alone may. Rank 0 writes.

    Args:
        ema: averages of some or all of the weights, sharded where these are.
        state: what the trainer has to remember, ready for JSON, which gives back every bit of a number.
        parts: writes further things into the folder, such as the autoencoder of a dynamics model.

    Raises:
        ValueError: averages of what the model does not have, or an optimiser's state that cannot be written.
        OSError: a full disk. What was there before is as it was.
    """
    own, ema = model.state_dict(), ema or {}
    for name, tensor in ema.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(f"Expected averages of the model's weights, got {name!r} of shape {tuple(tensor.shape)}.")
    weights, average = _gather(own), _gather(ema)
    moments, about = {}, None
    if optimizer is not None:
        tensors, about = optimizer_state.flatten(model, optimizer)
        moments = _gather(tensors)
    if in_group() and dist.get_rank() > 0:
        return
    try:
        with whole_folder(path) as temporary:
            save_file(weights, temporary / "model.safetensors")
            if average:
                save_file(weights | average, temporary / "ema.safetensors")
            if about is not None:
                save_file(moments, temporary / "optimizer.safetensors")
                (temporary / "optimizer.json").write_text(json.dumps(about))
            if parts is not None:
                parts(temporary)
            manifest.seal(
                temporary,
                {
                    "schema": SCHEMA,
                    "kind": kind,
                    "step": step,
                    "config": dict(config),
                    "extra": dict(extra),
                    "state": dict(state or {}),
                    "averaged": list(ema),
                },
            )
    except BaseException as error:
        if is_disk_full(error):
            needed = _bytes(weights) * (2 if average else 1) + _bytes(moments)
            free = shutil.disk_usage(path.parent).free
            raise OSError(
                errno.ENOSPC,
                f"Expected {needed} bytes for {path}, got a disk or quota with {free} free; make room, and the same "
                "command goes on. The checkpoints before are as they were",
            ) from error
        raise


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Load the optimiser's state that `save` wrote, bit for bit; the learning rate and settings stay as they are.

    Raises:
        ValueError: missing or damaged moments, moments of parameters that the optimiser does not have, or another
            kind of optimiser.
    """
    about = manifest.read_json(path / "optimizer.json")
    tensors = read_tensors(path / "optimizer.safetensors")
    optimizer_state.restore(tensors, about, optimizer, model, _part, path)


def verify(path: str | Path) -> None:
    """Read every file of a checkpoint folder and compare it with what was written.

    Raises:
        ValueError: the first file that is missing, short or changed.
    """
    manifest.check(present(Path(path)))


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors to write, on rank 0. Only where one of them is sharded do the ranks speak to each other."""
    if in_group():
        from latentphys.training.sharding import gather  # slow to import, and of no use to a single process

        tensors = gather(tensors)
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _part(whole: Tensor, current: Tensor | None) -> Tensor:
    """What a process keeps of a tensor: its part where the model is sharded."""
    if current is None or not in_group():
        return whole
    from latentphys.training.sharding import scatter_like

    return scatter_like(whole, current)


def steps(run: Path) -> list[Path]:
    """The checkpoint folders of a run, the newest first, whole or not."""
    names = (re.fullmatch(r"(\.?)(step-\d+)(\.old)?", path.name) for path in run.glob("*step-*") if path.is_dir())
    # one that waits while another takes its name counts as there
    found = {run / match[2] for match in names if match and bool(match[1]) == bool(match[3])}
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder of a run."""
    return int(folder.name.rpartition("-")[2])


def open_checkpoint(path: str | Path, kind: str | None = None) -> Checkpoint:
    """Find a checkpoint, compare every file with its SHA-256, and read what it says.

    Args:
        path: its folder; or the run that made it, or RUN/last, for the newest one that is whole, with a warning where
            the newest is damaged; or RUN/best.
        kind: ``autoencoder`` or ``dynamics``, where only that will do.

    Raises:
        ValueError: no checkpoint there, a damaged one, one of another schema, or one of another kind.
    """
    folder = Path(path)
    if not folder.exists() and folder.name == "best" and (folder.parent / BEST).is_file():
        found = _open(folder.parent / _named(folder.parent / BEST))
    elif not folder.exists() and folder.name == "last" and has_checkpoints(folder.parent):
        found = _newest(folder.parent)
    elif has_checkpoints(folder):
        found = _newest(folder)
    elif not folder.exists() and not aside_of(folder).exists():
        raise ValueError(f"Expected a checkpoint or a run directory, got {folder}, which does not exist.")
    else:
        found = _open(folder)
    if kind is not None and found.kind != kind:
        raise ValueError(f"Expected a checkpoint of kind {kind!r}, got one of kind {found.kind!r} in {found.path}.")
    return found


def has_checkpoints(folder: Path) -> bool:
    """Whether a folder is a run directory that has come as far as a checkpoint."""
    return not (folder / manifest.NAME).is_file() and ((folder / LAST).is_file() or bool(steps(folder)))


def _newest(run: Path) -> Checkpoint:
    """The checkpoint that last.json names, or the newest other one that is whole."""
    refused: dict[str, str] = {}
    while True:
        # Whoever reads a checkpoint while a run goes on may see it removed: last.json then names another one.
        name = LAST
        try:
            name = _named(run / LAST)
            if name not in refused:
                return _open(run / name)
        except ValueError as error:
            if name not in refused:
                refused[name] = str(error)
                continue
        break
    for folder in steps(run):
        if folder.name in refused:
            continue
        try:
            found = _open(folder)
        except ValueError as error:
            refused[folder.name] = str(error)
            continue
        warnings.warn(f"Damaged: {run}. {' '.join(refused.values())} {folder.name} is used instead.", stacklevel=3)
        return found
    others = "" if len(refused) == 1 else f" None of the {len(refused)} there is whole, and nothing was removed."
    raise ValueError(f"{next(iter(refused.values()))}{others}")


def _named(pointer: Path) -> str:
    """The checkpoint that last.json or best.json names."""
    name = manifest.read_json(pointer).get("checkpoint")
    if not isinstance(name, str) or not re.fullmatch(r"step-\d+", name):
        raise ValueError(
            f"Expected a checkpoint or a run directory, got {pointer.parent}, without a readable {pointer.name}."
        )
    return name


def _open(folder: Path) -> Checkpoint:
    folder = present(folder)
    schema = manifest.read(folder).get("schema")
    if schema != SCHEMA:
        raise ValueError(
            f"Expected a checkpoint of schema {SCHEMA!r}, got {schema!r} in {folder / manifest.NAME}; "
            "this version reads no other."
        )
    data = manifest.check(folder)
    missing = sorted({"kind", "config", "extra", "step", "state", "averaged"} - set(data))
    if missing:
        raise ValueError(f"Expected a complete checkpoint, got no {missing[0]!r} in {folder / manifest.NAME}.")
    return Checkpoint(
        folder, data["kind"], data["config"], data["extra"], data["step"], data["state"], tuple(data["averaged"])
    )
