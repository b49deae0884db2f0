"""Writing a store: in a temporary folder beside its target, renamed when every snapshot is there."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from torch import Tensor

from latentphys.data import records
from latentphys.data.lock import FileLock
from latentphys.data.part import Part
from latentphys.data.plan import Plan, coordinates, space_dimensions
from latentphys.data.records import Record
from latentphys.data.store import checksum, checksum_of_sums


class StoreWriter:
    """Writes one store; made by `create_store`, used as a context manager.

    `write` writes from this process; every `part` writes from wherever it is sent, so several processes can share the
    work, each trajectory in one of them. Whoever wrote it, and however often it was interrupted, the store is the same
    to the last bit.

    On a clean exit statistics and checksums are stored and the temporary folder takes its final name. On an exception,
    and on Ctrl-C, it is removed; with ``resume=True`` it stays, after ``kill -9`` too, and the next writer with the
    same description goes on: `complete` says what is done, and `Part.resume` how far a trajectory got.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        times: np.ndarray,
        parameters: Mapping[str, np.ndarray],
        solid: np.ndarray | None,
        attributes: Mapping[str, Any],
        overwrite: bool,
    ) -> None:
        self.path, self.plan = path, plan
        self._times, self._parameters, self._solid = times, parameters, solid
        self._attributes, self._overwrite = attributes, overwrite
        self._parts: weakref.WeakSet[Part] = weakref.WeakSet()
        self._own = self.part()
        self._lock: FileLock | None = None

    def __enter__(self) -> StoreWriter:
        try:
            self._begin()
        except BaseException:
            self._end(is_finished=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_finished = False
        try:
            if kind is None:
                self._finish()
                is_finished = True
        finally:
            self._end(is_finished)

    def part(self) -> Part:
        """A handle that writes trajectories, here or, pickled, in another process."""
        part = Part(self.plan)
        self._parts.add(part)
        return part

    def write(self, name: str, trajectory: int, time: int | slice, values: Tensor | np.ndarray) -> None:
        """Write one snapshot, or several of one trajectory, as `Part.write` does."""
        self._own.write(name, trajectory, time, values)

    def complete(self) -> list[int]:
        """The trajectories of which every snapshot is on disk, whoever wrote it."""
        return [i for i in range(self.plan.num_trajectories) if self._record(i) is not None]

    def _record(self, trajectory: int) -> Record | None:
        """The record of a trajectory that is complete."""
        record = records.load(self.plan, trajectory)
        return None if record is None or record.frames < self.plan.num_times else record

    def _begin(self) -> None:
        folder, description = self.plan.folder, self._description()
        if self.plan.resumable:
            self._lock = FileLock(folder / "writer.lock")
            FileLock(folder / "parts.lock").close()
            known = records.read_json(folder / "description.json")
            if known is not None and (self.plan.store / "zarr.json").exists():
                _check_same(known, description, folder)
                self.plan.begin_run()
                return
        for name in ("store", "records"):
            shutil.rmtree(folder / name, ignore_errors=True)
        with self.plan.disk_errors():
            self._create()
            self.plan.begin_run()
            records.write_json(folder / "description.json", description)

    def _end(self, is_finished: bool) -> None:
        for part in list(self._parts):
            part.close()
        if is_finished or not self.plan.resumable:
            shutil.rmtree(self.plan.folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def _description(self) -> dict[str, Any]:
        """Everything that must be the same when somebody goes on with this store, JSON-ready, by its name."""
        provenance = {k: v for k, v in self._attributes["provenance"].items() if k not in ("time", "command")}
        return {
            **{name: value for name, value in self._attributes.items() if name != "provenance"},
            **{f"provenance {name}": value for name, value in provenance.items()},
            **{f"parameter {name}": checksum([values]) for name, values in self._parameters.items()},
            **{f"array {n}": [list(a.shape), str(a.dtype), list(a.dimensions)] for n, a in self.plan.arrays.items()},
            "times": self._times.tolist(),
            "solid": None if self._solid is None else checksum([self._solid]),
            "snapshots per shard": self.plan.shard,
        }

    def _create(self) -> None:
        group = zarr.create_group(str(self.plan.store), zarr_format=3, attributes=dict(self._attributes))
        group.create_array("time", data=self._times, dimension_names=("time",), attributes={"units": "s"})
        space, (unit, numbers) = space_dimensions(self.plan.domain), coordinates(self.plan.domain)
        for dimension, along in zip(space, numbers, strict=True):
            group.create_array(dimension, data=along, dimension_names=(dimension,), attributes={"units": unit})
        for name, values in self._parameters.items():
            dimensions = ("trajectory", "time", f"{name}_component")
            group.create_array(
                f"parameters/{name}",
                data=values,
                dimension_names={1: dimensions[:1], 2: dimensions[::2], 3: dimensions}[values.ndim],
                attributes={"units": self._attributes["parameter_units"][name]},
            )
        if self._solid is not None:
            names, chunks = ("trajectory", *space), (1, *self._solid.shape[1:])
            group.create_array("solid", data=self._solid, chunks=chunks, dimension_names=names)
        for name, array in self.plan.arrays.items():
            array.create(group, name, self.plan.shard)

    def _finish(self) -> None:
        sums: dict[str, list[str]] = {name: [] for name in self.plan.arrays}
        statistics = {name: self.plan.statistics(name) for name in self.plan.specs}
        for trajectory in range(self.plan.num_trajectories):
            record = self._record(trajectory)
            if record is None:
                raise ValueError(self._missing(trajectory))
            for name, of_trajectory in record.sums.items():
                sums[name].append(checksum_of_sums(of_trajectory))
            for name, running in record.statistics.items():
                statistics[name].merge(running)
        sums |= {
            f"parameters/{name}": [checksum([np.asarray(row)]) for row in rows]
            for name, rows in self._parameters.items()
        }
        if self._solid is not None:
            sums["solid"] = [checksum([solid]) for solid in self._solid]
        summaries = {name: running.summary() for name, running in statistics.items()}
        with self.plan.disk_errors():
            # what a process was writing when it was killed
            for name in self.plan.arrays:
                for leftover in (self.plan.store / name).rglob("*.partial"):
                    leftover.unlink()
            group = zarr.open_group(str(self.plan.store), mode="r+", zarr_format=3)
            group.attrs.update({"statistics": summaries, "checksums": sums})
        self._move()

    def _move(self) -> None:
        """Give the store its final name."""
        replaced = self.plan.folder / "replaced"
        if self.path.exists():
            if not self._overwrite:
                raise ValueError(f"Expected a new path, got {self.path}, which somebody else made; move it away.")
            self.path.rename(replaced)
        try:
            self.plan.store.rename(self.path)
        except OSError:
            if replaced.exists():
                replaced.rename(self.path)
            raise

    def _missing(self, trajectory: int) -> str:
        """What to say of a trajectory that is not complete."""
        name, time = self._own.first_missing(trajectory) or (min(self.plan.arrays), self._own.flushed(trajectory))
        return (
            f"Expected all {self.plan.num_trajectories} trajectories to be written, got {len(self.complete())} "
            f"complete; the first snapshot missing is {name!r} at trajectory {trajectory}, time {time}."
        )


def _check_same(known: Mapping[str, Any], description: Mapping[str, Any], folder: Path) -> None:
    differing = [key for key in sorted({*known, *description}) if known.get(key) != description.get(key)]
    if differing:
        first = differing[0]
        there, here = (f"{repr(side.get(first)):.80}" for side in (known, description))
        raise ValueError(
            f"Expected the description that {folder} was begun with, got another {', '.join(differing)} "
            f"({first}: {there} there, {here} here); delete that folder to begin anew."
        )
