"""Which format a file or folder has, by what is in it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

from latentphys.data.importing.h5 import is_hdf5
from latentphys.data.importing.source import Reader

READERS = ("well", "pdebench", "dpot", "netcdf", "vtk", "openfoam", "voxels")
"""Formats that are recognised; each is a module of this package."""
GENERIC = "hdf5"
"""What any HDF5 file is when it is nothing else."""
FORMATS = (*READERS, GENERIC)


def reader(format: str) -> Reader:
    """The reader of a format.

    Raises:
        ValueError: a format that is none.
    """
    if format not in FORMATS:
        raise ValueError(f"Expected a format of {' | '.join(FORMATS)}, got {format!r}.")

    return cast(Reader, import_module(f"latentphys.data.importing.{format}"))


def detect(path: Path) -> str:
    """The one format that recognises a path.

    Raises:
        ValueError: nothing there, nothing that can be read, no format or several that recognise it.
    """
    if not path.exists():
        raise ValueError(f"Expected files to import at {path}, got nothing there; check the path.")
    try:
        if path.is_file() and not path.stat().st_size:
            raise ValueError(f"Expected files to import, got {path}, which is empty.")
        found = [name for name in READERS if reader(name).recognises(path)]
        found = found or [name for name in (GENERIC,) if reader(name).recognises(path)]
    except OSError as error:
        raise ValueError(f"Expected files that can be read, got {path}: {error.strerror or error}.") from error
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"Expected one format at {path}, got several that fit ({', '.join(found)}); say which (format)."
        )
    raise ValueError(
        f"Expected files of {' | '.join(FORMATS)} at {path}, got {_beginning(path)} that none of them recognises; say "
        "the format if it is one of these."
    )


def _beginning(path: Path) -> str:
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        return f"a folder of {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "an empty folder"
    if is_hdf5(path):
        return "an HDF5 file"
    with path.open("rb") as file:
        return f"a file that begins with {file.read(16)!r}"
