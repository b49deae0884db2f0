"""The processes that work on one model together."""

from __future__ import annotations

import torch.distributed as dist


def in_group() -> bool:
    """Whether this process belongs to a process group, were it the only one."""
    return dist.is_available() and dist.is_initialized()


def num_ranks() -> int:
    """How many processes there are; 1 without a process group."""
    return dist.get_world_size() if in_group() else 1
