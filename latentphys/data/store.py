"""Reading a store: a Zarr v3 group with one array per field, dimensions (trajectory, time[, axis], x, y, z),
or (trajectory, time[, axis], colatitude, longitude) on a sphere.

A chunk is one snapshot of one field, a shard several snapshots of one trajectory. Dask must rechunk to whole shards
before it stores into such an array; reading needs no such care.
"""

from __future__ import annotations

import json
import operator
import os
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import zarr
from torch import Tensor

from latentphys.data.shards import SnapshotReader
from latentphys.fields import Domain, FieldSpec, State, domain_from_dict
from latentphys.grid import Geometry, Grid
from latentphys.sphere import Sphere

if TYPE_CHECKING:
    import dask.array

SCHEMA = "latentphys.store/1"
ATTRIBUTES = {
    "family": str,
    "kind": str,
    "grid": dict,
    "specs": dict,
    "num_trajectories": int,
    "snapshots": list,
    "parameter_units": dict,
    "statistics": dict,
    "checksums": dict,
}


def snapshot_shape(spec: FieldSpec, domain: Domain, channels: int | None) -> tuple[int, ...]:
    """Shape of one snapshot in a store; among latents all but fluxes have ``channels`` components."""
    return spec.shape(domain) if channels is None or spec.kind == "flux" else (channels, *domain.shape)


def crc(values: np.ndarray) -> int:
    """CRC-32 of the bytes of an array."""
    return zlib.crc32(np.ascontiguousarray(values).data)


def checksum(parts: Iterable[np.ndarray]) -> str:
    """CRC-32 of the CRC-32s of the parts' bytes, so that snapshots can be summed in any order; 8 hex digits."""
    return checksum_of_sums([crc(part) for part in parts])


def checksum_of_sums(sums: Iterable[int]) -> str:
    return f"{crc(np.array(list(sums), dtype='<u4')):08x}"


class Store:
    """A data set of fields, latents or rollouts on one grid, or on one sphere.

    Nothing but the path is handed to another process: a worker, forked or spawned, opens its own handles.

    Args:
        path: its folder.

    Attributes:
        path: its folder.
        family: the kind of flow, such as ``open_channel``.
        domain: the box or the sphere that every trajectory lives on.
        specs: the fields, by name.
        times: time of each snapshot t [s], shape (num_times,).
        num_trajectories, num_times: how much there is.
        attributes: the attributes of the group: schema, kind, grid, provenance, statistics, checksums and the like.

    Raises:
        ValueError: no store there, a store of another schema, or arrays that do not fit its grid.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.attributes = _attributes(self.path)
        self.family: str = self.attributes["family"]
        self.domain = domain_from_dict(self.attributes["grid"])
        self.specs = {name: FieldSpec.from_dict(spec) for name, spec in self.attributes["specs"].items()}
        self._handles: dict[str, zarr.Array] = {}
        self._readers: dict[str, SnapshotReader] = {}
        self._owner = os.getpid()
        self._last_geometry: tuple[int, Geometry] | None = None
        self.times: np.ndarray = np.asarray(self.array("time")[:])
        self.num_times = len(self.times)
        self.num_trajectories = int(self.attributes["num_trajectories"])
        counts = (self.num_trajectories, self.num_times)
        for name, spec in self.specs.items():
            self._check_shape(name, (*counts, *snapshot_shape(spec, self.domain, self.attributes.get("channels"))))
        self._has_solids = "solid" in self.attributes["checksums"]
        if self._has_solids:
            self._check_shape("solid", (self.num_trajectories, *self.grid.shape))

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (str(self.path),)

    def __len__(self) -> int:
        return self.num_trajectories

    def __repr__(self) -> str:
        size = f"{len(self)} trajectories of {self.num_times} snapshots on {'×'.join(map(str, self.domain.shape))}"
        return f"Store({str(self.path)!r}, {self.family}, {size})"

    @property
    def grid(self) -> Grid:
        """The box that every trajectory lives on.

        Raises:
            ValueError: a store on a sphere.
        """
        if isinstance(self.domain, Sphere):
            raise ValueError(f"Expected a store in a box, got {self.path} on {self.domain}.")
        return self.domain

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        got = self.array(name).shape
        if got != expected:
            raise ValueError(f"Expected array {name!r} of shape {expected} in {self.path}, got {got}.")

    def array(self, name: str) -> zarr.Array:
        """The Zarr array of a field or of an extra, such as ``routing``.

        Raises:
            ValueError: the store has no such array.
        """
        if self._owner != os.getpid():
            # a handle that crossed a fork can hang
            self._handles, self._readers, self._owner = {}, {}, os.getpid()
        if name not in self._handles:
            group = zarr.open_group(str(self.path), mode="r", zarr_format=3)
            array = group.get(name)
            if not isinstance(array, zarr.Array):
                raise ValueError(f"Expected an array {name!r} in {self.path}, got only {sorted(group.array_keys())}.")
            self._handles[name] = array
        return self._handles[name]

    @cached_property
    def parameters(self) -> dict[str, np.ndarray]:
        """Physical parameters, each (trajectory,), (trajectory, k) or (trajectory, time, k)."""
        names = sorted(self.attributes["parameter_units"])
        return {name: np.asarray(self.array(f"parameters/{name}")[...]) for name in names}

    def geometry(self, trajectory: int) -> Geometry:
        """The box of one trajectory and its solids.

        Raises:
            ValueError: no such trajectory, or a store on a sphere.
        """
        trajectory = self._index(trajectory, self.num_trajectories, "trajectory") if self._has_solids else 0
        last = self._last_geometry
        if last is None or last[0] != trajectory:
            solid = torch.from_numpy(self.array("solid")[trajectory]) if self._has_solids else None
            self._last_geometry = last = (trajectory, Geometry(self.grid, solid))
        return last[1]

    def read(self, name: str, trajectory: int, time: int | slice, out: Tensor | None = None) -> Tensor:
        """One field of one trajectory.

        Args:
            name: the field, or an extra array.
            trajectory: which trajectory; negative counts from the end.
            time: which snapshot, or a slice of them with a positive step.
            out: where to, on the CPU and of the result's shape; the numbers are converted to its type on the way.
                Default: a new tensor of the stored type.

        Returns:
            The stored numbers: one snapshot as `FieldSpec` says, or a slice with time in front.

        Raises:
            ValueError: no such array, trajectory or snapshot, or a shard that is missing or damaged.
        """
        trajectory = self._index(trajectory, self.num_trajectories, "trajectory")
        index = time if isinstance(time, slice) else self._index(time, self.num_times, "time")
        array = self.array(name)
        if name not in self._readers:
            self._readers[name] = SnapshotReader(array)
        return torch.from_numpy(self._readers[name].read(trajectory, index, None if out is None else out.numpy()))

    def lazy(self, name: str) -> dask.array.Array:
        """A field or extra as a dask array over all trajectories and snapshots, in pieces of whole shards.

        Raises:
            ValueError: no such array.
        """
        import dask.array

        array = self.array(name)
        return dask.array.from_zarr(array, chunks=array.shards or array.chunks)

    def __getitem__(self, index: Any) -> State:
        """``store[trajectory, time]``: the state at one snapshot, with the parameters of that time."""
        if not isinstance(index, tuple) or len(index) != 2:
            raise ValueError(f"Expected store[trajectory, time], got store[{index!r}].")
        trajectory = self._index(index[0], self.num_trajectories, "trajectory")
        time = self._index(index[1], self.num_times, "time")
        parameters: dict[str, Any] = {}
        for name, values in self.parameters.items():
            value = values[trajectory, time] if values.ndim == 3 else values[trajectory]
            parameters[name] = float(value) if values.ndim == 1 else torch.from_numpy(value.copy())
        fields = {name: self.read(name, trajectory, time) for name in self.specs}
        place = self.domain if isinstance(self.domain, Sphere) else self.geometry(trajectory)
        return State(fields, place, float(self.times[time]), parameters, self.family)

    @staticmethod
    def _index(value: int, size: int, what: str) -> int:
        index = operator.index(value)
        if not -size <= index < size:
            raise ValueError(f"Expected a {what} from 0 to {size - 1}, got {index}.")
        return index % size

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Statistics of each field, as `RunningStatistics.summary` describes them, with arrays for lists."""
        return {
            name: {key: np.asarray(value) if isinstance(value, list) else value for key, value in summary.items()}
            for name, summary in self.attributes["statistics"].items()
        }

    def verify(self) -> None:
        """Read everything and compare it with the checksums taken when it was written.

        Raises:
            ValueError: an array that cannot be read or has other bytes, with its name and trajectory.
        """
        remedy = "make or copy it again"
        for name, sums in self.attributes["checksums"].items():
            array = self.array(name)
            times: Iterable[Any] = range(self.num_times) if name in self.attributes["snapshots"] else [...]
            for trajectory, expected in enumerate(sums):
                where = f"array {name!r}, trajectory {trajectory} of {self.path}"
                try:
                    got = checksum(np.asarray(array[trajectory, time]) for time in times)
                except (ValueError, RuntimeError, OSError) as error:
                    got = f"unreadable data ({error})"
                    raise ValueError(f"Expected checksum {expected} in {where}, got {got}; {remedy}.") from error
                if got != expected:
                    raise ValueError(f"Expected checksum {expected} in {where}, got {got}; {remedy}.")


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store for reading.

    Raises:
        ValueError: no store there, a store of another schema, or arrays that do not fit its grid.
    """
    return Store(path)


def _attributes(path: Path) -> dict[str, Any]:
    """The attributes of the group, checked to be those of a store this library reads."""
    if not path.exists():
        raise ValueError(f"Expected a store at {path}, got nothing there; check the path.")
    try:
        metadata = json.loads((path / "zarr.json").read_text())
        attributes = metadata["attributes"] if metadata["node_type"] == "group" else None
    except (OSError, ValueError, KeyError, TypeError):
        attributes = None
    if not isinstance(attributes, dict):
        raise ValueError(
            f"Expected a Zarr v3 group at {path}, got something else; make one with `latentphys simulate`."
        )
    schema = attributes.get("schema")
    if schema is None:
        raise ValueError(f"Expected a store with schema {SCHEMA!r} at {path}, got a Zarr group without a schema.")
    if schema != SCHEMA:
        raise ValueError(f"Expected schema {SCHEMA!r}, the one this version reads, got {schema!r} at {path}.")
    for name, kind in ATTRIBUTES.items():
        if not isinstance(attributes.get(name), kind):
            raise ValueError(f"Expected a finished store at {path}, got no {name} in its attributes; make it again.")
    if not attributes["specs"]:
        raise ValueError(f"Expected at least one field in the specs of {path}, got none.")
    return attributes
