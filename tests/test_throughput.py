"""Rates of training on a clock that the test turns, and over two processes."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

from latentphys.training.throughput import Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_of_the_steps_since_the_last_call() -> None:
    clock = Clock()
    throughput = Throughput(64, 1000.0, peak_flops=1e4, clock=clock)
    for _ in range(4):
        with throughput.waiting():
            clock.now += 0.5
        clock.now += 1.5
        throughput.step(6)
    with throughput.paused():
        clock.now += 1000.0
    assert throughput.rates() == {
        "samples_per_s": 3.0,
        "tokens_per_s": 192.0,
        "mfu": pytest.approx(0.3),
        "data_wait": 0.25,
    }
    clock.now += 2.0
    throughput.step(1)
    assert throughput.rates() == {"samples_per_s": 0.5, "tokens_per_s": 32.0, "mfu": 0.05, "data_wait": 0.0}
    assert throughput.rates() == {}


def test_steps_of_another_size_count_as_what_they_are() -> None:
    clock = Clock()
    throughput = Throughput(64, 1000.0, peak_flops=1e3, clock=clock)
    clock.now += 2.0
    throughput.step(2)
    throughput.step(2, tokens=16, flops=0)
    assert throughput.rates() == {"samples_per_s": 2.0, "tokens_per_s": 72.0, "mfu": 1.0, "data_wait": 0.0}


def test_time_out_while_waiting_is_no_waiting_and_no_time() -> None:
    clock = Clock()
    throughput = Throughput(1, 1, clock=clock)
    with pytest.raises(RuntimeError), throughput.waiting():
        clock.now += 1.0
        with throughput.paused():
            clock.now += 10.0
        raise RuntimeError
    clock.now += 3.0
    throughput.step(8)
    assert throughput.rates() == {"samples_per_s": 2.0, "tokens_per_s": 2.0, "data_wait": 0.25}


def test_there_is_no_mfu_without_a_peak() -> None:
    clock = Clock()
    throughput = Throughput(1, 1, clock=clock)
    clock.now += 1.0
    throughput.step(1)
    assert "mfu" not in throughput.rates()
    for peak in (0.0, -1.0):
        with pytest.raises(ValueError, match="Expected a positive peak rate"):
            Throughput(1, 1, peak)


RANK = """
import json, sys
import torch.distributed as dist
from latentphys.training.throughput import Throughput

dist.init_process_group("gloo")
rank = dist.get_rank()
now = [0.0]
throughput = Throughput(10, 100.0, 50.0, clock=lambda: now[0])
with throughput.waiting():
    now[0] += rank
now[0] += 4.0 - rank
throughput.step([3, 5][rank])
print(json.dumps(throughput.rates()))
dist.destroy_process_group()
"""


def test_processes_add_up(tmp_path: Path) -> None:
    found = [json.loads(said) for said in run_ranks(RANK, tmp_path)]
    assert found[0] == found[1]
    assert found[0] == {"samples_per_s": 2.0, "tokens_per_s": 20.0, "mfu": 800 / (8 * 50.0), "data_wait": 1 / 8}
