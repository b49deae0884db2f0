"""Net flux and time of projection and exact conservation, for random fields at growing sizes.

    python benchmarks/bench_core.py --json core.jsonl
    python benchmarks/bench_core.py --device cuda --sizes 32 64 128 256

For every box it prints the largest |net flux| of a cell over the largest |flux|: of the curl of a random potential in
FP32 and in FP64, and of what `project` and `conserve` make of a random flux. Only `conserve` is 0.0 bit for bit; the
others are what rounding and tolerance leave.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from counting import count_iterations
from machine import Results, parser, timed
from torch import Tensor

from latentphys import exact, operators, projection
from latentphys.families import OpenChannel, Porous
from latentphys.grid import Geometry


def boxes(size: int, device: str) -> dict[str, Geometry]:
    """A periodic box, a channel, and a random sphere pack of porosity 0.55 … 0.75."""
    porous = Porous()
    grid = porous.grid((size,) * 3)
    solid = torch.from_numpy(porous.solid(grid, porous.draw(0, 0), 0, 0))
    channel = OpenChannel().grid((size,) * 3)
    return {
        "empty": Geometry(grid),
        "channel": Geometry(channel),
        "porous": Geometry(grid, solid.to(device)),
    }


def net(flux: Tensor, geometry: Geometry) -> float:
    """Largest |net flux| of a cell over the largest |flux|, in FP64."""
    flux = flux.double()
    return float(operators.div(flux, geometry.grid).abs().amax() / flux.abs().amax())


def run(arguments: argparse.Namespace) -> None:
    results = Results("core", arguments)
    device, repeats = arguments.device, arguments.repeats
    for size in arguments.sizes:
        for name, geometry in boxes(size, device).items():
            torch.manual_seed(0)
            field = torch.randn(3, size, size, size, dtype=torch.float64).to(device)
            single = field.float()
            with count_iterations(projection) as single_iterations:
                projected, project_s = timed(partial(projection.project, single, geometry), device, repeats)
            loose_s = timed(partial(projection.project, single, geometry, tol=1e-2), device, repeats)[1]
            with count_iterations(exact) as iterations:
                conserve = partial(exact.conserve_report, flux=field, geometry=geometry)
                report, conserve_s = timed(conserve, device, repeats)
            closed = report.flux[~geometry.open_faces]
            figures = {
                "net_curl_fp32": net(operators.curl(single, geometry.grid), geometry),
                "net_curl_fp64": net(operators.curl(field, geometry.grid), geometry),
                "net_project_fp32": net(projected, geometry),
                "net_conserve": net(report.flux, geometry),
                "net_conserve_potential": net(exact.conserve(potential=field, geometry=geometry), geometry),
                "solid_flux": float(closed.abs().amax()) if closed.numel() else 0.0,
                "correction": report.correction,
                "project_iterations": single_iterations[0],
                "conserve_iterations": iterations[0],
                "project_fp32_ms": 1e3 * project_s,
                "project_fp32_tol1e-2_ms": 1e3 * loose_s,
                "conserve_ms": 1e3 * conserve_s,
            }
            results.add(f"{name} {size}", figures)


def main() -> None:
    options = parser(str(__doc__).partition("\n")[0])
    options.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128], help="cells per axis")
    options.add_argument("--repeats", type=int, default=2, help="timed runs, of which the shortest counts")
    run(options.parse_args())


if __name__ == "__main__":
    main()
