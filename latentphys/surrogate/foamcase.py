"""The mesh and the times of an OpenFOAM case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from latentphys.data.importing.foammesh import FoamMesh, read_mesh

SAME_TIME = 1e-9
"""Relative difference of times that still counts as one."""


def mesh_of(case: Path) -> FoamMesh:
    """The mesh of a case, read once as long as its files stay as they are."""
    folder = case / "constant" / "polyMesh"
    files = {file.name: file.stat() for file in folder.glob("*")}
    return _mesh(folder.resolve(), tuple(sorted((name, s.st_size, s.st_mtime_ns) for name, s in files.items())))


@lru_cache(maxsize=1)
def _mesh(folder: Path, files: tuple[tuple[str, int, int], ...]) -> FoamMesh:
    return read_mesh(folder)


def times_of(case: Path) -> dict[float, Path]:
    """Folders of times."""
    result = {}
    for folder in case.iterdir():
        try:
            value = float(folder.name)
        except ValueError:
            continue
        if folder.is_dir() and math.isfinite(value):
            result[value] = folder
    return result


def earlier(times: Mapping[float, Path], at: float, like: float | None, case: Path) -> Path:
    """The folder of the time `like`, or of the last before `at`, among those with U.

    Raises:
        ValueError: no such time.
    """
    having = {t: folder for t, folder in sorted(times.items()) if has(folder, "U")}
    fit = [t for t in having if (t < at and not same(t, at) if like is None else same(t, like))]
    if not fit:
        wanted = f"before {at:g}" if like is None else f"{like:g}"
        raise ValueError(f"Expected a time {wanted} with U in {case}, got only {list(having)}; name one as `like`.")
    return having[fit[-1]]


def has(folder: Path, name: str) -> bool:
    """Whether a time has a field."""
    return (folder / name).is_file() or (folder / f"{name}.gz").is_file()


def field_file(folder: Path, name: str) -> Path:
    """The file of a field, compressed or not; ValueError where a time has none."""
    if not has(folder, name):
        raise ValueError(f"Expected a field {name!r} in {folder}, got none; start from a time that has it.")
    return folder / name if (folder / name).is_file() else folder / f"{name}.gz"


def name_of(time: float) -> str:
    """The name of a time: six digits as OpenFOAM's default, more where it takes more to say it."""
    return next((text for n in range(6, 17) if same(float(text := f"{time:.{n}g}"), time)), repr(time))


def same(one: float, other: float) -> bool:
    """Whether two times are one."""
    return math.isclose(one, other, rel_tol=SAME_TIME, abs_tol=1e-12)
