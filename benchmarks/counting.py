"""How many conjugate-gradient iterations the projections of a piece of work take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock


@contextmanager
def count_iterations(module: ModuleType) -> Iterator[list[int]]:
    """The iterations of every `decompose` that a module calls within, one number each."""
    counts: list[int] = []
    original = module.decompose

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        counts.append(result.num_iterations)
        return result

    with mock.patch.object(module, "decompose", counted):
        yield counts
