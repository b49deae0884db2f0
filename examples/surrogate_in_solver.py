"""A surrogate inside a solver's time loop: the two take turns, and mass is conserved exactly all along.

    latentphys demo
    python examples/surrogate_in_solver.py runs/demo/dynamics runs/demo/porous.zarr --intervals 6
    python examples/surrogate_in_solver.py runs/demo/dynamics runs/demo/porous.zarr --intervals 16 --plot hybrid.png

One flow of a store is advanced interval by interval, Δt being that of the model: the Navier–Stokes solver takes the
first interval, the surrogate the next two, the solver the one after, and so on. What the two agree on:

    state      the volume flux through each cell's low faces [m³/s]; each takes what the other returns, as it is
    mass       every state that changes hands has a net flux of 0.0 in every cell, bit for bit: the surrogate's by
               construction, the solver's FP32 state after `exact.conserve`
    time       belongs to the loop: both are told the same force at the same times
    encoding   the surrogate encodes anew whatever it did not return itself; nobody has to tell it
    trust      a surrogate's interval in which the kinetic energy changes by more than the factor `--band` rings its
               `Alarm` and is taken back, and the solver repeats it, as the surrogate's `fallback`

Printed for each interval: who stepped and how long it took, the largest |net flux| of a cell, the kinetic energy, and
the VRMSE against the solver alone. The exit status is 1 if any net flux is not 0.0. `--plot` draws error and cost,
beside those of the surrogate alone.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from latentphys import Surrogate, exact, open_store, operators
from latentphys.data import Store
from latentphys.families import NavierStokes
from latentphys.fields import State
from latentphys.surrogate import Alarm
from latentphys.validators import vrmse

ParametersAt = Callable[[float], Mapping[str, Any]]


def parameters_of(store: Store, trajectory: int) -> ParametersAt:
    """The physical parameters at any time: a store knows a force at its snapshots only, a spline what lies between."""
    constant = {name: float(values[trajectory]) for name, values in store.parameters.items() if values.ndim == 1}
    force = CubicSpline(store.times, store.parameters["force"][trajectory])
    return lambda t: {**constant, "force": torch.from_numpy(force(t))}


class Solver:
    """The numerical solver of one flow; every state that it returns is exactly conservative."""

    def __init__(self, start: State, parameters: ParametersAt) -> None:
        self._parameters = parameters
        self._solver = NavierStokes(start.geometry, start.parameters["viscosity"], self._force)

    def step(self, state: State, interval: float) -> State:
        """The state an interval [s] later."""
        fields = self._solver.working({"velocity": state.velocity[None]})
        flux = self._solver.advance(fields, state.time, interval)["velocity"][0]
        return state.with_fields(
            time=state.time + interval, velocity=exact.conserve(flux=flux, geometry=state.geometry)
        )

    def _force(self, t: float) -> Tensor:
        return self._parameters(t)["force"]


@dataclass(frozen=True)
class Turn:
    """One interval: who stepped, what came out, and the seconds it took, those of a rejected attempt included."""

    who: str
    state: State
    seconds: float


def energy(state: State) -> float:
    """Kinetic energy per unit mass [m²/s²]."""
    return float(operators.kinetic_energy(state.velocity.double(), state.grid))


def couple(
    surrogate: Surrogate, solver: Solver, start: State, parameters: ParametersAt, num_intervals: int, period: float
) -> Iterator[Turn]:
    """Solver and surrogate in turns, from a state of a family that the surrogate knows.

    Args:
        period: the solver takes the first of every so many intervals; none where it is infinite.
    """
    state = start
    surrogate.init(start)
    interval = surrogate.families[str(start.family)]
    for n in range(num_intervals):
        begin, called = time.perf_counter(), surrogate.num_fallbacks
        if n % period or math.isinf(period):
            state = surrogate.step(state, parameters=parameters)
            who = "surrogate" if surrogate.num_fallbacks == called else "fallback"
        else:
            state, who = solver.step(state, interval), "solver"
        yield Turn(who, state, time.perf_counter() - begin)


def alone(solver: Solver, start: State, interval: float, num_intervals: int) -> Iterator[Turn]:
    """The solver by itself, for comparison."""
    state = start
    for _ in range(num_intervals):
        begin = time.perf_counter()
        state = solver.step(state, interval)
        yield Turn("solver", state, time.perf_counter() - begin)


def draw(path: Path, runs: Mapping[str, Sequence[Turn]], truth: Sequence[Turn]) -> None:
    """Error against the solver alone, and seconds spent, of several ways over the same intervals."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    times = [turn.state.time for turn in truth]
    with rc_context({"font.size": 9, "axes.linewidth": 0.6}):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        right.plot(times, list(accumulate(turn.seconds for turn in truth)), color="#0072B2", label="solver alone")
        for (name, turns), color in zip(runs.items(), ("#009E73", "#D55E00"), strict=True):
            geometry = truth[0].state.geometry
            pairs = zip(turns, truth, strict=True)
            errors = [float(vrmse(turn.state.velocity, true.state.velocity, geometry)) for turn, true in pairs]
            left.plot(times, errors, color=color, marker="o", markersize=3, label=name)
            right.plot(times, list(accumulate(turn.seconds for turn in turns)), color=color, label=name)
        left.set(xlabel="t [s]", ylabel="VRMSE against the solver alone", ylim=(0, None))
        right.set(xlabel="t [s]", ylabel="seconds spent", ylim=(0, None))
        left.legend(frameon=False, fontsize=8)
        right.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=200)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the loop and print one line per interval; returns the exit status."""
    parser = argparse.ArgumentParser(description="Let a surrogate and a solver take turns on one flow.")
    parser.add_argument("dynamics", help="a dynamics checkpoint or run directory")
    parser.add_argument("store", help="a store of fields with viscosity and force, such as a porous one")
    parser.add_argument("--intervals", type=int, default=6, help="how many intervals (default %(default)s)")
    parser.add_argument(
        "--turns", type=int, default=2, help="the surrogate's after each of the solver (default %(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw error and cost, the surrogate alone as well")
    parser.add_argument("--trajectory", type=int, default=-1, help="which flow of the store (default: the last)")
    parser.add_argument(
        "--band", type=float, default=2.0, help="largest change of energy, a factor (default %(default)s)"
    )
    arguments = parser.parse_args(argv)

    if arguments.turns < 0:
        parser.error(f"Expected turns ≥ 0, got {arguments.turns}.")
    if not arguments.band >= 1:
        parser.error(f"Expected a band ≥ 1, got {arguments.band}.")
    store = open_store(arguments.store)
    start, parameters = store[arguments.trajectory, 0], parameters_of(store, arguments.trajectory)
    solver, alarm = Solver(start, parameters), Alarm(store.family, {"energy_change": (0.0, math.log(arguments.band))})
    surrogate = Surrogate.load(arguments.dynamics, alarm=alarm, fallback=solver.step)
    if store.family not in surrogate.families:
        parser.error(f"Expected a store of {sorted(surrogate.families)}, got one of {store.family!r}.")
    interval = surrogate.families[store.family]
    most = int((store.times[-1] - store.times[0]) / interval + 1e-6)
    if not 1 <= arguments.intervals <= most:
        parser.error(f"Expected 1 to {most} intervals (the store's force ends there), got {arguments.intervals}.")

    count, period = arguments.intervals, 1 + arguments.turns
    coupled = couple(surrogate, solver, start, parameters, count, period)
    truth = alone(Solver(start, parameters), start, interval, count)
    turns: list[tuple[Turn, Turn]] = []
    print(f"{'t [s]':>7}  {'who':<9}  {'step [s]':>8}  {'max|net| [m3/s]':>15}  {'energy [m2/s2]':>14}  {'VRMSE':>6}")
    largest, seconds, seconds_alone = 0.0, 0.0, 0.0
    for turn, true in zip(coupled, truth, strict=True):
        turns.append((turn, true))
        net = float(operators.div(turn.state.velocity, turn.state.grid).abs().amax())
        error = float(vrmse(turn.state.velocity, true.state.velocity, start.geometry))
        largest, seconds, seconds_alone = max(largest, net), seconds + turn.seconds, seconds_alone + true.seconds
        t, e = turn.state.time, energy(turn.state)
        print(f"{t:7.4g}  {turn.who:<9}  {turn.seconds:8.3f}  {net:15}  {e:14.4g}  {error:6.3f}", flush=True)
    if arguments.plot:
        free = Surrogate(surrogate.factory)
        by_itself = list(couple(free, solver, start, parameters, count, math.inf))
        in_turns, by_solver = zip(*turns, strict=True)
        draw(arguments.plot, {"in turns": in_turns, "surrogate alone": by_itself}, by_solver)
    print(f"in turns {seconds:.2f} s, the solver alone {seconds_alone:.2f} s; largest |net flux| {largest} m3/s")
    return int(largest != 0.0)


if __name__ == "__main__":
    raise SystemExit(main())
