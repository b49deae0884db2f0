"""What a new store shall hold: checks its description, before anything is on disk."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentphys.data.plan import Plan, SnapshotArray, shard_length, space_dimensions
from latentphys.data.store import SCHEMA, snapshot_shape
from latentphys.data.writer import StoreWriter
from latentphys.fields import Domain, FieldSpec
from latentphys.grid import Geometry
from latentphys.sphere import Sphere

RESERVED = frozenset({"time", "x", "y", "z", "colatitude", "longitude", "solid", "parameters"})


def create_store(
    path: str | os.PathLike[str],
    *,
    grid: Domain,
    specs: Mapping[str, FieldSpec],
    family: str,
    num_trajectories: int,
    times: Sequence[float] | np.ndarray | Tensor,
    parameters: Mapping[str, Any] | None = None,
    parameter_units: Mapping[str, str] | None = None,
    solid: np.ndarray | Tensor | None = None,
    dtype: str = "float64",
    layout: str = "face_flux",
    channels: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
    extras: Mapping[str, tuple[Sequence[int], str, Sequence[str]]] | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> StoreWriter:
    """Prepare a new store, or go on with an unfinished one; nothing is on disk before the ``with`` block begins.

    Args:
        path: where it shall be; folders above are made.
        grid: the box or the sphere of every trajectory; the latent grid for latents.
        specs: the fields by name.
        family: the kind of flow, such as ``open_channel``.
        num_trajectories: number of trajectories, ≥ 1.
        times: time of each snapshot t [s], strictly increasing, not necessarily evenly.
        parameters: physical parameters, name → numbers (trajectory,), (trajectory, k) or (trajectory, time, k).
        parameter_units: name → unit of a parameter; default "1".
        solid: boolean voxels (trajectory, nx, ny, nz) of a box; left out of the store when there are none.
        dtype: ``float64`` (default) or ``float32``, of the fields; fluxes beside latents are always ``float64``.
        layout: the operator in which the fluxes' divergence is zero.
        channels: number of latent channels; makes a latent store, whose fields have ``channels`` components, but for
            fluxes on the latent grid.
        provenance: what else to record beside version, command and creation time, such as the seed.
        attributes: further attributes of the group; ``rollout`` makes it a rollout store.
        extras: further arrays per snapshot, name → (shape, dtype, dimension names), the first two of them
            ``trajectory, time``.
        overwrite: replace the store that is there, at the end of the ``with`` block. Default: refuse.
        resume: keep what was written in ``.NAME.partial`` beside `path` when the ``with`` block ends before its time,
            and go on from there if it is there already, made by the same arguments (provenance apart from ``time``
            and ``command`` among them). Default: begin anew, leave nothing.

    Raises:
        ValueError: an existing path, or arguments that contradict one another.
    """
    path = Path(path)
    _check_target(path, overwrite)
    t = np.asarray(times, dtype=np.float64)
    if t.ndim != 1 or not t.size or not np.isfinite(t).all() or not (np.diff(t) > 0).all():
        raise ValueError(f"Expected strictly increasing, finite times [s], got {t.tolist()}.")
    if num_trajectories < 1:
        raise ValueError(f"Expected at least one trajectory, got {num_trajectories}.")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"Expected dtype float64 or float32 for the fields, got {dtype!r}.")
    arrays = _fields(grid, specs, (num_trajectories, t.size), np.dtype(dtype), channels)
    for name, extra in (extras or {}).items():
        arrays[name] = _extra(name, extra, (num_trajectories, t.size), taken=arrays)
    values = {name: _parameter(name, value, num_trajectories, t.size) for name, value in (parameters or {}).items()}
    unknown = sorted(set(parameter_units or {}) - set(values))
    if unknown:
        raise ValueError(f"Expected units of the parameters {sorted(values)}, got one of {unknown[0]!r}.")
    own = {
        "schema": SCHEMA,
        "kind": "latent" if channels is not None else "rollout" if "rollout" in (attributes or {}) else "fields",
        "family": family,
        "layout": layout,
        "grid": grid.to_dict(),
        "specs": {name: spec.to_dict() for name, spec in specs.items()},
        "channels": channels,
        "num_trajectories": num_trajectories,
        "snapshots": sorted(arrays),
        "parameter_units": {name: (parameter_units or {}).get(name, "1") for name in values},
        "provenance": {**_provenance(), **(provenance or {})},
    }
    clash = sorted(set(attributes or {}) & {*own, "statistics", "checksums"})
    if clash:
        raise ValueError(f"Expected attributes beside the store's own, got {clash[0]!r}; choose another name.")
    try:
        own = json.loads(json.dumps({**own, **(attributes or {})}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected plain numbers, texts, lists and dicts as attributes, got: {error}.") from error
    voxels = _solid(solid, grid, num_trajectories)
    plan = Plan(
        folder=path.with_name(f".{path.name}.partial" if resume else f".{path.name}.partial-{os.getpid()}"),
        domain=grid,
        specs=dict(specs),
        arrays=arrays,
        shard=shard_length(arrays),
        has_solids=voxels is not None,
        resumable=resume,
        run=uuid.uuid4().hex,
    )
    return StoreWriter(path, plan, t, values, voxels, own, overwrite)


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise ValueError(f"Expected a new path, got {path}, which exists; choose another name or overwrite=True.")
    try:
        schema = str(json.loads((path / "zarr.json").read_text())["attributes"]["schema"])
    except (OSError, ValueError, KeyError, TypeError):
        schema = ""
    if not schema.startswith(SCHEMA.split("/")[0]):
        raise ValueError(f"Expected a store to overwrite at {path}, got something else; choose another name.")


def _fields(
    domain: Domain, specs: Mapping[str, FieldSpec], counts: tuple[int, int], dtype: np.dtype[Any], channels: int | None
) -> dict[str, SnapshotArray]:
    if not specs:
        raise ValueError("Expected at least one field in specs, got none.")
    arrays = {}
    for name, spec in specs.items():
        if name != spec.name or name in RESERVED:
            raise ValueError(f"Expected a field under its own name, and none of {sorted(RESERVED)}, got {name!r}.")
        snapshot = snapshot_shape(spec, domain, channels)
        has_components = len(snapshot) > len(domain.shape)
        is_latent = channels is not None and spec.kind != "flux"
        component = () if not has_components else ("channel",) if is_latent else ("axis",)
        dimensions = ("trajectory", "time", *component, *space_dimensions(domain))
        kind = dtype if is_latent or channels is None else np.dtype("float64")
        arrays[name] = SnapshotArray((*counts, *snapshot), kind, dimensions, {"units": spec.unit})
    return arrays


def _extra(
    name: str, extra: tuple[Sequence[int], str, Sequence[str]], counts: tuple[int, int], taken: Mapping[str, Any]
) -> SnapshotArray:
    shape, dtype, dimensions = tuple(extra[0]), np.dtype(extra[1]), tuple(extra[2])
    if name in RESERVED or name in taken:
        raise ValueError(f"Expected an extra array under a name of its own, got {name!r}.")
    if len(shape) != len(dimensions) or shape[:2] != counts or dimensions[:2] != ("trajectory", "time"):
        raise ValueError(
            f"Expected extra array {name!r} with dimensions (trajectory, time, …) of size {counts}, "
            f"got {dimensions} of size {shape}."
        )
    return SnapshotArray(shape, dtype, dimensions, {})


def _parameter(name: str, value: Any, num_trajectories: int, num_times: int) -> np.ndarray:
    array = np.asarray(value, dtype=np.float64)
    leading = {1: (num_trajectories,), 2: (num_trajectories,), 3: (num_trajectories, num_times)}.get(array.ndim)
    fits = leading is not None and array.shape[: len(leading)] == leading
    if not fits or not np.isfinite(array).all():
        raise ValueError(
            f"Expected finite numbers of shape ({num_trajectories},), ({num_trajectories}, k) or "
            f"({num_trajectories}, {num_times}, k) for parameter {name!r}, got shape {array.shape}."
        )
    return array


def _solid(solid: np.ndarray | Tensor | None, domain: Domain, num_trajectories: int) -> np.ndarray | None:
    """The voxels as an array; None where there are none."""
    if solid is None:
        return None
    if isinstance(domain, Sphere):
        raise ValueError("Expected no solid voxels on a sphere, got some; leave `solid` out.")
    voxels = torch.as_tensor(solid)
    shape = (num_trajectories, *domain.shape)
    if voxels.dtype != torch.bool or tuple(voxels.shape) != shape:
        raise ValueError(f"Expected boolean solid voxels of shape {shape}, got {voxels.dtype} {tuple(voxels.shape)}.")
    checked = Geometry(domain, voxels).solid
    return None if checked is None else checked.cpu().numpy()


def _provenance() -> dict[str, str]:
    try:
        version = importlib.metadata.version("latentphys")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"version": version, "command": shlex.join(sys.argv), "time": now}
