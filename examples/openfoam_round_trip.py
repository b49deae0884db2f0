"""An OpenFOAM case advanced by a surrogate: read, stepped, written back as times that the case's solver goes on from.

    icoFoam -case channel
    python examples/openfoam_round_trip.py channel runs/demo/dynamics --family open_channel --steps 4
    icoFoam -case channel                    # with startFrom latestTime and a later endTime in system/controlDict

The case is a box of equal cells, as blockMesh makes it, with phi in the time that it is read from (the last by
default). Each step is one Δt of the model, and becomes a time of the case with phi, U, the fields of `--scalar`, and
copies of those of `--carry`. Printed: how far reading moved phi to make it exact, and for each time the largest |net
flux| of a cell and where it was written. The exit status is 1 if any net flux is not 0.0, and 2 if something cannot be
read or written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from latentphys import Surrogate, operators
from latentphys.surrogate.openfoam import read_case, write_time


def pair(text: str) -> tuple[str, str]:
    """What stands on both sides of an equals sign."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"Expected NAME=VALUE, got {text!r}.")
    return name, value


def parameter(text: str) -> tuple[str, float | list[float]]:
    """A physical parameter: one number, or several with commas between them."""
    name, value = pair(text)
    try:
        numbers = [float(word) for word in value.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"Expected NAME=NUMBER or NAME=NUMBER,NUMBER,…, got {text!r}.") from None
    return name, numbers[0] if len(numbers) == 1 else numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Read, step and write; returns the exit status."""
    parser = argparse.ArgumentParser(description="Advance an OpenFOAM case with a surrogate.")
    parser.add_argument("case", help="the folder of a case")
    parser.add_argument("dynamics", help="a dynamics checkpoint, run directory or exported artefact")
    parser.add_argument("--family", required=True, help="which of the model's families the flow is of")
    parser.add_argument("--steps", type=int, default=4, help="how many steps of the model (default %(default)s)")
    parser.add_argument("--time", type=float, help="the time to start from [s] (default: the last with phi)")
    parser.add_argument(
        "--parameter",
        type=parameter,
        action="append",
        metavar="NAME=NUMBER[,…]",
        help="a physical parameter (default: the viscosity that the case names)",
    )
    parser.add_argument(
        "--scalar", type=pair, action="append", metavar="NAME=FILE", help="a further field, such as temperature=T"
    )
    parser.add_argument("--carry", action="append", metavar="FILE", help="a field to copy along (default: p)")
    parser.add_argument("--open-inflow", action="store_true", help="do not hold what flows in through inflow sides")
    parser.add_argument("--overwrite", action="store_true", help="replace times that are there")
    arguments = parser.parse_args(argv)

    scalars = dict(arguments.scalar or [])
    try:
        surrogate = Surrogate.load(arguments.dynamics)
        start, moved = read_case(
            arguments.case,
            "latest" if arguments.time is None else arguments.time,
            family=arguments.family,
            parameters=dict(arguments.parameter) if arguments.parameter else None,
            scalars=scalars,
            keep_inflow=not arguments.open_inflow,
        )
        print(f"t = {start.time:g} s read; phi moved by {moved:.2g} of the largest", flush=True)
        state, largest = surrogate.init(start), 0.0
        for _ in range(arguments.steps):
            state = surrogate.step(state)
            path = write_time(
                state, arguments.case, scalars=scalars, carry=arguments.carry, overwrite=arguments.overwrite
            )
            net = float(operators.div(state.velocity, state.grid).abs().amax())
            largest = max(largest, net)
            print(f"t = {state.time:g} s  largest |net flux| {net} m3/s  {path}", flush=True)
    except ValueError as error:
        parser.error(str(error))
    return int(largest != 0.0)


if __name__ == "__main__":
    raise SystemExit(main())
