"""The verb ``export``: a trained model becomes an artefact for other run times."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

Add = Callable[..., argparse.ArgumentParser]

DONE = 0

EXAMPLES = """examples:
  latentphys export runs/dynamics porous.artefact --to pt2 --store porous.zarr --trajectory 3
  latentphys export runs/dynamics channel.artefact --to onnx --family open_channel
  latentphys export runs/dynamics batch.artefact --to torchscript --store porous.zarr --batch 4

An artefact is a folder of one family and one geometry: three functions of fixed shapes (encode, step, decode), what is
to be known about them, and test vectors. `Surrogate.load` opens it, and so do C++ and Fortran (docs/native.md). It is
code: load only artefacts that you trust (docs/export.md)."""


def export(arguments: argparse.Namespace) -> int:
    import torch

    from latentphys.data import open_store
    from latentphys.surrogate.export import export as run
    from latentphys.surrogate.export.examples import from_scale, from_store
    from latentphys.surrogate.models import Models
    from latentphys.training import open_checkpoint
    from latentphys.training.provenance import provenance

    if (arguments.store is None) == (arguments.family is None):
        got = "neither" if arguments.store is None else "both"
        raise ValueError(f"Expected --store, for a flow of it, or --family, for an empty box, got {got}.")
    if arguments.store is not None and arguments.shape is not None:
        raise ValueError("Expected --shape beside --family only, got it beside --store, which has a shape.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("Expected a GPU for --device cuda, got none; export on a machine that has one.")
    models = Models.load(arguments.checkpoint, arguments.device)
    checkpoint = open_checkpoint(arguments.checkpoint, "dynamics").path
    units: dict[str, str] = {}
    about: dict[str, Any] = {"checkpoint": str(checkpoint.resolve())}
    if arguments.store is not None:
        store = open_store(arguments.store)
        states, then = from_store(models, store, arguments.trajectory, arguments.batch)
        units = store.attributes["parameter_units"]
        about |= {**provenance([store]), "store": str(store.path.resolve()), "trajectory": arguments.trajectory}
    else:
        states, then = from_scale(models, arguments.family, arguments.shape, arguments.batch)
        about |= provenance([])
    out = run(
        models,
        states,
        arguments.out,
        to=arguments.to,
        then=then,
        units=units,
        provenance=about,
        overwrite=arguments.overwrite,
        progress=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
    )
    print(out)
    return DONE


def add_verbs(verb: Add) -> None:
    sub = verb(export, "write a trained model as an artefact for C++, Fortran and other run times", EXAMPLES)
    sub.add_argument("checkpoint", help="a dynamics checkpoint or run directory")
    sub.add_argument("out", help="the folder to make; it appears whole or not at all")
    sub.add_argument(
        "--to",
        required=True,
        choices=("pt2", "onnx", "torchscript"),
        help="pt2: machine code for this kind of processor, for libtorch (compiling takes a minute or more, and g++); "
        "onnx: for ONNX Runtime; torchscript: for FTorch and older libtorch",
    )
    sub.add_argument("--store", help="the store whose flow says family, geometry and parameters")
    sub.add_argument(
        "--trajectory", type=int, default=0, metavar="N", help="which flow of the store (default %(default)s)"
    )
    sub.add_argument("--family", help="in place of a store: the family, in an empty box, with all parameters")
    sub.add_argument(
        "--shape", type=int, nargs=3, metavar=("NX", "NY", "NZ"), help="cells of that box (default: as in training)"
    )
    sub.add_argument("--batch", type=int, default=1, metavar="N", help="flows at a time, fixed (default %(default)s)")
    sub.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where it is to run (default %(default)s)"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace the artefact OUT")
