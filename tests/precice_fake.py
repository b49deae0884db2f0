"""A stand-in for preCICE 3 that is as strict as the library: calls out of order, forgotten checkpoints and steps beyond
the time window fail. The partner is a function of what was written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Partner = Callable[[float, np.ndarray], np.ndarray]
"""(end of a time window, what it was given) → what it has there."""
TOLERANCE = 1e-5
"""Relative change of what is written, below which an iterated window has converged."""


@dataclass
class Setup:
    """What preCICE's own configuration would say.

    Args:
        window: time window size [s].
        num_windows: how many.
        partner: what the other participant does.
        initial: what it has at the beginning; None where it gives no initial data, and preCICE says zeros.
        iterations: times that every window is run: 1 for explicit coupling. Default of an implicit one: until what is
            written no longer changes.
        needs_initial: whether this participant has to write initial data.
    """

    window: float
    num_windows: int
    partner: Partner = lambda end, written: written
    initial: np.ndarray | None = None
    iterations: int | None = 1
    needs_initial: bool = False
    mesh_dimensions: int = 3
    data_dimensions: int = 1
    made: list[Any] = field(default_factory=list)


def module(setup: Setup) -> Any:
    """The module ``precice`` with one class."""

    class Participant(_Participant):
        def __init__(self, solver_name: str, configuration_file_name: str, index: int, size: int) -> None:
            super().__init__(setup)
            self.name, self.config = solver_name, configuration_file_name
            assert 0 <= index < size
            setup.made.append(self)

    return type("precice", (), {"Participant": Participant})


class _Participant:
    def __init__(self, setup: Setup) -> None:
        self.setup, self.phase = setup, "configured"
        self.positions = np.empty((0, 3))
        self.window, self.time, self.iteration = 0, 0.0, 1
        self.must_write = self.must_read = self.has_asked = False
        self.complete = False
        self.written: np.ndarray | None = None
        self.before = self.after = np.empty(0)
        self.earlier: np.ndarray | None = None
        self.calls: list[tuple[str, float]] = []

    def _in(self, *phases: str) -> None:
        if self.phase not in phases:
            raise RuntimeError(f"a call that is not allowed when {self.phase}")

    def get_mesh_dimensions(self, mesh_name: str) -> int:
        return self.setup.mesh_dimensions

    def get_data_dimensions(self, mesh_name: str, data_name: str) -> int:
        return self.setup.data_dimensions

    def set_mesh_vertices(self, mesh_name: str, positions: np.ndarray) -> np.ndarray:
        self._in("configured")
        assert positions.ndim == 2 and positions.shape[1] == 3
        self.positions = positions
        return np.arange(100, 100 + len(positions))

    def requires_initial_data(self) -> bool:
        self._in("configured")
        self.has_asked = True
        return self.setup.needs_initial

    def initialize(self) -> None:
        self._in("configured")
        if not len(self.positions):
            raise RuntimeError("a mesh without vertices")
        if self.setup.needs_initial and (not self.has_asked or self.written is None):
            raise RuntimeError("initial data is required and was not written")
        self.phase = "initialized"
        zeros = np.zeros(len(self.positions))
        self.before = zeros if self.setup.initial is None else self.setup.initial
        self.after = self.before  # as in serial coupling before the partner's first window: constant
        self.written, self.must_write = None, self._is_implicit

    @property
    def _is_implicit(self) -> bool:
        return self.setup.iterations != 1

    def is_coupling_ongoing(self) -> bool:
        self._in("initialized")
        return self.window < self.setup.num_windows

    def is_time_window_complete(self) -> bool:
        self._in("initialized")
        return self.complete

    def get_max_time_step_size(self) -> float:
        self._in("initialized")
        if not self.is_coupling_ongoing():
            raise RuntimeError("no time is left")
        return self.setup.window - self.time

    def requires_writing_checkpoint(self) -> bool:
        self._in("initialized")
        asked, self.must_write = self.must_write, False
        return asked

    def requires_reading_checkpoint(self) -> bool:
        self._in("initialized")
        asked, self.must_read = self.must_read, False
        return asked

    def _check(self, vertex_ids: np.ndarray) -> None:
        assert np.array_equal(vertex_ids, np.arange(100, 100 + len(self.positions)))

    def write_data(self, mesh_name: str, data_name: str, vertex_ids: np.ndarray, values: np.ndarray) -> None:
        self._in("configured", "initialized")
        self._check(vertex_ids)
        assert values.shape == (len(vertex_ids),)
        self.written = np.array(values)

    def read_data(
        self, mesh_name: str, data_name: str, vertex_ids: np.ndarray, relative_read_time: float
    ) -> np.ndarray:
        self._in("initialized")
        self._check(vertex_ids)
        when = self.time + relative_read_time
        if not 0 <= relative_read_time <= self.get_max_time_step_size() * (1 + 1e-12):
            raise RuntimeError(f"data of a time beyond the window: {relative_read_time}")
        self.calls.append(("read", when))
        share = when / self.setup.window
        result: np.ndarray = (1 - share) * self.before + share * self.after
        return result

    def advance(self, computed_timestep_length: float) -> None:
        self._in("initialized")
        if self.must_write or self.must_read:
            raise RuntimeError("a checkpoint was required and not asked for")
        left = self.get_max_time_step_size()
        if not 0 < computed_timestep_length <= left * (1 + 1e-12):
            raise RuntimeError(f"a step of {computed_timestep_length} beyond the window, of which {left} is left")
        if self.written is None:
            raise RuntimeError("nothing was written")
        self.calls.append(("advance", computed_timestep_length))
        self.time += computed_timestep_length
        self.complete = False
        if self.time < self.setup.window * (1 - 1e-12):
            self.written = None
            return
        self._end_window(self.written)
        self.written = None

    def _end_window(self, written: np.ndarray) -> None:
        end = (self.window + 1) * self.setup.window
        self.after = self.setup.partner(end, written)
        if self.setup.iterations is None:
            change = np.inf if self.earlier is None else np.abs(written - self.earlier).max()
            converged = change <= TOLERANCE * np.abs(written).max()
        else:
            converged = self.iteration >= self.setup.iterations
        self.time, self.earlier = 0.0, written
        if not converged:
            if self.iteration > 50:
                raise RuntimeError("the iteration does not converge")
            self.iteration, self.must_read = self.iteration + 1, True
            return
        self.complete, self.iteration, self.earlier = True, 1, None
        self.window += 1
        self.before = self.after
        self.must_write = self._is_implicit and self.window < self.setup.num_windows

    def finalize(self) -> None:
        self._in("configured", "initialized")
        self.phase = "finalized"
