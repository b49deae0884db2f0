"""The Well's layout from a store: an HDF5 file for each of train, valid and test, and statistics beside them.

    OUT/stats.yaml    OUT/data/train/NAME.hdf5    OUT/data/valid/NAME.hdf5    OUT/data/test/NAME.hdf5

Reference: Ohana et al., The Well, NeurIPS Datasets and Benchmarks (2024), data format.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latentphys import operators
from latentphys.data.importing.h5 import h5py
from latentphys.data.relayout import FLUX_UNIT
from latentphys.data.statistics import RunningStatistics
from latentphys.data.store import Store
from latentphys.fields import FieldSpec
from latentphys.grid import Grid

SPLITS = ("train", "valid", "test")
TYPE_OF: Mapping[str, str] = {
    "periodic": "PERIODIC",
    "no_slip": "WALL",
    "free_slip": "WALL",
    "inflow": "OPEN",
    "outflow": "OPEN",
}


def export_well(
    store: Store,
    out: str | os.PathLike[str],
    *,
    name: str | None = None,
    split: Mapping[str, Sequence[int]] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda num_frames: None,
) -> Path:
    """Write a store of fields as a data set of The Well, in FP32, snapshot by snapshot.

    Volume fluxes become velocities at cell centres (second order: what is exactly solenoidal here is not there), other
    fluxes means of their two faces over the area. Solid voxels become a field ``solid`` that does not vary in time.
    Axes of one cell are left out; a component along them that is not zero becomes a scalar of its own, such as
    ``velocity_z``. Statistics are those of the training trajectories.

    Args:
        store: what to write; no latents.
        out: a folder, which has its name when it is complete and not before.
        name: of the data set and its files. Default: the family.
        split: trajectories of ``train``, ``valid`` and ``test``. Default: the last tenth, at least one, for each of the
            latter two where there are ten trajectories or more, and everything for training where there are fewer.
        overwrite: replace a data set of The Well that is at `out`. Default: refuse.
        progress: called with the number of snapshots written since the last call.

    Returns:
        The folder.

    Raises:
        ValueError: latents, data on a sphere, trajectories that are none, or an existing path.
    """
    out, name = Path(out), name or store.family
    if store.attributes.get("channels") is not None or not isinstance(store.grid, Grid):
        raise ValueError(f"Expected fields in a box to export, got {store}; decode latents first (rollout).")
    split = _default_split(len(store)) if split is None else {key: list(split[key]) for key in split}
    wrong = [i for indices in split.values() for i in indices if not 0 <= i < len(store)]
    if set(split) - set(SPLITS) or wrong or not any(split.values()):
        raise ValueError(f"Expected trajectories 0 … {len(store) - 1} of {' | '.join(SPLITS)}, got {dict(split)}.")
    if "/" in name or name in (".", ".."):
        raise ValueError(f"Expected a name that a file can have, got {name!r}.")
    if out.exists() and not (overwrite and (out / "stats.yaml").is_file() and (out / "data").is_dir()):
        raise ValueError(f"Expected a new path, got {out}, which exists; choose another or overwrite a data set there.")
    scratch = out.with_name(f".{out.name}.partial-{os.getpid()}")
    layout = _Layout(store, name)
    measured = next(key for key in SPLITS if split.get(key))
    try:
        for key, indices in split.items():
            if indices:
                layout.write(scratch / "data" / key / f"{name}.hdf5", indices, key == measured, progress)
        (scratch / "stats.yaml").write_text(layout.statistics())
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _default_split(count: int) -> dict[str, list[int]]:
    held = count // 10
    train, valid = count - 2 * held, count - held
    return {"train": list(range(train)), "valid": list(range(train, valid)), "test": list(range(valid, count))}


class _Field(NamedTuple):
    """An array of the file, and the components (none for a scalar) of a store's field that it holds."""

    name: str
    source: FieldSpec
    components: list[int]
    order: int

    def pick(self, values: Any) -> Any:
        """Its components out of three, or its one component."""
        if self.source.kind == "scalar":
            return values
        return [values[i] for i in self.components] if self.order else values[self.components[0]]


class _Layout:
    """What the files of one data set have in common."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name, self.grid = store, name, store.grid
        self.axes = [axis for axis, n in enumerate(self.grid.shape) if n > 1] or [0]
        self.shape = tuple(self.grid.shape[axis] for axis in self.axes)
        self.fields: list[_Field] = []
        for spec in store.specs.values():
            if spec.kind == "scalar":
                self.fields.append(_Field(spec.name, spec, [], 0))
                continue
            self.fields.append(_Field(spec.name, spec, self.axes, 1))
            known = store.attributes["statistics"][spec.name]
            for axis in sorted({0, 1, 2} - set(self.axes)):
                if known["min"][axis] or known["max"][axis]:
                    self.fields.append(_Field(f"{spec.name}_{'xyz'[axis]}", spec, [axis], 0))
        cells = {n: FieldSpec(n, "scalar" if s.kind == "scalar" else "vector", "1") for n, s in store.specs.items()}
        self.moments = {name: RunningStatistics(spec, self.grid) for name, spec in cells.items()}
        self.changes = {name: RunningStatistics(spec, self.grid) for name, spec in cells.items()}
        self.solid = RunningStatistics(FieldSpec("solid", "scalar", "1"), self.grid)
        self.has_solids = any(not store.geometry(i).is_empty for i in range(len(store)))

    def write(self, path: Path, indices: Sequence[int], measure: bool, progress: Callable[[int], None]) -> None:
        """One file, snapshot by snapshot."""
        path.parent.mkdir(parents=True)
        with h5py().File(path, "w") as file:
            file.attrs.update({"dataset_name": self.name, "grid_type": "cartesian"})
            file.attrs.update({"n_spatial_dims": len(self.axes), "n_trajectories": len(indices)})
            self._dimensions(file.create_group("dimensions"))
            self._boundaries(file.create_group("boundary_conditions"))
            self._scalars(file, indices)
            groups = [file.create_group(f"t{order}_fields") for order in range(3)]
            arrays = {field.name: self._array(groups[field.order], field, len(indices)) for field in self.fields}
            names = [[field.name for field in self.fields if field.order == order] for order in range(3)]
            if self.has_solids:
                names[0].append("solid")
                self._solid(groups[0], indices, measure)
            for group, own in zip(groups, names, strict=True):
                _names(group, "field_names", own)
            for place, trajectory in enumerate(indices):
                self._trajectory(arrays, place, trajectory, measure, progress)

    def _trajectory(
        self, arrays: Mapping[str, Any], place: int, trajectory: int, measure: bool, progress: Callable[[int], None]
    ) -> None:
        before: dict[str, np.ndarray] = {}
        for frame in range(self.store.num_times):
            for name, spec in self.store.specs.items():
                values = self.store.read(name, trajectory, frame).double()
                values = operators.cell_velocity(values, self.grid) if spec.kind == "flux" else values
                cells = values.float().numpy()
                for field in (field for field in self.fields if field.source.name == name):
                    own = np.asarray(field.pick(cells))
                    own = np.moveaxis(own, 0, -1) if field.order else own
                    arrays[field.name][place, frame] = own.reshape(arrays[field.name].shape[2:])
                if measure:
                    self.moments[name].update(cells)
                    if name in before:
                        self.changes[name].update(cells.astype(np.float64) - before[name])
                    before[name] = cells
            progress(1)

    def _array(self, group: Any, field: _Field, count: int) -> Any:
        snapshot = (*self.shape, *(len(self.axes),) * field.order)
        shape, chunks = (count, self.store.num_times, *snapshot), (1, 1, *snapshot)
        array = group.create_dataset(field.name, shape=shape, chunks=chunks, dtype="f4")
        array.attrs["dim_varying"] = np.ones(len(self.axes), dtype=bool)
        array.attrs.update({"sample_varying": True, "time_varying": True})
        unit = field.source.unit
        per_area = {flux: density for density, flux in FLUX_UNIT.items()}
        array.attrs["units"] = per_area.get(unit, f"{unit}/m2") if field.source.kind == "flux" else unit
        return array

    def _solid(self, group: Any, indices: Sequence[int], measure: bool) -> None:
        array = group.create_dataset("solid", shape=(len(indices), *self.shape), dtype="f4")
        array.attrs["dim_varying"] = np.ones(len(self.axes), dtype=bool)
        array.attrs.update({"sample_varying": True, "time_varying": False, "units": "1"})
        for place, trajectory in enumerate(indices):
            solid = (~self.store.geometry(trajectory).fluid).numpy().astype(np.float32)
            array[place] = solid.reshape(self.shape)
            if measure:
                self.solid.update(solid)

    def _dimensions(self, group: Any) -> None:
        _names(group, "spatial_dims", ["xyz"[axis] for axis in self.axes])
        times = self.store.times.astype(np.float32)
        # frames close together late in a long run are one number in FP32
        time = group.create_dataset("time", data=times if (np.diff(times) > 0).all() else self.store.times)
        time.attrs.update({"sample_varying": False, "units": "s"})
        for axis in self.axes:
            centres = (np.arange(self.grid.shape[axis]) + 0.5) * self.grid.spacing[axis]
            points = group.create_dataset("xyz"[axis], data=centres.astype(np.float32))
            points.attrs.update({"sample_varying": False, "time_varying": False, "units": "m"})

    def _boundaries(self, group: Any) -> None:
        for axis in self.axes:
            sides = [TYPE_OF[side] for side in self.grid.boundaries[axis]]
            for kind in dict.fromkeys(sides):
                own = group.create_group(f"{'xyz'[axis]}_{kind.lower()}")
                _names(own, "associated_dims", ["xyz"[axis]])
                _names(own, "associated_fields", [])
                own.attrs.update({"bc_type": kind, "sample_varying": False, "time_varying": False})
                mask = np.zeros(self.grid.shape[axis], dtype=bool)
                mask[[0, -1]] = [side == kind for side in sides]
                own.create_dataset("mask", data=mask)

    def _scalars(self, file: Any, indices: Sequence[int]) -> None:
        """Parameters one number at a time; those that are the same throughout are attributes of the file as well."""
        group, names, constant = file.create_group("scalars"), [], []
        for name, values in self.store.parameters.items():
            own = values[list(indices)]
            rows = own[..., None] if own.ndim == 1 else own
            for i in range(rows.shape[-1]):
                label = name if rows.shape[-1] == 1 else f"{name}_{i}"
                names.append(label)
                scalar = group.create_dataset(label, data=rows[..., i].astype(np.float32))
                scalar.attrs.update({"sample_varying": True, "time_varying": rows.ndim == 3})
                scalar.attrs["units"] = self.store.attributes["parameter_units"][name]
                if (rows[..., i] == rows.flat[i]).all():
                    constant.append(label)
                    file.attrs[label] = float(rows.flat[i])
        _names(group, "field_names", names)
        _names(file, "simulation_parameters", constant)

    def statistics(self) -> str:
        """Mean, standard deviation and root mean square of fields and of their changes from frame to frame, as YAML."""
        import yaml

        result: dict[str, dict[str, Any]] = {key: {} for key in ("mean", "std", "rms")}
        result |= {f"{key}_delta": {} for key in result}
        for field in self.fields:
            for suffix, running in (("", self.moments), ("_delta", self.changes)):
                if self.store.num_times == 1 and suffix:
                    continue
                for key, values in _summary(running[field.source.name]).items():
                    result[key + suffix][field.name] = (
                        field.pick(values) if field.source.kind != "scalar" else values[0]
                    )
        if self.has_solids:
            for key, values in _summary(self.solid).items():
                result[key]["solid"] = values[0]
        return yaml.safe_dump(result)


def _summary(running: RunningStatistics) -> dict[str, list[float]]:
    summary = running.summary()
    rms = np.hypot(summary["mean"], summary["std"]).tolist()
    return {"mean": summary["mean"], "std": summary["std"], "rms": rms}


def _names(group: Any, attribute: str, names: Sequence[str]) -> None:
    """A list of names, which may be empty, as an attribute."""
    group.attrs.create(attribute, data=list(names), shape=(len(names),), dtype=h5py().string_dtype())
