"""Rates of training on a clock that the test turns, and over two processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
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
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        found = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert found[0] == found[1]
    assert found[0] == {"samples_per_s": 2.0, "tokens_per_s": 20.0, "mfu": 800 / (8 * 50.0), "data_wait": 1 / 8}
