"""Statistics of whole stores, or of some of their trajectories, by dask.

Each shard of each trajectory is reduced by itself, a snapshot at a time, and the results are merged in the order of
trajectories and shards: who worked on what, and when, changes no bit of the outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from latentphys.data.statistics import RunningStatistics
from latentphys.data.store import Store

Compute = Callable[[Sequence[Any]], Sequence[Any]]
AT_ONCE = 256
"""Pieces handed to dask at a time, so that few results wait for being merged."""


class Piece(NamedTuple):
    """Snapshots of one field in one shard of one trajectory."""

    field: str
    trajectory: int
    start: int
    stop: int


def compute_statistics(
    store: Store,
    trajectories: Sequence[int] | None = None,
    scheduler: str = "threads",
    *,
    fields: Sequence[str] | None = None,
    num_workers: int | None = None,
    progress: Callable[[int], None] = lambda num_snapshots: None,
) -> dict[str, dict[str, Any]]:
    """Statistics of some trajectories of a store, in FP64 and one pass.

    Args:
        store: where from; by ``tcp://…`` its path must be the same for all workers.
        trajectories: which trajectories. Default: all.
        scheduler: ``threads | processes``, or the address of a dask scheduler, ``tcp://…``. Memory holds a few FP64
            snapshots for each worker.
        fields: which fields. Default: all.
        num_workers: threads or processes. Default: those dask chooses.
        progress: called with the number of snapshots read since the last call.

    Returns:
        Field → what `RunningStatistics.summary` says. The bits depend on the store and the trajectories in their order,
        and on nothing else.

    Raises:
        ValueError: no such trajectory, field or scheduler, numbers that are not finite, or a damaged store.
    """
    chosen = list(range(len(store))) if trajectories is None else [int(i) for i in trajectories]
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(len(store))):
        raise ValueError(f"Expected different trajectories from 0 to {len(store) - 1} of {store.path}, got {chosen}.")
    names = list(store.specs) if fields is None else list(fields)
    if not set(names) <= set(store.specs):
        raise ValueError(f"Expected fields among {sorted(store.specs)} of {store.path}, got {names}.")
    pieces = [piece for name in names for i in chosen for piece in _pieces(store, name, i)]
    totals = {name: _empty(store, name) for name in names}
    with _computer(scheduler, num_workers) as compute:
        for first in range(0, len(pieces), AT_ONCE):
            batch = pieces[first : first + AT_ONCE]
            for piece, state in zip(batch, compute([_delayed(store, piece) for piece in batch]), strict=True):
                totals[piece.field].merge(_empty(store, piece.field, state))
            progress(sum(piece.stop - piece.start for piece in batch))
    return {name: total.summary() for name, total in totals.items()}


def _pieces(store: Store, name: str, trajectory: int) -> Iterator[Piece]:
    array = store.array(name)
    length = (array.shards or array.chunks)[1]
    for start in range(0, store.num_times, length):
        yield Piece(name, trajectory, start, min(start + length, store.num_times))


def _empty(store: Store, name: str, state: dict[str, Any] | None = None) -> RunningStatistics:
    """Statistics of a field of a store: of nothing yet, or from their state."""
    channels = store.attributes.get("channels")
    arguments = (store.specs[name], store.domain, "solid" in store.attributes["checksums"], channels)
    return RunningStatistics(*arguments) if state is None else RunningStatistics.from_state(state, *arguments)


def _delayed(store: Store, piece: Piece) -> Any:
    import dask

    # a store is a path to other processes, where dask would look into it otherwise
    return dask.delayed(_measure, pure=False, traverse=False)(store, piece)


def _measure(store: Store, piece: Piece) -> dict[str, Any]:
    """The state of the statistics of one piece."""
    running = _empty(store, piece.field)
    geometry = store.geometry(piece.trajectory) if running.has_solids else None
    for time in range(piece.start, piece.stop):
        snapshot = store.read(piece.field, piece.trajectory, time)
        if not bool(torch.isfinite(snapshot.sum(dtype=torch.float64))):
            raise ValueError(
                f"Expected finite numbers of {piece.field!r} in {store.path}, got NaN or infinite ones at trajectory "
                f"{piece.trajectory}, time {time}."
            )
        running.update(snapshot, geometry)
    return running.state()


@contextmanager
def _computer(scheduler: str, num_workers: int | None) -> Iterator[Compute]:
    """A function that works delayed values out, with its workers kept from call to call."""
    import dask
    import dask.system

    if "://" in scheduler:
        try:
            from distributed import Client
        except ImportError as error:
            raise ValueError(
                f"Expected dask's distributed scheduler for {scheduler!r}, got none; run `pip install distributed`."
            ) from error
        with Client(scheduler) as client:
            yield lambda delayed: client.gather(client.compute(list(delayed)))
        return
    num_workers = num_workers or dask.system.CPU_COUNT
    if scheduler == "threads":
        with ThreadPoolExecutor(num_workers) as pool:
            yield lambda delayed: dask.compute(*delayed, scheduler="threads", pool=pool)
    elif scheduler == "processes":
        # a fork would copy locks that other threads hold
        with ProcessPoolExecutor(num_workers, get_context("spawn")) as processes:
            yield lambda delayed: dask.compute(*delayed, scheduler="processes", pool=processes)
    else:
        raise ValueError(f"Expected a scheduler of threads | processes | tcp://…, got {scheduler!r}.")
