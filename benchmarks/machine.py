"""On what a benchmark ran, how long something takes there, and where the results go."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

STDOUT = "-"
"""What `--json` holds where it names no file."""


def describe(device: str) -> dict[str, Any]:
    """Processor, cores, threads, load and versions, and the GPU where that is the device."""
    about: dict[str, Any] = {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.startswith("cuda"):
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    result.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    result.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="PATH",
        help="append one JSON line per result to this file; without a file, print them and nothing else",
    )
    return result


class Results:
    """Prints each result, or appends it to a file of JSON lines together with the machine; JSON alone where asked."""

    def __init__(self, benchmark: str, arguments: argparse.Namespace) -> None:
        torch.set_num_threads(arguments.threads)
        self.benchmark, self.device = benchmark, arguments.device
        self.json_only = arguments.json == STDOUT
        self.path = None if arguments.json is None or self.json_only else Path(arguments.json)
        print(json.dumps(describe(self.device)), flush=True)

    def say(self, text: str) -> None:
        """A remark, for people only."""
        if not self.json_only:
            print(text, flush=True)

    def add(
        self, name: str, figures: Mapping[str, Any], settings: Mapping[str, Any] | None = None, indent: str = ""
    ) -> None:
        """One result: numbers by name, the unit at the end of the name where there is one; settings for JSON only."""
        numbers = "  ".join(f"{key} {_short(value)}" for key, value in figures.items())
        self.say(f"{indent + name:<33} {numbers}")
        line = {"benchmark": self.benchmark, "name": name, **figures, **(settings or {})}
        text = json.dumps(line | {"machine": describe(self.device)})
        if self.json_only:
            print(text, flush=True)
        elif self.path is not None:
            with self.path.open("a") as file:
                file.write(text + "\n")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and value else str(value)


def elapsed(work: Callable[[], Any], device: str) -> float:
    """How long some work takes, until a GPU has finished it [s]."""
    return timed(work, device, repeats=0)[1]


def timed(work: Callable[[], T], device: str, repeats: int = 3) -> tuple[T, float]:
    """What some work returns, and its shortest time of some runs after one that warms up, or of one run alone [s]."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        begin = time.perf_counter()
        result = work()
        synchronise(device)
        times.append(time.perf_counter() - begin)
    return result, min(times[1:] or times)


def peak_memory(work: Callable[[], Any], device: str) -> float:
    """How much more memory some work holds at its peak than before it [MiB], on a GPU or of this process."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept by the allocator would hide what the work needs
    before, peak, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(0, peak - before) / 2**20


def _resident() -> int:
    """Memory that this process holds [bytes]."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def synchronise(device: str) -> None:
    """Wait for a GPU to finish."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
