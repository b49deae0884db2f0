"""What is known of the trajectories of a store that is being written: one small file for each, replaced as a whole."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentphys.data.plan import Plan
from latentphys.data.statistics import RunningStatistics


@dataclass
class Record:
    """The leading snapshots of a trajectory that are on disk in whole shards, of all arrays.

    Args:
        frames: how many.
        sums: CRC-32 of each of them, by array.
        statistics: theirs, by field.
    """

    frames: int
    sums: dict[str, list[int]]
    statistics: dict[str, RunningStatistics]

    @classmethod
    def empty(cls, plan: Plan) -> Record:
        return cls(0, {name: [] for name in plan.arrays}, {name: plan.statistics(name) for name in plan.specs})


def save(plan: Plan, trajectory: int, record: Record) -> None:
    """Replace the record of a trajectory."""
    statistics = {name: running.state() for name, running in record.statistics.items()}
    write_json(_path(plan, trajectory), {"frames": record.frames, "sums": record.sums, "statistics": statistics})


def load(plan: Plan, trajectory: int) -> Record | None:
    """The record of a trajectory; None where there is none, or none that is whole."""
    data = read_json(_path(plan, trajectory))
    try:
        if data is None or set(data["sums"]) != set(plan.arrays) or set(data["statistics"]) != set(plan.specs):
            return None
        frames, num_times = data["frames"], plan.num_times
        if not 0 <= frames <= num_times or (frames % plan.shard and frames < num_times):
            return None
        if any(len(sums) != frames for sums in data["sums"].values()):
            return None
        statistics = {name: plan.statistics(name, state) for name, state in data["statistics"].items()}
    except (KeyError, TypeError, ValueError):
        return None
    return Record(frames, data["sums"], statistics)


def remove(plan: Plan, trajectory: int) -> None:
    """Forget a trajectory."""
    _path(plan, trajectory).unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file as a whole, with a checksum of what it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    text = json.dumps(content, allow_nan=False)
    partial.write_text(json.dumps({"checksum": zlib.crc32(text.encode()), "content": text}))
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None where there is nothing, or nothing whole."""
    try:
        data = json.loads(path.read_text())
        text = data["content"]
        return json.loads(text) if zlib.crc32(text.encode()) == data["checksum"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _path(plan: Plan, trajectory: int) -> Path:
    return plan.folder / "records" / f"{trajectory}.json"
