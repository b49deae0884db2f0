"""The trainer: one loop for every task, on one process or many, resumable at every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latentphys.data import Batch, Batches
from latentphys.data.batches import ahead
from latentphys.training import trackers
from latentphys.training.checkpoint import open_checkpoint
from latentphys.training.control import Agreement, Signals
from latentphys.training.ema import EMA
from latentphys.training.guards import Guard
from latentphys.training.loop import Loop
from latentphys.training.optimizers import OPTIMIZERS, new_optimizer
from latentphys.training.run_directory import RunDirectory
from latentphys.training.schedules import learning_rate_factor
from latentphys.training.strategy import STRATEGIES, new_strategy
from latentphys.training.tasks import Task

PRECISIONS = (None, "no", "bf16")
_MOMENTS = {"adamw": 2, "soap": 6}
"""Bytes that an optimiser keeps for a byte of weights, about."""


@dataclass(frozen=True)
class Trainer:
    """Trains a task under `accelerate`.

    The batch of a step and its random numbers are functions of the seed and the step alone, so that a resumed run needs
    neither the state of a sampler nor that of a generator.

    Args:
        num_steps: optimiser steps.
        batch_size: windows per step over all processes.
        accumulate: passes into which each process divides its windows of a step, for less memory.
        optimizer: ``adamw | soap``.
        learning_rate: peak. Good values: 1e-3 for small models, 3e-4 for large ones.
        weight_decay: on matrices only.
        schedule: ``cosine | wsd | constant``, after the warm-up.
        warmup: steps of linear warm-up.
        cooldown: share of the steps over which ``wsd`` falls.
        clip: largest norm of the gradient.
        ema: decay of a moving average of the weights, with which tests are made and which checkpoints hold beside the
            weights. Good values: 0.999. None: no average.
        seed: of batches, noise and initial weights.
        mixed_precision: ``no | bf16``, of accelerate; None for what ``accelerate launch`` was told. The Helmholtz head,
            norms and the routers stay in FP32.
        strategy: ``ddp``: every process has the whole model; ``fsdp``: every process has a part of it.
        expert_parallel: under ``fsdp``, ranks that the experts of each layer are spread over.
        recompute: work out activations again in the backward pass, for less memory; routing is never decided again.
        compile: fuse the repeated parts of the model with ``torch.compile``.
        patience: tests without a new best after which training stops early. None: never.
        max_skipped, spike: see `Guard`.
        dead_after: steps without a token after which an expert is reported as dead.
        log_every, test_every, checkpoint_every: steps between log lines, tests on held-out data, checkpoints.
        test_batches: batches of each family per test.
        keep: checkpoints to keep beside the best.
        pictures_every: steps between pictures of held-out samples; 0: none.
        trackers: where log lines go beside the run's own log: ``tensorboard | wandb | mlflow | trackio``.
        peak_flops: peak rate of one processor [FLOP/s], for the model FLOPs utilisation in the log. Default: that of
            known GPUs, and none of others.

    Raises:
        ValueError: a number out of its range or an unknown choice.
    """

    num_steps: int
    batch_size: int
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    schedule: str = "cosine"
    warmup: int = 20
    cooldown: float = 0.2
    clip: float = 1.0
    ema: float | None = None
    seed: int = 0
    mixed_precision: str | None = None
    strategy: str = "ddp"
    expert_parallel: int = 1
    recompute: bool = False
    compile: bool = False
    patience: int | None = None
    max_skipped: int = 10
    spike: float = 10.0
    dead_after: int = 1000
    log_every: int = 10
    test_every: int = 100
    checkpoint_every: int = 100
    test_batches: int = 4
    keep: int = 2
    pictures_every: int = 0
    trackers: Sequence[str] = ()
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        for name in (
            *("num_steps", "batch_size", "accumulate", "expert_parallel", "dead_after", "log_every", "test_every"),
            *("checkpoint_every", "test_batches", "keep", "patience"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Expected {name} ≥ 1, got {value}.")
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("strategy", STRATEGIES),
            ("mixed_precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"Expected {name} = {' | '.join(map(str, choices))}, got {getattr(self, name)!r}.")
        if self.expert_parallel > 1 and self.strategy != "fsdp":
            raise ValueError(
                f"Expected strategy = fsdp for expert_parallel = {self.expert_parallel}, got {self.strategy!r}."
            )
        self.learning_rate_at(0)
        Guard(self.max_skipped, self.spike)
        trackers.check(self.trackers)
        if self.pictures_every:
            from latentphys.training import pictures

            pictures.check()

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        factor = learning_rate_factor(self.schedule, step, self.num_steps, self.warmup, self.cooldown)
        return self.learning_rate * factor

    def fit(self, task: Task, run: Path, about: Mapping[str, Any], resume: bool = True) -> Path:
        """Train a task in a run directory, from its newest whole checkpoint where there is one.

        Args:
            run: see `RunDirectory`.
            about: the run's whole configuration, recorded in it.
            resume: False starts over, and removes the checkpoints that are there.

        Returns:
            The last checkpoint.

        Raises:
            ValueError: a run directory that belongs to another model, to other data or to a process that is alive, or a
                batch size that the processes cannot share or that is larger than a store.
            FloatingPointError: more bad steps than `max_skipped`.
            Preempted: a signal asked for the run's place. It saved itself, and goes on when it is called again.
            OSError: a full disk or a store that cannot be read any more; what was saved stays.
        """
        accelerator = self._accelerator(run)
        passes = accelerator.num_processes * self.accumulate
        if self.batch_size % passes:
            raise ValueError(
                f"Expected a batch size that is a multiple of the {accelerator.num_processes} processes "
                f"times {self.accumulate} passes each, got {self.batch_size}."
            )
        task.train_windows.check_batch(self.batch_size)
        if accelerator.device.type == "cuda":
            self.check_memory(task, about, accelerator.num_processes, accelerator.mixed_precision == "bf16")
        agreement = Agreement()
        with Signals() as signals, RunDirectory(run, accelerator.is_main_process) as directory:
            directory.begin(about, task.stores(), resume, self.keep)
            found = directory.newest(task.kind) if accelerator.is_main_process else None
            first = agreement.largest(found.step if found else 0)[0]
            if first and found is None:
                found = open_checkpoint(directory.path_of(first), task.kind)
            self._prepare_model(task)
            strategy = new_strategy(self.strategy, accelerator, task, self.expert_parallel)
            optimizer = new_optimizer(self.optimizer, task.model(), self.learning_rate, self.weight_decay)
            average = None if self.ema is None else EMA(task.model(), self.ema)
            weights = sum(tensor.nbytes for tensor in task.model().state_dict().values())
            directory.check_space(weights * (1 + _MOMENTS[self.optimizer] + (average is not None)))
            loop = Loop(self, task, strategy, optimizer, average, directory, agreement, signals, accelerator, about)
            try:
                if found is not None:
                    loop.load(found)
                steps = range(first, self.num_steps)
                loop.run(steps, ahead(self._sample(task, accelerator), steps))
            finally:
                strategy.close()
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return directory.path_of(loop.done)

    def check_memory(self, task: Task, about: Mapping[str, Any], num_processes: int, bf16: bool) -> None:
        """Refuse a run that does not fit a processor's memory, before anything is on it.

        Raises:
            ValueError: what is needed and there, and what remedies would need.
        """
        from latentphys.training.estimate import Settings, check_fit, estimate, remedies
        from latentphys.training.hardware import available_memory
        from latentphys.training.planned import plan

        settings = replace(Settings.of(about["trainer"], num_processes), bf16=bf16)
        make = partial(plan, about, max(task.stores(), key=lambda store: store.grid.num_cells))
        check_fit(estimate(make, settings).memory(), available_memory(), lambda: remedies(make, settings))

    def _accelerator(self, run: Path) -> Any:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        return Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=self.mixed_precision,
            log_with=list(self.trackers) or None,
            project_dir=str(run),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )

    def _prepare_model(self, task: Task) -> None:
        if self.recompute:
            from latentphys.training.recompute import set_recompute

            set_recompute(task.model(), True)
        if self.compile:
            from latentphys.training.compilation import compile_model

            compile_model(task.model())

    def _sample(self, task: Task, accelerator: Any) -> Callable[[int], Batch | Exception]:
        """Training step → its windows in main memory, or why they cannot be had."""
        rank, world = accelerator.process_index, accelerator.num_processes
        batches = Batches(task.train_windows, self.batch_size, self.seed, rank, world)
        return partial(_read, task, batches, accelerator.device.type == "cuda")


def _read(task: Task, batches: Batches, pin: bool, step: int) -> Batch | Exception:
    try:
        batch = batches[step]
        task.prefetch(batch)
        return batch.pin_memory() if pin else batch
    except (OSError, ValueError, RuntimeError) as error:
        return error
