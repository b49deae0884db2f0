"""Magnetohydrodynamics: Orszag & Tang's vortex, Alfvén waves, resistive decay, the energy budget, and div B."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from latentphys import operators
from latentphys.families import MHD, Magnetohydrodynamics
from latentphys.families.solver import Fields
from latentphys.grid import Geometry, Grid
from verification.case import Case, Line, Plot, Result, Row

ORSZAG_TANG = np.array([[0.5, 1.68062, 2.13667], [1.0, 0.93603, 2.44722], [2.0, 1.10724, 1.49845]])
"""t, kinetic and magnetic energy of the vortex u = (−2 sin y, 2 sin x), B = (−2 sin 2y, 2 sin x), ν = η = 0.02."""

Wave = tuple[tuple[int, int], tuple[float, float, float]]


def plane(n: int) -> Grid:
    """A periodic square of side 2π, n × n × 1 cells."""
    return Grid((n, n, 1), (2 * math.pi / n, 2 * math.pi / n, 2 * math.pi))


def face_points(grid: Grid, axis: int) -> tuple[Tensor, Tensor]:
    """x and y of the low faces normal to an axis [m], FP64."""
    x = (torch.arange(grid.shape[0], dtype=torch.float64) + 0.5 * (axis != 0)) * grid.spacing[0]
    y = (torch.arange(grid.shape[1], dtype=torch.float64) + 0.5 * (axis != 1)) * grid.spacing[1]
    return x[:, None, None], y[None, :, None]


def flux(grid: Grid, *components: Tensor) -> Tensor:
    """A batch of one from velocities on the low faces."""
    return operators.flux_of(torch.stack([c.expand(grid.shape) for c in components]), grid)[None]


def energies(fields: Fields, grid: Grid) -> tuple[float, float]:
    kinetic, magnetic = (float(operators.kinetic_energy(fields[name], grid)) for name in ("velocity", "magnetic"))
    return kinetic, magnetic


def vortex(n: int, device: str) -> np.ndarray:
    """Energies at the reference's times."""
    grid = plane(n)
    (xv, _), (_, yu) = face_points(grid, 1), face_points(grid, 0)
    zero = torch.zeros(grid.shape, dtype=torch.float64)
    fields = {
        "velocity": flux(grid, -2 * yu.sin(), 2 * xv.sin(), zero),
        "magnetic": flux(grid, -2 * (2 * yu).sin(), 2 * xv.sin(), zero),
    }
    solver = Magnetohydrodynamics(Geometry(grid), 0.02, 0.02, dtype=torch.float64, device=device)
    fields, time, found = solver.working(fields), 0.0, []
    for end in ORSZAG_TANG[:, 0]:
        fields = solver.advance(fields, time, end - time)
        time = end
        found.append(energies(fields, grid))
    return np.array(found)


def orszag_tang(device: str, size: str) -> Result:
    """Energies at three times on grids halved each time, and the order at which they converge."""
    sizes, settled = ((32, 64, 128), 1) if size == "small" else ((64, 128, 256), 3)
    found = np.stack([vortex(n, device) for n in sizes])
    source = "Orszag & Tang (1979) vortex, spectral computation"
    settings, rows, lines = f"{sizes[-1]}² cells, FP64", [], []
    for which, name in enumerate(("kinetic", "magnetic")):
        for t, time in enumerate(ORSZAG_TANG[:, 0]):
            reference, values = ORSZAG_TANG[t, 1 + which], found[:, t, which]
            label = f"{name} energy at t = {time:g}"
            rows.append(Row(f"{label} [m²/s²]", values[-1], reference, 64 / sizes[-1] ** 2, source, settings))
            if t < settled:
                limit = values[-1] + (values[-1] - values[-2]) / 3
                tolerance = 5e-5 if t == 0 else 6e-4
                rows.append(Row(f"{label}, h → 0 [m²/s²]", limit, reference, tolerance, source, "Richardson"))
            lines.append(Line(f"{name}, t = {time:g}", np.array(sizes), np.abs(values / reference - 1)))
        first = np.abs(np.diff(found[:, 0, which]))
        order = math.log2(first[-2] / first[-1])
        rows.append(
            Row(f"order of the {name} energy in h, t = 0.5 [1]", order, 2.0, 0.05, "second-order scheme", settings)
        )
    reference_line = Line("h²", np.array(sizes), 10 / np.array(sizes, dtype=float) ** 2, is_reference=True)
    plot = Plot("Orszag–Tang vortex", "cells per side", "relative error", [*lines, reference_line], "log", "log")
    return Result(rows, [plot])


def wave(grid: Grid, mode: tuple[int, int], mean: tuple[float, float, float], amplitude: float) -> Fields:
    """A circularly polarised Alfvén wave u = −b that travels along B₀; an exact solution at any amplitude."""
    kx, ky = mode
    k = math.hypot(kx, ky)
    b = []
    for axis, factor in enumerate((ky / k, -kx / k, 1.0)):
        x, y = face_points(grid, axis)
        phase = kx * x + ky * y
        b.append(amplitude * factor * (phase.sin() if axis == 2 else phase.cos()))
    fluctuation = flux(grid, *b)
    uniform = operators.flux_of(torch.tensor(mean, dtype=torch.float64).reshape(3, 1, 1, 1), grid)
    return {"velocity": -fluctuation, "magnetic": fluctuation + uniform}


def alfven(device: str, size: str) -> Result:
    """Frequency and damping of large waves along and across the grid, from the phase and size of their mode."""
    sizes = (16, 32, 64) if size == "small" else (32, 64, 128, 256)
    nu, duration, amplitude = 0.01, 2.0, 0.8
    rows, lines = [], []
    cases: list[Wave] = [((1, 0), (1.0, 0.0, 0.0)), ((1, 2), (1.0, -0.3, 0.5))]
    for mode, mean in cases:
        exact = mode[0] * mean[0] + mode[1] * mean[1]
        speeds, dampings = [], []
        for n in sizes:
            grid = plane(n)
            solver = Magnetohydrodynamics(Geometry(grid), nu, nu, dtype=torch.float64, device=device)
            first = solver.working(wave(grid, mode, mean, amplitude))
            last = solver.advance(first, 0.0, duration)
            before, after = (torch.fft.fft2(f["velocity"][0, 2, :, :, 0])[mode[0], mode[1]] for f in (first, last))
            ratio = complex(after / before)
            speeds.append(-math.atan2(ratio.imag, ratio.real) / duration)
            dampings.append(-math.log(abs(ratio)) / duration)
        settings = f"k = {mode}, B₀ = {mean}, amplitude {amplitude}, ν = η = {nu}, {sizes[-1]}² cells, FP64"
        damping = nu * (mode[0] ** 2 + mode[1] ** 2)
        order = math.log2(abs(speeds[-2] - exact) / abs(speeds[-1] - exact))
        rows += [
            Row("Alfvén wave, ω = k·B₀ [1/s]", speeds[-1], exact, 8e-3, "closed form", settings),
            Row("Alfvén wave, damping νk² [1/s]", dampings[-1], damping, 8e-3, "closed form", settings),
            Row("Alfvén wave, order of ω in h [1]", order, 2.0, 0.05, "second-order scheme", settings),
        ]
        error = np.abs(np.array(speeds) / exact - 1)
        lines.append(Line(f"k = {mode}", np.array(sizes), error))
    lines.append(Line("h²", np.array(sizes), 10 / np.array(sizes, dtype=float) ** 2, is_reference=True))
    return Result(rows, [Plot("Alfvén waves", "cells per side", "relative error of ω", lines, "log", "log")])


def resistive_decay(device: str, size: str) -> Result:
    """A force-free field, ∇×B = B, decays as exp(−ηt) and moves nothing."""
    sizes = (16, 32, 64) if size == "small" else (32, 64, 128, 256)
    eta, rates, moved = 0.3, [], 0.0
    for n in sizes:
        grid = plane(n)
        (_, yu), (xv, _), (xw, yw) = (face_points(grid, axis) for axis in range(3))
        b = flux(grid, yu.sin(), -xv.sin(), -xw.cos() - yw.cos())
        solver = Magnetohydrodynamics(Geometry(grid), 0.1, eta, dtype=torch.float64, device=device)
        first = solver.working({"velocity": 0.0 * b, "magnetic": b})
        last = solver.advance(first, 0.0, 2.0)
        rates.append(0.25 * math.log(energies(first, grid)[1] / energies(last, grid)[1]))
        moved = energies(last, grid)[0] / energies(first, grid)[1]
    order = math.log2(abs(rates[-2] - eta) / abs(rates[-1] - eta))
    settings = f"{sizes[-1]}² cells, FP64"
    return Result(
        [
            Row("decay rate of a force-free field, η [1/s]", rates[-1], eta, 1e-3, "closed form", settings),
            Row("order of the decay rate in h [1]", order, 2.0, 0.05, "second-order scheme", settings),
            Row("kinetic energy it sets free [1]", moved, 0.0, 1e-9, "closed form: J × B = 0", settings),
        ]
    )


def budget(device: str, size: str) -> Result:
    """Turbulence in FP32: what viscosity and resistivity take is what energy is lost, and what is left of div B."""
    n = 32 if size == "small" else 128
    family = MHD(reynolds=(500.0, 500.0), prandtl=(1.0, 1.0), magnetic=(1.0, 1.0), mean_field=(0.5, 0.5))
    grid = family.grid((n, n, n))
    drawn = family.draw(0, 0)
    nu, eta = drawn["viscosity"], drawn["resistivity"]
    first = family.initial(Geometry(grid), drawn, 0, 0)
    parameters = {name: np.array([value]) for name, value in drawn.items()}
    solver = family.solver(Geometry(grid), parameters, device=device)
    fields = solver.working({name: value[None] for name, value in first.items()})

    def state() -> tuple[float, float, float, float]:
        wide = {name: value.double() for name, value in fields.items()}
        vorticity, current = (float(operators.vorticity(flux, grid).square().mean()) * 3 for flux in wide.values())
        net = operators.div(wide["magnetic"], grid).abs().amax() / wide["magnetic"].abs().amax()
        return *energies(wide, grid), nu * vorticity + eta * current, float(net)

    num_steps, dt = (600, 1 / 600) if size == "small" else (2400, 1 / 2400)
    history = [state()]
    for k in range(num_steps):
        fields = solver.step(fields, k * dt, dt)
        history.append(state())
    kinetic, magnetic, lost, net = np.array(history).T
    total = kinetic + magnetic
    spent = np.concatenate([[0.0], np.cumsum(0.5 * (lost[1:] + lost[:-1]) * dt)])
    time = np.arange(num_steps + 1) * dt
    settings = f"{n}³ cells, Re = 500, Pm = 1, FP32, {num_steps} steps to t = 1"
    recorded = solver.recorded(fields)
    exact = max(float(operators.div(recorded[name], grid).abs().amax()) for name in recorded)
    ratio = (total[0] - total[-1]) / spent[-1]
    rows = [
        Row("energy lost / ∫ (ν⟨ω²⟩ + η⟨J²⟩) dt [1]", ratio, 1.0, 1e-3, "energy budget", settings),
        Row("largest net magnetic flux of a cell / largest flux [1]", net.max(), 0.0, 1e-5, "∇·B = 0", settings),
        Row("the same in recorded fields", exact, 0.0, 0.0, "∇·B = ∇·u = 0", settings),
    ]
    plot = Plot(
        "Energy budget",
        "t [s]",
        "energy [m²/s²]",
        [
            Line("kinetic", time, kinetic),
            Line("magnetic", time, magnetic),
            Line("both", time, total),
            Line("first energy less what was dissipated", time[::40], (total[0] - spent)[::40], is_reference=True),
        ],
    )
    return Result(rows, [plot])


CASES = [
    Case("mhd", "Orszag–Tang vortex", orszag_tang),
    Case("mhd", "Alfvén waves", alfven),
    Case("mhd", "resistive decay", resistive_decay),
    Case("mhd", "energy budget and div B", budget),
]
