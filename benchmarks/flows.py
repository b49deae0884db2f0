"""The flows that models of benchmarks are trained on, simulated once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from latentphys.cli import main
from latentphys.data import Store, open_store


def simulate(work: Path, settings: Mapping[str, Sequence[str]], device: str = "cpu") -> dict[str, Store]:
    """The stores of some families in a folder, made where they are not there yet.

    Args:
        settings: family → what follows ``latentphys simulate family=…``.

    Raises:
        ValueError: a simulation that failed.
    """
    stores = {}
    for family, overrides in settings.items():
        path = work / f"{family}.zarr"
        command = ["simulate", f"family={family}", *overrides, f"out={path}", f"device={device}"]
        if not path.is_dir() and main(command):
            raise ValueError(f"Expected the simulation of {family} to succeed, got an error; see above.")
        stores[family] = open_store(path)
    return stores
