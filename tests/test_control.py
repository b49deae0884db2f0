"""Signals are remembered, not died of, and what one process says all of them know."""

import os
import signal
import threading
from pathlib import Path

import pytest
from ranks import run_ranks

from latentphys.training.control import PREEMPTED, Agreement, Signals

RANK = """
import torch.distributed as dist

from latentphys.training.control import Agreement

dist.init_process_group("gloo")
rank = dist.get_rank()
agreement = Agreement()
print(agreement.largest(10 * rank, 1 - rank), agreement.largest(0), agreement.largest(-5 + rank, 3))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_remembered_and_the_handlers_come_back(kind: signal.Signals) -> None:
    before = {number: signal.getsignal(number) for number in Signals.KINDS}
    with Signals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), kind)
        assert signals.received == kind
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == kind
    assert {number: signal.getsignal(number) for number in Signals.KINDS} == before


def test_a_second_interrupt_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nothing_is_changed() -> None:
    seen = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with Signals() as signals:
            seen.append(signals.received is None and signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert seen == [True]


def test_one_process_agrees_with_itself() -> None:
    assert Agreement().largest(3, 0, -2) == [3, 0, -2]


def test_two_processes_know_the_largest_of_each_number(tmp_path: Path) -> None:
    outputs = run_ranks(RANK, tmp_path)
    assert outputs == ["[10, 1] [0] [-4, 3]\n"] * 2


def test_the_exit_status_asks_to_be_tried_again() -> None:
    assert PREEMPTED == 75
