"""An optimiser's state as tensors and JSON, by the names of the parameters: exact, and without a pickle.

Whatever an optimiser keeps of a parameter, or in its groups, comes back bit for bit: tensors, numbers, strings, None,
and lists, tuples and dictionaries of these. `torch.optim.Optimizer.load_state_dict` would cast tensors to the type of
the parameter, and forget how they lie in memory, which the rounding of a matrix product depends on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_ELSEWHERE = {"params", "lr", "fused", "foreach", "capturable", "differentiable"}
"""Entries of a group that are not restored: the learning rate is a function of the step, and how a step is computed
depends on the device."""


def flatten(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an optimiser, as they are, and a JSON object that says where each belongs.

    Of a sharded model every process gets the same names in the same order.

    Raises:
        ValueError: parameters that the model does not have, or a state that JSON and tensors cannot hold.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    foreign = sum(p not in names for group in optimizer.param_groups for p in group["params"])
    if foreign:
        raise ValueError(
            f"Expected an optimiser of the model's parameters, got {foreign} of another module among them."
        )
    tensors: dict[str, Tensor] = {}
    state = {
        name: {key: _encode(value, f"{name}.{key}", tensors) for key, value in optimizer.state[parameter].items()}
        for parameter, name in names.items()
        if parameter in optimizer.state
    }
    groups = [
        {
            "params": [names[parameter] for parameter in group["params"]],
            "values": {
                key: _encode(value, f"param_groups.{n}.{key}", tensors)
                for key, value in group.items()
                if key != "params"
            },
        }
        for n, group in enumerate(optimizer.param_groups)
    ]
    return tensors, {"optimizer": type(optimizer).__name__, "state": state, "groups": groups}


def restore(
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    part: Callable[[Tensor, Tensor | None], Tensor],
    path: Path,
) -> None:
    """Put what `flatten` gave, tensors whole, into an optimiser.

    What the groups count is restored. What the optimiser was made with, such as its weight decay, is not: where it
    differs there is a warning.

    Args:
        part: a whole tensor and the parameter it belongs to → what this process keeps of it.
        path: for messages.

    Raises:
        ValueError: the state of another optimiser, of parameters that the optimiser does not have, or of other ones.
    """
    if about["optimizer"] != type(optimizer).__name__:
        raise ValueError(
            f"Expected the optimiser of {path}, {about['optimizer']}, got {type(optimizer).__name__}; "
            "choose that one, or start another run."
        )
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter in groups}
    saved = {name: entry for entry in about["groups"] for name in entry["params"]}
    for name in (*about["state"], *saved):
        if name not in parameters:
            raise ValueError(f"Expected moments of the optimiser's parameters in {path}, got some of {name!r}.")
    for name in parameters:
        if name not in saved:
            raise ValueError(f"Expected moments of the optimiser's parameters in {path}, got none of {name!r}.")
    optimizer.state.clear()
    for name, entries in about["state"].items():
        parameter = parameters[name]

        def place(whole: Tensor, key: str, parameter: Tensor = parameter) -> Tensor:
            group = groups[parameter]
            if key == "step" and not (group.get("fused") or group.get("capturable")):
                return whole
            return part(whole, parameter).to(parameter.device)

        optimizer.state[parameter] = {key: _decode(value, key, tensors, place) for key, value in entries.items()}
    names = {parameter: name for name, parameter in parameters.items()}
    _restore_groups(optimizer, [[saved[names[p]] for p in g["params"]] for g in optimizer.param_groups], tensors, path)


def _restore_groups(
    optimizer: torch.optim.Optimizer, saved: list[list[dict[str, Any]]], tensors: Mapping[str, Tensor], path: Path
) -> None:
    """The counts of each group, from the groups that its parameters were in when they were saved."""
    changed: dict[str, str] = {}
    for group, before in zip(optimizer.param_groups, saved, strict=True):
        for entry in {id(entry): entry for entry in before}.values():
            for key, encoded in entry["values"].items():
                if key in _ELSEWHERE:
                    continue
                value = _decode(encoded, key, tensors, lambda whole, _: whole)
                if key in optimizer.defaults:
                    if not _equal(value, group.get(key)):
                        changed[key] = f"{key}: {group.get(key)} (the checkpoint was made with {value})"
                elif any(entry["values"].get(key) != encoded for entry in before):
                    raise ValueError(
                        f"Expected one {key!r} for the parameters of a group, got several in {path}; "
                        "group them as they were."
                    )
                else:
                    group[key] = value
    if changed:
        warnings.warn(f"The optimiser goes on with other settings: {'; '.join(changed.values())}.", stacklevel=2)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a.cpu(), b.cpu())
    return bool(a == b)


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        assert name not in tensors, name
        tensors[name] = value
        is_strided = not value.is_contiguous() and torch.empty_like(value).stride() == value.stride()
        return {"tensor": name, **({"stride": list(value.stride())} if is_strided else {})}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(entry, f"{name}.{n}", tensors) for n, entry in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(entry, f"{name}.{key}", tensors) for key, entry in value.items()}}
    raise ValueError(
        f"Expected tensors, numbers, strings, None, and lists and dictionaries of these in an optimiser's state, "
        f"got a {type(value).__name__} as {name!r}; choose another optimiser."
    )


def _decode(data: Any, key: str, tensors: Mapping[str, Tensor], place: Callable[[Tensor, str], Tensor]) -> Any:
    if not isinstance(data, dict):
        return data
    ((kind, content), *rest) = data.items()
    if kind == "tensor":
        tensor = place(tensors[content], key)
        if rest:
            strided = torch.empty_strided(tensor.shape, rest[0][1], dtype=tensor.dtype, device=tensor.device)
            return strided.copy_(tensor)
        # What was read may lie in the mapped file, and not on the boundaries that sums over vectors are rounded by.
        return tensor.clone()
    if kind == "dict":
        return {name: _decode(entry, name, tensors, place) for name, entry in content.items()}
    entries = [_decode(entry, key, tensors, place) for entry in content]
    return tuple(entries) if kind == "tuple" else entries
