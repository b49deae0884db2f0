"""Batches of windows read ahead of the step that needs them, in a thread or in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch.utils.data import Dataset

from latentphys.data.windows import Batch, Windows

T = TypeVar("T")


class Batches(Dataset[Batch]):
    """The batch of every training step, by its number, for a torch ``DataLoader``.

        loader = DataLoader(Batches(windows, 8, seed=0), batch_size=None, sampler=range(first, num_steps),
                            num_workers=2, multiprocessing_context="spawn")

    Workers get the paths of stores and open them themselves. Cached windows go to them once, in shared memory.

    Args:
        windows, batch, seed, rank, world: see `Windows.sample`.
    """

    def __init__(self, windows: Windows, batch: int, seed: int, rank: int = 0, world: int = 1) -> None:
        windows.check_batch(batch)
        self.windows, self.batch, self.seed, self.rank, self.world = windows, batch, seed, rank, world

    def __getitem__(self, step: int) -> Batch:
        return self.windows.sample(step, self.batch, self.seed, self.rank, self.world)


def ahead(work: Callable[[int], T], steps: Sequence[int]) -> Iterator[T]:
    """``work(step)`` for one step after the other, each begun in a thread while the one before it is made use of.

    What `work` raises is raised where its result is asked for.
    """
    with ThreadPoolExecutor(1, "ahead") as thread:
        num_threads = torch.get_num_threads()
        thread.submit(_work_alone).result()
        torch.set_num_threads(num_threads)  # of this thread, and of libraries that have one number for all
        coming = [thread.submit(work, step) for step in steps[:1]]
        for step in steps[1:]:
            result = coming.pop().result()
            coming.append(thread.submit(work, step))
            yield result
        for last in coming:
            yield last.result()


def _work_alone() -> None:
    """Keep this thread from a team of OpenMP threads of its own: two teams are more threads than cores, and OpenMP then
    lets those of the first one sleep between any two operations, for a third of the time of a step."""
    torch.get_num_threads()  # torch sets the number of a thread when it is first asked for it
    torch.set_num_threads(1)
