"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all, and never needs a pickle.

checkpoint.json        schema, kind, the model's configuration and everything it needs beside its weights
model.safetensors      weights and buffers
optimizer.safetensors  moments of the optimiser, by the name of the parameter; absent where training is over

A checkpoint knows nothing of the number of processes that wrote it: tensors are whole, and a model that is sharded over
any number of processes (`latentphys.training.sharding`) takes its own parts of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SCHEMA = "latentphys.checkpoint/1"
LAST = "last.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder says of itself."""

    path: Path
    kind: str
    config: dict[str, Any]
    extra: dict[str, Any]
    step: int

    def load_into(self, model: nn.Module) -> None:
        """Load the weights.

        Raises:
            ValueError: missing or damaged weights, or weights of another architecture.
        """
        tensors = read_tensors(self.path / "model.safetensors")
        current = model.state_dict()
        try:
            model.load_state_dict({name: _part(whole, current.get(name)) for name, whole in tensors.items()})
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise ValueError(
                f"Expected weights that fit the model described in {self.path}, got others: {first}"
            ) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"Expected weights in {path}, got no such file.") from None
    except SafetensorError as error:
        raise ValueError(f"Expected a readable safetensors file, got {path}: {error}.") from None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name and rename."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)


def save(
    path: Path,
    *,
    kind: str,
    model: nn.Module,
    config: Mapping[str, Any],
    extra: Mapping[str, Any],
    step: int,
    optimizer: torch.optim.Optimizer | None = None,
    parts: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint folder; it has its name only when it is complete.

    Of a sharded model, every process has to call this; rank 0 writes.

    Args:
        parts: writes further things into the folder, such as the autoencoder of a dynamics model.
    """
    weights = _gather(model.state_dict())
    moments = None if optimizer is None else _gather(_moments(model, optimizer))
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(weights, temporary / "model.safetensors")
    if moments is not None:
        save_file(moments, temporary / "optimizer.safetensors")
    if parts is not None:
        parts(temporary)
    write_json(
        temporary / "checkpoint.json",
        {"schema": SCHEMA, "kind": kind, "step": step, "config": dict(config), "extra": dict(extra)},
    )
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Load the optimiser's moments that `save` wrote.

    Raises:
        ValueError: missing or damaged moments, or moments of parameters that the optimiser does not have.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {names[parameter]: n for n, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, whole in read_tensors(path / "optimizer.safetensors").items():
        name, _, moment = key.rpartition(".")
        if name not in index:
            raise ValueError(f"Expected moments of the optimiser's parameters in {path}, got some of {name!r}.")
        state.setdefault(index[name], {})[moment] = _part(whole, parameters[index[name]])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by the names of the parameters, in one order on every rank."""
    return {
        f"{name}.{moment}": value
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment, value in optimizer.state[parameter].items()
    }


def _gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors to write, on rank 0."""
    if dist.is_available() and dist.is_initialized():
        from latentphys.training.sharding import gather  # slow to import, and of no use to a single process

        tensors = gather(tensors)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _part(whole: Tensor, current: Tensor | None) -> Tensor:
    """What a process keeps of a tensor: its part where the model is sharded."""
    if current is None or not (dist.is_available() and dist.is_initialized()):
        return whole
    from latentphys.training.sharding import scatter_like

    return scatter_like(whole, current)


def open_checkpoint(path: str | Path, kind: str | None = None) -> Checkpoint:
    """Find and read a checkpoint, given its folder or the folder of the run that made it.

    Args:
        kind: ``autoencoder`` or ``dynamics``, where only that will do.

    Raises:
        ValueError: no checkpoint there, one of another schema, or one of another kind.
    """
    folder = Path(path)
    if not folder.exists():
        raise ValueError(f"Expected a checkpoint or a run directory, got {folder}, which does not exist.")
    if (folder / LAST).is_file():
        folder = folder / str(_read_json(folder / LAST).get("checkpoint"))
    file = folder / "checkpoint.json"
    data = _read_json(file)
    if data.get("schema") != SCHEMA:
        raise ValueError(
            f"Expected a checkpoint of schema {SCHEMA!r}, got {data.get('schema')!r} in {file}; "
            "this version reads no other."
        )
    missing = sorted({"kind", "config", "extra", "step"} - set(data))
    if missing:
        raise ValueError(f"Expected a complete checkpoint, got no {missing[0]!r} in {file}.")
    if kind is not None and data["kind"] != kind:
        raise ValueError(f"Expected a checkpoint of kind {kind!r}, got one of kind {data['kind']!r} in {folder}.")
    return Checkpoint(folder, data["kind"], data["config"], data["extra"], data["step"])


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint or run."""
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict):
        raise ValueError(
            f"Expected a checkpoint or a run directory, got {file.parent}, without a readable {file.name}."
        )
    return data
