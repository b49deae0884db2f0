"""Encode a store of fields into a store of latents, which dynamics training reads instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from latentphys.autoencoders import Autoencoder
from latentphys.data import Store, create_store
from latentphys.fields import FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.training.checkpoint import open_checkpoint

LATENT = FieldSpec("latent", "vector", "1")


@torch.no_grad()
def encode_store(
    autoencoder: Autoencoder,
    store: Store,
    out: str | Path,
    *,
    checkpoint: str,
    batch_size: int = 16,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda num_frames: None,
) -> Path:
    """Write the latents of every snapshot of a store.

    Its attributes name the source and the checkpoint; geometry and parameters stay with the source.

    Args:
        checkpoint: where the autoencoder was loaded from: a checkpoint, or a run directory for its newest one.

    Raises:
        ValueError: a store that the autoencoder cannot take, or an existing path without `overwrite`.
    """
    if Path(out).resolve() == store.path.resolve():
        raise ValueError(
            f"Expected another path than the store's own, got {out}; the latents would replace the fields."
        )
    autoencoder.scale(store.family).check(store.grid)
    shape = autoencoder.latent_shape(store.grid)
    sx, sy, sz = (length / n for length, n in zip(store.grid.lengths, shape, strict=True))
    writer = create_store(
        out,
        grid=Grid(shape, (sx, sy, sz), store.grid.boundaries),
        specs={LATENT.name: LATENT},
        family=store.family,
        num_trajectories=len(store),
        times=store.times,
        dtype="float32",
        layout="latent",
        channels=autoencoder.latent_channels,
        attributes={
            "source": str(store.path.resolve()),
            "checkpoint": str(open_checkpoint(checkpoint, "autoencoder").path.resolve()),
        },
        overwrite=overwrite,
    )
    with writer:
        for i in range(len(store)):
            geometry: Geometry = store.geometry(i)
            for start in range(0, store.num_times, batch_size):
                frames = slice(start, min(start + batch_size, store.num_times))
                latent = autoencoder.encode(store.read("velocity", i, frames), geometry, store.family)
                writer.write("latent", i, frames, latent)
                progress(len(latent))
    return Path(out)
