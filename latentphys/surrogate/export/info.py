"""What an artefact holds, in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentphys.surrogate.contract import Contract
from latentphys.surrogate.export.folder import read


def describe(folder: Path) -> dict[str, Any]:
    """Name → value of what is worth knowing; nothing is loaded or checked.

    Raises:
        ValueError: no artefact there, or one of another schema.
    """
    about = read(folder)
    contract = Contract.from_dict({name: about[name] for name in Contract.__dataclass_fields__})
    made, size = about["provenance"], sum(file.stat().st_size for file in folder.iterdir())
    return {
        "artefact": str(folder),
        "format": about["format"] + (f", opset {about['opset']}" if "opset" in about else ""),
        "schema": about["schema"],
        "contract": str(contract),
        "flows at a time": about["batch"],
        "device": about["device"],
        "latent": " × ".join(map(str, about["latent_shape"])),
        "functions": {name: _signature(said) for name, said in about["functions"].items()},
        "differs from the model [measured, tolerance]": {
            name: f"{about['measured'][name]:.1e}, {about['tolerances'][name]:.1e}" for name in about["tolerances"]
        },
        "made by": {key: made[key] for key in ("version", "git", "time", "checkpoint", "store") if made.get(key)},
        "made on": f"{made['made_on']['cpu']['model']}, torch {made['made_on']['packages'].get('torch')}",
        "size on disk [MB]": round(size / 1e6, 1),
    }


def _signature(said: dict[str, Any]) -> str:
    inputs = ", ".join(f"{x['dtype']} {tuple(x['shape'])}" for x in said["inputs"])
    return f"{inputs} → {said['output']['dtype']} {tuple(said['output']['shape'])}"
