"""What a run directory says of a training run, alive or not; and a table over several."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentphys.training import checkpoint, manifest
from latentphys.training.provenance import flat
from latentphys.training.run_directory import is_held
from latentphys.training.run_log import read_log

_RATES = ("samples_per_s", "tokens_per_s", "mfu", "data_wait")
_OWN = ("run", "resume")
"""Settings that say where a run is, and nothing of what it does."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory that took a step."""
    return (folder / "config.json").is_file() and (folder / "log.jsonl").is_file()


def describe(run: Path) -> dict[str, Any]:
    """Name → value of how a run goes: state, losses, figures of held-out data, checkpoints, data, code and machine.

    Raises:
        ValueError: no readable configuration there.
    """
    config, log = manifest.read_json(run / "config.json"), read_log(run / "log.jsonl")
    newest, best = _pointed(run, checkpoint.LAST), _pointed(run, checkpoint.BEST)
    measured = [line for line in log if "event" not in line]
    training = [line for line in measured if not any(name.startswith("test/") for name in line)]
    tests = [line for line in measured if line not in training]
    status = _optional(run / "status.json")
    step = max([line["step"] for line in measured], default=_step(newest))
    about: dict[str, Any] = {
        "run": str(run),
        "kind": newest.get("kind", "unknown: no checkpoint yet"),
        "state": state(run),
        **({"message": status["message"]} if status.get("message") else {}),
        "progress": f"{step} of {config.get('trainer', {}).get('num_steps', '?')} steps",
        "elapsed [s]": max((line.get("seconds", 0.0) for line in log), default=0.0),
        "losses": _course(training, lambda name: name == "loss" or "/" in name) or "none yet",
        "held-out data": _course(tests, lambda name: name.startswith("test/")) or "none yet",
        "newest checkpoint": _figures(newest, tests),
        "best checkpoint": _figures(best, tests),
    }
    rates = [line for line in training if any(name in line for name in _RATES)]
    if rates:
        about["throughput"] = {name: rates[-1][name] for name in _RATES if name in rates[-1]}
    events = [f"step {line['step']}: {line['event']}" for line in log if "event" in line]
    return about | {
        "skipped steps": _num_lines(run / "skipped.jsonl"),
        **({"last events": "\n".join(events[-5:])} if events else {}),
        **_origin(run),
    }


def state(run: Path) -> str:
    """``running``, ``done``, ``preempted``, ``interrupted``, ``stopped`` or ``failed``, as the run says of itself;
    ``killed`` where it says that it is running and is not; ``unknown`` where it says nothing."""
    said = str(_optional(run / "status.json").get("state", "unknown"))
    return "killed" if said == "running" and is_held(run) is False else said


def table(runs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """One row for each run: ``run``, ``state``, ``step``, the settings in which the runs differ, ``best``, which is the
    least figure by which checkpoints were compared, and the last figures on held-out data, ``test/…``. None stands for
    what a run does not have.

    Raises:
        ValueError: a path that is no run directory.
    """
    folders = [Path(run) for run in runs]
    for folder in folders:
        if not is_run(folder):
            raise ValueError(f"Expected a run directory, got {folder}, without config.json and log.jsonl.")
    configs = [flat(manifest.read_json(folder / "config.json")) for folder in folders]
    names = [name for name in dict.fromkeys(name for config in configs for name in config) if name not in _OWN]
    differing = [name for name in names if len({json.dumps(config.get(name)) for config in configs}) > 1]
    logs = [read_log(folder / "log.jsonl") for folder in folders]
    last = [_last_test(log) for log in logs]
    figures = list(dict.fromkeys(name for test in last for name in test))
    return [
        {
            "run": str(folder),
            "state": state(folder),
            "step": max((line["step"] for line in log), default=0),
            **{name: config.get(name) for name in differing},
            "best": _finite(_pointed(folder, checkpoint.LAST).get("state", {}).get("best")),
            **{name: test.get(name) for name in figures},
        }
        for folder, config, log, test in zip(folders, configs, logs, last, strict=True)
    ]


def _last_test(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tests = [{k: _finite(v) for k, v in line.items() if k.startswith("test/")} for line in log]
    return next((test for test in reversed(tests) if test), {})


def _course(lines: Sequence[Mapping[str, Any]], chosen: Any) -> dict[str, dict[str, Any]]:
    """The first and the last value of each figure; they are logged for one family at a time."""
    course: dict[str, dict[str, Any]] = {}
    for line in lines:
        for name, value in line.items():
            if chosen(name) and isinstance(value, int | float):
                course.setdefault(name, {"first": _finite(value)})["last"] = _finite(value)
    return course


def _pointed(run: Path, pointer: str) -> dict[str, Any]:
    """What the checkpoint that last.json or best.json names says of itself; nothing where there is none."""
    name = _optional(run / pointer).get("checkpoint")
    return {"name": name, **_optional(run / str(name) / manifest.NAME)} if name else {}


def _step(about: Mapping[str, Any]) -> int:
    return int(about.get("step", 0))


def _figures(about: Mapping[str, Any], tests: Sequence[Mapping[str, Any]]) -> Any:
    """Name of a checkpoint and the figures that were measured at its step."""
    if not about:
        return "none yet"
    at = [line for line in tests if line["step"] == about.get("step")]
    figures = {name: _finite(value) for line in at for name, value in line.items() if name.startswith("test/")}
    return {"name": about["name"], **figures}


def _origin(run: Path) -> dict[str, Any]:
    """Data, code and machine of the latest start."""
    places, origins = _starts(run / "environment.json"), _starts(run / "provenance.json")
    about: dict[str, Any] = {}
    if origins:
        code = origins[-1]
        about["data"] = {
            "SHA-256": code.get("data"),
            **{store["family"]: store["path"] for store in code.get("stores", ())},
        }
        dirty = " with changes" if code.get("dirty") else ""
        about["code"] = f"{code.get('version')}, revision {code.get('git') or 'unknown'}{dirty}"
    if places:
        place = places[-1]
        devices = ", ".join(place.get("gpus") or ()) or place.get("cpu", {}).get("model")
        about |= {
            "machine": f"{place.get('host')}, {devices}",
            "processes": place.get("processes"),
            "precision": place.get("precision"),
            "started": f"{place.get('time')}, {len(places)} {'start' if len(places) == 1 else 'starts'}",
        }
    return about


def _starts(file: Path) -> list[dict[str, Any]]:
    starts = _optional(file).get("starts")
    return starts if isinstance(starts, list) else []


def _optional(file: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing where it is missing or cannot be read."""
    try:
        return manifest.read_json(file)
    except ValueError:
        return {}


def _num_lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.is_file() else 0


def _finite(value: Any) -> Any:
    """A number that JSON can hold, or None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None
