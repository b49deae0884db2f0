"""A small store of two fields, autoencoders of random weights for it, and its latents as one process encodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from reference import box
from small import MODEL
from store_files import content

from latentphys.configuration import compose
from latentphys.data import Store, create_store, open_store
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.training import checkpoint, encode_store, load_autoencoder
from latentphys.training.models import autoencoder_extra, new_autoencoder

NUM_TRAJECTORIES, NUM_TIMES, SHARD = 3, 11, 4
SHARD_BYTES = SHARD * 8 * 4**3 * 4
"""Four latents to a shard, so that the eleven of a trajectory fill two and begin a third."""
SPECS = {"velocity": VELOCITY, "temperature": FieldSpec("temperature", "scalar", "K")}
BATCH = 3
"""Snapshots to a batch: it does not divide a shard."""


def make_store(path: Path, num_trajectories: int = NUM_TRAJECTORIES, num_times: int = NUM_TIMES, n: int = 16) -> Store:
    """Random fluxes and temperatures with some solids in every second trajectory."""
    grid = box("channel", (n, n, n), (0.5, 0.5, 0.5))
    solid = torch.zeros(num_trajectories, n, n, n, dtype=torch.bool)
    solid[1::2, 2:5, 3, 4:9] = True
    times = torch.arange(num_times).double()
    settings: dict[str, Any] = {"num_trajectories": num_trajectories, "times": times, "solid": solid}
    with create_store(path, grid=grid, specs=SPECS, family="random", **settings) as out:
        for i in range(num_trajectories):
            for t in range(num_times):
                generator = torch.Generator().manual_seed(1000 * i + t)
                flux = torch.randn(3, n, n, n, dtype=torch.float64, generator=generator)
                out.write("velocity", i, t, torch.where(solid[i], 0.0, flux))
                out.write("temperature", i, t, flux.square().sum(0))
    return open_store(path)


def make_autoencoder(path: Path, store: Store, seed: int = 0) -> Path:
    """A checkpoint of random weights."""
    config = compose("train", ["trainer=autoencoder", f"stores=[{store.path}]", "run=none", *MODEL["autoencoder"]])
    config = config["autoencoder"]
    torch.manual_seed(seed)
    model = new_autoencoder(config, [store])
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    checkpoint.save(path, kind="autoencoder", model=model, config=config, extra=autoencoder_extra(model), step=0)
    return path


class Case:
    """A store, two autoencoders for it, and its latents as one undisturbed process encodes them.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.store = make_store(folder / "random.zarr")
        self.checkpoint = make_autoencoder(folder / "autoencoder", self.store)
        self.other = make_autoencoder(folder / "other", self.store, seed=1)
        self.whole = folder / "latent.zarr"
        self.encode(self.whole)

    def encode(self, out: Path, **changes: Any) -> Path:
        settings = {"checkpoint": str(self.checkpoint), "batch_size": BATCH, **changes}
        return encode_store(load_autoencoder(settings["checkpoint"]), self.store, out, **settings)

    def command(self, out: Path, *options: str | Path) -> list[str]:
        given = (self.checkpoint, self.store.path, out, f"--batch-size={BATCH}", "--device=cpu", *options)
        return ["encode", *map(str, given)]

    def check(self, out: Path) -> None:
        """Every file is that of the undisturbed process, and nothing else is left."""
        open_store(out).verify()
        assert content(out) == content(self.whole)
        assert not list(out.parent.glob(".*"))
