"""Turbulence: exact solutions, the Taylor–Green vortex against a spectral computation, and developed statistics."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from latentphys import operators
from latentphys.families import NavierStokes
from latentphys.families.family import broadband, generator
from latentphys.families.turbulence import StirredFlow
from latentphys.grid import PERIODIC, Boundaries, Geometry, Grid
from latentphys.validators.statistics import energy_spectra
from verification.case import Case, Line, Plot, Result, Row

FREE_SLIP: Boundaries = (("free_slip", "free_slip"),) * 3

DAIRAY = np.array(
    [
        [1.0, 0.124515, 0.5188e-3],
        [3.0, 0.123024, 1.1265e-3],
        [5.0, 0.118436, 4.1271e-3],
        [8.0, 0.098290, 10.373e-3],
        [10.0, 0.074480, 11.273e-3],
    ]
)
"""Taylor–Green vortex at Re = 1600 on 512³: t, E and −dE/dt."""
SOURCE = "Dairay, Lamballais, Laizet & Vassilicos, J. Comput. Phys. 337 (2017), DNS on 512³"


def faces(grid: Grid, axis: int) -> list[Tensor]:
    """Coordinates of the low faces normal to an axis [m], FP64, each along its own axis."""
    return [
        ((torch.arange(n, dtype=torch.float64) + 0.5 * (a != axis)) * h).reshape(
            [-1 if b == a else 1 for b in range(3)]
        )
        for a, (n, h) in enumerate(zip(grid.shape, grid.spacing, strict=True))
    ]


def cube(n: int, side: float, boundaries: Boundaries = PERIODIC) -> Grid:
    return Grid((n, n, n), (side / n,) * 3, boundaries)


def abc(grid: Grid) -> Tensor:
    """The Arnold–Beltrami–Childress flow (1, 0.7, 0.4) as a flux: ∇×u = u, so that it decays as exp(−νt)."""
    strength, u = (1.0, 0.7, 0.4), []
    for a in range(3):
        at = faces(grid, a)
        wave = strength[a] * at[(a + 2) % 3].sin() + strength[(a + 2) % 3] * at[(a + 1) % 3].cos()
        u.append(wave.expand(grid.shape))
    return operators.flux_of(torch.stack(u), grid)


def taylor_green(grid: Grid) -> Tensor:
    """u = (sin x cos y cos z, −cos x sin y cos z, 0) as a flux; its net per cell is zero."""
    (x, y, z), (p, q, r) = faces(grid, 0), faces(grid, 1)
    u = x.sin() * y.cos() * z.cos()
    v = -p.cos() * q.sin() * r.cos()
    return operators.flux_of(torch.stack([u, v, torch.zeros_like(u)]), grid)


def exact_solutions(device: str, size: str) -> Result:
    """The ABC flow decays as exp(−νt) whatever its amplitude: every nonlinear term is a gradient."""
    viscosity, duration, rows, errors = 0.05, 2.0, [], []
    sizes = (8, 16, 32) if size == "small" else (32, 64, 128, 256)
    for n in sizes:
        grid = cube(n, 2 * math.pi)
        solver, start = NavierStokes(Geometry(grid), viscosity, dtype=torch.float64, device=device), abc(grid)
        end = solver.advance(solver.working({"velocity": start[None]}), 0.0, duration)["velocity"][0].cpu()
        expected = start * math.exp(-viscosity * duration)
        errors.append(float((end - expected).norm() / expected.norm()))
    decay = float((end * start).sum() / start.square().sum())
    settings = f"ν = {viscosity} m²/s, t = {duration} s, FP64"
    rows.append(
        Row(
            "ABC flow, amplitude left at t [1]",
            decay,
            math.exp(-viscosity * duration),
            2e-3,
            "closed form",
            f"{sizes[-1]}³, {settings}",
        )
    )
    order = math.log2(errors[-2] / errors[-1])
    rows.append(
        Row(
            "ABC flow, order in h [1]",
            order,
            2.0,
            0.05,
            "second-order scheme",
            f"{sizes[-2]}³ → {sizes[-1]}³, {settings}",
        )
    )
    h = 2 * math.pi / np.array(sizes)
    lines = [
        Line("here", h, np.array(errors)),
        Line("h²", h, errors[-1] * (h / h[-1]) ** 2, is_reference=True),
    ]
    return Result(rows, [Plot("ABC flow", "h [m]", "relative error [1]", lines, "log", "log")])


def energy_and_loss(solver: NavierStokes, fields: dict[str, Tensor]) -> tuple[float, float]:
    """E [m²/s²] and −dE/dt [m²/s³] from the rates of change; the projection takes no energy."""
    grid = solver.geometry.grid
    flux = fields["velocity"]
    u, change = operators.velocity(flux, grid).double(), operators.velocity(solver.rates(fields, {})["velocity"], grid)
    return float(0.5 * u.square().sum(1).mean()), -float((u * change.double()).sum(1).mean())


def taylor_green_vortex(device: str, size: str) -> Result:
    """Re = 1600 in one of the eight mirror images of the periodic box: a box of side π with free-slip walls."""
    sizes, last = ((24, 48), 3.0) if size == "small" else ((64, 128, 256), 10.0)
    dtype = torch.float64 if size == "small" else torch.float32
    rows, lines = [], [Line("Dairay et al.", DAIRAY[:, 0], DAIRAY[:, 2], is_reference=True)]
    for n in sizes:
        grid = cube(n, math.pi, FREE_SLIP)
        solver = NavierStokes(Geometry(grid), 1 / 1600, dtype=dtype, device=device, compiled=size == "large")
        fields, history = solver.working({"velocity": taylor_green(grid)[None]}), []
        for t in np.arange(0, last + 0.05, 0.1):
            history.append((t, *energy_and_loss(solver, fields)))
            fields = solver.advance(fields, float(t), 0.1)
        curve = np.array(history)
        lines.append(Line(f"{2 * n}³", curve[:, 0], curve[:, 2]))
        if n != sizes[-1]:
            continue
        settings = f"{n}³ cells in an octant, as {2 * n}³, {dtype}".replace("torch.", "")
        for t, energy, loss in DAIRAY[DAIRAY[:, 0] <= last]:
            at = curve[round(t / 0.1)]
            rows.append(Row(f"E at t = {t:g} [m²/s²]", at[1], energy, 0.002 if t < 6 else 0.02, SOURCE, settings))
            rows.append(Row(f"−dE/dt at t = {t:g} [m²/s³]", at[2], loss, 0.03, SOURCE, settings))
        if size == "large":
            rows.append(Row("peak of −dE/dt [m²/s³]", curve[:, 2].max(), 0.012856, 0.03, SOURCE, settings))
            peak = curve[curve[:, 2].argmax(), 0]
            rows.append(Row("time of the peak [s]", peak, 8.98, 0.02, SOURCE, settings))
    return Result(rows, [Plot("Taylor–Green vortex, Re = 1600", "t [s]", "−dE/dt [m²/s³]", lines)])


def skewness(flux: Tensor, grid: Grid) -> float:
    """Of ∂u_a/∂x_a, mean over the axes."""
    u = operators.velocity(flux, grid)
    values = []
    for a in range(3):
        slope = u[..., a, :, :, :].roll(-1, a - 3) - u[..., a, :, :, :]
        values.append(float(slope.pow(3).mean() / slope.square().mean() ** 1.5))
    return float(np.mean(values))


def model_spectrum(k_eta: np.ndarray) -> np.ndarray:
    """E(k)/(εν⁵)^¼ without an energy-containing range. Pope, Turbulent Flows (2000), eqs. 6.246 and 6.248."""
    return 1.5 * k_eta ** (-5 / 3) * np.exp(-5.2 * ((k_eta**4 + 0.4**4) ** 0.25 - 0.4))


def donzis(reynolds: float) -> float:
    """C_ε of forced boxes by Re_λ: A (1 + √(1 + (B/Re_λ)²)) with A = 0.2, B = 92."""
    return 0.2 * (1 + math.sqrt(1 + (92 / reynolds) ** 2))


def developed_statistics(device: str, size: str) -> Result:
    """Stationary turbulence: what is put in is dissipated, and the small scales know nothing of the force."""
    n, viscosity, spin_up, num_frames = (48, 0.03, 6.0, 24) if size == "small" else (256, 0.003, 8.0, 24)
    grid = cube(n, 2 * math.pi)
    geometry, interval = Geometry(grid), 0.4
    solver = StirredFlow(geometry, viscosity, 1.0, device=device, compiled=size == "large")
    fields = solver.working({"velocity": broadband(geometry, 2.0, -5 / 6, generator(0, 0, 1))[None]})
    fields = solver.advance(fields, 0.0, spin_up)
    energies, losses, skew, spectra = [], [], [], []
    for frame in range(num_frames):
        energy, loss = energy_and_loss(solver, fields)
        flux = fields["velocity"][0].double().cpu()
        energies.append(energy)
        losses.append(loss)
        skew.append(skewness(flux, grid))
        (spectrum,) = energy_spectra(flux, geometry)
        spectra.append(spectrum.density.numpy())
        fields = solver.advance(fields, spin_up + frame * interval, interval)
    k, density = np.array(spectrum.wavenumbers), np.mean(spectra, axis=0)
    energy, loss = float(np.mean(energies)), float(np.mean(losses))
    variance = 2 / 3 * energy
    integral = math.pi / (2 * variance) * float((density / k).sum() * k[0])
    reynolds = variance * math.sqrt(15 / (viscosity * loss))
    eta = (viscosity**3 / loss) ** 0.25
    settings = (
        f"{n}³, ν = {viscosity}, {num_frames} frames in {num_frames * interval:g} s, Re_λ = {reynolds:.0f}, "
        f"k_max η = {n / 2 * eta:.2f}, FP32"
    )
    rows = [
        Row("ε/P [1]", loss, 1.0, 0.1, "stationary: what goes in comes out", settings),
        Row(
            "C_ε = εL/u'³ [1]",
            loss * integral / variance**1.5,
            donzis(reynolds),
            0.25,
            "Donzis, Sreenivasan & Yeung, J. Fluid Mech. 532 (2005), fit to forced boxes",
            settings,
        ),
        Row(
            "skewness of ∂u/∂x [1]",
            float(np.mean(skew)),
            -0.5,
            0.2,
            "Kerr, J. Fluid Mech. 153 (1985); Jiménez et al., J. Fluid Mech. 255 (1993)",
            settings,
        ),
    ]
    if size == "large":
        band = (k >= 4) & (k * eta <= 0.1)
        slope = float(np.polyfit(np.log(k[band]), np.log(density[band]), 1)[0])
        rows.append(Row("slope of E(k), 4 ≤ k ≤ 0.1/η [1]", slope, -5 / 3, 0.15, "Kolmogorov 1941", settings))
    lines = [
        Line(f"Re_λ = {reynolds:.0f}", k * eta, density / (loss * viscosity**5) ** 0.25),
        Line("Pope's model", k * eta, model_spectrum(k * eta), is_reference=True),
    ]
    plot = Plot("Developed turbulence", "kη [1]", "E(k)/(εν⁵)^¼ [1]", lines, "log", "log")
    return Result(rows, [plot])


CASES: list[Case] = [
    Case("turbulence", "ABC flow", exact_solutions),
    Case("turbulence", "Taylor–Green vortex at Re = 1600", taylor_green_vortex),
    Case("turbulence", "developed statistics", developed_statistics),
]
