"""Runs that are killed at random moments, again and again, against runs that nobody disturbed: to the last bit.

    python benchmarks/fault_resume.py --kills 20 --json faults.jsonl
    python benchmarks/fault_resume.py --kills 4 --processes 1 --seed 7

Small autoencoders and dynamics models are trained by the command line on one and on two processes, with everything that
a resumed run has to take up again: AdamW or SOAP, an average of the weights, accumulated gradients, noise, guards that
skip steps, routing balance. Each is trained once undisturbed. Then SIGKILL goes to all processes of a run at once, the
launcher included, at a random moment of its start-up or, most of the time, of its training, saves and tests; the same
command is given again, and killed again, until the run comes to its end. Its last checkpoint must hold the same tensors
and the same state as that of the undisturbed run, bit for bit, and its log the same figures.

A kill counts where the run was alive and not yet done, and a run where it was killed at least once. Exit status 1: a
run came out otherwise, or not at all.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from killed_runs import Attempt, differences, figures, interrupted_save, steps_done, steps_saved
from machine import Results, parser

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
    "ema": 0.5,
    "warmup": 5,
    "learning_rate": 3e-3,  # high enough for tests that get worse again, so that the best is not the last
    "spike": 1.01,  # steps are skipped for next to nothing
    "max_skipped": 100,
    "log_every": 1,
    "test_every": 4,
    "test_batches": 1,
}
OPTIMIZERS = {("autoencoder", 1): "soap", ("dynamics", 2): "soap"}
"""AdamW elsewhere."""
SAVES = {1: 2, 2: 3}
"""Processes → steps between checkpoints."""
EARLY = 0.2
"""Share of the kills that come while a run starts."""
MOST_FAILURES = 3
"""Runs that come out wrong before there is no point in going on."""
PATIENCE = 20
"""Times the length of an undisturbed run after which one that goes on hangs."""


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
    survived: int = 0
    corrupt: int = 0

    @property
    def kills(self) -> int:
        return self.phases.total()


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
    with Attempt(case.command, case.whole, arguments.device, arguments.threads) as attempt:
        limit = attempt.begin + 600
        attempt.wait(limit, for_training=True)
        start_s = time.monotonic() - attempt.begin
        attempt.wait(limit)
        train_s = time.monotonic() - attempt.begin - start_s
        status = attempt.process.poll()
        if status != 0:
            raise RuntimeError(f"Expected an undisturbed run to end well, got exit status {status}: {attempt.said()}")
    there = json.loads((case.whole / "environment.json").read_text())["starts"][0]["processes"]
    if there != case.processes:
        raise RuntimeError(f"Expected {case.processes} processes, got {there}.")
    return replace(case, start_s=start_s, train_s=train_s)


def disturbed(case: Case, run: Path, tally: Tally, draw: random.Random, arguments: argparse.Namespace) -> str | None:
    """One run, killed and started again until it is done; why it is not as it should be, or None."""
    limit_s, restarted, is_done = PATIENCE * (case.start_s + case.train_s), False, False
    while True:
        with Attempt(case.command, run, arguments.device, arguments.threads) as attempt:
            last_chance = attempt.begin + limit_s
            if tally.kills >= arguments.kills or is_done:
                attempt.wait(last_chance)
            elif draw.random() < EARLY:
                attempt.wait(attempt.begin + draw.uniform(0, case.start_s))
            else:
                attempt.wait(last_chance, for_training=True)
                if restarted and attempt.is_training:
                    tally.restarts.setdefault(case.processes, []).append(time.monotonic() - attempt.begin)
                rest = 1 - steps_saved(run) / arguments.steps
                attempt.wait(time.monotonic() + draw.uniform(0, case.train_s * max(rest, 0.5)))
            status, was_training = attempt.process.poll(), attempt.is_training
            if status:
                return f"exit status {status}: {attempt.said()}"
            if status == 0:
                return "; ".join(differences(run, case.whole)) or None
            if attempt.kill():
                phase = "save" if interrupted_save(run) else "training" if was_training else "start"
                tally.phases[phase] += 1
                tally.lost.append(steps_done(run) - steps_saved(run))
            else:
                is_done = True
            if time.monotonic() >= last_chance:
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
            hits = (tally.phases - before).total()
            if reason or hits:  # a run that was never hit proves nothing
                tally.identical.append(reason is None)
                tally.survived += hits if reason is None else 0
            tally.corrupt += len(list(path.glob("corrupt-*")))
            about = {"kills": dict(tally.phases - before), "seconds": time.monotonic() - begin}
            results.add(f"run {number}: {case.kind} {case.processes}", about | {"differs": reason or "in nothing"})
            number += 1
        summarise(results, tally)
    return int(not all(tally.identical))


def summarise(results: Results, tally: Tally) -> None:
    """The lines that count."""
    identical, runs = sum(tally.identical), len(tally.identical)
    survived = {"value": tally.survived, "of": tally.kills, "target": f"≥ {tally.kills}", "met": identical == runs}
    results.add("kills", {"value": tally.kills, **{f"during_{k}": n for k, n in sorted(tally.phases.items())}})
    results.add("bit_identical", survived)
    results.add("runs_bit_identical", {"value": identical, "of": runs})
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
    options.add_argument("--steps", type=int, default=80, help="steps of each run (default %(default)s)")
    options.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    options.add_argument("--folder", type=Path, help="where the runs go for a while (default: temporary)")
    arguments = options.parse_args()
    if min(arguments.kills, arguments.steps, *arguments.processes) < 1:
        options.error("Expected at least one kill, step and process.")
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
