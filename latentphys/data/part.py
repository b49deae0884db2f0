"""Writing some trajectories of a store, in any process.

A snapshot waits in memory until its shard is complete, for a shard written in parts is rewritten for each of them. The
checksums and statistics of a shard are taken in the order of time when it is written, and join the record of their
trajectory in the order of time too: so a store does not depend on who wrote which snapshot when, to the last bit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from latentphys.data import records
from latentphys.data.lock import FileLock
from latentphys.data.plan import Plan
from latentphys.data.records import Record
from latentphys.data.statistics import RunningStatistics
from latentphys.data.store import crc
from latentphys.grid import Geometry


@dataclass
class _Trajectory:
    """A trajectory in progress.

    Args:
        record: of the leading shards.
        waiting: (array, first snapshot) → snapshots of a shard, and which of them are there.
        early: (array, first snapshot) → checksums and statistics of a shard that is on disk before others.
    """

    record: Record
    waiting: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    early: dict[tuple[str, int], tuple[list[int], RunningStatistics | None]] = field(default_factory=dict)

    def has(self, name: str, start: int, offset: int) -> bool:
        """Whether it has a snapshot of the shard that begins with snapshot ``start``."""
        waiting = self.waiting.get((name, start))
        is_waiting = waiting is not None and bool(waiting[1][offset])
        return start < self.record.frames or (name, start) in self.early or is_waiting


class Part:
    """Writes trajectories of one store; made by `StoreWriter.part`.

    It can be pickled, and the copy works in another process, spawned or forked: it starts with nothing in memory.
    A trajectory is one part's at a time. Its snapshots come in any order, each once; up to 64 MB of them, or one of
    each array, wait in memory for every trajectory in progress. With its last snapshot a trajectory is complete, on
    disk and on record.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._reset()

    def __reduce__(self) -> tuple[Any, ...]:
        return Part, (self.plan,)

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._lock: FileLock | None = None
        self._handles: dict[str, zarr.Array] = {}
        self._trajectories: dict[int, _Trajectory] = {}
        self._geometry: tuple[int, Geometry | None] = (-1, None)

    def close(self) -> None:
        """Forget what is in memory, and let go of the store; what is on record stays."""
        if self._lock is not None:
            self._lock.close()
        self._reset()

    def write(self, name: str, trajectory: int, time: int | slice, values: Tensor | np.ndarray) -> None:
        """Write one snapshot, or several of one trajectory.

        A trajectory that is neither complete nor taken up by `resume` starts anew, whatever an earlier run left of it.

        Args:
            name: a field, or an extra array.
            trajectory: which trajectory, from 0.
            time: which snapshot, or a slice of them; ``slice(None)`` for the whole trajectory, the fastest way.
            values: ``([axis,] x, y, z)``, or ``([axis,] colatitude, longitude)`` on a sphere, with time in front for a
                slice, on any device.

        Raises:
            ValueError: no such array, trajectory or snapshot, a snapshot written before, another shape, or numbers
                that are not finite or that the array's type cannot hold.
            OSError: a disk that is full or fails.
        """
        array = self._array(name)
        times = self._times(name, trajectory, time)
        snapshot = array.shape[2:]
        expected = (len(times), *snapshot) if isinstance(time, slice) else snapshot
        if tuple(values.shape) != expected:
            raise ValueError(f"Expected {name!r} of shape {expected}, got {tuple(values.shape)}.")
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        for t, one in zip(times, values.reshape(len(times), *snapshot), strict=True):
            self._write_snapshot(name, trajectory, t, one)

    def flushed(self, trajectory: int) -> int:
        """How many leading snapshots are on disk in whole shards, of all arrays; a simulation may restart there."""
        progress = self._in_memory(trajectory)
        record = records.load(self.plan, trajectory) if progress is None else progress.record
        return 0 if record is None else record.frames

    def checkpoint(self, trajectory: int) -> int:
        """Put the `flushed` snapshots on record, so that `resume` keeps them after the end of this process.

        Returns:
            How many they are.

        Raises:
            OSError: a disk that is full or fails.
        """
        progress = self._in_memory(trajectory)
        if progress is not None:
            with self.plan.disk_errors():
                records.save(self.plan, trajectory, progress.record)
        return self.flushed(trajectory)

    def resume(self, trajectory: int) -> int:
        """Return to the last record of a trajectory, of this process or an earlier one.

        Returns:
            How many leading snapshots are kept; the others are to be written again. 0 where nothing is on record.

        Raises:
            ValueError: no such trajectory.
        """
        if not 0 <= trajectory < self.plan.num_trajectories:
            raise ValueError(f"Expected a trajectory below {self.plan.num_trajectories}, got {trajectory}.")
        if self._in_memory(trajectory) is not None:
            del self._trajectories[trajectory]
        record = records.load(self.plan, trajectory)
        if record is None:
            return 0
        if record.frames < self.plan.num_times:
            self._trajectories[trajectory] = _Trajectory(record)
        return record.frames

    def read(self, name: str, trajectory: int, time: int) -> Tensor:
        """One of the `flushed` snapshots, such as the one to restart from.

        Raises:
            ValueError: no such array, or a snapshot that is not on disk.
        """
        array, frames = self._array(name), self.flushed(trajectory)
        if not 0 <= time < frames:
            raise ValueError(f"Expected one of the {frames} snapshots on disk of trajectory {trajectory}, got {time}.")
        return torch.from_numpy(np.asarray(array[trajectory, time]))

    def first_missing(self, trajectory: int) -> tuple[str, int] | None:
        """Array and time of the first snapshot that this part waits for; None for a trajectory it has not begun."""
        progress, shard = self._in_memory(trajectory), self.plan.shard
        if progress is None:
            return None
        every = ((name, time) for name in sorted(self.plan.arrays) for time in range(self.plan.num_times))
        return next((n, t) for n, t in every if not progress.has(n, t - t % shard, t % shard))

    def _array(self, name: str) -> zarr.Array:
        self._check_process()
        if name not in self._handles:
            if name not in self.plan.arrays:
                raise ValueError(f"Expected one of {sorted(self.plan.arrays)}, got {name!r}.")
            handle = self.plan.open(name)
            if self.plan.resumable and self._lock is None:
                self._lock = self._join()
            self._handles[name] = handle
        return self._handles[name]

    def _join(self) -> FileLock:
        """Keep other runs away from the folder, if it is still the one of this run."""
        lock = FileLock(self.plan.folder / "parts.lock", shared=True)
        try:
            self.plan.check_run()
        except ValueError:
            lock.close()
            raise
        return lock

    def _check_process(self) -> None:
        """Leave to the parent what crossed a fork; its handles could hang."""
        if self._owner != os.getpid():
            self._reset()

    def _in_memory(self, trajectory: int) -> _Trajectory | None:
        self._check_process()
        return self._trajectories.get(trajectory)

    def _times(self, name: str, trajectory: int, time: int | slice) -> range:
        num_times = self.plan.num_times
        times = range(num_times)[time] if isinstance(time, slice) else range(time, time + 1)
        if not 0 <= trajectory < self.plan.num_trajectories or any(not 0 <= t < num_times for t in times):
            raise ValueError(
                f"Expected a trajectory below {self.plan.num_trajectories} and a time below {num_times} for {name!r}, "
                f"got trajectory {trajectory}, time {time}."
            )
        return times

    def _write_snapshot(self, name: str, trajectory: int, time: int, values: np.ndarray) -> None:
        array, where = self.plan.arrays[name], f"{name!r} at trajectory {trajectory}, time {time}"
        offset = time % self.plan.shard
        start = time - offset
        progress = self._begin(trajectory)
        if progress is None or progress.has(name, start, offset):
            raise ValueError(f"Expected each snapshot once, got {where} again.")
        with np.errstate(over="ignore", invalid="ignore"):
            stored = np.ascontiguousarray(values, dtype=array.dtype)
        if array.dtype.kind == "f" and not np.isfinite(stored).all():
            raise ValueError(f"Expected finite numbers that {array.dtype} can hold, got NaN or Inf in {where}.")
        if array.dtype.kind != "f" and not np.array_equal(stored, values):
            raise ValueError(f"Expected numbers that {array.dtype} can hold, got others in {where}.")
        if (name, start) not in progress.waiting:
            size = min(self.plan.shard, self.plan.num_times - start)
            progress.waiting[name, start] = np.empty((size, *array.snapshot), array.dtype), np.zeros(size, dtype=bool)
        buffer, is_there = progress.waiting[name, start]
        buffer[offset], is_there[offset] = stored, True
        if is_there.all():
            with self.plan.disk_errors():
                self._flush(progress, name, trajectory, start)

    def _begin(self, trajectory: int) -> _Trajectory | None:
        """What is known of a trajectory in progress, and an earlier run's record forgotten; None when complete."""
        if trajectory not in self._trajectories:
            if self.flushed(trajectory) == self.plan.num_times:
                return None
            records.remove(self.plan, trajectory)
            self._trajectories[trajectory] = _Trajectory(Record.empty(self.plan))
        return self._trajectories[trajectory]

    def _flush(self, progress: _Trajectory, name: str, trajectory: int, start: int) -> None:
        """Write a shard, and the record of the trajectory when it was the last."""
        buffer, _ = progress.waiting[name, start]
        self._array(name)[trajectory, start : start + len(buffer)] = buffer
        running = None
        if name in self.plan.specs:
            running = self.plan.statistics(name)
            if self._geometry[0] != trajectory:
                self._geometry = (trajectory, self.plan.geometry(trajectory))
            for snapshot in buffer:
                running.update(snapshot, self._geometry[1])
        progress.early[name, start] = [crc(snapshot) for snapshot in buffer], running
        del progress.waiting[name, start]
        record = progress.record
        while all((array, record.frames) in progress.early for array in self.plan.arrays):
            for array in self.plan.arrays:
                sums, of_shard = progress.early.pop((array, record.frames))
                record.sums[array] += sums
                if of_shard is not None:
                    record.statistics[array].merge(of_shard)
            record.frames = min(record.frames + self.plan.shard, self.plan.num_times)
        if record.frames == self.plan.num_times:
            records.save(self.plan, trajectory, record)
            del self._trajectories[trajectory]
