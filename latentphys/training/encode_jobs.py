"""Snapshots of a store of fields through an autoencoder, trajectory by trajectory, in batches that never depend on who
encodes them.

The last bits of a convolution depend on the snapshots that go through it together and on the number of threads. So
batches begin anew with every shard of the latent store, and every process has the same number of threads: any number of
them, interrupted however often, writes the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from latentphys.autoencoders import Autoencoder
from latentphys.data import Store, open_store
from latentphys.data.part import Part
from latentphys.fields import FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.training.models import load_autoencoder

LATENT = FieldSpec("latent", "vector", "1")

BATCH_CELLS = 128**3
"""Cells that go through the encoder together unless told otherwise: one snapshot of 128³, or 512 of 16³."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class EncodeJob:
    """Some trajectories, for a process that opens the store and loads the autoencoder itself.

    Args:
        checkpoint: the autoencoder's.
        store: the store of fields.
        members: the numbers of the trajectories.
        num_frames: snapshots of each.
        batch_size: snapshots that are encoded together.
        device: ``cpu | cuda``.
        index: which of the GPUs, counted round and round.
        threads: CPU threads.
        tile: see `Autoencoder.tile`.
    """

    checkpoint: Path
    store: Path
    members: tuple[int, ...]
    num_frames: int
    batch_size: int
    device: str
    index: int
    threads: int
    tile: int | None

    @property
    def num_snapshots(self) -> int:
        return len(self.members) * self.num_frames

    def run(self, part: Part, progress: Progress) -> None:
        """Write what the latent store does not have yet of these trajectories."""
        autoencoder = _loaded(self.checkpoint, str(nth_device(self.device, self.index)))
        autoencoder.tile = self.tile
        encode_trajectories(
            autoencoder, open_store(self.store), self.members, part, self.batch_size, self.threads, progress
        )


def encode_trajectories(
    autoencoder: Autoencoder,
    store: Store,
    members: tuple[int, ...],
    part: Part,
    batch_size: int,
    threads: int,
    progress: Progress,
) -> None:
    """Encode trajectories on the device of the autoencoder, and write what the latent store does not have yet of them.

    Memory holds one batch, and the latents of one shard.

    Args:
        part: writes to the latent store.
        progress: called with the number of snapshots that are there now and were not before the last call.
    """
    shard, device = part.plan.shard, next(autoencoder.parameters()).device
    with _threads(threads):
        for i in members:
            kept = part.resume(i)
            progress(kept)
            geometry = store.geometry(i).to(device)
            for begin in range(kept, store.num_times, shard):
                end = min(begin + shard, store.num_times)
                for start in range(begin, end, batch_size):
                    frames = slice(start, min(start + batch_size, end))
                    for name, values in encode_frames(autoencoder, store, i, frames, geometry).items():
                        part.write(name, i, frames, values)
                    progress(frames.stop - frames.start)
                part.checkpoint(i)


@torch.no_grad()
def encode_frames(
    autoencoder: Autoencoder, store: Store, trajectory: int, frames: slice, geometry: Geometry
) -> dict[str, Tensor]:
    """The latents of some snapshots of a trajectory, and the fields that they stand for as they are.

    Args:
        geometry: of the trajectory, on the device of the autoencoder.
    """
    scale, device = autoencoder.scale(store.family), next(autoencoder.parameters()).device
    packed = scale.pack({name: store.read(name, trajectory, frames).to(device) for name in scale.fields})
    latent = autoencoder.encode(packed, geometry, store.family)
    return {LATENT.name: latent, **autoencoder.latent_fields(latent, geometry, store.family)}


def default_batch_size(grid: Grid) -> int:
    """Snapshots of `BATCH_CELLS` together, at least one."""
    return max(1, BATCH_CELLS // math.prod(grid.shape))


def nth_device(device: str, index: int) -> torch.device:
    """The CPU, or one of the GPUs of this machine, counted round and round."""
    return torch.device("cuda", index % torch.cuda.device_count()) if device == "cuda" else torch.device(device)


@lru_cache(maxsize=1)
def _loaded(checkpoint: Path, device: str) -> Autoencoder:
    """The autoencoder, once for all jobs that a process is given."""
    return load_autoencoder(checkpoint).to(device)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
