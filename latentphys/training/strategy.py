"""How one model is trained on many processes: each has all of it, or each has a part.

A strategy owns the module that the trainer calls. It is told which pass of a step is the last, for gradients travel
only then, and it makes them those of the mean loss over all processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

    from latentphys.training.tasks import Output, Task

STRATEGIES = ("ddp", "fsdp")


class DataParallel:
    """Every process has the whole model (DistributedDataParallel); a single process needs nothing."""

    saves_everywhere = False

    def __init__(self, accelerator: Accelerator, task: Task) -> None:
        self.accelerator, self.task = accelerator, task
        self._module: nn.Module | None = None

    def wrap(self, optimizer: torch.optim.Optimizer) -> Any:
        """Call it when weights and moments are those that training begins with; returns the optimiser to step."""
        self._module, prepared = self.accelerator.prepare(self.task, optimizer)
        return prepared

    def __call__(self, batch: Any) -> Output:
        assert self._module is not None
        return self._module(batch)

    @contextmanager
    def passes(self, is_last: bool) -> Iterator[None]:
        """One of the forward and backward passes of a step."""
        if is_last or not isinstance(self._module, nn.parallel.DistributedDataParallel):
            yield
        else:
            with self._module.no_sync():
                yield

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to a largest norm; returns the norm before, the same on every process."""
        parameters = [p for p in self.task.parameters() if p.grad is not None]
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def close(self) -> None:
        """Let go of the wrapper. Its reducer must not be the last to hold the process group: joining gloo's threads,
        it would wait for them while they wait for the interpreter."""
        self._module = None
        self.accelerator.free_memory()


class Sharded:
    """Every process has a part of each weight (FSDP2), and, with expert parallelism, a slice of the experts.

    Args:
        expert_parallel: see `latentphys.training.sharding.shard`.
    """

    saves_everywhere = True

    def __init__(self, accelerator: Accelerator, task: Task, expert_parallel: int) -> None:
        from latentphys.training.sharding import shard

        self.accelerator, self.task = accelerator, task
        shard(task.model(), expert_parallel, accelerator.mixed_precision == "bf16")

    def wrap(self, optimizer: torch.optim.Optimizer) -> Any:
        return self.accelerator.prepare(optimizer)

    def __call__(self, batch: Any) -> Output:
        return self.task(batch)

    @contextmanager
    def passes(self, is_last: bool) -> Iterator[None]:
        self.task.model().set_requires_gradient_sync(is_last)  # type: ignore[operator]
        yield

    def backward(self, loss: Tensor) -> None:
        # The gradients are sums over the processes.
        self.accelerator.backward(loss / self.accelerator.num_processes)

    def clip(self, max_norm: float) -> Tensor:
        from latentphys.training.sharding import clip_grad_norm

        return clip_grad_norm(self.task.model().parameters(), max_norm)

    def close(self) -> None:
        self.accelerator.free_memory()


def new_strategy(name: str, accelerator: Accelerator, task: Task, expert_parallel: int) -> DataParallel | Sharded:
    """The strategy of that name, with a model whose weights are still whole, which goes to its device."""
    task.to(accelerator.device)
    return DataParallel(accelerator, task) if name == "ddp" else Sharded(accelerator, task, expert_parallel)
