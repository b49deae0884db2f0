"""Stores as VTKHDF image data with time, which ParaView and VTK open as one film.

    /VTKHDF            Version 2.2, Type ImageData, WholeExtent, Origin, Spacing, Direction
    /VTKHDF/CellData   name (step, z, y, x[, component]); what does not change has one step
    /VTKHDF/Steps      NSteps, Values (times t [s]), CellDataOffsets/name: where each step begins

Reference: VTK File Formats, VTKHDF, https://docs.vtk.org/en/latest/vtk_file_formats/vtkhdf_file_format/index.html
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from latentphys import operators
from latentphys.data.importing.h5 import h5py
from latentphys.data.routing import cell_data, has_routing, read_routing
from latentphys.data.store import Store
from latentphys.fields import FieldSpec

VERSION = (2, 2)
ENDING = ".vtkhdf"


def export_vtkhdf(
    store: Store,
    out: str | os.PathLike[str],
    trajectory: int | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda num_frames: None,
) -> list[Path]:
    """Write trajectories of a store as VTKHDF files, one each, as values in cells.

    A flux is written as the velocity at cell centres, the mean of the two faces of each axis (`operators.
    cell_velocity`): m3/s becomes m/s. Scalars and vectors stay as they are. ``solid`` is 1 in solid voxels. Each array
    has an attribute ``units``. The box has its low corner at the origin. In rollouts with experts ``expert_layer0``, …
    is the expert that took the latent cell in which a cell lies; -1 in the first frame, which no step made.

    Args:
        store: a store of fields or a rollout.
        out: a file ending in ``.vtkhdf`` for one trajectory, or a folder, made if need be, for one file each,
            ``<family>_<trajectory>.vtkhdf``.
        trajectory: which trajectory; negative counts from the end. Default: all of them.
        overwrite: replace files that are there. Default: refuse.
        progress: called with the number of snapshots written since the last call.

    Returns:
        The files; each has its name when it is complete, and not before.

    Raises:
        ValueError: latents, a trajectory that is not there, several trajectories for one file, or a file that exists.
    """
    if store.attributes.get("channels") is not None:
        raise ValueError(f"Expected fields, got latents in {store.path}; decode them with `latentphys rollout` first.")
    if trajectory is not None and not -len(store) <= trajectory < len(store):
        raise ValueError(f"Expected a trajectory from 0 to {len(store) - 1}, got {trajectory}.")
    wanted = range(len(store)) if trajectory is None else [trajectory % len(store)]
    out = Path(out)
    if out.suffix == ENDING and not out.is_dir():
        if len(wanted) > 1:
            raise ValueError(
                f"Expected a folder for {len(wanted)} trajectories, got the file {out}; choose one of them."
            )
        paths = [out]
    else:
        digits = len(str(len(store) - 1))
        paths = [out / f"{store.family}_{i:0{digits}d}{ENDING}" for i in wanted]
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        raise ValueError(f"Expected a new path, got {there[0]}, which exists; choose another name or overwrite=True.")
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for index, path in zip(wanted, paths, strict=True):
        partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{ENDING}")
        try:
            _write(store, index, partial, progress)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return paths


def _write(store: Store, trajectory: int, path: Path, progress: Callable[[int], None]) -> None:
    library = h5py()
    grid, num_times = store.grid, store.num_times
    space = grid.shape[::-1]
    with library.File(path, "w") as file:
        root = file.create_group("VTKHDF")
        root.attrs["Version"] = np.array(VERSION, dtype=np.int64)
        root.attrs.create("Type", b"ImageData", dtype=library.string_dtype("ascii", 9))
        root.attrs["WholeExtent"] = np.array([bound for n in grid.shape for bound in (0, n)], dtype=np.int64)
        root.attrs["Origin"] = np.zeros(3)
        root.attrs["Spacing"] = np.array(grid.spacing)
        root.attrs["Direction"] = np.eye(3).ravel()
        cells, steps = root.create_group("CellData"), root.create_group("Steps")
        steps.attrs["NSteps"] = np.int64(num_times)
        steps["Values"] = store.times
        offsets = steps.create_group("CellDataOffsets")
        arrays: dict[str, Any] = {}
        for name, spec in store.specs.items():
            shape = space if spec.kind == "scalar" else (*space, 3)
            arrays[name] = cells.create_dataset(name, (num_times, *shape), store.array(name).dtype, chunks=(1, *shape))
            arrays[name].attrs["units"] = _unit(spec)
            offsets[name] = np.arange(num_times)
        routing = read_routing(store, trajectory) if has_routing(store) else None
        for name, ids in ({} if routing is None else cell_data(routing[0], grid)).items():
            arrays[name] = cells.create_dataset(name, (num_times, *space), ids.dtype, chunks=(1, *space))
            arrays[name].attrs["units"] = "1"
            offsets[name] = np.arange(num_times)
        geometry = store.geometry(trajectory)
        if not geometry.is_empty:
            cells["solid"] = rearrange((~geometry.fluid).numpy().astype(np.uint8), "x y z -> 1 z y x")
            offsets["solid"] = np.zeros(num_times, dtype=np.int64)
        for time in range(num_times):
            for name, spec in store.specs.items():
                values = store.read(name, trajectory, time)
                if spec.kind == "flux":
                    values = operators.cell_velocity(values.double(), grid).to(values.dtype)
                pattern = "x y z -> z y x" if spec.kind == "scalar" else "c x y z -> z y x c"
                arrays[name][time] = rearrange(values.numpy(), pattern)
            for name, ids in ({} if routing is None else cell_data(routing[time], grid)).items():
                arrays[name][time] = rearrange(ids, "x y z -> z y x")
            progress(1)


def _unit(spec: FieldSpec) -> str:
    """The unit of what is written: per area for a flux."""
    if spec.kind != "flux":
        return spec.unit
    return {"m3/s": "m/s", "kg/s": "kg/(m2 s)", "Wb": "T", "T m2": "T"}.get(spec.unit, f"{spec.unit}/m2")
