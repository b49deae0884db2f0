"""Writing a store: under a temporary name beside its target, renamed when every snapshot is there."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import BloscCodec

from latentphys.data.statistics import RunningStatistics
from latentphys.data.store import checksum, checksum_of_sums, crc
from latentphys.fields import FieldSpec
from latentphys.grid import Geometry, Grid

SHARD_BYTES = 64 * 2**20


@dataclass(frozen=True)
class SnapshotArray:
    """One array of snapshots: shape (trajectory, time, …), type and dimension names."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    dimensions: tuple[str, ...]
    attributes: Mapping[str, str]

    @property
    def snapshot(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def num_components(self) -> int:
        return self.snapshot[0] if len(self.snapshot) == 4 else 1

    @property
    def shard(self) -> int:
        """Snapshots per shard: as many as 64 MB hold, shared out evenly over the trajectory; at least one."""
        most = max(1, SHARD_BYTES // (math.prod(self.snapshot) * self.dtype.itemsize))
        return math.ceil(self.shape[1] / math.ceil(self.shape[1] / most))

    def create(self, group: zarr.Group, name: str) -> zarr.Array:
        return group.create_array(
            name,
            shape=self.shape,
            dtype=self.dtype,
            chunks=(1, 1, *self.snapshot),
            shards=(1, self.shard, *self.snapshot),
            compressors=BloscCodec(cname="lz4", shuffle="shuffle"),
            # a lost shard must not read as fluid at rest
            fill_value=math.nan if self.dtype.kind == "f" else 0,
            config={"write_empty_chunks": True},
            dimension_names=self.dimensions,
            attributes=dict(self.attributes),
        )


class StoreWriter:
    """Writes one store; made by `create_store`, used as a context manager.

    Snapshots come in any order, each once. A shard is written when its last snapshot comes, so up to 64 MB (or one
    snapshot) stay in memory for every trajectory in progress: with large batches, write whole trajectories.

    On a clean exit statistics and checksums are stored and the temporary folder takes its final name. On an exception,
    and on Ctrl-C, it is removed.
    """

    def __init__(
        self,
        path: Path,
        grid: Grid,
        specs: Mapping[str, FieldSpec],
        arrays: Mapping[str, SnapshotArray],
        times: np.ndarray,
        parameters: Mapping[str, np.ndarray],
        solid: np.ndarray | None,
        attributes: Mapping[str, Any],
        overwrite: bool,
    ) -> None:
        self.path, self.grid, self.specs = path, grid, specs
        self._arrays, self._times, self._parameters, self._solid = arrays, times, parameters, solid
        self._attributes, self._overwrite = attributes, overwrite
        self._partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        self._open: dict[str, zarr.Array] = {}
        self._buffers: dict[tuple[str, int, int], tuple[np.ndarray, int]] = {}
        self._written = {name: np.zeros(array.shape[:2], dtype=bool) for name, array in arrays.items()}
        self._sums = {name: np.zeros(array.shape[:2], dtype="<u4") for name, array in arrays.items()}
        self._statistics = {
            name: RunningStatistics(spec, grid, solid is not None, arrays[name].num_components)
            for name, spec in specs.items()
        }
        self._geometry: tuple[int, Geometry] = (-1, Geometry(grid))

    def __enter__(self) -> StoreWriter:
        try:
            self._create()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._open.clear()
            self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    def _create(self) -> None:
        self._remove()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        group = zarr.create_group(str(self._partial), zarr_format=3, attributes=dict(self._attributes))
        group.create_array("time", data=self._times, dimension_names=("time",), attributes={"units": "s"})
        for axis, n, h in zip("xyz", self.grid.shape, self.grid.spacing, strict=True):
            centres = (np.arange(n) + 0.5) * h
            group.create_array(axis, data=centres, dimension_names=(axis,), attributes={"units": "m"})
        for name, values in self._parameters.items():
            dimensions = ("trajectory", "time", f"{name}_component")
            group.create_array(
                f"parameters/{name}",
                data=values,
                dimension_names={1: dimensions[:1], 2: dimensions[::2], 3: dimensions}[values.ndim],
                attributes={"units": self._attributes["parameter_units"][name]},
            )
        if self._solid is not None:
            names, chunks = ("trajectory", "x", "y", "z"), (1, *self.grid.shape)
            group.create_array("solid", data=self._solid, chunks=chunks, dimension_names=names)
        self._open = {name: array.create(group, name) for name, array in self._arrays.items()}

    def write(self, name: str, trajectory: int, time: int | slice, values: Tensor | np.ndarray) -> None:
        """Write one snapshot, or several of one trajectory.

        Args:
            name: a field, or an extra array.
            trajectory: which trajectory, from 0.
            time: which snapshot, or a slice of them; ``slice(None)`` for the whole trajectory, the fastest way.
            values: ``([axis,] x, y, z)``, with time in front for a slice, on any device.

        Raises:
            ValueError: no such array, trajectory or snapshot, a snapshot written before, another shape, or numbers
                that are not finite or that the array's type cannot hold.
        """
        if name not in self._open:
            raise ValueError(f"Expected one of {sorted(self._arrays)} inside `with create_store(…)`, got {name!r}.")
        num_trajectories, num_times, *snapshot = self._arrays[name].shape
        times = range(num_times)[time] if isinstance(time, slice) else range(time, time + 1)
        if not 0 <= trajectory < num_trajectories or any(not 0 <= t < num_times for t in times):
            raise ValueError(
                f"Expected a trajectory below {num_trajectories} and a time below {num_times} for {name!r}, "
                f"got trajectory {trajectory}, time {time}."
            )
        expected = (len(times), *snapshot) if isinstance(time, slice) else tuple(snapshot)
        if tuple(values.shape) != expected:
            raise ValueError(f"Expected {name!r} of shape {expected}, got {tuple(values.shape)}.")
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        for t, one in zip(times, values.reshape(len(times), *snapshot), strict=True):
            self._write_snapshot(name, trajectory, t, one)

    def _write_snapshot(self, name: str, trajectory: int, time: int, values: np.ndarray) -> None:
        array, where = self._arrays[name], f"{name!r} at trajectory {trajectory}, time {time}"
        if self._written[name][trajectory, time]:
            raise ValueError(f"Expected each snapshot once, got {where} again.")
        with np.errstate(over="ignore", invalid="ignore"):
            stored = np.ascontiguousarray(values, dtype=array.dtype)
        if array.dtype.kind == "f" and not np.isfinite(stored).all():
            raise ValueError(f"Expected finite numbers that {array.dtype} can hold, got NaN or Inf in {where}.")
        if array.dtype.kind != "f" and not np.array_equal(stored, values):
            raise ValueError(f"Expected numbers that {array.dtype} can hold, got others in {where}.")
        if name in self._statistics:
            self._statistics[name].update(stored, self._geometry_of(trajectory))
        self._sums[name][trajectory, time] = crc(stored)
        self._written[name][trajectory, time] = True
        self._buffer(name, trajectory, time, stored)

    def _buffer(self, name: str, trajectory: int, time: int, snapshot: np.ndarray) -> None:
        """Keep a snapshot until its shard is complete: a shard written in parts is rewritten for each of them."""
        length = self._arrays[name].shard
        start = time - time % length
        size = min(length, len(self._times) - start)
        key = (name, trajectory, start)
        buffer, filled = self._buffers.get(key) or (np.empty((size, *snapshot.shape), snapshot.dtype), 0)
        buffer[time - start] = snapshot
        self._buffers[key] = (buffer, filled + 1)
        if filled + 1 == size:
            self._open[name][trajectory, start : start + size] = buffer
            del self._buffers[key]

    def _geometry_of(self, trajectory: int) -> Geometry:
        if self._solid is not None and self._geometry[0] != trajectory:
            self._geometry = (trajectory, Geometry(self.grid, torch.from_numpy(self._solid[trajectory])))
        return self._geometry[1]

    def _finish(self) -> None:
        for name, written in self._written.items():
            if not written.all():
                trajectory, time = np.argwhere(~written)[0]
                raise ValueError(
                    f"Expected all {written.size} snapshots of {name!r} to be written, got {written.sum()}; "
                    f"the first one missing is trajectory {trajectory}, time {time}."
                )
        sums = {name: [checksum_of_sums(row.tolist()) for row in rows] for name, rows in self._sums.items()}
        sums |= {
            f"parameters/{name}": [checksum([np.asarray(row)]) for row in rows]
            for name, rows in self._parameters.items()
        }
        if self._solid is not None:
            sums["solid"] = [checksum([solid]) for solid in self._solid]
        statistics = {name: running.summary() for name, running in self._statistics.items()}
        group = zarr.open_group(str(self._partial), mode="r+", zarr_format=3)
        group.attrs.update({"statistics": statistics, "checksums": sums})
        replaced = self.path.with_name(f".{self.path.name}.replaced-{os.getpid()}")
        if self._overwrite and self.path.exists():
            self.path.rename(replaced)
        self._partial.rename(self.path)
        shutil.rmtree(replaced, ignore_errors=True)
