"""What is done about an alarm that rings: a warning, an error, or a solver that repeats the interval."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from latentphys.fields import State
from latentphys.surrogate.exchange import conserved, member
from latentphys.surrogate.flight import Flight
from latentphys.surrogate.reading import AlarmError, AlarmWarning, Intervention

Fallback = Callable[[State, float], State]
"""(state, duration [s]) → the state then."""
OnAlarm = Literal["warn", "raise"]


def advance(
    flight: Flight,
    now: Mapping[str, Any],
    then: Mapping[str, Any],
    end: float,
    on_alarm: OnAlarm,
    fallback: Fallback | None,
) -> Flight:
    """One interval: stepped, watched where there is an alarm, and where it rings told or repeated.

    Args:
        flight: at the beginning of the interval.
        now, then: parameters at its beginning and its end.
        end: its end [s].
        on_alarm, fallback: see `latentphys.surrogate.Surrogate`.
    """
    if flight.alarm is None:
        return flight.advanced(now, then, end)
    before = flight.decoded()
    assert before.reading is not None
    if fallback is None:
        after = before.advanced(now, then, end).decoded(before.reading)
        return told(after, before.state.time, on_alarm, None, depth=4)
    suspect = before.reading.rings
    before = replace(before, state=replace(before.state, parameters=now))
    if all(suspect):
        return repeated(before, fallback, end, then, suspect)
    after = before.advanced(now, then, end).decoded(before.reading)
    assert after.reading is not None
    rings = [tuple(dict.fromkeys(a + b)) for a, b in zip(suspect, after.reading.rings, strict=True)]
    return repeated(before, fallback, end, then, [names or None for names in rings], after) if any(rings) else after


def told(flight: Flight, begin: float, on_alarm: OnAlarm, fallback: Fallback | None, depth: int = 3) -> Flight:
    """The same, with what rings in the log, after a warning or an error, where there is nothing to fall back on.

    Args:
        begin: of the interval that led here [s]; the time of the flight itself for a state from outside.
        on_alarm, fallback: see `latentphys.surrogate.Surrogate`.
        depth: how many calls up a warning points: to who called the surrogate.

    Raises:
        AlarmError: the alarm rings, and is told to raise.
    """
    reading = flight.reading
    if reading is None or not reading.is_ringing or fallback is not None:
        return flight
    if on_alarm == "raise":
        raise AlarmError(str(reading))
    warnings.warn(str(reading), AlarmWarning, stacklevel=depth)
    entries = [
        Intervention(begin, flight.state.time - begin, flow, names, is_fallback=False)
        for flow, names in enumerate(reading.rings)
        if names
    ]
    return replace(flight, log=(*flight.log, *entries))


def repeated(
    before: Flight,
    fallback: Fallback,
    end: float,
    then: Mapping[str, Any],
    reasons: Sequence[tuple[str, ...] | None],
    proposed: Flight | None = None,
) -> Flight:
    """Flows at a later time, some of them taken there by the fallback, each by itself.

    Args:
        before: the flows, decoded.
        end: the later time [s].
        then: parameters at that time.
        reasons: for each flow the quantities that rang; None for those that are as proposed.
        proposed: the flows then, where any is kept. Default: the fallback takes all.

    Raises:
        ValueError: a fallback that returns anything but a state with finite fields of the same shape.
    """
    duration, base, log = end - before.state.time, proposed or before, list(before.log)
    sizes = {quantity.name: quantity.size for quantity in before.contract.parameters}
    fields = dict(base.copy().fields)
    for flow, names in enumerate(reasons):
        if names is None:
            continue
        one = member(before.state, flow, sizes) if before.batch else before.copy()
        out = fallback(one, duration)
        if not isinstance(out, State):
            raise ValueError(f"Expected a State from the fallback, got {type(out).__name__}.")
        out = replace(out, place=one.place)
        replace(before, state=one).packed(out)
        for name, values in conserved(out, before.stepper.scale).fields.items():
            if name in fields:
                fields[name][flow if before.batch else ...] = values
        log.append(Intervention(before.state.time, duration, flow, names, is_fallback=True))
    is_taken = [names is not None for names in reasons]
    foreign = before.moved_to(replace(before.state, fields=fields, time=end, parameters=then), is_taken)
    if proposed is not None:
        foreign = foreign.mixed(is_taken, proposed)
    return replace(foreign, log=tuple(log))
