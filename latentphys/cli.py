"""The command ``latentphys``: one verb for each station of the road from simulation to report.

Exit status: 0 done, 1 a check failed, 2 bad input, 75 preempted, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latentphys import cli_compose, cli_encode, cli_exchange, cli_export, cli_training, cli_validate

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def simulate(arguments: argparse.Namespace) -> int:
    import torch

    from latentphys.configuration import compose
    from latentphys.families import simulate as run
    from latentphys.progress import progress_bar
    from latentphys.training.models import build

    config = compose("simulate", arguments.overrides)
    family = build(config["family"])
    out = Path(config["out"] or f"{family.name}.zarr")
    available = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if config["device"] not in ("auto", *available):
        raise ValueError(f"Expected a device of auto | {' | '.join(available)}, got {config['device']!r}.")
    device = available[0] if config["device"] == "auto" else config["device"]
    total = config["trajectories"] * config["frames"]
    with progress_bar() as bar:
        line = bar.add_task(f"simulate {family.name}", total=total)
        run(
            family,
            out,
            shape=config["grid"]["shape"],
            num_trajectories=config["trajectories"],
            num_frames=config["frames"],
            seed=config["seed"],
            batch_size=config["batch_size"],
            device=device,
            compiled=_should_compile(config),
            workers=_workers(config, device),
            resume=config["resume"],
            overwrite=config["overwrite"],
            provenance={"config": {k: v for k, v in config.items() if k not in _NOT_THE_DATA}},
            progress=lambda n: bar.advance(line, n),
        )
    print(out)
    return DONE


_NOT_THE_DATA = ("out", "workers", "resume", "overwrite")
"""Settings that change how a data set is made, and nothing of what it holds."""


def _workers(config: dict[str, Any], device: str) -> int | str:
    """How many processes: as configured, or one for each batch as long as there are cores, or GPUs."""

    import torch

    from latentphys.workers import check_workers

    if config["workers"] != "auto":
        check_workers(config["workers"])
        return config["workers"]
    there = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    return max(1, min(there, -(-config["trajectories"] // max(1, config["batch_size"]))))


def _should_compile(config: dict[str, Any]) -> bool:
    """Whether to fuse the solver: as configured, or where it pays and there is a compiler."""
    import math
    import shutil
    import sysconfig

    if isinstance(config["compile"], bool):
        return config["compile"]
    if config["compile"] != "auto":
        raise ValueError(f"Expected auto, true or false for 'compile', got {config['compile']!r}.")
    cells = config["trajectories"] * config["frames"] * math.prod(config["grid"]["shape"])
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return cells > 4_000_000 and shutil.which("g++") is not None and headers.is_file()


def rollout(arguments: argparse.Namespace) -> int:
    from latentphys.data import open_store, split
    from latentphys.progress import progress_bar
    from latentphys.rollout import rollout_store
    from latentphys.training import load_dynamics, open_checkpoint

    dynamics, autoencoder = load_dynamics(arguments.checkpoint, arguments.resident_experts)
    autoencoder.tile = arguments.tile
    store = open_store(arguments.store)
    trajectories = arguments.trajectories or split(len(store), arguments.held_out)[1]
    with progress_bar() as bar:
        line = bar.add_task(f"rollout {store.family}", total=len(trajectories) * (arguments.steps + 1))
        rollout_store(
            autoencoder,
            dynamics,
            store,
            arguments.out,
            num_steps=arguments.steps,
            trajectories=trajectories,
            start=arguments.start,
            checkpoint=str(open_checkpoint(arguments.checkpoint).path),
            overwrite=arguments.overwrite,
            progress=lambda n: bar.advance(line, n),
        )
    print(arguments.out)
    return DONE


def render(arguments: argparse.Namespace) -> int:
    from latentphys.data import open_store
    from latentphys.views import render as draw

    reference = open_store(arguments.reference) if arguments.reference else None
    store = open_store(arguments.store)
    pictures = draw(store, arguments.out, reference, arguments.trajectory, arguments.layer, not arguments.no_movie)
    for picture in pictures:
        print(picture.path)
    return DONE


def info(arguments: argparse.Namespace) -> int:
    if len(arguments.what) == 1 and "=" not in arguments.what[0] and arguments.what[0] not in cli_training.MODELS:
        from latentphys.info import describe

        description = describe(arguments.what[0])
    else:
        from latentphys.info_experiment import describe_experiment

        named = arguments.what[0] in cli_training.MODELS
        model, overrides = (arguments.what[0], arguments.what[1:]) if named else ("dynamics", arguments.what)
        description = describe_experiment(model, overrides)
    if arguments.json:
        print(json.dumps(description, indent=1))
    else:
        _print_nested(description)
    return DONE


def demo(arguments: argparse.Namespace) -> int:
    from latentphys.demo import run

    return run(Path(arguments.out), arguments.size)


def _print_nested(description: dict[str, Any], indent: str = "") -> None:
    """Names and values in two columns; what belongs together indented under its name."""
    width = max(len(name) for name in description)
    for name, value in description.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print_nested(value, indent + "  ")
        elif "\n" in str(value):
            print(f"{indent}{name}", *(f"{indent}  {text}".rstrip() for text in str(value).splitlines()), sep="\n")
        else:
            print(f"{indent}{name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="latentphys",
        description="Compress 3D flows into latents whose every decode conserves mass exactly, advance them with a "
        "sparse mixture of experts, and prove what was done.",
        epilog="Exit status: 0 done, 1 a check failed, 2 bad input, 75 training gave up its place and is saved.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(run: Callable[[argparse.Namespace], int], summary: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            run.__name__.strip("_").replace("_", "-"),
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = verb(
        simulate,
        "make ground truth: run a family of flows and write it to a store",
        "examples:\n  latentphys simulate family=open_channel size=tiny out=open_channel.zarr\n"
        "  latentphys simulate family=porous grid.shape=[64,64,64] trajectories=16 out=porous.zarr",
    )
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="Hydra overrides: family=open_channel|porous|convection|passive_scalar|mhd|turbulence|reaction_diffusion|"
        "acoustics|shallow_water_sphere, size=tiny|small|base, grid.shape, trajectories, frames, seed, out, batch_size,"
        " workers, device, compile, resume, overwrite, and the family's own settings, family.…",
    )

    cli_exchange.add_verbs(verb)

    cli_training.add_verbs(verb)

    cli_encode.add_verbs(verb)

    cli_compose.add_verbs(verb)

    sub = verb(rollout, "advance flows in latent space and write the exactly conservative decodes to a store")
    sub.add_argument("checkpoint", help="a dynamics checkpoint or run directory")
    sub.add_argument("store", help="the store whose flows to start from")
    sub.add_argument("out", help="the rollout store to make")
    sub.add_argument("--steps", type=int, default=16, help="intervals to advance (default %(default)s)")
    sub.add_argument("--start", type=int, default=0, help="snapshot to start from (default %(default)s)")
    sub.add_argument("--trajectories", type=int, nargs="+", help="which trajectories (default: the held-out ones)")
    sub.add_argument(
        "--held-out", type=_share, default=0.15, help="share or number held out (default %(default)s, as in training)"
    )
    sub.add_argument(
        "--resident-experts",
        type=int,
        metavar="N",
        help="keep N experts of each layer in memory and read others from the checkpoint when needed (default: all)",
    )
    sub.add_argument(
        "--tile",
        type=cli_encode.count,
        metavar="N",
        help="encode and decode in tiles of N cells per axis of each level of the network (default: at once)",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace OUT")

    cli_validate.add_verbs(verb)

    sub = verb(render, "draw a store or a rollout: volume, surfaces, slices, routing, movie")
    sub.add_argument("store", help="a store of fields or a rollout")
    sub.add_argument("--reference", metavar="STORE", help="the truth: adds truth and error beside the rollout")
    sub.add_argument("--out", required=True, metavar="DIR", help="where the pictures go")
    sub.add_argument("--trajectory", type=int, default=0, help="which trajectory (default %(default)s)")
    sub.add_argument("--layer", type=int, default=-1, help="whose routing (default: the last layer's)")
    sub.add_argument("--no-movie", action="store_true", help="stills only")

    sub = verb(
        info,
        "say what a store, a checkpoint, a run or an artefact holds, or what an experiment would need",
        "examples:\n  latentphys info runs/dynamics\n"
        "  latentphys info experiment=shodh_moe dynamics=base processes=8 memory=80e9\n"
        "  latentphys info autoencoder autoencoder=base shape=[128,128,128] trainer.recompute=true",
    )
    sub.add_argument(
        "what",
        nargs="+",
        metavar="PATH | [MODEL] KEY=VALUE",
        help="a store, a checkpoint, a run directory or an artefact; or Hydra overrides as of `train`, of a dynamics "
        "model unless MODEL says autoencoder, and processes, memory (bytes of each that must be enough), latent_shape, "
        "shape, mfu",
    )
    sub.add_argument("--json", action="store_true", help="print JSON")

    cli_export.add_verbs(verb)

    sub = verb(demo, "the whole road, small: simulate, compress, advance, validate, render")
    sub.add_argument("--out", default="runs/demo", metavar="DIR", help="where everything goes (default %(default)s)")
    sub.add_argument("--size", choices=("demo", "tiny"), default="demo", help="tiny: minutes less, figures worthless")
    return top


def _share(text: str) -> float | int:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"Expected a share such as 0.15 or a number such as 3, got {text!r}."
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    arguments = parser().parse_args(argv)
    from latentphys.pressure import ConvergenceError
    from latentphys.training.control import PREEMPTED, Preempted

    try:
        return arguments.run(arguments)
    except (ValueError, FloatingPointError, ConvergenceError, OSError) as error:
        print(f"latentphys {arguments.verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except Preempted as error:
        print(f"latentphys {arguments.verb}: {error}", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt as error:
        print(f"latentphys {arguments.verb}: interrupted; {error}".rstrip("; "), file=sys.stderr)
        return INTERRUPTED
