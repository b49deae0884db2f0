"""Whole snapshots straight from the shards of a Zarr array, at the speed of a memory map.

A shard holds its chunks one after another, and an index with the offset and length of each of them [bytes],

    (offset₀, length₀), (offset₁, length₁), …, CRC-32C          little-endian uint64, both 2⁶⁴ − 1 for no chunk,

so where a chunk is one snapshot, and not compressed, reading it is one copy from the page cache. What has been
compressed by Blosc is decompressed to where it belongs. Everything else Zarr reads.
"""

from __future__ import annotations

import mmap
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import LocalStore

NO_CHUNK = 2**64 - 1
NUM_SHARDS = 64
"""Shards of one array that stay mapped: each takes a file descriptor, and address space but no memory of its own."""


class Shard(NamedTuple):
    """A mapped shard, and the (offset, length) of each snapshot in it."""

    file: mmap.mmap
    table: np.ndarray


class SnapshotReader:
    """Reads snapshots of one array of dimensions ``(trajectory, time, …)``, from several threads if need be.

    Args:
        array: the array, which nobody writes to any more.
    """

    def __init__(self, array: zarr.Array) -> None:
        self.array = array
        self._snapshot: tuple[int, ...] = tuple(array.shape[2:])
        self._compressed = _compressed(array)
        self._shard = lru_cache(maxsize=NUM_SHARDS)(self._open)

    @property
    def direct(self) -> bool:
        """Whether the shards are read without Zarr."""
        return self._compressed is not None

    def read(self, trajectory: int, time: int | slice, out: np.ndarray | None = None) -> np.ndarray:
        """One snapshot, or several of one trajectory.

        Args:
            trajectory: which trajectory, from 0.
            time: which snapshot, from 0, or a slice of them with a positive step.
            out: where to, of the result's shape; the numbers are converted to its type. Default: a new array.

        Raises:
            ValueError: a shard that is missing or damaged.
        """
        times = range(self.array.shape[1])[time] if isinstance(time, slice) else range(time, time + 1)
        shape = (len(times), *self._snapshot) if isinstance(time, slice) else self._snapshot
        # NumPy asks for huge pages, which torch does not: half the time of a first write to 25 MB
        result = np.empty(shape, self.array.dtype) if out is None else out
        if result.shape != shape:
            raise ValueError(f"Expected room for {shape}, got {result.shape}.")
        if not self.direct:
            result[...] = self.array[trajectory, time]
            return result
        for one, t in zip(result.reshape(len(times), *self._snapshot) if times else [], times, strict=True):
            self._copy(trajectory, t, one)
        return result

    def _copy(self, trajectory: int, time: int, out: np.ndarray) -> None:
        assert self.array.shards is not None
        position, within = divmod(time, self.array.shards[1])
        shard = self._shard(trajectory, position)
        offset, length = (int(number) for number in shard.table[within])
        if offset == length == NO_CHUNK:
            out[...] = self.array.fill_value
        elif self._compressed:
            self._decompress(memoryview(shard.file)[offset : offset + length], out, (trajectory, time))
        else:
            out[...] = np.frombuffer(shard.file, self.array.dtype, out.size, offset).reshape(out.shape)

    def _decompress(self, chunk: memoryview, out: np.ndarray, where: tuple[int, int]) -> None:
        from numcodecs import blosc

        fits = out.dtype == self.array.dtype and out.flags.c_contiguous
        room = out if fits else np.empty(out.shape, self.array.dtype)
        size = int.from_bytes(chunk[4:8], "little")
        try:
            if size != room.nbytes:
                raise RuntimeError(f"{size} bytes for a snapshot of {room.nbytes}")
            blosc.decompress(chunk, room)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"Expected a readable snapshot at trajectory {where[0]}, time {where[1]} of {self.array.name!r} in "
                f"{self._root}, got damaged data ({error}); make or copy it again."
            ) from error
        if not fits:
            out[...] = room

    @property
    def _root(self) -> Path:
        assert isinstance(self.array.store, LocalStore)
        return self.array.store.root

    def _open(self, trajectory: int, position: int) -> Shard:
        """Map a shard and check its index."""
        array, codec = self.array, _sharding(self.array)
        assert codec is not None and array.shards is not None
        key = array.metadata.encode_chunk_key((trajectory, position, *(0 for _ in self._snapshot)))
        path, number = self._root / array.path / key, array.shards[1]
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ValueError(f"Expected a shard {path}, got none or an empty one; make or copy it again.") from error
        size = 16 * number + 4
        at_end = codec.index_location.value == "end"
        stored = mapped[-size:] if at_end else mapped[:size]
        index = np.frombuffer(stored[:-4], "<u8").reshape(-1, 2) if len(stored) == size else np.empty((0, 2), "<u8")
        offsets, lengths = index[(index != NO_CHUNK).any(1)].T
        whole = len(index) and crc32c(stored[:-4]) == int.from_bytes(stored[-4:], "little")
        inside = whole and (lengths <= len(mapped)).all() and (offsets <= len(mapped) - lengths).all()
        if not inside or (not self._compressed and (lengths != self._num_bytes).any()):
            raise ValueError(f"Expected a whole shard of {number} snapshots, got a damaged {path}; copy it again.")
        return Shard(mapped, index)

    @property
    def _num_bytes(self) -> int:
        return int(np.prod(self._snapshot, dtype=np.int64)) * self.array.dtype.itemsize


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), as at the end of a shard's index."""
    import google_crc32c

    return int(google_crc32c.value(data))


def _compressed(array: zarr.Array) -> bool | None:
    """Whether the snapshots of an array are compressed; None where this module cannot read them."""
    codec, snapshot, shards = _sharding(array), tuple(array.shape[2:]), array.shards
    if codec is None or not isinstance(array.store, LocalStore):
        return None
    if array.chunks != (1, 1, *snapshot) or shards is None or (shards[0], *shards[2:]) != (1, *snapshot):
        return None
    index, inner = codec.index_codecs, codec.codecs
    if [type(codec) for codec in index] != [BytesCodec, Crc32cCodec] or sys.byteorder != "little":
        return None
    if any(isinstance(codec, BytesCodec) and str(codec.endian).endswith("big") for codec in (*index, *inner)):
        return None
    kinds: dict[tuple[type, ...], bool] = {(BytesCodec,): False, (BytesCodec, BloscCodec): True}
    return kinds.get(tuple(type(codec) for codec in inner))


def _sharding(array: zarr.Array) -> ShardingCodec | None:
    codecs: Any = getattr(array.metadata, "codecs", ())
    return codecs[0] if len(codecs) == 1 and isinstance(codecs[0], ShardingCodec) else None
