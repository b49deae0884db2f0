"""Make a data set: simulate trajectories of a family and write them to a store, by as many workers as there are."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentphys.data import create_store
from latentphys.families.family import Family
from latentphys.families.jobs import Job, geometries, stack
from latentphys.sphere import Sphere
from latentphys.workers import Progress, check_workers, run_in_processes, run_on_cluster


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
            run_on_cluster(jobs, writer.part(), workers, progress)
        else:
            run_in_processes(jobs, writer.part(), workers, progress)
    return Path(out)


def _device(device: str, index: int) -> str:
    """The GPU of a job, where there are several."""
    return f"cuda:{index % torch.cuda.device_count()}" if device == "cuda" else device
