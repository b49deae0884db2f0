"""Make a data set: simulate trajectories of a family and write them to a store, by as many workers as there are."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from importlib.util import find_spec
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentphys.data import create_store
from latentphys.data.part import Part
from latentphys.families.family import Family
from latentphys.families.jobs import Job, Progress, geometries, stack
from latentphys.sphere import Sphere

POLL_SECONDS = 0.2


def simulate(
    family: Family,
    out: str | Path,
    *,
    shape: Sequence[int],
    num_trajectories: int,
    num_frames: int,
    seed: int = 0,
    batch_size: int = 8,
    device: str = "cpu",
    compiled: bool = False,
    workers: int | str = 1,
    resume: bool = False,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = lambda num_frames: None,
) -> Path:
    """Simulate trajectories of a family and write them to a Zarr store.

    Args:
        out: the store to make.
        shape: cells per axis (nx, ny, nz), or points (nlat, nlon) on a sphere.
        num_trajectories, num_frames: how many, and how many frames of each.
        seed: of the data set; every trajectory depends on it and on its own index only.
        batch_size: trajectories advanced together; they share Δt.
        device: ``cpu | cuda``; several workers share the GPUs that there are.
        compiled: fuse the solver with `torch.compile`.
        workers: processes that share the batches, or the address of a dask cluster (``tcp://…``) that sees the same
            files. The number of threads of each follows from it, and the last bits of FP32 sums from that.
        resume: keep what is done when interrupted, in ``.NAME.partial`` beside `out`, and go on from there.
        provenance: what else the store shall say of its making.
        progress: called with the number of trajectory-frames done since the last call.

    Raises:
        ValueError: an existing path without `overwrite`, or a shape the family cannot have.
        FloatingPointError: a solver that blew up.
    """
    if num_trajectories < 1 or num_frames < 2 or batch_size < 1:
        raise ValueError(
            f"Expected ≥ 1 trajectory of ≥ 2 frames in batches of ≥ 1, got {num_trajectories} of {num_frames} "
            f"in batches of {batch_size}."
        )
    if seed < 0:
        raise ValueError(f"Expected a seed ≥ 0, got {seed}.")
    check_workers(workers)
    family.check_shape(shape)
    domain = family.grid(shape)
    times = np.arange(num_frames) * family.interval
    drawn = [family.draw(seed, i) for i in range(num_trajectories)]
    everywhere = geometries(family, domain, drawn, seed, range(num_trajectories))
    solid = None if isinstance(everywhere, Sphere) or everywhere.solid is None else everywhere.solid.numpy()
    writer = create_store(
        out,
        grid=domain,
        specs=family.specs,
        family=family.name,
        num_trajectories=num_trajectories,
        times=times,
        parameters=family.recorded(stack(drawn), times),
        solid=solid,
        parameter_units=family.parameter_units,
        provenance={"seed": seed, "exact": True, **(provenance or {})},
        attributes={"about": inspect.getdoc(sys.modules[type(family).__module__]) or ""},
        overwrite=overwrite,
        resume=resume,
    )
    starts = range(0, num_trajectories, batch_size)
    members = [tuple(range(start, min(start + batch_size, num_trajectories))) for start in starts]
    alone = isinstance(workers, int) and min(workers, len(members)) == 1
    threads = None if alone else 1 if isinstance(workers, str) else max(1, (os.cpu_count() or 1) // workers)
    jobs = [Job(family, seed, own, num_frames, _device(device, k), compiled, threads) for k, own in enumerate(members)]
    with writer:
        if alone:
            part = writer.part()
            for job in jobs:
                job.run(part, progress)
        elif isinstance(workers, str):
            _on_cluster(jobs, writer.part(), workers, progress)
        else:
            _in_processes(jobs, writer.part(), workers, progress)
    return Path(out)


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


def _device(device: str, index: int) -> str:
    """The GPU of a job, where there are several."""
    return f"cuda:{index % torch.cuda.device_count()}" if device == "cuda" else device


def _run(job: Job, part: Part, report: Progress) -> None:
    """One job in a process of its own, or on a cluster."""
    try:
        job.run(part, report)
    finally:
        part.close()


def _end_with_parent() -> None:
    """Make this process end when its parent does, even by ``kill -9``, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_processes(jobs: Sequence[Job], part: Part, workers: int, progress: Progress) -> None:
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(_end_with_parent)
    with manager:
        done = manager.Queue()
        pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _end_with_parent)
        try:
            _wait([pool.submit(_run, job, part, done.put) for job in jobs], partial(_drain, done, progress))
        except BaseException:
            # without this the processes would finish the jobs that they have begun
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


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


def _on_cluster(jobs: Sequence[Job], part: Part, address: str, progress: Progress) -> None:
    from dask.distributed import Client, as_completed

    with Client(address) as client:
        futures = {client.submit(_run, job, part, _ignore, pure=False): job for job in jobs}
        for future in as_completed(futures):
            future.result()
            progress(len(futures[future].members) * futures[future].num_frames)


def _ignore(num_frames: int) -> None:
    """Progress that nobody watches."""
