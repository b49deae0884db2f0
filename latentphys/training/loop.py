"""The steps of a training run: batch, gradient, guard, update; and what is logged, tested and saved on the way."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentphys.data import Batch
from latentphys.training import checkpoint
from latentphys.training.control import Agreement, Preempted, Signals
from latentphys.training.ema import EMA
from latentphys.training.guards import DeadExperts, Guard
from latentphys.training.meter import Meter
from latentphys.training.monitor import Monitor
from latentphys.training.run_directory import RunDirectory
from latentphys.training.strategy import DataParallel, Sharded
from latentphys.training.tasks import Output, Task

if TYPE_CHECKING:
    from latentphys.training.trainer import Trainer

TEST_SEED = 1


class Loop:
    """One run of a `Trainer`, on one of its processes.

    Attributes:
        done: steps that were taken.
    """

    def __init__(
        self,
        trainer: Trainer,
        task: Task,
        strategy: DataParallel | Sharded,
        optimizer: torch.optim.Optimizer,
        average: EMA | None,
        directory: RunDirectory,
        agreement: Agreement,
        signals: Signals,
        accelerator: Any,
        about: Mapping[str, Any],
    ) -> None:
        self.trainer, self.task, self.strategy, self.optimizer = trainer, task, strategy, optimizer
        self.average, self.directory, self.agreement, self.signals = average, directory, agreement, signals
        self.accelerator, self.about = accelerator, about
        self.guard, self.dead = Guard(trainer.max_skipped, trainer.spike), DeadExperts(trainer.dead_after)
        self.best, self.tests_without_best = float("inf"), 0
        self.done = self.saved = 0

    def load(self, found: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint of this run."""
        found.load_into(self.task.model())
        checkpoint.load_optimizer(found.path, self.optimizer, self.task.model())
        if self.average is not None:
            self.average.load(found.average())
        self.guard.load(found.state["guard"])
        self.best, self.tests_without_best = found.state["best"], found.state["tests_without_best"]
        self.done = self.saved = found.step

    def run(self, steps: range, batches: Iterator[Batch | Exception]) -> None:
        """Take the steps. The run directory says how it ended."""
        prepared = self.strategy.wrap(self.optimizer)
        self.monitor = Monitor(self.trainer, self.task, self.directory, self.accelerator, self.about, steps)
        self.directory.status("running", step=self.done)
        try:
            with self.monitor:
                for step in steps:
                    if self._stops_early():
                        break
                    with self.monitor.throughput.waiting():
                        batch = self._agreed(step, next(batches))
                    self._step(step, batch, prepared)
                    self.done = step + 1
                    self._after(is_last=self.done == steps.stop)
                if self.saved < self.done:
                    self._save()
            self.directory.status("done", step=self.done)
        except BaseException as error:
            state = {Preempted: "preempted", KeyboardInterrupt: "interrupted"}.get(type(error), "failed")
            with suppress(OSError):  # a full disk has no room for this either
                self.directory.status(state, step=self.done, message=str(error) or type(error).__name__)
            raise

    def _agreed(self, step: int, batch: Batch | Exception) -> Batch:
        """The batch, unless some process has none or was asked to stop: then all save and stop."""
        number, is_lost = self.agreement.largest(self.signals.received or 0, isinstance(batch, Exception))
        if not (number or is_lost):
            assert isinstance(batch, Batch)
            return batch
        if self.saved < self.done:
            self._save()
        # Launchers kill the processes that outlive the first by some seconds: none ends before all is written.
        self.accelerator.wait_for_everyone()
        saved = f"the run is saved at step {self.done}, and the same command goes on from there."
        if number == signal.SIGINT:
            raise KeyboardInterrupt(saved)
        if number:
            raise Preempted(f"{signal.Signals(number).name}: {saved}")
        reason = batch if isinstance(batch, Exception) else "another process could not read its own"
        raise OSError(f"Expected the windows of step {step}, got: {reason} Restore the store: {saved}")

    def _step(self, step: int, batch: Batch, optimizer: Any) -> None:
        trainer, family = self.trainer, self.task.stores()[batch.store].family
        for group in optimizer.param_groups:
            group["lr"] = trainer.learning_rate_at(step)
        torch.manual_seed(_seed(trainer.seed, step, self.accelerator.process_index))
        self.task.train()
        outputs, parts = [], batch.parts(trainer.accumulate)
        for n, part in enumerate(parts):
            with self.strategy.passes(is_last=n + 1 == len(parts)):
                with self.accelerator.autocast():
                    outputs.append(self.strategy(part.to(self.accelerator.device)))
                self.strategy.backward(outputs[-1].loss / len(parts))
        output = Output.join(outputs)
        norm = self.strategy.clip(trainer.clip)
        loss = self.accelerator.reduce(output.loss.detach(), "mean")
        reason = self.guard.verdict(step, family, *torch.stack([loss, norm.to(loss)]).tolist())
        if reason is None:
            optimizer.step()
            with torch.no_grad():
                self.task.after_step(output)
                if self.average is not None:
                    self.average.update(self.task.model(), step)
            self.monitor.step(batch, {"loss": output.loss, "gradient_norm": norm, **output.figures})
        optimizer.zero_grad()
        if reason is not None:
            self._skip(step, reason)

    def _skip(self, step: int, reason: str) -> None:
        """Record a step that did not reach the weights; too many of them end the run."""
        drawn = self.task.train_windows.draw(step, self.trainer.batch_size, self.trainer.seed)
        where = f"store {drawn.store}, trajectories {drawn.trajectories.tolist()}"
        self.directory.dump_batch(
            step=step,
            reason=reason,
            store=str(self.task.stores()[drawn.store].path),
            trajectories=drawn.trajectories.tolist(),
            starts=drawn.starts.tolist(),
        )
        self.monitor.event(step, f"skipped step {step}: {reason} ({where})")
        if self.guard.gives_up:
            raise FloatingPointError(
                f"Expected at most {self.guard.max_skipped} skipped steps among the last 100, got more, the last at "
                f"step {step}: {reason} ({where}). Look for NaN in the batches that skipped.jsonl lists, or lower the "
                f"learning rate. The last checkpoint, of step {self.saved}, is intact."
            )

    def _after(self, is_last: bool) -> None:
        """Whatever is due after a step."""
        trainer, done = self.trainer, self.done
        is_best = False
        if done % trainer.log_every == 0 or is_last:
            routing = self.monitor.log(done, lr=trainer.learning_rate_at(done - 1), skipped=self.guard.total)
            for layer, expert, age in self.dead.newly_dead(routing):
                self.monitor.event(done, f"expert {expert} of layer {layer} has taken no token for {age} steps")
        with self.monitor.throughput.paused():
            if done % trainer.test_every == 0 or is_last:
                is_best = self._test()
            if done % trainer.checkpoint_every == 0 or is_last or is_best:
                self._save(is_best)
            if trainer.pictures_every and done % trainer.pictures_every == 0:
                with self._averaged():
                    self.monitor.pictures(done)
        self.monitor.advance(done)

    def _test(self) -> bool:
        """Log the figures of held-out data; whether they are the best so far."""
        with self._averaged():
            figures = self.test()
        score = self.task.score(figures)
        is_best = score < self.best
        self.best, self.tests_without_best = (score, 0) if is_best else (self.best, self.tests_without_best + 1)
        self.monitor.write(self.done, {f"test/{name}": value for name, value in figures.items()})
        return is_best

    @torch.no_grad()
    def test(self) -> dict[str, float]:
        """Mean figures over the same held-out batches every time; every process works out all of them."""
        self.task.eval()
        meter, windows = Meter(), self.task.test_windows
        size = min(self.trainer.batch_size, *(windows.num_windows(s) for s in range(len(windows.stores))))
        for step in range(self.trainer.test_batches * len(windows.stores)):
            meter.add(self.task(windows.sample(step, size, TEST_SEED).to(self.accelerator.device)).figures)
        return meter.means()

    def _averaged(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.average is None else self.average.applied(self.task.model())

    def _stops_early(self) -> bool:
        patience = self.trainer.patience
        if patience is None or self.tests_without_best < patience:
            return False
        self.monitor.event(self.done, f"stopped early at step {self.done}: {patience} tests without a new best")
        return True

    def _save(self, is_best: bool = False) -> None:
        state = {"guard": self.guard.state(), "best": self.best, "tests_without_best": self.tests_without_best}
        average = None if self.average is None else self.average.tensors()

        def write(path: Path) -> None:
            self.task.save(path, self.done, self.optimizer, average, state)

        if self.strategy.saves_everywhere or self.accelerator.is_main_process:
            self.directory.save(self.done, write, is_best)
        self.saved = self.done


def _seed(seed: int, step: int, rank: int) -> int:
    """A seed for the random numbers of one step on one rank."""
    return (seed * 1_000_003 + step) * 1_009 + rank
