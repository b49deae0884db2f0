"""The verb ``encode``: a store of fields becomes a store of latents, in one process or many."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentphys.data import Store

Add = Callable[..., argparse.ArgumentParser]

DONE = 0

SMALL = 2**27
"""Cells of all snapshots together up to which one process is done before others have started."""

EXAMPLES = """examples:
  latentphys encode runs/autoencoder porous.zarr porous.latent.zarr
  latentphys encode runs/autoencoder porous.zarr porous.latent.zarr --workers 8 --device cpu
  latentphys encode runs/autoencoder porous.zarr porous.latent.zarr --dask tcp://head:8786
  accelerate launch --config_file configs/accelerate/one_node.yaml -m latentphys encode runs/autoencoder porous.zarr \\
    porous.latent.zarr

Snapshots stream through in batches: memory holds one batch and one shard of latents for each process. Trajectories are
shared out, so more processes than trajectories are of no use. The latents are the same to the last bit for any number
of processes. After an interruption, kill -9 included, the same command goes on from the last whole shard."""


def encode(arguments: argparse.Namespace) -> int:
    from latentphys.data import open_store
    from latentphys.progress import progress_bar
    from latentphys.training import encode_store, load_autoencoder

    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(arguments.device)
    autoencoder, store = load_autoencoder(arguments.checkpoint), open_store(arguments.store)
    autoencoder.tile = arguments.tile
    num_own = len(range(rank, len(store), num_ranks))
    share = "" if num_ranks == 1 else f", {num_own} of {len(store)} trajectories"
    with progress_bar(rank == 0) as bar:
        line = bar.add_task(f"encode {store.family}{share}", total=num_own * store.num_times)
        try:
            encode_store(
                autoencoder,
                store,
                arguments.out,
                checkpoint=arguments.checkpoint,
                batch_size=arguments.batch_size,
                device=device,
                workers=arguments.dask or arguments.workers or _workers(store, device, num_ranks),
                threads=arguments.threads,
                together=num_ranks > 1,
                resume=arguments.resume,
                overwrite=arguments.overwrite,
                progress=lambda n: bar.advance(line, n),
            )
        except KeyboardInterrupt:
            said = "the same command goes on" if arguments.resume else "nothing is kept"
            raise KeyboardInterrupt(said) from None
    if rank == 0:
        print(arguments.out)
    return DONE


def _device(name: str) -> str:
    """Where to encode; the GPU of this process where a launch has given it one."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("Expected a GPU that torch can use for --device cuda, got none; use --device cpu.")
    if name == "cpu" or not available:
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _workers(store: Store, device: str, num_ranks: int) -> int:
    """One process for each GPU or core, as long as there are trajectories; one for a small store, or for each rank."""
    import torch

    if num_ranks > 1 or len(store) * store.num_times * math.prod(store.domain.shape) <= SMALL:
        return 1
    there = len(os.sched_getaffinity(0)) if device == "cpu" else torch.cuda.device_count()
    return min(there, len(store))


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"Expected a number ≥ 1, got {text!r}.")
    return int(text)


def add_verbs(verb: Add) -> None:
    """Add the verb to the command line."""
    sub = verb(encode, "encode a store of fields into a store of latents", EXAMPLES)
    sub.add_argument("checkpoint", help="an autoencoder's checkpoint or run directory")
    sub.add_argument("store", help="a store of fields")
    sub.add_argument("out", help="the latent store to make")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    sub.add_argument(
        "--batch-size",
        type=count,
        metavar="N",
        help="snapshots that are encoded together (default: as many as have 128³ cells together, or one)",
    )
    sub.add_argument(
        "--tile",
        type=count,
        metavar="N",
        help="work through large boxes in tiles of N cells per axis of each level of the network (default: at once)",
    )
    many = sub.add_mutually_exclusive_group()
    many.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help="processes (default: one for each GPU or core, one for a small store or under `accelerate launch`)",
    )
    many.add_argument("--dask", metavar="tcp://…", help="the address of a dask cluster that sees the same files")
    sub.add_argument(
        "--threads", type=count, default=1, metavar="N", help="CPU threads of each process (default %(default)s)"
    )
    sub.add_argument("--no-resume", dest="resume", action="store_false", help="keep nothing of an interrupted run")
    sub.add_argument("--overwrite", action="store_true", help="replace OUT, at the end")
