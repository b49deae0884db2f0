"""checkpoint.json: what a checkpoint is, with the size and SHA-256 of every file beside it, at any depth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentphys.training.durable import write_json

NAME = "checkpoint.json"
_REMEDY = "copy it again from where it came, or use an earlier checkpoint"


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write checkpoint.json, the last file of a checkpoint: what `about` says, and a list of all files there are."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digest(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / NAME
    }
    data = json.loads(json.dumps({**about, "files": files}))
    write_json(folder / NAME, {**data, "sha256": own_digest(data)})


def read(folder: Path) -> dict[str, Any]:
    """What checkpoint.json says, without a look at the other files.

    Raises:
        ValueError: no readable checkpoint.json there.
    """
    return read_json(folder / NAME)


def check(folder: Path) -> dict[str, Any]:
    """What checkpoint.json says, where every file still is as it was written.

    Raises:
        ValueError: the first file that is missing, short or changed.
    """
    data = read(folder)
    file, own = folder / NAME, own_digest({key: value for key, value in data.items() if key != "sha256"})
    if data.get("sha256") != own or not isinstance(data.get("files"), dict):
        raise ValueError(f"Expected SHA-256 {data.get('sha256')} of what {file} says, got {own}; {_REMEDY}.")
    for name, expected in data["files"].items():
        file = folder / name
        try:
            size = file.stat().st_size
            got = digest(file) if size == expected["bytes"] else ""
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"an error: {error}"
            raise ValueError(f"Expected {file}, got {reason}; {_REMEDY}.") from error
        if size != expected["bytes"]:
            raise ValueError(f"Expected {expected['bytes']} bytes in {file}, got {size}; {_REMEDY}.")
        if got != expected["sha256"]:
            raise ValueError(f"Expected SHA-256 {expected['sha256']} of {file}, got {got}; {_REMEDY}.")
    return data


def is_complete(folder: Path) -> bool:
    """Whether every file is there and as long as it was: a check that reads one small file."""
    try:
        files = read(folder)["files"]
        return all((folder / name).stat().st_size == expected["bytes"] for name, expected in files.items())
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return False


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint or run.

    Raises:
        ValueError: there is none, or one that cannot be read.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise ValueError(
            f"Expected a checkpoint or a run directory, got {file.parent}, without a readable {file.name}."
        )
    return data


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def own_digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, however it is laid out."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
