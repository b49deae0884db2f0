"""What stops a run from outside: signals that ask it to save, and the word of any process for all of them."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from latentphys.ranks import num_ranks

PREEMPTED = os.EX_TEMPFAIL
"""Exit status 75 of a run that saved itself because a signal asked for its place; the same command goes on with it."""


class Preempted(Exception):
    """A run was asked to give up its place, saved itself, and stopped."""


class Signals:
    """Remembers the first SIGTERM, SIGUSR1 or SIGINT instead of dying of it; a second SIGINT interrupts at once.

    Only a program's main thread can receive signals: elsewhere nothing is changed.
    """

    KINDS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {kind: signal.signal(kind, self._receive) for kind in self.KINDS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)


class Agreement:
    """Numbers that every process gets to know the largest of, on a channel of the CPU's that no GPU waits for.

    Made, and called, by all processes at the same places. A single process agrees with itself.
    """

    def __init__(self) -> None:
        self._distributed = num_ranks() > 1
        is_gloo = self._distributed and dist.get_backend() == "gloo"
        self._group = dist.new_group(backend="gloo") if self._distributed and not is_gloo else None

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes."""
        if not self._distributed:
            return list(numbers)
        together = torch.tensor(numbers)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=self._group)
        return together.tolist()
