"""The whole road on 16³ or 16² cells, in seconds: stores of two families, a trained autoencoder, its latents, a trained
dynamics model. What it learns is worthless; what it does to a flow must hold for any weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from latentphys.configuration import compose
from latentphys.data import Store, open_store
from latentphys.families import MHD, Convection, Family, OpenChannel, Porous, simulate
from latentphys.training import encode_store, load_autoencoder, open_checkpoint, train_autoencoder, train_dynamics

SHAPE = (16, 16, 16)
NUM_TRAJECTORIES, NUM_FRAMES = 4, 6
FAMILIES: dict[str, tuple[Family, tuple[int, int, int]]] = {
    "open_channel": (OpenChannel(spin_up=0.01), SHAPE),
    "porous": (Porous(spin_up=0.01), SHAPE),
}
FLAT: dict[str, tuple[Family, tuple[int, int, int]]] = {
    "mhd": (MHD(spin_up=0.01), (16, 16, 1)),
    "convection": (Convection(spin_up=0.5), (16, 1, 16)),
}
"""Two families on boxes of two dimensions, each with another thin axis."""

MODEL = {
    "autoencoder": [
        "autoencoder.latent_channels=8",
        "autoencoder.widths=[8,16]",
        "autoencoder.num_blocks=[1,1]",
    ],
    "dynamics": ["dynamics.dim=32", "dynamics.depth=2", "dynamics.num_heads=2", "dynamics.hidden=32"],
}
TRAINER = [
    "held_out=1",
    "trainer.num_steps=6",
    "trainer.batch_size=2",
    "trainer.warmup=2",
    "trainer.log_every=2",
    "trainer.test_every=3",
    "trainer.test_batches=1",
    "trainer.checkpoint_every=2",
]


@dataclass(frozen=True)
class Road:
    """Paths of everything that was made, by family where there is one for each."""

    fields: dict[str, Path]
    autoencoder: Path
    latents: dict[str, Path]
    dynamics: Path

    def store(self, family: str) -> Store:
        return open_store(self.fields[family])

    def inputs(self, kind: str) -> list[Path]:
        """The stores that a model of this kind is trained on."""
        return list((self.fields if kind == "autoencoder" else self.latents).values())


def arguments(kind: str, stores: Sequence[Path], run: Path, *overrides: str) -> list[str]:
    """What follows ``latentphys train`` for a small model."""
    unique = {text.partition("=")[0]: text for text in [*MODEL[kind], *TRAINER, *overrides]}
    return [kind, f"stores=[{','.join(map(str, stores))}]", f"run={run}", *unique.values()]


def configuration(kind: str, stores: Sequence[Path], run: Path, *overrides: str) -> dict[str, Any]:
    _, no_stores, unused, *settings = arguments(kind, [], Path("unused"), *overrides)
    composed = _composed(f"trainer={kind}", no_stores, unused, *settings)
    return deepcopy(composed) | {"stores": [str(path) for path in stores], "run": str(run)}


@cache
def _composed(*overrides: str) -> dict[str, Any]:
    """Composing takes as long as some steps of training."""
    return compose("train", list(overrides))


def train(kind: str, stores: Sequence[Path], run: Path, *overrides: str) -> Path:
    """Train a small model; returns its last checkpoint."""
    run_training = train_autoencoder if kind == "autoencoder" else train_dynamics
    return run_training(configuration(kind, stores, run, *overrides))


def assert_bit_equal(run: Path, other: Path) -> None:
    """The newest checkpoints of two runs hold the same: every tensor, and what the trainer remembers."""
    a, b = open_checkpoint(run), open_checkpoint(other)
    assert a.step == b.step and a.state == b.state
    files = sorted(path.name for path in a.path.glob("*.safetensors"))
    assert len(files) > 1 and files == sorted(path.name for path in b.path.glob("*.safetensors"))
    for file in files:
        x, y = load_file(a.path / file), load_file(b.path / file)
        assert set(x) == set(y) and not [key for key in x if not torch.equal(x[key], y[key])]


def spoil(folder: Path) -> None:
    """Flip one bit of a checkpoint's weights."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def build_road(folder: Path, families: Mapping[str, tuple[Family, tuple[int, int, int]]] = FAMILIES) -> Road:
    fields = {name: folder / f"{name}.zarr" for name in families}
    for name, (family, shape) in families.items():
        simulate(family, fields[name], shape=shape, num_trajectories=NUM_TRAJECTORIES, num_frames=NUM_FRAMES)
    autoencoder = train("autoencoder", list(fields.values()), folder / "autoencoder")
    latents = {name: folder / f"{name}.latent.zarr" for name in families}
    model = load_autoencoder(autoencoder)
    for name, path in latents.items():
        encode_store(model, open_store(fields[name]), path, checkpoint=str(autoencoder))
    dynamics = train("dynamics", list(latents.values()), folder / "dynamics")
    return Road(fields, autoencoder.parent, latents, dynamics.parent)
