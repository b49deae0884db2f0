"""What is in the files of a store."""

import json
from pathlib import Path
from typing import Any


def content(path: Path) -> dict[str, Any]:
    """Every file of a store; of the provenance only what does not say when and by which command."""
    files: dict[str, Any] = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    group = json.loads(files["zarr.json"])
    for name in ("time", "command"):
        del group["attributes"]["provenance"][name]
    return files | {"zarr.json": json.dumps(group)}
