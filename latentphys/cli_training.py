"""The verbs of training: ``train`` is one run, ``sweep`` many, ``runs`` compares them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = ("autoencoder", "dynamics")

Add = Callable[..., argparse.ArgumentParser]

DONE, FAILED = 0, 1

SWEEP_EXAMPLES = """examples:
  latentphys sweep dynamics stores=[porous.latent.zarr] out=runs/routers router=top1,topk,dense trainer.seed=0,1,2
  latentphys sweep dynamics stores=[porous.latent.zarr] out=runs/rates "trainer.learning_rate=choice(1e-3,3e-3)" \\
    --accelerate configs/accelerate/one_node.yaml
  latentphys sweep dynamics stores=[porous.latent.zarr] out=runs/routers router=top1,topk --launcher submitit \\
    --submitit slurm_partition=gpu nodes=1 gpus_per_node=8 tasks_per_node=8 timeout_min=720

Exit status: 0 every run is done, 1 some failed, 2 bad input, 75 stopped by a signal. The same command goes on."""

RUNS_EXAMPLES = """examples:
  latentphys runs runs/routers
  latentphys runs runs/routers runs/dense --sort test/porous/latent_mse
  latentphys runs runs/routers --each --csv > routers.csv"""


def train(arguments: argparse.Namespace) -> int:
    from latentphys.configuration import compose
    from latentphys.training import train_autoencoder, train_dynamics

    overrides = [f"trainer={arguments.model}", *arguments.overrides]
    config = compose("train", overrides)
    last = (train_autoencoder if arguments.model == "autoencoder" else train_dynamics)(config)
    if os.environ.get("RANK", "0") == "0":
        print(last)
    return DONE


def sweep(arguments: argparse.Namespace) -> int:
    from latentphys.info_run import is_run
    from latentphys.training.control import PREEMPTED
    from latentphys.training.launchers import run_locally, submit
    from latentphys.training.sweep import expand

    jobs = expand(arguments.model, arguments.overrides)
    if arguments.launcher == "submitit":
        if arguments.accelerate:
            raise ValueError(
                "Expected --accelerate with --launcher local only: tasks of a submitted job are its ranks."
            )
        states = submit(jobs, _settings(arguments.submitit), _report)
    else:
        if arguments.submitit:
            raise ValueError("Expected --submitit together with --launcher submitit.")
        states = run_locally(jobs, arguments.accelerate, _report)
    begun = [job.run for job in jobs if is_run(job.run)]
    if begun:
        _print(begun, each=False, sort=None, form="table")
    if all(state == "done" for state in states.values()):
        return DONE
    return FAILED if "failed" in states.values() else PREEMPTED


def runs(arguments: argparse.Namespace) -> int:
    from latentphys.training.results import find_runs

    _print(find_runs(arguments.paths), arguments.each, arguments.sort, arguments.form)
    return DONE


def _print(folders: list[Path], each: bool, sort: str | None, form: str) -> None:
    from latentphys.info_run import table
    from latentphys.training import results

    rows = table(folders)
    if form == "table":  # names that tell runs apart, and fit a line
        above = os.path.commonpath([folder.resolve().parent for folder in folders])
        rows = [{**row, "run": os.path.relpath(Path(row["run"]).resolve(), above)} for row in rows]
    if not each:
        rows = results.over_seeds(rows)
    if sort is not None:
        rows = results.ordered(rows, sort)
    if form == "table":
        results.show(rows)
    else:
        sys.stdout.write(results.as_csv(rows) if form == "csv" else results.as_json(rows))


def _report(job: Any, state: str, log: Path) -> None:
    print(f"{state:<9} {job.run.name}", file=sys.stderr, flush=True)
    if state == "failed":
        said = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        print(f"          {said[-1] if said else 'no word'} ({log})", file=sys.stderr, flush=True)


def _settings(pairs: list[str]) -> dict[str, Any]:
    """Settings such as ``nodes=2`` with Hydra's types."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(pairs)
    except HydraException as error:
        raise ValueError(
            f"Expected settings such as nodes=2 after --submitit: {' '.join(str(error).split())}"
        ) from None
    return {one.get_key_element(): one.value() for one in parsed}


def add_verbs(verb: Add) -> None:
    """Add the verbs to the command line."""
    sub = verb(
        train,
        "train an autoencoder on field stores, or a dynamics model on latent stores",
        "examples:\n"
        "  accelerate launch -m latentphys train autoencoder stores=[open_channel.zarr,porous.zarr] "
        "run=runs/autoencoder\n"
        "  accelerate launch -m latentphys train dynamics stores=[open_channel.latent.zarr,porous.latent.zarr] "
        "run=runs/dynamics\n"
        "  accelerate launch --config_file configs/accelerate/one_node.yaml -m latentphys train dynamics … "
        "trainer.strategy=fsdp trainer.expert_parallel=8\n\n"
        "The same command goes on with a run that stopped. SIGTERM and SIGUSR1 save it, and it exits with status 75.",
    )
    sub.add_argument("model", choices=MODELS)
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="Hydra overrides: stores=[…], run=DIR, router=top1|topk|nested|tree|random|dense, "
        "experiment=shodh_moe|moe_pot|nestor|mono|dense|random|ccm, dynamics=tiny|small|base, trainer.num_steps=…",
    )

    sub = verb(sweep, "train every combination of some settings, one run each", SWEEP_EXAMPLES)
    sub.add_argument("model", choices=MODELS)
    sub.add_argument(
        "overrides",
        nargs="+",
        metavar="KEY=VALUE[,VALUE…]",
        help="as of `latentphys train`; several values of a setting, range(…) or choice(…) make several runs; "
        "out=DIR: the folder that their run directories go to",
    )
    sub.add_argument("--launcher", choices=("local", "submitit"), default="local", help="(default %(default)s)")
    sub.add_argument("--accelerate", metavar="FILE", help="a launch file for several processes per run on this machine")
    sub.add_argument(
        "--submitit",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="cluster=slurm|local, nodes, tasks_per_node, gpus_per_node, timeout_min, slurm_partition, … of submitit",
    )

    sub = verb(runs, "compare runs: the settings in which they differ, and their last figures", RUNS_EXAMPLES)
    sub.add_argument("paths", nargs="+", metavar="RUN", help="run directories, or folders of them")
    sub.add_argument("--each", action="store_true", help="one row per run, even where only the seed differs")
    sub.add_argument("--sort", metavar="COLUMN", help="smallest first, such as test/porous/latent_mse")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", dest="form", const="json", default="table", help="print JSON")
    form.add_argument("--csv", action="store_const", dest="form", const="csv", help="print CSV")
