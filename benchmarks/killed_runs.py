"""A training command that can be killed with all its processes, and what it leaves, compared to the last bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file

from latentphys.training.run_log import read_log

TENSORS = ("model", "ema", "optimizer")
"""Files that the last checkpoint must have."""
OF_THE_CLOCK = ("seconds", "samples_per_s", "tokens_per_s", "mfu", "data_wait")
"""What two equal runs log differently; and, counted from a run's last start, the age of dead experts."""
POLL_S = 0.002


class Attempt:
    """One start of a training command, with all the processes that come of it, wherever they move.

    In a ``with`` block none of them outlives the block.
    """

    def __init__(self, command: list[str], run: Path, device: str, threads: int) -> None:
        self.run, self.mark = run, uuid.uuid4().hex
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "LATENTPHYS_FAULT": self.mark}
        if device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        self._status = _identity(run / "status.json")
        self.begin = time.monotonic()
        self.errors = run.with_name(f"{run.name}.stderr")
        with self.errors.open("w") as stream:
            self.process = subprocess.Popen(
                [*command, f"run={run}"],
                stdout=subprocess.DEVNULL,
                stderr=stream,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    @property
    def is_training(self) -> bool:
        """Whether it has come as far as its first step."""
        return _identity(self.run / "status.json") != self._status

    def wait(self, until: float, for_training: bool = False) -> bool:
        """Whether it ended, or began to train where that is asked for, before a moment of the clock."""
        while time.monotonic() < until:
            if self.process.poll() is not None or (for_training and self.is_training):
                return True
            time.sleep(POLL_S)
        return False

    def kill(self) -> bool:
        """SIGKILL to all processes, in any order; whether the run was alive and not yet done."""
        was_alive = self.process.poll() is None and _status(self.run) != "done"
        while found := list(marked(self.mark)):
            for process in found:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        self.process.wait()
        return was_alive and self.process.returncode == -signal.SIGKILL

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        return self.errors.read_text(errors="replace")[-2000:]


def marked(mark: str) -> Iterator[int]:
    """Processes that were started, by whatever way, with this mark in their environment."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:
                continue
            if mark.encode() in environment:
                yield int(folder.name)


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _status(run: Path) -> str | None:
    try:
        return json.loads((run / "status.json").read_text())["state"]
    except FileNotFoundError:
        return None


def interrupted_save(run: Path) -> bool:
    """Whether a dead run left a checkpoint half written, half exchanged, or not yet named."""
    if any(path.name.endswith((".partial", ".old", ".gone")) for path in run.glob(".step-*")):
        return True
    folders, last = sorted(run.glob("step-*")), run / "last.json"
    named = json.loads(last.read_text())["checkpoint"] if last.is_file() else None
    return bool(folders) and folders[-1].name != named


def steps_done(run: Path) -> int:
    """Steps that a dead run had taken, by its log, whose last line may be cut off."""
    return max((line["step"] for line in _lines(run)), default=0)


def steps_saved(run: Path) -> int:
    """Steps in the newest checkpoint that has its name."""
    return max((int(path.name.removeprefix("step-")) for path in run.glob("step-*")), default=0)


def _lines(run: Path) -> list[dict[str, Any]]:
    return read_log(run / "log.jsonl") if (run / "log.jsonl").is_file() else []


def figures(run: Path) -> tuple[list[Any], list[str]]:
    """What two equal runs log alike: all figures line by line, and what was skipped and why."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: bare(v) for k, v in value.items() if k not in (*OF_THE_CLOCK, "dead_age")}
        return [bare(v) for v in value] if isinstance(value, list) else value

    lines = _lines(run)
    skipped = sorted(line["event"] for line in lines if line.get("event", "").startswith("skipped"))
    return [bare(line) for line in lines if "event" not in line], skipped


def differences(run: Path, whole: Path) -> list[str]:
    """In what the last checkpoint and the log of a run differ from those of another; nothing where they do not."""
    a, b = sorted(run.glob("step-*")), sorted(whole.glob("step-*"))
    if not a or not b or a[-1].name != b[-1].name:
        return [f"last checkpoint {[path.name for path in (*a[-1:], *b[-1:])]}"]
    found = []
    files = {
        path.relative_to(folder)
        for folder in (a[-1], b[-1])
        for path in folder.rglob("*")
        if path.suffix in (".safetensors", ".json")
    }
    for file in sorted(files | {Path(f"{name}.safetensors") for name in TENSORS}):
        x, y = a[-1] / file, b[-1] / file
        if not (x.is_file() and y.is_file()):
            found.append(f"{file} is missing")
        elif file.suffix == ".json":
            p, q = json.loads(x.read_text()), json.loads(y.read_text())
            found += [f"{file}: {key}" for key in sorted(p.keys() | q.keys()) if p.get(key) != q.get(key)]
        else:
            p, q = load_file(x), load_file(y)
            found += [f"{file}: {key}" for key in sorted(p.keys() | q.keys()) if not _same_bits(p.get(key), q.get(key))]
    for file in (Path("last.json"), Path("best.json")):
        texts = [(folder / file).read_text() if (folder / file).is_file() else None for folder in (run, whole)]
        found += [str(file)] * (texts[0] != texts[1])
    for name, mine, theirs in zip(("figures", "skipped steps"), figures(run), figures(whole), strict=True):
        if mine != theirs:
            found.append(f"{name} in the log")
    return found


def _same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
