"""The trainer: one loop for every task, on one process or many, resumable at every checkpoint."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentphys.data import Batch, Batches
from latentphys.data.batches import ahead
from latentphys.training import checkpoint
from latentphys.training.tasks import Output, Task

TEST_SEED = 1


def learning_rate_factor(step: int, num_steps: int, warmup: int) -> float:
    """Linear warm-up to 1, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


@dataclass(frozen=True)
class Trainer:
    """AdamW with warm-up and cosine decay, under `accelerate`.

    The batch of a step and its random numbers are functions of the seed and the step alone, so that a resumed run needs
    neither the state of a sampler nor that of a generator.

    Args:
        num_steps: optimiser steps.
        batch_size: windows per step over all processes.
        learning_rate: peak. Good values: 1e-3 for small models, 3e-4 for large ones.
        weight_decay: of AdamW, on matrices only.
        warmup: steps of linear warm-up.
        clip: largest norm of the gradient.
        seed: of batches, noise and initial weights.
        log_every, test_every, checkpoint_every: steps between log lines, tests on held-out data, checkpoints.
        test_batches: batches per test.
        mixed_precision: ``no | bf16``, of accelerate; None for what ``accelerate launch`` was told. The Helmholtz head
            and the routers stay in FP32.

    Raises:
        ValueError: a number below 1 where one must be at least that.
    """

    num_steps: int
    batch_size: int
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup: int = 20
    clip: float = 1.0
    seed: int = 0
    log_every: int = 10
    test_every: int = 100
    checkpoint_every: int = 100
    test_batches: int = 4
    mixed_precision: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "log_every", "test_every", "checkpoint_every", "test_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} ≥ 1, got {getattr(self, name)}.")

    def fit(self, task: Task, run: Path, about: Mapping[str, Any], resume: bool = True) -> Path:
        """Train a task in a run directory, from its newest checkpoint where there is one.

        Args:
            run: holds ``config.json``, ``log.jsonl``, the two newest checkpoints and ``last.json``, which names the
                newest. The log of a resumed run goes on behind its checkpoint: lines beyond are taken out.
            about: the run's whole configuration, recorded in it.
            resume: False starts over, and removes the checkpoints that are there.

        Returns:
            The last checkpoint.

        Raises:
            ValueError: a run directory whose checkpoint belongs to another model, or a batch size that is not a
                multiple of the number of processes or larger than a store.
            FloatingPointError: a loss or gradient that is not finite; the weights are as before that step.
        """
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=self.mixed_precision,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        if self.batch_size % accelerator.num_processes:
            raise ValueError(
                f"Expected a batch size that is a multiple of the {accelerator.num_processes} processes, "
                f"got {self.batch_size}."
            )
        task.train_windows.check_batch(self.batch_size)
        optimizer = torch.optim.AdamW(self._parameter_groups(task), lr=self.learning_rate)
        first = self._resume(task, optimizer, run) if resume else 0
        wrapped, prepared = accelerator.prepare(task, optimizer)
        main = accelerator.is_main_process
        if main:
            run.mkdir(parents=True, exist_ok=True)
            if not resume:
                _remove_checkpoints(run)
            checkpoint.write_json(run / "config.json", about)
        log = _Log(run / "log.jsonl" if main else None, first)
        last = run / f"step-{max(first, self.num_steps):06d}"
        with _progress(main) as bar:
            line = bar.add_task(f"train {task.kind}", total=self.num_steps, completed=first, figures="")
            steps = range(first, self.num_steps)
            for step, sampled in zip(steps, ahead(self._sample(task, accelerator), steps), strict=True):
                batch = sampled.to(accelerator.device)
                for group in prepared.param_groups:
                    group["lr"] = self.learning_rate * learning_rate_factor(step, self.num_steps, self.warmup)
                torch.manual_seed(_seed(self.seed, step, accelerator.process_index))
                wrapped.train()
                with accelerator.autocast():
                    output: Output = wrapped(batch)
                accelerator.backward(output.loss)
                norm = accelerator.clip_grad_norm_(wrapped.parameters(), self.clip)
                self._check(output.loss, norm, step, batch, accelerator)
                prepared.step()
                prepared.zero_grad()
                with torch.no_grad():
                    task.after_step(output)
                done = step + 1
                if done % self.log_every == 0 or done == self.num_steps:
                    figures = {"loss": output.loss.detach(), "gradient_norm": norm, **output.figures}
                    rate = prepared.param_groups[0]["lr"]
                    log.write(step=done, lr=rate, **_numbers(figures), **task.telemetry())
                    bar.update(line, figures=_short(_numbers(output.figures)))
                if done % self.test_every == 0 or done == self.num_steps:
                    log.write(step=done, **{f"test/{k}": v for k, v in self.test(task, accelerator).items()})
                bar.update(line, completed=done)
                if main and (done % self.checkpoint_every == 0 or done == self.num_steps):
                    self._save(task, prepared.optimizer, run, done)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return last

    @torch.no_grad()
    def test(self, task: Task, accelerator: Any) -> dict[str, float]:
        """Mean figures over the same held-out batches every time; every process works out all of them."""
        task.eval()
        sums: dict[str, list[float]] = {}
        windows = task.test_windows
        size = min(self.batch_size, *(windows.num_windows(s) for s in range(len(windows.stores))))
        for step in range(self.test_batches * len(windows.stores)):
            output = task(windows.sample(step, size, TEST_SEED).to(accelerator.device))
            for name, value in _numbers(output.figures).items():
                sums.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in sums.items()}

    def _parameter_groups(self, task: Task) -> list[dict[str, Any]]:
        parameters = [p for p in task.parameters() if p.requires_grad]
        return [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]

    def _sample(self, task: Task, accelerator: Any) -> Callable[[int], Batch]:
        """Training step → its windows, in main memory."""
        rank, world = accelerator.process_index, accelerator.num_processes
        batches = Batches(task.train_windows, self.batch_size, self.seed, rank, world)
        return (lambda step: batches[step].pin_memory()) if accelerator.device.type == "cuda" else batches.__getitem__

    @staticmethod
    def _check(loss: Tensor, norm: Tensor, step: int, batch: Batch, accelerator: Any) -> None:
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise FloatingPointError(
                f"The loss became {loss.item():g}, its gradient {norm.item():g}, at step {step} on rank "
                f"{accelerator.process_index} (store {batch.store}, trajectories {batch.trajectories.tolist()}); "
                "look for NaN in the data or lower the learning rate. The last checkpoint is intact."
            )

    @staticmethod
    def _resume(task: Task, optimizer: torch.optim.Optimizer, run: Path) -> int:
        if not (run / checkpoint.LAST).is_file():
            return 0
        found = checkpoint.open_checkpoint(run, task.kind)
        found.load_into(task.model())
        checkpoint.load_optimizer(found.path, optimizer, task.model())
        return found.step

    @staticmethod
    def _save(task: Task, optimizer: torch.optim.Optimizer, run: Path, step: int) -> None:
        path = run / f"step-{step:06d}"
        task.save(path, step, optimizer)
        checkpoint.write_json(run / checkpoint.LAST, {"checkpoint": path.name})
        for older in sorted(run.glob("step-*"), key=lambda p: (len(p.name), p.name))[:-2]:
            shutil.rmtree(older, ignore_errors=True)


def _remove_checkpoints(run: Path) -> None:
    (run / checkpoint.LAST).unlink(missing_ok=True)
    for old in run.glob("step-*"):
        shutil.rmtree(old)


class _Log:
    """Appends JSON lines, or nothing without a path; lines after step `first`, and cut-off ones, are taken out."""

    def __init__(self, path: Path | None, first: int) -> None:
        self.path, self.start = path, time.perf_counter()
        if path is not None and path.is_file():
            kept = [line + "\n" for line in path.read_text().splitlines() if _step_of(line) <= first]
            temporary = path.with_name(f".{path.name}.partial")
            temporary.write_text("".join(kept))
            os.replace(temporary, path)

    def write(self, **figures: Any) -> None:
        if self.path is not None:
            seconds = round(time.perf_counter() - self.start, 3)
            with self.path.open("a") as file:
                file.write(json.dumps({**figures, "seconds": seconds}) + "\n")


def _step_of(line: str) -> float:
    """The step of a log line; infinite where the line is not whole."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _seed(seed: int, step: int, rank: int) -> int:
    """A seed for the random numbers of one step on one rank."""
    return (seed * 1_000_003 + step) * 1_009 + rank


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


def _short(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in figures.items())


def _progress(show: bool) -> Any:
    from latentphys.progress import progress_bar

    return progress_bar(show, "{task.fields[figures]}")
