"""What every process must know that writes a part of a store: where it grows, and which arrays it will have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from latentphys.data.statistics import RunningStatistics
from latentphys.fields import Domain, FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.sphere import Sphere

SHARD_BYTES = 64 * 2**20
ARRAY_CONFIG: Any = {"write_empty_chunks": True}
"""A snapshot of zeros is data: without its chunk, a lost shard could not be told from it."""


def space_dimensions(domain: Domain) -> tuple[str, ...]:
    """Names of the dimensions of a scalar."""
    return ("colatitude", "longitude") if isinstance(domain, Sphere) else ("x", "y", "z")


def coordinates(domain: Domain) -> tuple[str, list[np.ndarray]]:
    """Unit and numbers of every dimension: cell centres [m], or the angles of a sphere's points [rad]."""
    if isinstance(domain, Sphere):
        return "rad", [domain.colatitudes.numpy(), domain.longitudes.numpy()]
    return "m", [(np.arange(n) + 0.5) * h for n, h in zip(domain.shape, domain.spacing, strict=True)]


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
    def snapshot_bytes(self) -> int:
        return math.prod(self.snapshot) * self.dtype.itemsize

    def create(self, group: zarr.Group, name: str, shard: int) -> None:
        """Make the array, empty, with ``shard`` snapshots per shard."""
        group.create_array(
            name,
            shape=self.shape,
            dtype=self.dtype,
            chunks=(1, 1, *self.snapshot),
            shards=(1, shard, *self.snapshot),
            # LZ4 saves 12 to 22 % of turbulence and makes reading it three to five times slower
            compressors=None,
            # a lost shard must not read as fluid at rest
            fill_value=math.nan if self.dtype.kind == "f" else 0,
            config=ARRAY_CONFIG,
            dimension_names=self.dimensions,
            attributes=dict(self.attributes),
        )


def shard_length(arrays: Mapping[str, SnapshotArray]) -> int:
    """Snapshots per shard, the same for all arrays: as many as 64 MB hold of all of them, shared out evenly."""
    num_times = next(iter(arrays.values())).shape[1]
    most = max(1, SHARD_BYTES // sum(array.snapshot_bytes for array in arrays.values()))
    return math.ceil(num_times / math.ceil(num_times / most))


@dataclass(frozen=True)
class Plan:
    """A store that is being written.

    Args:
        folder: the temporary folder; the Zarr group grows in ``folder/store``, the records in ``folder/records``.
        domain: the box or the sphere.
        specs: the fields by name.
        arrays: the arrays of snapshots, fields and extras, by name.
        shard: snapshots per shard of all of them.
        has_solids: whether any trajectory has solid voxels.
        resumable: whether the folder outlives the run that made it.
        run: the name of the run whose plan this is, among all that ever worked on the folder.
    """

    folder: Path
    domain: Domain
    specs: Mapping[str, FieldSpec]
    arrays: Mapping[str, SnapshotArray]
    shard: int
    has_solids: bool
    resumable: bool
    run: str

    @property
    def num_trajectories(self) -> int:
        return next(iter(self.arrays.values())).shape[0]

    @property
    def num_times(self) -> int:
        return next(iter(self.arrays.values())).shape[1]

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def statistics(self, name: str, state: Mapping[str, Any] | None = None) -> RunningStatistics:
        """Statistics of a field: empty ones, or those of a state."""
        num_components = math.prod(self.arrays[name].snapshot[: -len(self.domain.shape)])
        arguments = (self.specs[name], self.domain, self.has_solids, num_components)
        return RunningStatistics(*arguments) if state is None else RunningStatistics.from_state(state, *arguments)

    def open(self, name: str) -> zarr.Array:
        """An array to write to.

        Raises:
            ValueError: the store is not being written, or no longer.
        """
        try:
            array = zarr.open_array(str(self.store / name), mode="r+", zarr_format=3)
        except FileNotFoundError as error:
            raise ValueError(
                f"Expected an unfinished store in {self.folder}, got none; write inside `with create_store(…)`."
            ) from error
        return zarr.Array(zarr.AsyncArray(array.metadata, array.store_path, config=ARRAY_CONFIG))

    def begin_run(self) -> None:
        """Take the folder over; the parts of earlier runs shall write no more."""
        (self.folder / "run").write_text(self.run)

    def check_run(self) -> None:
        """Refuse a plan of an earlier run.

        Raises:
            ValueError: another run has taken the folder over.
        """
        run = self.folder / "run"
        if not run.exists() or run.read_text() != self.run:
            raise ValueError(f"Expected a part of the run that writes to {self.folder} now, got one of an earlier run.")

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Say what to do when the disk refuses."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            message = f"Expected to write to {self.folder}, got: {reason}; make room there and run again"
            raise OSError(error.errno, message) from error

    def geometry(self, trajectory: int) -> Geometry | None:
        """The solids of a trajectory; None in a store without any."""
        if not self.has_solids:
            return None
        assert isinstance(self.domain, Grid)
        return Geometry(self.domain, torch.from_numpy(np.asarray(self.open("solid")[trajectory])))
