"""Open channel: laminar flow in closed form, the profiles of a turbulent layer, and the balance of its stresses."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from latentphys import operators
from latentphys.families import NavierStokes, OpenChannel
from latentphys.families.jobs import stack
from latentphys.grid import Boundaries, Geometry, Grid
from verification.case import Case, Line, Plot, Result, Row

MOSER = np.array(
    [[0.858, 0.8556], [5.34, 5.113], [10.41, 8.774], [15.28, 10.967], [30.02, 13.87], [49.1, 15.264], [98.0, 17.094]]
)
"""z⁺ and U⁺ of a closed channel at Re_τ = 178; towards the surface an open channel differs."""
PEAKS = {"streamwise u′⁺": 2.658, "wall-normal w′⁺": 0.836, "spanwise v′⁺": 1.087, "−u′w′⁺": 0.723}
SOURCE = "Moser, Kim & Mansour, Phys. Fluids 11 (1999), Re_τ = 178"
WALLS: Boundaries = (("periodic", "periodic"), ("periodic", "periodic"), ("no_slip", "free_slip"))


def starting(z: Tensor, time: float) -> Tensor:
    """Laminar flow from rest under f = 1 m/s² at ν = 1 m²/s and H = 1 m: zH − z²/2 less a Fourier series."""
    u = z - z**2 / 2
    for n in range(40):
        k = (n + 0.5) * math.pi
        u = u - 2 / k**3 * math.exp(-(k**2) * time) * (k * z).sin()
    return u


def laminar(device: str, size: str) -> Result:
    """Poiseuille flow and its start from rest, on grids halved each time."""
    sizes = (6, 12, 24) if size == "small" else (8, 16, 32, 64)
    force = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    rows, lines = [], []
    for name, is_steady, time in (("from rest, t = 0.2 H²/ν", False, 0.2), ("u = (F/ν)(zH − z²/2)", True, 1.5)):
        errors = []
        for n in sizes:
            grid = Grid((1, 1, n), (1.0, 1.0, 1 / n), WALLS)
            solver = NavierStokes(Geometry(grid), 1.0, lambda t: force, dtype=torch.float64, device=device)
            z = (torch.arange(n, dtype=torch.float64) + 0.5) / n
            start = torch.zeros(1, 3, *grid.shape, dtype=torch.float64)
            start[:, 0] = z - z**2 / 2 if is_steady else 0.0
            fields = solver.working({"velocity": operators.flux_of(start, grid)})
            u = operators.velocity(solver.advance(fields, 0.0, time)["velocity"], grid)[0, 0, 0, 0].cpu()
            exact = z - z**2 / 2 if is_steady else starting(z, time)
            errors.append(float((u - exact).abs().amax() / exact.amax()))
        order = math.log2(errors[-2] / errors[-1])
        settings = f"{sizes[-1]} cells over the depth, FP64"
        rows += [
            Row(f"laminar, {name}: largest error / u(H) [1]", errors[-1], 0.0, 2e-3, "closed form", settings),
            Row(f"laminar, {name}: order in h [1]", order, 2.0, 0.05, "second-order scheme", settings),
        ]
        lines.append(Line(name, np.array(sizes), np.array(errors)))
    lines.append(Line("h²", np.array(sizes), 1 / np.array(sizes, dtype=float) ** 2, is_reference=True))
    return Result(rows, [Plot("Laminar open channel", "cells over the depth", "largest error", lines, "log", "log")])


def mean_profile(x: Tensor) -> Tensor:
    """Mean over the batch and over horizontal planes, (…, nz) FP64."""
    return x.double().mean((0, 1, 2))


def turbulent(device: str, size: str) -> Result:
    """Mean and RMS profiles, and τ = ν dU/dz − ⟨u′w′⟩, which carries what the force puts in above each height."""
    shape, batch, lengths, times = (
        ((32, 32, 32), 6, (math.pi, math.pi / 2, 1.0), (2.0, 2.6))
        if size == "small"
        else ((128, 128, 128), 4, (2 * math.pi, math.pi, 1.0), (8.0, 16.0))
    )
    family = OpenChannel(reynolds=(180.0, 180.0), lengths=lengths)
    grid = family.grid(shape)
    geometry, nu, h = Geometry(grid), 1 / 180, grid.spacing[2]
    drawn = [family.draw(0, i) for i in range(batch)]
    first = [family.initial(geometry, p, 0, i)["velocity"] for i, p in enumerate(drawn)]
    solver = family.solver(geometry, stack(drawn), device=device, compiled=device == "cuda")
    fields = solver.advance(solver.working({"velocity": torch.stack(first)}), 0.0, times[0])
    dt = 0.6 * solver.stable_step(fields)
    num_steps = math.ceil((times[1] - times[0]) / dt)
    begin = mean_profile(operators.velocity(fields["velocity"], grid)[:, 0])
    sums: dict[str, Tensor] = {}
    for k in range(num_steps):
        u, v, w = operators.velocity(fields["velocity"], grid).unbind(1)
        below, w_mean = u.roll(1, -1), 0.5 * (w + w.roll(1, -3))  # both on the edges that carry the momentum flux
        values = {"u": u, "uu": u * u, "vv": v * v, "ww": w * w, "uw": 0.5 * (u + below) * w_mean}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + mean_profile(value) / num_steps
        fields = solver.step(fields, times[0] + k * dt, dt)
    change = (mean_profile(operators.velocity(fields["velocity"], grid)[:, 0]) - begin) / (num_steps * dt)
    mean = {name: value.cpu().numpy() for name, value in sums.items()}
    slope = np.diff(mean["u"], prepend=-mean["u"][0]) / h  # at the bed the velocity is zero half a cell away
    viscous, turbulent_stress = nu * slope, -mean["uw"]
    stress, heights = viscous + turbulent_stress, np.arange(shape[2]) * h
    put_in = np.cumsum((1 - change.cpu().numpy())[::-1])[::-1] * h
    z = (np.arange(shape[2]) + 0.5) * h * 180
    rms_u = np.sqrt(mean["uu"] - mean["u"] ** 2)
    peaks = (rms_u.max(), math.sqrt(mean["ww"][: shape[2] // 2].max()), math.sqrt(mean["vv"][: shape[2] // 2].max()))
    settings = (
        f"{shape[0]}³ cells, box {lengths[0]:.3g} × {lengths[1]:.3g} × 1 H, {batch} trajectories, "
        f"t = {times[0]:g} … {times[1]:g} H/u_τ, {str(solver.dtype).split('.')[1]}"
    )
    tolerance = 0.08 if size == "small" else 0.05
    at_points = np.interp(MOSER[:, 0], np.concatenate([[0], z]), np.concatenate([[0], mean["u"]]))
    rows = [
        Row(f"U⁺ at z⁺ = {zp:g} [1]", value, reference, tolerance, SOURCE, settings)
        for value, (zp, reference) in zip(at_points, MOSER, strict=True)
        if zp > z[0]
    ]
    for (name, reference), value in zip(PEAKS.items(), (*peaks, turbulent_stress.max()), strict=True):
        rows.append(Row(f"peak of {name} [1]", float(value), reference, 1.5 * tolerance, SOURCE, settings))
    balance, drift = np.abs(stress - put_in).max(), np.abs(stress - (1 - heights)).max()
    rows += [
        Row(
            "largest |τ − force less acceleration above z| / u_τ² [1]", balance, 0.0, 1e-2, "momentum budget", settings
        ),
        Row("largest |τ/u_τ² − (1 − z/H)| [1]", drift, 0.0, 0.2 if size == "small" else 0.05, "steady mean", settings),
    ]
    profile = Plot(
        "Mean velocity",
        "z⁺",
        "U⁺",
        [Line("here", z, mean["u"]), Line("Moser, Kim & Mansour", MOSER[:, 0], MOSER[:, 1], is_reference=True)],
        "log",
    )
    stresses = Plot(
        "Stresses",
        "z / H",
        "τ / u_τ²",
        [
            Line("viscous", heights, viscous),
            Line("turbulent", heights, turbulent_stress),
            Line("both", heights, stress),
            Line("1 − z/H", heights, 1 - heights, is_reference=True),
        ],
    )
    return Result(rows, [profile, stresses])


CASES = [
    Case("open_channel", "laminar flow", laminar),
    Case("open_channel", "turbulent profiles and stress balance", turbulent),
]
