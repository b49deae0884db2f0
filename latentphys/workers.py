"""Independent jobs that write to one store together: in processes of this machine, or on a dask cluster.

Processes end with their parent, even by ``kill -9``, and leave Ctrl-C to it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from importlib.util import find_spec
from multiprocessing.managers import SyncManager
from typing import Any, Protocol, runtime_checkable

from latentphys.data.part import Part

POLL_SECONDS = 0.2

Progress = Callable[[int], None]


@runtime_checkable
class Job(Protocol):
    """What a process needs to know to write some trajectories; it can be pickled."""

    @property
    def num_snapshots(self) -> int:
        """How many it has to care for."""
        ...

    def run(self, part: Part, progress: Progress) -> None:
        """Write what the store does not have yet; ``progress`` is told of every snapshot, also of those it has."""
        ...


def check_workers(workers: Any) -> None:
    """Refuse what is neither a number of processes nor the address of a dask cluster that can be used here.

    Raises:
        ValueError: anything else, or no dask.distributed.
    """
    is_address = isinstance(workers, str) and "://" in workers
    if not is_address and (type(workers) is not int or workers < 1):
        raise ValueError(
            f"Expected at least one worker, or the address of a dask cluster such as tcp://host:8786, got {workers!r}."
        )
    if is_address and find_spec("distributed") is None:
        raise ValueError(f"Expected dask.distributed for {workers!r}, got none; pip install distributed.")


def run_in_processes(jobs: Sequence[Job], part: Part, num_processes: int, progress: Progress) -> None:
    """Run jobs in spawned processes; the first that fails ends them all.

    Args:
        part: of the store; each job gets a copy of it.
        progress: called here with the number of snapshots done since the last call.
    """
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(_end_with_parent)
    with manager:
        done = manager.Queue()
        pool = ProcessPoolExecutor(min(num_processes, len(jobs)), context, _end_with_parent)
        try:
            _wait([pool.submit(_run, job, part, done.put) for job in jobs], partial(_drain, done, progress))
        except BaseException:
            # without this the processes would finish the jobs that they have begun
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def run_on_cluster(jobs: Sequence[Job], part: Part, address: str, progress: Progress) -> None:
    """Run jobs on a dask cluster that sees the same files; ``progress`` hears of whole jobs."""
    from dask.distributed import Client, as_completed

    with Client(address) as client:
        futures = {client.submit(_run, job, part, _ignore, pure=False): job for job in jobs}
        for future in as_completed(futures):
            future.result()
            progress(futures[future].num_snapshots)


def _run(job: Job, part: Part, report: Progress) -> None:
    """One job in a process of its own, or on a cluster."""
    try:
        job.run(part, report)
    finally:
        part.close()


def _end_with_parent() -> None:
    """Make this process end when its parent does, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _wait(futures: Sequence[Future[None]], look: Callable[[], None]) -> None:
    """Until all are done or one has failed."""
    waiting = set(futures)
    while waiting:
        finished, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
        look()
        for future in finished:
            future.result()


def _drain(done: Any, progress: Progress) -> None:
    while not done.empty():
        progress(done.get())


def _ignore(num_snapshots: int) -> None:
    """Progress that nobody watches."""
