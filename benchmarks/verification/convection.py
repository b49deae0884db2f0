"""Convection: the Rayleigh number at which it begins, and the heat that steady rolls carry."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentphys import operators
from latentphys.families.convection import PLATES, BuoyantFlow, free_fall
from latentphys.families.solver import Fields
from latentphys.grid import Boundaries, Boundary, Geometry, Grid
from latentphys.projection import project
from verification.case import Case, Line, Plot, Result, Row

ONSET: dict[str, tuple[tuple[Boundary, Boundary], float, float]] = {
    "rigid–rigid": (("no_slip", "no_slip"), 3.116, 1707.762),
    "rigid–free": (("no_slip", "free_slip"), 2.682, 1100.650),
    "free–free": (("free_slip", "free_slip"), math.pi / math.sqrt(2), 657.511),
}
"""Plates, critical wave number [1/H] and critical Ra; Chandrasekhar (1961), ch. II, tables I–III."""

ROLLS = {2500.0: 1.4717, 1e4: 2.6525}
"""Nu of steady rolls of wave number 3.117 between rigid plates at Pr = 0.71, by Ra; spectral computation."""


def slice_of(plates: tuple[Boundary, Boundary], wavenumber: float, nz: int) -> Grid:
    """One wavelength of two-dimensional rolls, 2 nz × 1 × nz cells."""
    walls: Boundaries = (("periodic", "periodic"), ("periodic", "periodic"), plates)
    return Grid((2 * nz, 1, nz), (math.pi / wavenumber / nz, 1.0, 1.0 / nz), walls)


def rolls(grid: Grid, batch: int, speed: float, warmth: float) -> Fields:
    """The conducting layer, FP64, with a pair of rolls of this velocity [m/s] and temperature [K] in it."""
    (nx, _, nz), k = grid.shape, 2 * math.pi / grid.lengths[0]
    x = k * grid.spacing[0] * torch.arange(nx, dtype=torch.float64)[:, None, None]
    z = math.pi * torch.arange(nz, dtype=torch.float64) / nz
    middle_x, middle_z = x + 0.5 * k * grid.spacing[0], z + 0.5 * math.pi / nz
    u = torch.zeros(3, *grid.shape, dtype=torch.float64)
    u[0] = -speed * math.pi / k * x.sin() * middle_z.cos()
    u[2] = speed * middle_x.cos() * z.sin()
    flux = project(operators.flux_of(u, grid), Geometry(grid))
    temperature = PLATES["z-"] - middle_z / math.pi + warmth * middle_x.cos() * middle_z.sin()
    return {"velocity": flux.expand(batch, *flux.shape), "temperature": temperature.expand(batch, *grid.shape)}


def layer(grid: Grid, rayleigh: Sequence[float], prandtl: float, device: str) -> BuoyantFlow:
    scales = {name: torch.from_numpy(value) for name, value in free_fall(np.array(rayleigh), prandtl).items()}
    return BuoyantFlow(Geometry(grid), **scales, dtype=torch.float64, device=device)


def critical_rayleigh(
    plates: tuple[Boundary, Boundary], wavenumber: float, guess: float, nz: int, device: str
) -> float:
    """Ra at which an infinitesimal roll neither grows nor decays.

    The growth rates of a Pr = 1 layer at two Ra, in units of κ/H², are interpolated over √Ra, in which they are all but
    linear.
    """
    grid, rayleigh = slice_of(plates, wavenumber, nz), (0.95 * guess, 1.05 * guess)
    solver = layer(grid, rayleigh, 1.0, device)
    conduction = math.sqrt(guess)  # H²/κ
    start = rolls(grid, 2, 1e-6, 1e-6 * math.sqrt(math.pi**2 + wavenumber**2) / wavenumber)
    fields = solver.advance(solver.working(start), 0.0, 0.2 * conduction)
    before = operators.kinetic_energy(fields["velocity"], grid)
    fields = solver.advance(fields, 0.0, 0.1 * conduction)
    growth = (operators.kinetic_energy(fields["velocity"], grid) / before).log().cpu() * torch.tensor(rayleigh).sqrt()
    low, high = (float(rate) for rate in growth)
    root = math.sqrt(rayleigh[0]) - low * (math.sqrt(rayleigh[1]) - math.sqrt(rayleigh[0])) / (high - low)
    return root**2


def onset(device: str, size: str) -> Result:
    """Growth rates through zero, on grids halved each time, and what they tend to."""
    sizes = (8, 16, 32) if size == "small" else (16, 32, 64)
    rows, lines = [], []
    for name, (plates, wavenumber, reference) in ONSET.items():
        found = np.array([critical_rayleigh(plates, wavenumber, reference, nz, device) for nz in sizes])
        settings = f"{2 * sizes[-1]} × {sizes[-1]} cells, Pr = 1, FP64"
        limit = found[-1] + (found[-1] - found[-2]) / 3
        source = "Chandrasekhar (1961), ch. II"
        rows += [
            Row(f"critical Ra, {name} [1]", found[-1], reference, 0.01, source, settings),
            Row(f"critical Ra, {name}, h → 0 [1]", limit, reference, 5e-4, source, "Richardson, two finest grids"),
            Row(
                f"critical Ra, {name}, order in h [1]",
                math.log2(abs(found[-2] - reference) / abs(found[-1] - reference)),
                2.0,
                0.1,
                "second-order scheme",
                f"nz = {sizes[-2]} → {sizes[-1]}",
            ),
        ]
        lines.append(Line(name, 1 / np.array(sizes), np.abs(found / reference - 1)))
    h = 1 / np.array(sizes)
    lines.append(Line("h²", h, (2 * h) ** 2, is_reference=True))
    return Result(rows, [Plot("Onset of convection", "h/H [1]", "error of critical Ra [1]", lines, "log", "log")])


def nusselt(fields: Fields, diffusivity: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Nu of each trajectory by four measures that agree to rounding once the flow is steady."""
    fields = {name: value.cpu() for name, value in fields.items()}
    temperature, kappa = fields["temperature"], diffusivity.flatten().cpu()
    dz, mean = grid.spacing[2], temperature.mean((1, 2))
    bottom, top = (PLATES["z-"] - mean[:, 0]) * 2 / dz, (mean[:, -1] - PLATES["z+"]) * 2 / dz
    w = operators.velocity(fields["velocity"], grid)[:, 2]
    lifted = 0.5 * (temperature + temperature.roll(1, -1)) * w  # nothing flows through the plates
    slopes = operators.grad(temperature, grid) / grid.per_face(grid.spacing, temperature)
    beside = (PLATES["z-"] - temperature[..., 0]).square() + (temperature[..., -1] - PLATES["z+"]).square()
    return {
        "bottom": bottom,
        "top": top,
        "heat carried": 1 + lifted.mean((1, 2, 3)) / kappa,
        "thermal dissipation": slopes.square().sum(1).mean((1, 2, 3)) + beside.mean((1, 2)) * 2 / dz,
    }


def steady_rolls(device: str, size: str) -> Result:
    """Two Ra at a time from rolls of about their final strength until nothing changes."""
    sizes = (8, 16, 24) if size == "small" else (16, 32, 64)
    rows: list[Row] = []
    curves: dict[float, list[float]] = {rayleigh: [] for rayleigh in ROLLS}
    for nz in sizes:
        grid = slice_of(("no_slip", "no_slip"), 3.117, nz)
        solver = layer(grid, list(ROLLS), 0.71, device)
        fields, time, before = solver.working(rolls(grid, len(ROLLS), 0.2, 0.2)), 0.0, torch.zeros(1)
        while True:
            fields = solver.advance(fields, time, 10.0)
            found = nusselt(fields, solver.transport.diffusivity, grid)
            time += 10.0
            if float((found["bottom"] - before).abs().amax()) < 1e-6:
                break
            before = found["bottom"]
        for i, rayleigh in enumerate(ROLLS):
            curves[rayleigh].append(float(found["bottom"][i]))
    settings = f"{2 * sizes[-1]} × {sizes[-1]} cells, steady at t = {time:g}, FP64"
    for i, (rayleigh, reference) in enumerate(ROLLS.items()):
        values, about = curves[rayleigh], f"of rolls at Ra = {rayleigh:g} [1]"
        limit = values[-1] + (values[-1] - values[-2]) / ((sizes[-1] / sizes[-2]) ** 2 - 1)
        source = "spectral computation, k = 3.117, Pr = 0.71"
        rows.append(Row(f"Nu {about}", values[-1], reference, 0.01, source, settings))
        rows.append(Row(f"Nu {about}, h → 0", limit, reference, 2e-3, source, "Richardson, two finest grids"))
        for name in ("top", "heat carried", "thermal dissipation"):
            rows.append(
                Row(f"Nu by {name} {about}", float(found[name][i]), values[-1], 1e-4, "Nu by the bottom", settings)
            )
    h = 1 / np.array(sizes)
    lines = [Line(f"Ra = {r:g}", h, np.abs(np.array(curves[r]) / ROLLS[r] - 1)) for r in ROLLS]
    lines.append(Line("h²", h, (3 * h) ** 2, is_reference=True))
    return Result(rows, [Plot("Steady rolls", "h/H [1]", "error of Nu [1]", lines, "log", "log")])


CASES: list[Case] = [
    Case("convection", "onset", onset),
    Case("convection", "steady rolls", steady_rolls),
]
