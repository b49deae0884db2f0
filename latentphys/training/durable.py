"""Files and folders that have their name only once they are whole and on the disk, whatever kills the process."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FULL = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EFBIG: "File too large",
}


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object under a temporary name, bring it to the disk, and rename."""
    temporary = partial_of(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def partial_of(path: Path) -> Path:
    """Where something is written before it has its name."""
    return path.with_name(f".{path.name}.partial")


def aside_of(path: Path) -> Path:
    """Where a folder waits while another takes its name."""
    return path.with_name(f".{path.name}.old")


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some file systems sync no folders
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Bring a folder with everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def put(temporary: Path, path: Path) -> None:
    """Give a finished folder its name. What had the name before stays, under this name or aside, until that is done."""
    aside = aside_of(path)
    restore(path)
    sync_tree(temporary)
    if path.exists():
        os.replace(path, aside)
    try:
        os.replace(temporary, path)
    except BaseException:
        restore(path)
        raise
    sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write into, which gets the name at the end; nothing of it is left where anything fails."""
    temporary = partial_of(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        put(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def restore(path: Path) -> None:
    """Undo, or finish, a `put` that was killed."""
    aside = aside_of(path)
    if aside.exists() and path.exists():
        shutil.rmtree(aside)
    elif aside.exists():
        os.replace(aside, path)


def present(path: Path) -> Path:
    """A folder by its name, or where it waits while a `put` gives this name to another."""
    return path if path.exists() or not aside_of(path).exists() else aside_of(path)


def remove(folder: Path) -> None:
    """Remove a folder that others may be about to read: by its name it is whole, or not there."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether something could not be written for want of space; safetensors says so in words only."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(f"os error {number}" in str(error) or text in str(error) for number, text in _FULL.items())
