"""Where a run comes from: the code, the data, the machine; and whether another start of it fits the one before."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import latentphys
from latentphys.data import Store

HARMLESS = {
    "run",
    "resume",
    "cache",
    *(
        f"trainer.{name}"
        for name in (
            *("num_steps", "log_every", "test_every", "checkpoint_every", "keep", "trackers", "pictures_every"),
        )
    ),
}
"""Settings that may change from one start of a run to the next without a word."""
_OF_THE_DATA = ("family", "kind", "schema", "grid", "specs", "num_trajectories", "checksums")


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """The machine and the packages of this process, and how it was started."""
    from accelerate.state import AcceleratorState, is_initialized

    state = AcceleratorState() if is_initialized() else None
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "time": now(),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu": {"model": _cpu(), "cores": len(os.sched_getaffinity(0))},
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "processes": state.num_processes if state else 1,
        "precision": state.mixed_precision if state else "no",
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "packages": dict(_packages()),
    }


def provenance(stores: Sequence[Store]) -> dict[str, Any]:
    """The code and the data of a run."""
    about = [
        {"path": str(store.path.resolve()), "family": store.family, "sha256": store_hash(store)} for store in stores
    ]
    return {"time": now(), "version": _version("latentphys"), **_git(), "data": data_hash(stores), "stores": about}


def store_hash(store: Store) -> str:
    """SHA-256 of what a store holds, by the checksums that it keeps of every array; not of where it lies."""
    about = {name: store.attributes[name] for name in _OF_THE_DATA}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def data_hash(stores: Sequence[Store]) -> str:
    """SHA-256 of what some stores hold together, in any order."""
    return hashlib.sha256("".join(sorted(store_hash(store) for store in stores)).encode()).hexdigest()


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings, by their dotted names, that two configurations do not share: what they were and what they are.

    A setting that is not there counts as ``(none)``.
    """
    old, new = flat(json.loads(json.dumps(before))), flat(json.loads(json.dumps(after)))
    pairs = {name: (old.get(name, "(none)"), new.get(name, "(none)")) for name in {**old, **new}}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b or type(a) is not type(b)}


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration with dotted names."""
    if not isinstance(config, Mapping) or not config:
        return {prefix.rstrip("."): config}
    return {key: value for name, part in config.items() for key, value in flat(part, f"{prefix}{name}.").items()}


def _git() -> dict[str, Any]:
    """The revision of the repository that this package is a part of, where it is of one."""
    folder = Path(latentphys.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # a package that was installed may lie in somebody else's repository
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"git": None, "dirty": None}
    changes = git("status", "--porcelain")
    return {"git": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


@cache
def _packages() -> dict[str, str]:
    """The versions of this package and of all that it can use and that is installed."""
    try:
        requirements = importlib.metadata.requires("latentphys") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = ["accelerate", "numpy", "safetensors", "torch", "zarr"]
    names = sorted({re.split(r"[^\w.-]", text)[0] for text in requirements} | {"latentphys"})
    versions = {name: _version(name) for name in names}
    return {name: version for name, version in versions.items() if version is not None}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
