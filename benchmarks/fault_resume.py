"""Runs that are killed at random moments, again and again, against runs that nobody disturbed: to the last bit.

    python benchmarks/fault_resume.py --kills 20 --json faults.jsonl
    python benchmarks/fault_resume.py --kills 4 --processes 1 --seed 7

Small autoencoders and dynamics models are trained by the command line on one and on two processes, with everything that
a resumed run has to take up again: AdamW or SOAP, an average of the weights, accumulated gradients, noise, guards that
skip steps, routing balance. Each is trained once undisturbed. Then SIGKILL goes to all processes of a run at once, the
launcher included, at a random moment of its start-up or, most of the time, of its training, saves and tests; the same
command is given again, and killed again, until the run comes to its end. Its last checkpoint must hold the same tensors
and the same state as that of the undisturbed run, bit for bit, and its log the same figures.

A kill counts where the run was alive and not yet done. Exit status 1: a run came out otherwise, or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import Results, parser
from safetensors.torch import load_file

from latentphys.data import open_store
from latentphys.families import OpenChannel, Porous, simulate
from latentphys.training import encode_store, load_autoencoder

LAUNCH = Path(__file__).parent.parent / "configs" / "accelerate" / "cpu_2proc.yaml"
FAMILIES = {"open_channel": OpenChannel(spin_up=0.01), "porous": Porous(spin_up=0.01)}
MODELS = {
    "autoencoder": ["autoencoder.latent_channels=8", "autoencoder.widths=[8,16]", "autoencoder.num_blocks=[1,1]"],
    "dynamics": ["dynamics.dim=32", "dynamics.depth=2", "dynamics.num_heads=2", "dynamics.hidden=32"],
}
TRAINER = {
    "batch_size": 4,
    "accumulate": 2,
    "ema": 0.9,
    "warmup": 5,
    "spike": 1.5,  # of so few samples that some steps are skipped
    "max_skipped": 100,
    "log_every": 1,
    "test_every": 8,
    "test_batches": 1,
}
OPTIMIZERS = {("autoencoder", 1): "soap", ("dynamics", 2): "soap"}
"""AdamW elsewhere."""
TENSORS = ("model", "ema", "optimizer")
"""Files that the last checkpoint must have."""
SAVES = {1: 2, 2: 3}
"""Processes → steps between checkpoints."""
EARLY = 0.2
"""Share of the kills that come while a run starts."""
OF_THE_CLOCK = ("seconds", "samples_per_s", "tokens_per_s", "mfu", "data_wait")
"""What two equal runs log differently; and, counted from a run's last start, the age of dead experts."""
MOST_FAILURES = 3
"""Runs that come out wrong before there is no point in going on."""
PATIENCE = 20
"""Times the length of an undisturbed run after which one that goes on hangs."""
POLL_S = 0.002


@dataclass(frozen=True)
class Case:
    """One kind of run, and how it went undisturbed.

    Args:
        start_s: from the command to the first step [s].
        train_s: from there to the end [s].
    """

    kind: str
    processes: int
    command: list[str]
    whole: Path
    start_s: float = 0.0
    train_s: float = 0.0


@dataclass
class Tally:
    """What the kills did."""

    phases: Counter[str] = field(default_factory=Counter)
    identical: list[bool] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    restarts: dict[int, list[float]] = field(default_factory=dict)
    corrupt: int = 0

    @property
    def kills(self) -> int:
        return self.phases.total()


class Attempt:
    """One start of a training command, with all the processes that come of it, wherever they move."""

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
    return max((line["step"] for line in log_lines(run)), default=0)


def steps_saved(run: Path) -> int:
    """Steps in the newest checkpoint that has its name."""
    return max((int(path.name.removeprefix("step-")) for path in run.glob("step-*")), default=0)


def log_lines(run: Path) -> list[dict[str, Any]]:
    lines = []
    for text in (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def figures(run: Path) -> tuple[list[Any], list[str]]:
    """What two equal runs log alike: all figures line by line, and what was skipped and why."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: bare(v) for k, v in value.items() if k not in (*OF_THE_CLOCK, "dead_age")}
        return [bare(v) for v in value] if isinstance(value, list) else value

    lines = log_lines(run)
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
    for name, mine, theirs in zip(("figures", "skipped steps"), figures(run), figures(whole), strict=True):
        if mine != theirs:
            found.append(f"{name} in the log")
    return found


def _same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def command(kind: str, processes: int, stores: list[Path], steps: int) -> list[str]:
    """What trains a model, up to the run directory."""
    program = [sys.executable, "-m", "latentphys"]
    if processes > 1:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH)]
        program = [*launcher, "--num_processes", str(processes), "-m", "latentphys"]
    settings = TRAINER | {
        "num_steps": steps,
        "optimizer": OPTIMIZERS.get((kind, processes), "adamw"),
        "checkpoint_every": SAVES.get(processes, 2),
    }
    return [
        *(*program, "train", kind, f"stores=[{','.join(map(str, stores))}]", "held_out=1"),
        *MODELS[kind],
        *(f"trainer.{name}={value}" for name, value in settings.items()),
    ]


def undisturbed(case: Case, arguments: argparse.Namespace) -> Case:
    """Train once without a kill, and see how long that takes."""
    attempt = Attempt(case.command, case.whole, arguments.device, arguments.threads)
    limit = attempt.begin + 600
    attempt.wait(limit, for_training=True)
    start_s = time.monotonic() - attempt.begin
    attempt.wait(limit)
    train_s = time.monotonic() - attempt.begin - start_s
    if attempt.process.poll() != 0:
        attempt.kill()
        raise RuntimeError(f"Expected an undisturbed run to end, got {attempt.process.returncode}: {attempt.said()}")
    return Case(case.kind, case.processes, case.command, case.whole, start_s, train_s)


def disturbed(case: Case, run: Path, tally: Tally, draw: random.Random, arguments: argparse.Namespace) -> str | None:
    """One run, killed and started again until it is done; why it is not as it should be, or None."""
    limit_s, restarted = PATIENCE * (case.start_s + case.train_s), False
    while True:
        attempt = Attempt(case.command, run, arguments.device, arguments.threads)
        last_chance, wanted = attempt.begin + limit_s, tally.kills < arguments.kills
        if wanted and draw.random() < EARLY:
            attempt.wait(attempt.begin + draw.uniform(0, case.start_s))
        else:
            attempt.wait(last_chance, for_training=True)
            if restarted and attempt.is_training:
                tally.restarts.setdefault(case.processes, []).append(time.monotonic() - attempt.begin)
            attempt.wait(time.monotonic() + draw.uniform(0, case.train_s) if wanted else last_chance)
        if attempt.process.poll() is not None:
            attempt.kill()  # what a launcher may have left behind
            if attempt.process.returncode:
                return f"exit status {attempt.process.returncode}: {attempt.said()}"
            return "; ".join(differences(run, case.whole)) or None
        was_training = attempt.is_training
        if attempt.kill():
            phase = "save" if interrupted_save(run) else "training" if was_training else "start"
            tally.phases[phase] += 1
            tally.lost.append(steps_done(run) - steps_saved(run))
        elif time.monotonic() >= last_chance:
            return f"it hung: {attempt.said()}"
        restarted = True


def data(folder: Path) -> list[Path]:
    """Two families of fields, simulated."""
    stores = [folder / f"{name}.zarr" for name in FAMILIES]
    for family, path in zip(FAMILIES.values(), stores, strict=True):
        simulate(family, path, shape=(16, 16, 16), num_trajectories=4, num_frames=6)
    return stores


def cases(folder: Path, arguments: argparse.Namespace) -> list[Case]:
    """Everything that is to be killed, trained undisturbed once; latents come of the first of the autoencoders."""
    fields, found = data(folder), []
    latents = [path.with_suffix(".latent.zarr") for path in fields]
    for kind in MODELS:
        for processes in arguments.processes:
            stores = fields if kind == "autoencoder" else latents
            whole = folder / f"{kind}-{processes}"
            case = Case(kind, processes, command(kind, processes, stores, arguments.steps), whole)
            found.append(undisturbed(case, arguments))
        if kind == "autoencoder":
            autoencoder = load_autoencoder(found[0].whole)
            for path, out in zip(fields, latents, strict=True):
                encode_store(autoencoder, open_store(path), out, checkpoint=str(found[0].whole))
    return found


def run(arguments: argparse.Namespace) -> int:
    results, tally, draw = Results("fault_resume", arguments), Tally(), random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        every = cases(folder, arguments)
        for case in every:
            times = {"start_s": case.start_s, "train_s": case.train_s}
            skipped = len(figures(case.whole)[1])
            results.add(f"undisturbed {case.kind} {case.processes}", times | {"skipped": skipped})
        number = 0
        while tally.kills < arguments.kills and tally.identical.count(False) < MOST_FAILURES:
            case = every[number % len(every)]
            path = folder / f"killed-{number}"
            before, begin = tally.phases.copy(), time.monotonic()
            reason = disturbed(case, path, tally, draw, arguments)
            tally.identical.append(reason is None)
            tally.corrupt += len(list(path.glob("corrupt-*")))
            about = {"kills": dict(tally.phases - before), "seconds": time.monotonic() - begin}
            results.add(f"run {number}: {case.kind} {case.processes}", about | {"differs": reason or "in nothing"})
            number += 1
        summarise(results, tally)
    return int(not all(tally.identical))


def summarise(results: Results, tally: Tally) -> None:
    """The lines that count."""
    identical, runs = sum(tally.identical), len(tally.identical)
    results.add("kills", {"value": tally.kills, **{f"during_{k}": n for k, n in sorted(tally.phases.items())}})
    results.add("bit_identical", {"value": identical, "of": runs})
    results.add("bit_identical_share", {"value": identical / runs, "target": "≥ 1", "met": identical == runs})
    results.add("kills_during_save", {"value": tally.phases["save"]})
    results.add("steps_lost_at_most", {"value": max(tally.lost, default=0)})
    results.add("corrupt_checkpoints", {"value": tally.corrupt})
    for processes, seconds in sorted(tally.restarts.items()):
        figures = {"value": statistics.median(seconds), "most": max(seconds), "of": len(seconds)}
        results.add(f"restart_s_{processes}_processes", figures)


def main() -> int:
    options = parser(str(__doc__).partition("\n")[0])
    options.set_defaults(threads=1)
    options.add_argument("--kills", type=int, default=20, help="(default %(default)s)")
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="(default 1 2)")
    options.add_argument("--steps", type=int, default=60, help="steps of each run (default %(default)s)")
    options.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    options.add_argument("--folder", type=Path, help="where the runs go for a while (default: temporary)")
    arguments = options.parse_args()
    if min(arguments.kills, arguments.steps, *arguments.processes) < 1:
        options.error("Expected at least one kill, step and process.")
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
