"""An artefact's folder: what lies in it, and whether it is as it was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentphys.fields import FieldSpec
from latentphys.grid import Grid
from latentphys.training.durable import write_json
from latentphys.training.manifest import digest, own_digest

SCHEMA = "latentphys.artefact/1"
ABOUT, FLAT, ARRAYS = "artefact.json", "artefact.txt", "arrays.safetensors"
_REMEDY = "export it again, or copy it again from where it came"


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write artefact.json, the last file: what `about` says, and the SHA-256 of every other file."""
    files = {file.name: digest(file) for file in sorted(folder.iterdir()) if file.name != ABOUT}
    data = json.loads(json.dumps({"schema": SCHEMA, **about, "files": files}))
    write_json(folder / ABOUT, {**data, "sha256": own_digest(data)})


def check(folder: Path) -> dict[str, Any]:
    """What artefact.json says, where every file is as it was written.

    Raises:
        ValueError: no artefact, one of another schema, or the first file that is missing or changed.
    """
    about = read(folder)
    own = own_digest({key: value for key, value in about.items() if key != "sha256"})
    if about.get("sha256") != own or not isinstance(about.get("files"), dict):
        raise ValueError(f"Expected SHA-256 {about.get('sha256')} of what {folder / ABOUT} says, got {own}; {_REMEDY}.")
    for name, expected in about["files"].items():
        try:
            got = digest(folder / name)
        except OSError:
            raise ValueError(f"Expected {folder / name}, got no readable file; {_REMEDY}.") from None
        if got != expected:
            raise ValueError(f"Expected SHA-256 {expected} of {folder / name}, got {got}; {_REMEDY}.")
    return about


def read(folder: Path) -> dict[str, Any]:
    """What artefact.json says, without a look at the other files.

    Raises:
        ValueError: no artefact there, or one of another schema.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise ValueError(f"Expected an exported artefact, got {folder}, without a readable {ABOUT}; {_REMEDY}.")
    if about.get("schema") != SCHEMA:
        raise ValueError(
            f"Expected an artefact of schema {SCHEMA}, got {about.get('schema')!r} in {folder}; export it again with "
            "this version."
        )
    return about


def write_flat(folder: Path, about: Mapping[str, Any], grid: Grid, specs: Mapping[str, FieldSpec]) -> None:
    """Write artefact.txt: what a reader without JSON has to know, a line for each fact, ``key value value …``.

    Numbers are printed so that they read back to the bit. A blank in a unit is ``*``, no unit is ``-``.
    """
    lines: list[list[Any]] = [
        ["schema", SCHEMA],
        *([key, about[key]] for key in ("format", "family", "batch", "device", "interval")),
        ["grid.shape", *grid.shape],
        ["grid.spacing", *grid.spacing],
        ["grid.boundaries", *sum(grid.boundaries, ())],
        ["latent.shape", *about["latent_shape"]],
        ["fields", len(specs)],
    ]
    for n, (name, spec) in enumerate(specs.items()):
        first, count = about["channels"][name]
        lines.append([f"fields.{n}", name, spec.kind, spec.constraint, _word(spec.unit), first, count])
        if name in about["conserved"]:
            lines.append([f"conserved.{n}", about["conserved"][name]])
    lines.append(["parameters", len(about["parameters"])])
    for n, p in enumerate(about["parameters"]):
        lines.append([f"parameters.{n}", p["name"], p["size"], _word(p["unit"])])
    lines += [[f"tolerance.{name}", value] for name, value in about["tolerances"].items()]
    text = "".join(" ".join(x if isinstance(x, str) else repr(x) for x in line) + "\n" for line in lines)
    (folder / FLAT).write_text(text, encoding="utf-8")


def _word(unit: str | None) -> str:
    return (unit or "-").replace(" ", "*")
