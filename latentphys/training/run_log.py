"""log.jsonl: what a run measures, one JSON object a line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from latentphys.training.durable import partial_of


class RunLog:
    """Appends lines to a log; `seconds` of each count over all starts of the run.

    Args:
        path: None: nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._start = time.perf_counter()
        self._told: set[tuple[int, str]] = set()

    def rewind(self, step: int) -> None:
        """Take out what was measured after a step that the run goes on from, and a line that was cut off.

        Events stay, and are not written again when the run comes by them again.
        """
        if self.path is None or not self.path.is_file():
            return
        lines = read_log(self.path)
        kept = [line for line in lines if line["step"] <= step or "event" in line]
        self._told = {(line["step"], line["event"]) for line in kept if "event" in line and line["step"] >= step}
        self._start = time.perf_counter() - max((line.get("seconds", 0.0) for line in kept), default=0.0)
        temporary = partial_of(self.path)
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self.path)

    def write(self, *, step: int, **figures: Any) -> None:
        """Append a line: figures, or an ``event``, which is a message, at a step."""
        if self.path is None or (step, figures.get("event")) in self._told:
            return
        seconds = round(time.perf_counter() - self._start, 3)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **figures, "seconds": seconds}) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log, such as one that is being written."""
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
