"""A trained model as a time stepper that a solver can call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from latentphys.fields import State
from latentphys.grid import Geometry
from latentphys.surrogate.alarm import Alarm
from latentphys.surrogate.contract import Contract
from latentphys.surrogate.exchange import as_state, like
from latentphys.surrogate.flight import Flight
from latentphys.surrogate.guard import Fallback, OnAlarm, advance, repeated, told
from latentphys.surrogate.models import open_factory
from latentphys.surrogate.protocol import Factory
from latentphys.surrogate.reading import Intervention, Reading
from latentphys.surrogate.window import Window, span

ParametersAt = Callable[[float], Mapping[str, Any]]


class Surrogate:
    """Steps flows with a trained model. Mass is conserved exactly by every state that it returns; accuracy is not.

    Fluxes go in and out as the volume flux through each cell's low faces [m³/s], FP64 out, and so do further fields of
    the family; conserved scalars keep their total. States that it returns have the fields that the model advances, and
    no others. A solver may change a state between calls, in place too: one whose fields are not those returned last is
    encoded anew.

    Args:
        factory: what steps: trained `Models`, or an opened artefact.
        alarm: what is watched at every interval, and every state that comes from outside. It decodes each interval;
            without one only the last is decoded. Default: nothing is watched.
        on_alarm: where it rings and there is no fallback, ``warn`` (`AlarmWarning`) or ``raise`` (`AlarmError`).
        fallback: (state, duration [s]) → the state then: a solver that repeats, from the state before it, every
            interval in which the alarm rang, and takes what is left of a duration that is no whole number of
            intervals. It gets one flow at a time. Its solenoidal fluxes are made exactly conservative.

    Raises:
        ValueError: an alarm that was calibrated with another model.
    """

    def __init__(
        self,
        factory: Factory,
        *,
        alarm: Alarm | None = None,
        on_alarm: OnAlarm = "warn",
        fallback: Fallback | None = None,
    ) -> None:
        if on_alarm not in ("warn", "raise"):
            raise ValueError(f"Expected on_alarm of warn | raise, got {on_alarm!r}.")
        if alarm is not None:
            alarm.check(factory)
        self.factory, self.alarm, self.on_alarm, self.fallback = factory, alarm, on_alarm, fallback
        self._flight: Flight | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        max_resident_experts: int | None = None,
        *,
        alarm: Alarm | str | Path | None = None,
        on_alarm: OnAlarm = "warn",
        fallback: Fallback | None = None,
    ) -> Surrogate:
        """From a dynamics checkpoint, the run directory that holds it, or an artefact folder of `latentphys export`.

        Args:
            device: where to compute. Default: the CPU.
            max_resident_experts: of a checkpoint: see `latentphys.training.load_dynamics`.
            alarm: or the file that `Alarm.save` wrote.
            on_alarm, fallback: see `Surrogate`.

        Raises:
            ValueError: no checkpoint or artefact there, or one of another kind or schema.
        """
        loaded = Alarm.load(alarm) if isinstance(alarm, str | Path) else alarm
        factory = open_factory(path, device, max_resident_experts)
        return cls(factory, alarm=loaded, on_alarm=on_alarm, fallback=fallback)

    @property
    def families(self) -> dict[str, float]:
        """The families that the model knows, and the Δt [s] of its steps for each."""
        return dict(self.factory.intervals)

    @property
    def reading(self) -> Reading | None:
        """What the alarm measured last; None without an alarm."""
        return self._require().reading

    @property
    def log(self) -> tuple[Intervention, ...]:
        """What the alarm and the fallback did since `init`; `restore` brings back the log of then."""
        return self._require().log

    @property
    def num_fallbacks(self) -> int:
        """How often the fallback was called since `init`, for one flow each."""
        return sum(entry.is_fallback for entry in self.log)

    def contract(self, family: str) -> Contract:
        """What a solver has to know of a family; print it."""
        return self.factory.contract(family)

    def negotiate(self, duration: float) -> Window:
        """How many intervals fit into a duration [s], and what remains of it; it takes what `step` takes.

        Raises:
            ValueError: a call before `init`, or a duration that is none.
        """
        return Window.of(duration, self._require().stepper.interval)

    def init(
        self,
        state: State | Sequence[State] | Any,
        geometry: Geometry | None = None,
        family: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        time: float = 0.0,
    ) -> State:
        """Set geometry, family and first state.

        Args:
            state: a `State` that says all the rest itself, such as ``store[0, 0]``; several of them, of one family,
                grid and time, or a batch of them, with fields (b, …) and parameters (b, …) or one for all; or a flux
                (3, nx, ny, nz) or (b, 3, nx, ny, nz) [m³/s]: NumPy, torch, or with ``__dlpack__``.
            geometry, family, parameters, time: with a bare flux, what a `State` would say.

        Returns:
            The state that the model sees: the given one through the autoencoder.

        Raises:
            ValueError: a grid, family, parameter or flux that the model cannot take.
            AlarmError: the alarm rings, and is told to raise.
        """
        state = as_state(state, geometry, family, parameters or {}, time)
        if state.family is None:
            raise ValueError(f"Expected a state of a family among {sorted(self.families)}, got one without a family.")
        if self.alarm is not None and self.alarm.family != state.family:
            raise ValueError(f"Expected a flow of the alarm's family {self.alarm.family!r}, got {state.family!r}.")
        flight = Flight.begin(self.factory, self.alarm, state)
        self._flight = told(flight, state.time, self.on_alarm, self.fallback).decoded()
        return self._flight.copy()

    def step(
        self,
        state: State | Any,
        num_steps: int | None = None,
        parameters: ParametersAt | None = None,
        *,
        duration: float | None = None,
    ) -> Any:
        """Advance by some intervals of the family's Δt.

        Args:
            state: the state returned last, or one that a solver has changed; a bare flux of the shape given to `init`,
                NumPy, torch or with ``__dlpack__``, stands for the last state with that velocity.
            num_steps: how many intervals. Default: 1.
            duration: instead, a time [s] that is a whole number of intervals; or any with a fallback, which takes the
                rest.
            parameters: time → the parameters then, where they change in time. Default: those of the state, constant.

        Returns:
            What was given: a `State`, a flux as an array for a NumPy array, and as a torch tensor, which has
            ``__dlpack__`` itself, for all others.

        Raises:
            ValueError: a call before `init`, another geometry or family than set there, a flux that is not finite, or
                a duration that does not fit.
            AlarmError: the alarm rings, and is told to raise; the surrogate is where it was.
        """
        flight = self._require()
        steps, rest = span(num_steps, duration, flight.stepper.interval, self.fallback is not None)
        given = flight.given(state)
        moved = flight.moved_to(given)
        is_new = moved.reading is not flight.reading
        flight = told(moved, given.time, self.on_alarm, self.fallback) if is_new else moved
        start = given.time
        at = (lambda t: given.parameters) if parameters is None else parameters
        for n in range(steps):
            begin, end = (start + m * flight.stepper.interval for m in (n, n + 1))
            flight = advance(flight, at(begin), at(end), end, self.on_alarm, self.fallback)
        if rest and self.fallback is not None:
            everybody, begin = [()] * flight.num_flows, start + steps * flight.stepper.interval
            before = flight.decoded()
            before = replace(before, state=replace(before.state, parameters=at(begin)))
            flight = repeated(before, self.fallback, begin + rest, at(begin + rest), everybody)
        self._flight = flight.decoded()
        result = self._flight.copy()
        return result if isinstance(state, State) else like(result.velocity, state)

    def snapshot(self) -> Flight:
        """A token of the present state, log and alarm; steps after `restore` repeat bit for bit."""
        return self._require()

    def restore(self, token: Flight) -> State:
        """Go back to a snapshot and return its state."""
        self._flight = token
        return token.copy()

    def _require(self) -> Flight:
        if self._flight is None:
            raise ValueError("Expected init before this call, got a surrogate without a state.")
        return self._flight
