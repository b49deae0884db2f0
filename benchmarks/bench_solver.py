"""Time per step of the Navier–Stokes solver, and what a step leaves of the divergence.

    python benchmarks/bench_solver.py --json solver.jsonl
    python benchmarks/bench_solver.py --device cuda

Every ratio is of speeds, against `channel 48 fp32 eager` of the same run: absolute times change with the machine and
with what else it does. There is no foreign solver among the baselines; the eager and the FP64 solver are our own.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from counting import count_iterations
from machine import Results, elapsed, parser
from torch import Tensor

from latentphys import operators
from latentphys.families import Family, NavierStokes, OpenChannel, Porous, navier_stokes
from latentphys.families.simulate import stack
from latentphys.grid import Geometry


class Flow:
    """A batch of flows of a family, ready to step."""

    def __init__(self, family: Family, size: int, batch: int, dtype: torch.dtype, compiled: bool, device: str) -> None:
        self.family, self.device = family, device
        grid = family.grid((size, size, size))
        drawn = [family.draw(0, i) for i in range(batch)]
        self.parameters = stack(drawn)
        solids = [family.solid(grid, p, 0, i) for i, p in enumerate(drawn)]
        found = [torch.from_numpy(solid) for solid in solids if solid is not None]
        self.geometry = Geometry(grid, torch.stack(found) if found else None)
        first = [family.initial(self.geometry[i], p, 0, i) for i, p in enumerate(drawn)]
        self.flux = torch.stack(first).to(device, dtype)
        viscosity = torch.from_numpy(np.asarray(self.parameters["viscosity"]))
        self.solver = NavierStokes(self.geometry, viscosity, dtype, compiled, device=device)
        self.dt = 0.5 * self.solver.stable_step(self.flux)

    def advance(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.flux = self.solver.step(self.flux, self._force, 0.0, self.dt)

    def _force(self, t: float) -> Tensor:
        return torch.from_numpy(self.family.force(self.parameters, t))

    @property
    def num_cells(self) -> int:
        """Cells of the whole batch."""
        return len(self.flux) * self.geometry.grid.num_cells

    @property
    def divergence(self) -> float:
        """Largest |∇·u| h/U after a step, U the largest velocity."""
        grid = self.geometry.grid
        net = operators.div(self.flux.double(), grid).abs().amax() / grid.cell_volume
        u = operators.velocity(self.flux.double(), grid).abs().amax()
        return float(net * min(grid.spacing) / u)


CASES: dict[str, tuple[Family, int, int, torch.dtype, bool]] = {
    "channel 48 fp32 eager": (OpenChannel(), 48, 1, torch.float32, False),
    "channel 48 fp32 compiled": (OpenChannel(), 48, 1, torch.float32, True),
    "channel 48 fp64 eager": (OpenChannel(), 48, 1, torch.float64, False),
    "channel 32 batch 8 fp32 eager": (OpenChannel(), 32, 8, torch.float32, False),
    "porous 32 fp32 eager": (Porous(), 32, 1, torch.float32, False),
    "porous 48 fp32 eager": (Porous(), 48, 1, torch.float32, False),
    "porous 32 batch 8 fp32 eager": (Porous(), 32, 8, torch.float32, False),
}


def run(arguments: argparse.Namespace) -> None:
    """The cases whose name holds `arguments.only`, and the first one, against which the others are measured.

    Every round times each case once, so that what else the machine does spreads over all of them; the shortest counts.
    """
    results = Results("solver", arguments)
    unit, *others = CASES
    chosen = [unit, *(name for name in others if arguments.only in name)]
    flows = {name: Flow(*CASES[name], device=arguments.device) for name in chosen}
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(arguments.rounds + 1):
        for name, flow in flows.items():
            times[name].append(elapsed(partial(flow.advance, arguments.steps), arguments.device) / arguments.steps)
    speed = {name: flow.num_cells / min(times[name][1:]) for name, flow in flows.items()}
    for name, flow in flows.items():
        figures = {
            "ms_per_step": 1e3 * min(times[name][1:]),
            "cell_steps_per_s": speed[name],
            "ratio": speed[name] / speed[unit],
        }
        if not flow.geometry.is_empty:
            with count_iterations(navier_stokes) as iterations:
                flow.advance(arguments.steps)
            figures["iterations_per_projection"] = float(np.mean(iterations))
        results.add(name, {**figures, "div_h_over_u": flow.divergence})


def main() -> None:
    options = parser(str(__doc__).partition("\n")[0])
    options.add_argument("--steps", type=int, default=20, help="steps per measurement (default %(default)s)")
    options.add_argument("--rounds", type=int, default=3, help="measurements of each case (default %(default)s)")
    options.add_argument("--only", default="", help="run the cases whose name holds this text")
    run(options.parse_args())


if __name__ == "__main__":
    main()
