"""One training run of a dynamics model on random latents, timed step by step; and the same steps as a bare loop.

    python benchmarks/training_case.py FOLDER '{"size": "tiny", "steps": 10}'
    accelerate launch --config_file configs/accelerate/cpu_2proc.yaml benchmarks/training_case.py FOLDER '{}'

As a program it prints one JSON line: seconds per step, and the peak of the process's memory [MiB]. FOLDER holds what
`make_stores` made.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import synchronise
from torch import nn

from latentphys.autoencoders import Autoencoder
from latentphys.configuration import compose
from latentphys.data import Batch, Windows, create_store, open_store
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Grid
from latentphys.training import Trainer, checkpoint
from latentphys.training.estimate import Settings, estimate
from latentphys.training.models import build, new_dynamics, unit_scale
from latentphys.training.optimizers import new_optimizer
from latentphys.training.planned import plan_dynamics
from latentphys.training.run_log import read_log
from latentphys.training.tasks import DynamicsTask, Output
from latentphys.transformer.conditioning import Conditioning

FAMILY, CHANNELS, COMPRESSION = "turbulence", 16, 2
TRAJECTORIES, FRAMES = 4, 17
WARM = 3
"""Steps before the first that is timed."""
NEVER = 10**9


@dataclass(frozen=True)
class Size:
    """Latent cells per axis, windows per step, and settings of the model."""

    cells: int
    batch: int
    model: tuple[str, ...]


SIZES = {
    "micro": Size(4, 4, ("dynamics=tiny", "dynamics.dim=32", "dynamics.depth=1", "dynamics.hidden=32")),
    "tiny": Size(8, 4, ("dynamics=tiny",)),
    "small": Size(16, 8, ("dynamics=small",)),
    "base": Size(16, 16, ("dynamics=base",)),
}
"""`micro` is for tests."""
PRECISION = {"fp32": "no", "bf16": "bf16"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """What to train, and how.

    Args:
        size: of `SIZES`.
        dtype: ``fp32``, or ``bf16`` under autocast.
        steps: timed steps.
        batch: windows per step over all processes. Default: the size's.
        cached: latents held in memory; else they are read from the store.
        overrides: Hydra's, over the whole of ``train.yaml``.
    """

    size: str = "tiny"
    dtype: str = "fp32"
    steps: int = 10
    batch: int | None = None
    cached: bool = True
    overrides: tuple[str, ...] = ()

    def but(self, *overrides: str, **changes: Any) -> Case:
        """The same with further overrides or other fields."""
        return replace(self, overrides=(*self.overrides, *overrides), **changes)

    @property
    def batch_size(self) -> int:
        return self.batch or SIZES[self.size].batch

    @property
    def tokens(self) -> int:
        """Latent cells per step over all processes."""
        return self.batch_size * SIZES[self.size].cells ** 3

    @cached_property
    def config(self) -> dict[str, Any]:
        settings = {
            "num_steps": WARM + self.steps + 1,
            "batch_size": self.batch_size,
            "mixed_precision": PRECISION[self.dtype],
            "log_every": 10,
            "test_every": NEVER,
            "checkpoint_every": NEVER,
            "test_batches": 1,
        }
        trainer = [f"trainer.{name}={value}" for name, value in settings.items()]
        return compose(
            "train", ["trainer=dynamics", "stores=[x]", "run=x", *SIZES[self.size].model, *trainer, *self.overrides]
        )

    def flops_per_step(self) -> int:
        """FLOPs of the forward and backward passes of one step, recomputation left out."""
        config, cells = self.config, SIZES[self.size].cells

        def make() -> Any:
            return plan_dynamics(config, (cells,) * 3, CHANNELS)

        settings = Settings.of({**config["trainer"], "batch_size": 1, "accumulate": 1})
        return self.batch_size * estimate(make, settings).flops_per_sample


class TimedTask(DynamicsTask):
    """Notes when each training step begins. Its checkpoints hold next to nothing: they are not what is timed."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.begins: list[float] = []

    def forward(self, batch: Batch) -> Output:
        if self.training:
            self.begins.append(time.perf_counter())
        return super().forward(batch)

    def save(self, path: Path, step: int, *_: Any, **__: Any) -> None:
        checkpoint.save(path, kind=self.kind, model=nn.Linear(1, 1), config={}, extra={}, step=step)


def make_stores(folder: Path, size: str) -> None:
    """Random latents on a periodic box, and the fields at rest that they might come from."""
    cells, random = SIZES[size].cells, np.random.default_rng(0)
    shape = (cells * COMPRESSION,) * 3
    fields = {"velocity": (VELOCITY, Grid(shape, (1 / shape[0],) * 3), 3)}
    fields["latent"] = (FieldSpec("latent", "vector", "1"), Grid((cells,) * 3, (1 / cells,) * 3), CHANNELS)
    for name, (spec, grid, channels) in fields.items():
        is_latent = name == "latent"
        with create_store(
            folder / f"{name}.zarr",
            grid=grid,
            specs={name: spec},
            family=FAMILY,
            num_trajectories=TRAJECTORIES,
            times=range(FRAMES if is_latent else 2),
            parameters=None if is_latent else {"viscosity": np.linspace(1e-3, 2e-3, TRAJECTORIES)},
            dtype="float32",
            channels=CHANNELS if is_latent else None,
        ) as out:
            for trajectory in range(TRAJECTORIES):
                for frame in range(FRAMES if is_latent else 2):
                    values = np.zeros((channels, *grid.shape), np.float32)
                    if is_latent:
                        random.standard_normal(values.shape, np.float32, values)
                    out.write(name, trajectory, frame, values)


def new_task(case: Case, folder: Path) -> TimedTask:
    """The task of a case, with the same weights every time."""
    config = case.config
    settings, trajectories = config["dynamics_training"], [list(range(TRAJECTORIES))]
    source, store = open_store(folder / "velocity.zarr"), open_store(folder / "latent.zarr")
    torch.manual_seed(0)
    dynamics = new_dynamics(config["dynamics"], CHANNELS, Conditioning.fit([source]), {FAMILY: 1.0})
    dynamics.fit_scales([store], trajectories, 1)
    windows = Windows([store], "latent", dynamics.num_frames + settings["unroll"], cache=case.cached)
    autoencoder = Autoencoder({FAMILY: unit_scale(source.grid, source.specs)}, CHANNELS, [8], [1], stem=COMPRESSION)
    named = {"unroll": settings["unroll"], "input_noise": settings["input_noise"]}
    return TimedTask(dynamics, autoencoder, windows, windows, [source], {}, {}, **named)


def fit(case: Case, folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """Seconds per step of the trainer, from one step's beginning to another's, and the lines of its log."""
    trainer: Trainer = build(case.config["trainer"])
    task, run = new_task(case, folder), Path(os.environ.get("TRAINING_CASE_RUN") or tempfile.mkdtemp(dir=folder))
    with redirect_stderr(io.StringIO()):  # bars
        trainer.fit(task, run, case.config)
    lines = read_log(run / "log.jsonl") if (run / "log.jsonl").is_file() else []
    shutil.rmtree(run, ignore_errors=True)
    return (task.begins[WARM + case.steps] - task.begins[WARM]) / case.steps, lines


def bare(case: Case, folder: Path, device: str) -> float:
    """Seconds per step of a loop that is given everything: the inputs of each step ready on the device."""
    task, trainer = new_task(case, folder).to(device), build(case.config["trainer"])
    model, windows = task.dynamics.train(), task.train_windows
    optimizer = new_optimizer(trainer.optimizer, model, trainer.learning_rate, trainer.weight_decay)
    ready = []
    for step in range(4):
        batch = windows.sample(step, case.batch_size, seed=0)
        k = model.num_frames
        condition = task._condition(task.sources[0], batch, k - 1, 1)
        geometry = task._geometry(task.sources[0], batch)
        inputs = batch.values[:, :k], condition, geometry, batch.values[:, k]
        ready.append([tensor.float().to(device) for tensor in inputs])
    begin, kind = 0.0, device.partition(":")[0]
    for step in range(WARM + case.steps):
        if step == WARM:
            synchronise(device)
            begin = time.perf_counter()
        frames, condition, geometry, target = ready[step % len(ready)]
        with torch.autocast(kind, torch.bfloat16, enabled=case.dtype == "bf16"):
            latent = model(frames, condition, geometry, (True, True, True)).latent
            loss = ((latent - target) / model.increment_std).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.clip)
        optimizer.step()
        optimizer.zero_grad()
    synchronise(device)
    return (time.perf_counter() - begin) / case.steps


def resident_mib(name: str = "VmHWM") -> float:
    """Memory that this process has held at most, or (``VmRSS``) holds [MiB]."""
    found = re.search(name + r":\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) / 1024


def to_json(case: Case) -> str:
    return json.dumps(asdict(case))


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    case = Case(**{**settings, "overrides": tuple(settings.get("overrides", ()))})
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    before = resident_mib("VmRSS")
    seconds, _ = fit(case, folder)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({"step_s": seconds, "before_mib": before, "peak_mib": resident_mib()}), flush=True)


if __name__ == "__main__":
    main()
