"""One store written by all processes of an ``accelerate launch``: rank 0 begins and finishes it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from latentphys.data import StoreWriter
from latentphys.data.part import Part
from latentphys.ranks import in_group

PATIENCE = timedelta(days=365)
"""How long a process waits for one that has more to do; one that is lost is noticed at once."""


def write_together(writer: StoreWriter, work: Callable[[Part, int, int], None]) -> None:
    """Let every process write its share of a store; to be called by all of them.

    Args:
        writer: of the same description everywhere; only that of rank 0 is used.
        work: writes the share of a process, given a part, its rank and the number of processes.

    Raises:
        ValueError: rank 0 could not begin.
        ConnectionError: another process is lost.
    """
    is_ours = not in_group()
    if is_ours:
        dist.init_process_group("gloo")
    try:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        if dist.get_rank() == 0:
            _lead(writer, work, group)
        else:
            _follow(work, group)
        _meet(group)
    finally:
        if is_ours:
            dist.destroy_process_group()


def _lead(writer: StoreWriter, work: Callable[[Part, int, int], None], group: dist.ProcessGroup | None) -> None:
    has_begun = False
    try:
        with writer:
            part = writer.part()
            has_begun = True
            dist.broadcast_object_list([part], src=0, group=group)
            work(part, 0, dist.get_world_size())
            _meet(group)
    finally:
        if not has_begun:
            dist.broadcast_object_list([None], src=0, group=group)


def _follow(work: Callable[[Part, int, int], None], group: dist.ProcessGroup | None) -> None:
    received: list[Part | None] = [None]
    dist.broadcast_object_list(received, src=0, group=group)
    part = received[0]
    if part is None:
        raise ValueError("Expected rank 0 to begin the store, got an error there; see what it says.")
    try:
        work(part, dist.get_rank(), dist.get_world_size())
    finally:
        part.close()
    _meet(group)


def _meet(group: dist.ProcessGroup | None) -> None:
    """Wait for all processes."""
    try:
        dist.barrier(group)
    except RuntimeError as error:
        raise ConnectionError(
            "Expected every process to do its share, got one that is lost; see what it said, and run the same again to "
            "go on."
        ) from error
