"""The verb ``compose``: one model between, or beyond, two that were fine-tuned from it."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Add = Callable[..., argparse.ArgumentParser]
FRAMES = 4
"""How many frames are scored, where nobody says it."""

EXAMPLES = """θ(α) = θ₀ + Δ₊ + α Δ₋: the anchor θ₀, half the sum Δ₊ and half the difference Δ₋ of what both ends learnt.
α = −1 is LOW, +1 is HIGH, 0 their mean, and what lies beyond is extrapolation.

examples:
  latentphys train dynamics experiment=ccm finetune.checkpoint=runs/anchor stores=[f.latent.zarr] \\
    "regime={viscosity: [null, 0.01]}" run=runs/low
  latentphys train dynamics experiment=ccm finetune.checkpoint=runs/anchor stores=[f.latent.zarr] \\
    "regime={viscosity: [0.05, null]}" run=runs/high
  latentphys compose runs/anchor runs/low runs/high --out runs/c --metadata viscosity=0.03 --map log
  latentphys compose runs/anchor runs/low runs/high --out runs/c --prefix new_flow.zarr --frames 4
  latentphys compose runs/anchor runs/low runs/high --out runs/c --scale viscosity=0.03 --calibrate a.zarr b.zarr
  latentphys compose runs/anchor runs/low runs/high --out runs/d --scale viscosity=0.04 --calibrate runs/c
  latentphys compose runs/anchor runs/low runs/high --out runs/mean --alpha 0"""


def compose(arguments: argparse.Namespace) -> int:
    from latentphys.composition import compose as write
    from latentphys.composition.checkpoints import check_out
    from latentphys.composition.files import num_numbers
    from latentphys.composition.sources import open_relatives
    from latentphys.progress import progress_bar

    _check(arguments)
    anchor, low, high = sources = open_relatives(arguments.anchor, arguments.low, arguments.high)
    check_out(arguments.out, sources, arguments.overwrite)
    with progress_bar() as bar, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        choice = _choice(arguments, sources, bar)
        line = bar.add_task("compose", total=num_numbers(sources[0].weights(ema=True)))

        def show(done: int) -> None:
            bar.advance(line, done)

        path = write(anchor, low, high, arguments.out, choice, overwrite=arguments.overwrite, progress=show)
    for text in dict.fromkeys(str(warning.message) for warning in said):
        print(f"latentphys compose: {text}", file=sys.stderr)
    about = json.loads((path / "composition.json").read_text())
    if arguments.json:
        print(json.dumps({"checkpoint": str(path), **about}, indent=1))
    else:
        print(f"alpha = {choice.alpha:.6g} ({choice.how}; {choice.range})")
        print(path)
    return 0


def _choice(arguments: argparse.Namespace, sources: Any, bar: Any) -> Any:
    """α in the one way that was asked for."""
    from latentphys.composition import Choice, CompositeModel, Prefix, calibrate, from_metadata, search
    from latentphys.composition.prefix import BANK
    from latentphys.composition.scale import Fit
    from latentphys.data import open_store

    if arguments.alpha is not None:
        return Choice(arguments.alpha, "given")
    map = arguments.map or "linear"
    if arguments.metadata is not None:
        name, value = arguments.metadata
        return from_metadata(sources, name, value, map, arguments.low_at, arguments.high_at)
    if arguments.scale is not None and _is_fit(arguments.calibrate[0]):
        name, value = arguments.scale
        fit = Fit.read(arguments.calibrate[0], sources)
        if name != fit.parameter:
            raise ValueError(f"Expected --scale {fit.parameter}=…, which the fit is of, got {name!r}.")
        return fit.choice(value)
    anchor, low, high = sources
    model = CompositeModel(anchor, low, high, _device(arguments.device))
    bank, some = arguments.bank or BANK, arguments.trajectories
    frames = FRAMES if arguments.frames is None else arguments.frames
    line = bar.add_task("score", total=None)

    def show(done: int) -> None:
        bar.advance(line, done)

    if arguments.prefix is not None:
        return search(model, Prefix.read(model, open_store(arguments.prefix), some, frames), bank, progress=show)
    name, value = arguments.scale
    stores = [open_store(path) for path in arguments.calibrate]
    fit = calibrate(model, stores, name, map, trajectories=some, frames=frames, bank=bank, progress=show)
    return fit.choice(value)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that the way in which α is found has no use for."""
    way = next(name for name in ("alpha", "metadata", "scale", "prefix") if getattr(arguments, name) is not None)
    takes = {
        "map": ("metadata", "scale"),
        "low_at": ("metadata",),
        "high_at": ("metadata",),
        "calibrate": ("scale",),
        "frames": ("prefix", "scale"),
        "trajectories": ("prefix", "scale"),
        "bank": ("prefix", "scale"),
    }
    for name, ways in takes.items():
        if getattr(arguments, name) is not None and way not in ways:
            options = " or ".join(f"--{w}" for w in ways)
            raise ValueError(f"Expected --{name.replace('_', '-')} with {options} only, got it with --{way}.")
    if way == "scale":
        _check_calibration(arguments)
    if way in ("prefix", "scale"):
        from latentphys.training import pictures

        pictures.check()


def _check_calibration(arguments: argparse.Namespace) -> None:
    """Refuse no flows to calibrate with, and a fit with options or flows that it makes no use of."""
    paths = arguments.calibrate
    if not paths:
        raise ValueError("Expected --calibrate STORE … beside --scale, got none: the flows that the map is fitted to.")
    fits = [path for path in paths if _is_fit(path)]
    if not fits:
        return
    if len(paths) > 1:
        raise ValueError(
            f"Expected a fit alone with --calibrate, got {fits[0]} among {len(paths)} paths; give the fit, or stores."
        )
    for name in ("map", "frames", "trajectories", "bank"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"Expected --{name} with stores to calibrate with only, got it with the fit of {fits[0]}.")


def _is_fit(path: str) -> bool:
    return path.endswith(".json") or (Path(path) / "composition.json").is_file()


def _device(name: str) -> str:
    import torch

    there = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and there == "cpu":
        raise ValueError("Expected --device auto | cpu, got 'cuda' on a machine without a GPU.")
    return there if name == "auto" else name


def _named(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        if name.strip():
            return name.strip(), float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"Expected NAME=VALUE such as viscosity=0.03, got {text!r}.")


def add_verbs(verb: Add) -> None:
    """Add the verb to the command line."""
    sub = verb(compose, "compose one model from an anchor and two that were fine-tuned from it", EXAMPLES)
    sub.add_argument("anchor", help="checkpoint or run that both endpoints were fine-tuned from")
    sub.add_argument("low", help="checkpoint or run of the endpoint at alpha = −1")
    sub.add_argument("high", help="checkpoint or run of the endpoint at alpha = +1")
    sub.add_argument("--out", required=True, metavar="DIR", help="the checkpoint to make")
    way = sub.add_mutually_exclusive_group(required=True)
    way.add_argument("--alpha", type=float, metavar="A", help="alpha itself")
    way.add_argument(
        "--metadata", type=_named, metavar="NAME=VALUE", help="from a parameter, by where the endpoints were trained"
    )
    way.add_argument(
        "--scale",
        type=_named,
        metavar="NAME=VALUE",
        help="from a parameter, by a map fitted to the flows of --calibrate",
    )
    way.add_argument("--prefix", metavar="STORE", help="from the first frames of these flows, by the error of rollouts")
    sub.add_argument("--map", choices=("linear", "log"), help="of the parameter, or of its logarithm (default linear)")
    sub.add_argument(
        "--low-at", type=float, metavar="P", help="the parameter of LOW (default: the mean in its training)"
    )
    sub.add_argument(
        "--high-at", type=float, metavar="P", help="the parameter of HIGH (default: the mean in its training)"
    )
    sub.add_argument(
        "--calibrate", nargs="+", metavar="STORE", help="flows at several values, or one composition that has the fit"
    )
    sub.add_argument("--frames", type=int, metavar="K", help=f"first frames to score (default {FRAMES})")
    sub.add_argument("--trajectories", type=int, nargs="+", metavar="N", help="which of the flows (default: all)")
    sub.add_argument(
        "--bank",
        type=float,
        nargs="+",
        metavar="A",
        help="alphas to score before the refinement (default −2…2 by 0.25)",
    )
    sub.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to score: auto is a GPU where there is one",
    )
    sub.add_argument("--json", action="store_true", help="print what composition.json says")
    sub.add_argument("--overwrite", action="store_true", help="replace OUT, at the end")
