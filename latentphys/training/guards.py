"""What keeps a bad step from the weights: gradients that are not finite, and losses that leap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

RECENT = 100
"""Steps over which skipped ones are counted, and losses that a spike is measured against."""
ENOUGH = 20
"""Losses of a family before one of them can be called a spike."""


class Guard:
    """Judges every step before it reaches the weights. What it remembers goes into checkpoints: a resumed run judges
    as one that never stopped.

    Args:
        max_skipped: steps among the last 100 that may be skipped; one more stops the run. Good values: 10.
        spike: a loss above this many times the median of its family's last 100 is skipped. 0: none is.

    Raises:
        ValueError: a negative number of steps, or a spike at or below 1.
    """

    def __init__(self, max_skipped: int = 10, spike: float = 10.0) -> None:
        if max_skipped < 0:
            raise ValueError(f"Expected max_skipped ≥ 0, got {max_skipped}.")
        if spike != 0 and not spike > 1:
            raise ValueError(f"Expected spike > 1, times the median loss, or 0 for none, got {spike}.")
        self.max_skipped, self.spike = max_skipped, spike
        self.total = 0
        self._skipped: list[int] = []
        self._losses: dict[str, list[float]] = {}

    def verdict(self, step: int, family: str, loss: float, norm: float) -> str | None:
        """Why a step must not reach the weights; None where it may.

        Args:
            loss: of the whole batch.
            norm: of its gradient, before clipping.
        """
        reason = self._reason(family, loss, norm)
        if reason is None:
            self._losses.setdefault(family, []).append(loss)
            del self._losses[family][:-RECENT]
        else:
            self.total += 1
            self._skipped = [earlier for earlier in self._skipped if earlier > step - RECENT] + [step]
        return reason

    def _reason(self, family: str, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss of {family} is {loss}"
        if not math.isfinite(norm):
            return f"the gradient of {family} has the norm {norm}"
        before = self._losses.get(family, ())
        if self.spike and len(before) >= ENOUGH and loss > self.spike * median(before):
            return f"the loss of {family} leapt to {loss:.4g}, {loss / median(before):.3g} times its median"
        return None

    @property
    def gives_up(self) -> bool:
        """Whether too many of the last steps were skipped."""
        return len(self._skipped) > self.max_skipped

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold; JSON gives back every bit of it."""
        return {"total": self.total, "skipped": self._skipped, "losses": self._losses}

    def load(self, state: Mapping[str, Any]) -> None:
        self.total, self._skipped = state["total"], list(state["skipped"])
        self._losses = {family: list(losses) for family, losses in state["losses"].items()}


class DeadExperts:
    """Says once of each expert that no token has come to it for many steps, and again after it has lived.

    Args:
        after: steps without a token.
    """

    def __init__(self, after: int) -> None:
        self.after = after
        self._known: set[tuple[int, int]] = set()

    def newly_dead(self, routing: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
        """Layer, expert and its age in steps, from a line of `RoutingLog`."""
        ages = {
            (line["layer"], expert): age
            for line in routing
            for expert, age in zip(line["dead"], line["dead_age"], strict=True)
        }
        dead = {key for key, age in ages.items() if age >= self.after}
        new = sorted(dead - self._known)
        self._known = dead
        return [(*key, ages[key]) for key in new]
