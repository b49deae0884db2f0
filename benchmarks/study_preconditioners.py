"""Iterations and time of the pressure solve with four preconditioners, by pore space, solid fraction and size.

    python benchmarks/study_preconditioners.py --json preconditioners.jsonl
    python benchmarks/study_preconditioners.py --sizes 32 64 128 256 --fractions 0.4 --kinds spheres

The conjugate gradients of `latentphys.pressure` solve for a random net flux to 1e-8 in FP64 with `multigrid`, with the
direct solver of the empty box, with the diagonal of the operator, and with smoothed aggregation of PyAMG where that is
installed (`pip install pyamg`). PyAMG is set up on the matrix plus 1e-9 of its diagonal, as it wants no null vectors.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from unittest import mock

import numpy as np
import torch
from machine import Results, parser, synchronise
from scipy.ndimage import gaussian_filter
from torch import Tensor

from latentphys import operators, pressure
from latentphys.families.media import sphere_pack
from latentphys.grid import Geometry, Grid
from latentphys.multigrid import Multigrid
from latentphys.separable import box_poisson

TOLERANCE = 1e-8
Preconditioner = Callable[[Tensor], Tensor]


def voxels(kind: str, fraction: float, size: int) -> Geometry:
    """Periodic pores between spheres of ten cells, in noise of three cells' correlation length, or cell by cell."""
    rng, grid = np.random.default_rng(0), Grid((size,) * 3, (1.0,) * 3)
    if kind == "spheres":
        solid = sphere_pack(grid, 1 - fraction, 10.0, rng, overlap=0.9, tries=size**3)
    else:
        noise = rng.standard_normal(grid.shape)
        noise = gaussian_filter(noise, 3, mode="wrap") if kind == "noise" else noise
        solid = noise < np.quantile(noise, fraction)
    return Geometry(grid, torch.from_numpy(solid))


def multigrid(conductance: Tensor, geometry: Geometry) -> Preconditioner:
    return Multigrid(conductance)


def box(conductance: Tensor, geometry: Geometry) -> Preconditioner:
    return box_poisson(geometry.grid, geometry.ends, conductance.dtype, conductance.device)


def jacobi(conductance: Tensor, geometry: Geometry) -> Preconditioner:
    diagonal = sum(k + k.roll(-1, axis) for axis, k in enumerate(conductance))
    inverse = torch.where(diagonal == 0, 0.0, -1 / diagonal)
    return lambda r: r * inverse


def pyamg(conductance: Tensor, geometry: Geometry) -> Preconditioner:
    from pyamg import smoothed_aggregation_solver
    from scipy.sparse import coo_matrix, diags

    n = geometry.grid.num_cells
    cells = np.arange(n).reshape(geometry.grid.shape)
    axis, high = np.nonzero(conductance.cpu().numpy().reshape(3, n))
    low = np.stack([np.roll(cells, 1, a).ravel() for a in range(3)])[axis, high]
    k = conductance.cpu().numpy().reshape(3, n)[axis, high]
    links = coo_matrix((np.r_[k, k], (np.r_[low, high], np.r_[high, low])), shape=(n, n)).tocsr()
    diagonal = np.asarray(links.sum(1)).ravel()
    used = np.flatnonzero(diagonal)
    matrix = (diags((1 + 1e-9) * diagonal) - links).tocsr()[used][:, used]
    cycle = smoothed_aggregation_solver(matrix).aspreconditioner()

    def precondition(r: Tensor) -> Tensor:
        z = np.zeros(n)
        z[used] = cycle @ r.numpy().ravel()[used]
        return torch.from_numpy(-z.reshape(r.shape))

    return precondition


PRECONDITIONERS = {"multigrid": multigrid, "box": box, "jacobi": jacobi, "pyamg": pyamg}


def measure(name: str, geometry: Geometry, net: Tensor, flux: Tensor) -> dict[str, float | int]:
    """Iterations, the time to prepare the preconditioner, and that to solve with it."""
    conductance = pressure.face_conductance(geometry, net) * geometry.open_faces.to(net.device)
    begin = time.perf_counter()
    precondition = PRECONDITIONERS[name](conductance, geometry)
    synchronise(str(net.device))
    prepared = time.perf_counter()
    with mock.patch.object(pressure, "_preconditioner", lambda *_: precondition):
        iterations = pressure.solve(net, flux, geometry, tol=TOLERANCE, max_iterations=5000)[1]
    synchronise(str(net.device))
    end = time.perf_counter()
    return {f"{name}_iterations": iterations, f"{name}_setup_s": prepared - begin, f"{name}_solve_s": end - prepared}


def wanted(arguments: argparse.Namespace, size: int) -> Iterator[str]:
    """The preconditioners to compare at a size: the last two take too long for large boxes."""
    yield from ("multigrid", "box")
    if size <= arguments.largest_compared:
        yield "jacobi"
        if arguments.device == "cpu" and find_spec("pyamg"):
            yield "pyamg"


def run(arguments: argparse.Namespace) -> None:
    results = Results("preconditioners", arguments)
    if not find_spec("pyamg"):
        print("PyAMG is not installed and left out; `pip install pyamg` adds it to the comparison.", file=sys.stderr)
    for kind in arguments.kinds:
        for fraction in arguments.fractions:
            for size in arguments.sizes:
                geometry = voxels(kind, fraction, size).to(arguments.device)
                torch.manual_seed(0)
                field = torch.randn(3, size, size, size, dtype=torch.float64).to(arguments.device)
                flux = geometry.mask(field)
                net = operators.div(flux, geometry.grid)
                figures: dict[str, float | int] = {}
                for name in wanted(arguments, size):
                    figures |= measure(name, geometry, net, flux)
                results.add(f"{kind} {fraction:g} {size}", figures)


def main() -> None:
    options = parser(str(__doc__).partition("\n")[0])
    options.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128], help="cells per axis")
    options.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.4, 0.6, 0.8], help="solid fractions")
    kinds = ["random", "noise", "spheres"]
    options.add_argument("--kinds", nargs="+", default=kinds, choices=kinds, help="pore spaces")
    options.add_argument("--largest-compared", type=int, default=64, help="largest size for Jacobi and PyAMG")
    run(options.parse_args())


if __name__ == "__main__":
    main()
