"""What people see of a run while it goes on: a bar, the log and its trackers, and pictures of held-out samples."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentphys.data import Batch
from latentphys.progress import progress_bar
from latentphys.training import trackers
from latentphys.training.estimate import sample_cost
from latentphys.training.hardware import peak_flops
from latentphys.training.meter import Meter
from latentphys.training.run_directory import RunDirectory
from latentphys.training.tasks import Task
from latentphys.training.throughput import Throughput

if TYPE_CHECKING:
    from latentphys.training.trainer import Trainer

SHOWN = {"samples_per_s": "samples/s", "tokens_per_s": "tokens/s", "mfu": "MFU"}
"""Rates beside the bar."""


class Monitor:
    """Says what happens in a run. Every process calls it; the main one says it.

    Args:
        about: the run's configuration.
        steps: that it still takes.

    Attributes:
        throughput: is told of time that is not spent on training.
    """

    def __init__(
        self,
        trainer: Trainer,
        task: Task,
        directory: RunDirectory,
        accelerator: Any,
        about: Mapping[str, Any],
        steps: range,
    ) -> None:
        self.trainer, self.task, self.directory, self.accelerator = trainer, task, directory, accelerator
        self._about, self._first = about, steps.start
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        peak = trainer.peak_flops or peak_flops(dtype)
        self._flops = _flops(task, about) if peak else None
        self.meter, self.throughput = Meter(), Throughput(0, 0, peak, accelerator.device)
        self._bar = progress_bar(accelerator.is_main_process, "{task.fields[figures]}")
        self._line = self._bar.add_task(f"train {task.kind}", total=steps.stop, completed=steps.start, figures="")

    def __enter__(self) -> Monitor:
        if self.trainer.trackers:
            trackers.start(self.accelerator, self.trainer.trackers, self.directory.path, self._first, self._about)
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def step(self, batch: Batch, figures: Mapping[str, Tensor]) -> None:
        """A step that reached the weights."""
        self.meter.add(figures)
        samples = len(batch.values)
        flops = samples * self._flops[batch.store] if self._flops else 0
        self.throughput.step(samples, self.task.tokens(batch), flops)

    def log(self, done: int, **figures: Any) -> list[dict[str, Any]]:
        """A line of everything since the last one; returns what it says of the routing."""
        means, rates = self.meter.means(), self.throughput.rates()
        told = self.task.telemetry()
        self.write(done, {**means, **figures, **rates, **told})
        shown = [f"{name} {value:.3f}" for name, value in means.items() if "/" in name and "/balance/" not in name]
        shown += [f"{rates[name]:.3g} {unit}" for name, unit in SHOWN.items() if name in rates]
        routing = told.get("routing", [])
        if routing:
            even = sum(layer["entropy_share"] for layer in routing) / len(routing)
            shown.append(f"experts {100 * even:.0f} % even, {sum(len(layer['dead']) for layer in routing)} dead")
        self._bar.update(self._line, figures=", ".join(shown))
        return routing

    def write(self, done: int, figures: Mapping[str, Any]) -> None:
        self.directory.log.write(step=done, **figures)
        self.accelerator.log(trackers.flatten(figures), step=done)

    def event(self, done: int, message: str) -> None:
        """Something that an operator should read."""
        self.directory.log.write(step=done, event=message)
        if self.accelerator.is_main_process:
            self._bar.console.print(f"step {done}: {message}")

    def advance(self, done: int) -> None:
        self._bar.update(self._line, completed=done)

    def pictures(self, done: int) -> None:
        """One picture of all families. Every process works it out, for the model may be spread over them."""
        from latentphys.training.pictures import sample_picture

        main = self.accelerator.is_main_process
        path = sample_picture(self.task, self.directory.path / "pictures", done, write=main)
        if main:
            trackers.show(self.accelerator, path, done)


def _flops(task: Task, about: Mapping[str, Any]) -> list[int]:
    """FLOPs of training on one sample of each store."""
    return [sample_cost(about, store)[1] for store in task.stores()]
