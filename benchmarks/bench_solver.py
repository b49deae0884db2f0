"""Time per step of the Navier–Stokes solver, what a step leaves of the divergence, and a foreign solver beside it.

    python benchmarks/bench_solver.py --json solver.jsonl
    python benchmarks/bench_solver.py --device cuda --size 128

Every ratio is of speeds, against `channel fp32 eager` of the same run: absolute times change with the machine and with
what else it does. The foreign solver is lbmpy (lattice Boltzmann, D3Q19, generated C), where it can be imported, on a
channel of the same size. Its steps are shorter than ours by the Mach number, so that besides cells·steps/s there is the
time that each needs for a unit of physical time, h/u_τ.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from counting import count_iterations
from machine import Results, elapsed, parser

from latentphys import operators
from latentphys.families import Family, OpenChannel, Porous, navier_stokes
from latentphys.families.jobs import geometries, stack
from latentphys.grid import Geometry

MACH = 0.1
"""Of the foreign solver's fastest flow: its error in compressibility is of the order of the square."""
FASTEST = 20.0
"""Fastest velocity in the channel [u_τ]."""


class Flow:
    """A batch of flows of a family, ready to step."""

    def __init__(self, family: Family, size: int, batch: int, dtype: torch.dtype, compiled: bool, device: str) -> None:
        drawn = [family.draw(0, i) for i in range(batch)]
        geometry = geometries(family, family.grid((size,) * 3), drawn, 0, range(batch))
        assert isinstance(geometry, Geometry)
        self.geometry = geometry
        self.solver = family.solver(geometry, stack(drawn), dtype=dtype, compiled=compiled, device=device)
        first = [family.initial(geometry[i], p, 0, i)["velocity"] for i, p in enumerate(drawn)]
        self.fields = self.solver.working({"velocity": torch.stack(first)})
        self.dt = self.solver.stable_step(self.fields)

    def advance(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.fields = self.solver.step(self.fields, 0.0, 0.5 * self.dt)

    @property
    def num_cells(self) -> int:
        """Cells of the whole batch."""
        return len(self.fields["velocity"]) * self.geometry.grid.num_cells

    @property
    def divergence(self) -> float:
        """Largest |∇·u| h/U after a step, U the largest velocity."""
        grid, flux = self.geometry.grid, self.fields["velocity"].double()
        net = operators.div(flux, grid).abs().amax() / grid.cell_volume
        return float(net * min(grid.spacing) / operators.velocity(flux, grid).abs().amax())


def foreign(size: int, threads: int) -> Callable[[int], None] | None:
    """Steps of lbmpy's channel of ``size``³ cells in FP32; None where it is not installed."""
    try:
        import pystencils
        from lbmpy import LBMConfig, LBStencil, Method, Stencil
        from lbmpy.scenarios import create_channel
    except ImportError:
        return None
    config = pystencils.CreateKernelConfig(default_dtype="float32")
    config.cpu.openmp.enable = threads > 1
    method = LBMConfig(stencil=LBStencil(Stencil.D3Q19), method=Method.SRT, relaxation_rate=1.9, compressible=False)
    return create_channel((size,) * 3, force=1e-6, lbm_config=method, config=config, duct=False).run


CASES: dict[str, tuple[Family, float, int, torch.dtype, bool]] = {
    "channel fp32 eager": (OpenChannel(), 1, 1, torch.float32, False),
    "channel fp32 compiled": (OpenChannel(), 1, 1, torch.float32, True),
    "channel fp64 eager": (OpenChannel(), 1, 1, torch.float64, False),
    "channel small batch 8 fp32 compiled": (OpenChannel(), 2 / 3, 8, torch.float32, True),
    "porous small fp32 eager": (Porous(), 2 / 3, 1, torch.float32, False),
    "porous fp32 eager": (Porous(), 1, 1, torch.float32, False),
    "porous small batch 8 fp32 eager": (Porous(), 2 / 3, 8, torch.float32, False),
}
"""Family, size as a share of ``--size``, trajectories, type, compiled."""


def run(arguments: argparse.Namespace) -> None:
    """The cases whose name holds `arguments.only`, and the first one, against which the others are measured.

    Every round times each case once, so that what else the machine does spreads over all of them; the shortest counts.
    """
    results = Results("solver", arguments)
    unit, *others = CASES
    chosen = [unit, *(name for name in others if arguments.only in name)]
    flows = {}
    for name in chosen:
        family, share, batch, dtype, compiled = CASES[name]
        flows[name] = Flow(family, round(share * arguments.size), batch, dtype, compiled, arguments.device)
    work: dict[str, Callable[[int], Any]] = {name: flow.advance for name, flow in flows.items()}
    peer = foreign(arguments.size, arguments.threads) if arguments.device == "cpu" else None
    if peer is None:
        print("lbmpy is not here, or not for this device: no foreign solver in this run", file=sys.stderr)
    else:
        work["lbmpy D3Q19 fp32"] = peer
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(arguments.rounds + 1):
        for name, advance in work.items():
            times[name].append(elapsed(partial(advance, arguments.steps), arguments.device) / arguments.steps)
    cells = {name: flows[name].num_cells if name in flows else arguments.size**3 for name in work}
    speed = {name: cells[name] / min(times[name][1:]) for name in work}
    for name in work:
        step = min(times[name][1:])
        figures = {"ms_per_step": 1e3 * step, "cell_steps_per_s": speed[name], "ratio": speed[name] / speed[unit]}
        if name not in flows:
            # a cell a step is the speed of sound times √3
            steps = FASTEST * arguments.size / (MACH / math.sqrt(3))
            results.add(name, figures | {"s_per_h_over_u_tau": step * steps, "cells": arguments.size})
            continue
        flow = flows[name]
        if name.startswith("channel"):
            figures["s_per_h_over_u_tau"] = step / flow.dt
        else:
            with count_iterations(navier_stokes) as iterations:
                flow.advance(arguments.steps)
            figures["iterations_per_projection"] = float(np.mean(iterations))
        results.add(name, figures | {"div_h_over_u": flow.divergence, "cells": flow.geometry.grid.shape[0]})


def main() -> None:
    options = parser(str(__doc__).partition("\n")[0])
    options.add_argument("--steps", type=int, default=20, help="steps per measurement (default %(default)s)")
    options.add_argument("--rounds", type=int, default=3, help="measurements of each case (default %(default)s)")
    options.add_argument("--size", type=int, default=48, help="cells per axis (default %(default)s)")
    options.add_argument("--only", default="", help="run the cases whose name holds this text")
    run(options.parse_args())


if __name__ == "__main__":
    main()
