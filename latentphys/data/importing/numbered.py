"""Files whose names end in numbers: slices of an image, frames of a film."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def natural_order(paths: Sequence[Path]) -> list[Path]:
    """Sorted by name, with numbers by their value: slice2 before slice10."""
    return sorted(paths, key=_key)


def _key(path: Path) -> list[tuple[bool, int, str]]:
    runs = re.findall(r"[0-9]+|[^0-9]+", path.name)
    return [(not run.isdecimal(), int(run) if run.isdecimal() else 0, run) for run in runs]


def series_name(path: Path) -> str:
    """What the files of one series have in common: the name without its ending and its last number."""
    return re.sub(r"[0-9]+$", "", path.stem).rstrip("_-. ")


def visible_files(folder: Path) -> list[Path]:
    """Files of a folder in natural order, hidden ones left out.

    Raises:
        ValueError: a folder that cannot be read.
    """
    try:
        return natural_order([p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")])
    except OSError as error:
        raise ValueError(f"Expected a folder that can be read, got {folder}: {error.strerror}.") from error
