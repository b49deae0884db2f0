"""Encode a store of fields into a store of latents, which dynamics training reads instead."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch

from latentphys.autoencoders import Autoencoder
from latentphys.data import Store, StoreWriter, create_store
from latentphys.grid import Grid
from latentphys.training import manifest
from latentphys.training.checkpoint import Checkpoint, open_checkpoint
from latentphys.training.encode_jobs import LATENT, EncodeJob, Progress, default_batch_size, encode_trajectories
from latentphys.training.encode_ranks import write_together
from latentphys.workers import check_workers, run_in_processes, run_on_cluster


def encode_store(
    autoencoder: Autoencoder,
    store: Store,
    out: str | Path,
    *,
    checkpoint: str,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    workers: int | str = 1,
    threads: int = 1,
    together: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda num_snapshots: None,
) -> Path:
    """Write the latents of every snapshot of a store.

    Snapshots are read, encoded and written in batches. The result does not depend on the number of workers or ranks, or
    on interruptions, to the last bit. Its attributes name the source and the checkpoint; geometry and parameters stay
    with the source.

    Args:
        checkpoint: where the autoencoder was loaded from: a checkpoint, or a run directory for its newest one.
        batch_size: snapshots that are encoded together, ≥ 1. Default: as many as have 128³ cells together, or one.
        device: where to encode; the autoencoder is moved there. Several workers share the GPUs that there are. Default:
            where the autoencoder is.
        workers: processes that share the trajectories, or the address of a dask cluster (``tcp://…``) that sees the
            same files; each loads the autoencoder from the checkpoint.
        threads: CPU threads of each process, ≥ 1; the last bits depend on it.
        together: share the trajectories with the other processes of an ``accelerate launch``, which all call this.
        resume: keep what is done when interrupted, in ``.NAME.partial`` beside `out`, and go on from there. It must
            have been begun with the same weights, fields, batch size, device and threads.
        overwrite: replace `out`, at the end.
        progress: called with the number of snapshots done since the last call; of ranks, with those of this one.

    Raises:
        ValueError: a store that the autoencoder cannot take, an existing path without `overwrite`, something else
            begun there, or settings that contradict one another.
    """
    if Path(out).resolve() == store.path.resolve():
        raise ValueError(
            f"Expected another path than the store's own, got {out}; the latents would replace the fields."
        )
    check_workers(workers)
    if together and workers != 1:
        raise ValueError(f"Expected one worker in each process of a launch, got workers={workers!r}; start more ranks.")
    batch_size = default_batch_size(store.grid) if batch_size is None else batch_size
    if batch_size < 1 or threads < 1:
        raise ValueError(f"Expected batch_size ≥ 1 and threads ≥ 1, got {batch_size} and {threads}.")
    autoencoder.scale(store.family)
    autoencoder.check(store.family, store.grid, store.specs)
    if device is not None:
        autoencoder.to(device)
    kind = next(autoencoder.parameters()).device.type
    opened = open_checkpoint(checkpoint, "autoencoder")
    settings: dict[str, int | str | None] = {
        "batch_size": batch_size,
        "threads": threads,
        "device": kind,
        "tile": autoencoder.tile,
    }
    writer = _writer(autoencoder, store, out, opened, settings, overwrite, resume)
    if together:
        write_together(
            writer,
            lambda part, rank, num_ranks: encode_trajectories(
                autoencoder, store, _share(store, rank, num_ranks), part, batch_size, threads, progress
            ),
        )
        return Path(out)
    num_jobs = len(store) if isinstance(workers, str) else min(workers, len(store))
    jobs = [
        EncodeJob(
            opened.path.resolve(),
            store.path.resolve(),
            _share(store, k, num_jobs),
            store.num_times,
            batch_size,
            kind,
            k,
            threads,
            autoencoder.tile,
        )
        for k in range(num_jobs)
    ]
    with writer:
        part = writer.part()
        if isinstance(workers, str):
            run_on_cluster(jobs, part, workers, progress)
        elif num_jobs > 1:
            run_in_processes(jobs, part, workers, progress)
        else:
            try:
                encode_trajectories(autoencoder, store, _share(store, 0, 1), part, batch_size, threads, progress)
            except BaseException:
                if not any(part.flushed(i) for i in range(len(store))):
                    # nothing to go on from
                    shutil.rmtree(writer.plan.folder, ignore_errors=True)
                raise
    return Path(out)


def _share(store: Store, index: int, count: int) -> tuple[int, ...]:
    """The trajectories of one among several."""
    return tuple(range(index, len(store), count))


def _writer(
    autoencoder: Autoencoder,
    store: Store,
    out: str | Path,
    checkpoint: Checkpoint,
    settings: dict[str, int | str | None],
    overwrite: bool,
    resume: bool,
) -> StoreWriter:
    """The latent store to make."""
    shape = autoencoder.latent_shape(store.grid)
    sx, sy, sz = (length / n for length, n in zip(store.grid.lengths, shape, strict=True))
    weights = checkpoint.weights(ema=True).name
    return create_store(
        out,
        grid=Grid(shape, (sx, sy, sz), store.grid.boundaries),
        specs={LATENT.name: LATENT, **autoencoder.latent_specs},
        family=store.family,
        num_trajectories=len(store),
        times=store.times,
        dtype="float32",
        layout="latent",
        channels=autoencoder.latent_channels,
        provenance={
            "exact": bool(autoencoder.latent_specs),
            **settings,
            "weights": manifest.read(checkpoint.path)["files"][weights]["sha256"],
            "fields": hashlib.sha256(json.dumps(store.attributes["checksums"], sort_keys=True).encode()).hexdigest(),
        },
        attributes={"source": str(store.path.resolve()), "checkpoint": str(checkpoint.path.resolve())},
        overwrite=overwrite,
        resume=resume,
    )
