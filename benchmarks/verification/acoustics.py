"""Acoustics: phase speed, a box of walls, an impedance jump, and the scattering of a pulse by a rigid sphere."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import eval_legendre, spherical_jn, spherical_yn
from torch import Tensor

from latentphys import operators
from latentphys.families.acoustics import Acoustics
from latentphys.families.solver import Fields
from latentphys.grid import Boundaries, Geometry, Grid
from verification.case import Case, Line, Plot, Result, Row

FAMILY = "acoustics"
CLOSED: Boundaries = (("free_slip", "free_slip"),) * 3
LINE: Boundaries = (("free_slip", "free_slip"), ("periodic", "periodic"), ("periodic", "periodic"))


def places(grid: Grid, face: int | None = None) -> list[Tensor]:
    """Coordinates of the cells, or of the low faces of an axis."""
    return [
        ((torch.arange(n, dtype=torch.float64) + (0.0 if axis == face else 0.5)) * h).reshape(
            [-1 if a == axis else 1 for a in range(3)]
        )
        for axis, (n, h) in enumerate(zip(grid.shape, grid.spacing, strict=True))
    ]


def state_of(solver: Acoustics, pressure: Tensor, c: Tensor | float = 1.0, velocity: Tensor | None = None) -> Fields:
    grid = solver.geometry.grid
    u = torch.zeros(1, 3, *grid.shape, dtype=torch.float64) if velocity is None else velocity
    speed = torch.as_tensor(c, dtype=torch.float64).expand(1, *grid.shape)
    return solver.working({"pressure": pressure, "velocity": operators.flux_of(u, grid), "sound_speed": speed})


def phase_speed(device: str, size: str) -> Result:
    """ω of a plane wave from its fall to the first zero, along an axis and along the diagonal, by resolution."""
    rows, lines = [], []
    for name, modes in (("axis", (1, 0, 0)), ("diagonal", (1, 1, 1))):
        per_wave, ratio = (6, 8, 12, 16, 24, 32), []
        for n in per_wave:
            grid = Grid((n, n, n), (1 / n,) * 3)
            solver = Acoustics(Geometry(grid), 1.0, dtype=torch.float64, device=device)
            wave = torch.cos(sum(2 * math.pi * m * x for m, x in zip(modes, places(grid), strict=True)))  # type: ignore[arg-type]
            wave = wave.expand(1, n, n, n)
            state = state_of(solver, wave)
            dt = solver.stable_step(state)
            state = solver.step(state, 0.0, dt)
            fall = float((state["pressure"].cpu() * wave).sum() / wave.square().sum())
            ratio.append(math.acos(fall) / dt / (2 * math.pi * math.sqrt(sum(modes))))
        where = "FP64, CFL 0.9"
        order = math.log2((1 - ratio[3]) / (1 - ratio[5]))
        rows.append(
            Row(f"ω/ck along the {name}, 32 cells a wave [1]", ratio[5], 1.0, 2e-3, "closed form: ω = ck", where)
        )
        rows.append(Row(f"order of ω along the {name} [1]", order, 2.0, 0.02, "closed form", "16 and 32 cells a wave"))
        dt_h, directions = 0.9 / math.sqrt(3), sum(modes)
        kh = 2 * math.pi / np.array(per_wave)
        exact = 2 / dt_h * np.arcsin(dt_h * math.sqrt(directions) * np.sin(kh / 2)) / (math.sqrt(directions) * kh)
        worst = float(np.abs(np.array(ratio) / exact - 1).max())
        rows.append(Row(f"distance to the scheme's own relation, {name} [1]", worst, 0.0, 1e-10, "closed form", where))
        lines += [
            Line(name, np.array(per_wave), np.array(ratio)),
            Line(f"{name}, closed form", np.array(per_wave), exact, is_reference=True),
        ]
    return Result(rows, [Plot("Phase speed", "cells per wave along an axis", "ω / ck", lines)])


def box_of_walls(device: str, size: str) -> Result:
    """The mode (2, 1, 1) of a closed box after two and a half periods."""
    c, rho, lengths, modes = 1.5, 0.8, (1.0, 1.4, 0.8), (2, 1, 1)
    cells = (16, 32, 64) if size == "small" else (32, 64, 128)
    k = [math.pi * m / length for m, length in zip(modes, lengths, strict=True)]
    omega = c * math.hypot(*k)
    duration, errors = 2.3 * 2 * math.pi / omega, []
    for n in cells:
        nx, ny, nz = lengths
        grid = Grid((n, n, n), (nx / n, ny / n, nz / n), CLOSED)
        solver = Acoustics(Geometry(grid), rho, dtype=torch.float64, device=device)

        def wave(at: list[Tensor], along: int | None = None) -> Tensor:
            value = torch.ones(1, dtype=torch.float64)
            for axis in range(3):
                value = value * (-k[axis] * (k[axis] * at[axis]).sin() if axis == along else (k[axis] * at[axis]).cos())
            return value

        end = solver.recorded(solver.advance(state_of(solver, wave(places(grid))[None], c), 0.0, duration))
        p = end["pressure"][0] - math.cos(omega * duration) * wave(places(grid))
        slopes = torch.stack([wave(places(grid, a), a) for a in range(3)])
        u = operators.velocity(end["velocity"][0], grid) + math.sin(omega * duration) / (rho * omega) * slopes
        errors.append((float(p.abs().amax()), rho * c * float(u.abs().amax())))
    rows, where = [], f"{cells[-1]}³ cells, FP64, after 2.3 periods"
    for i, name in enumerate(("p", "ρcu")):
        order = math.log2(errors[-2][i] / errors[-1][i])
        rows.append(Row(f"largest error of {name}, amplitude 1 Pa", errors[-1][i], 0.0, 0.02, "closed form", where))
        rows.append(Row(f"order of {name} [1]", order, 2.0, 0.1, "closed form", f"{cells[-2]}³ and {cells[-1]}³ cells"))
    return Result(rows)


def impedance_jump(device: str, size: str) -> Result:
    """What comes back from, and what passes, a jump of density and sound speed."""
    n, rows, lines = 1600 if size == "small" else 6400, [], []
    grid = Grid((n, 1, 1), (4.0 / n, 1.0, 1.0), LINE)
    x, at_faces = places(grid)[0], places(grid, 0)[0]
    for density, speed in ((3.0, 1.0), (1.0, 0.5), (4.0, 0.5), (0.4, 1.5)):
        beyond = (x > 2.0).expand(1, *grid.shape)
        rho, c = (torch.where(beyond, value, 1.0).double() for value in (density, speed))
        pulse, moving = (torch.exp(-(((at - 1.2) / 0.12) ** 2)).expand(1, *grid.shape) for at in (x, at_faces))
        velocity = torch.stack([moving, 0 * moving, 0 * moving], dim=1)
        solver = Acoustics(Geometry(grid), rho, dtype=torch.float64, device=device)
        end = solver.advance(state_of(solver, pulse, c, velocity), 0.0, 1.45)
        p = end["pressure"][0, :, 0, 0].cpu()
        back, on, impedance = p[: n // 2], p[n // 2 :], density * speed
        where, source = (
            f"{n} cells on 4 m, ρ₂ = {density}, c₂ = {speed}",
            "closed form: (Z₂ − Z₁)/(Z₂ + Z₁), 2Z₂/(Z₂ + Z₁)",
        )
        reflected, passed = (impedance - 1) / (impedance + 1), 2 * impedance / (impedance + 1)
        found = float(back[back.abs().argmax()])
        rows.append(Row("pressure reflected by a jump [1]", found, reflected, 2e-3, source, where))
        rows.append(Row("pressure passed by a jump [1]", float(on.amax()), passed, 2e-3, source, where))
        lines.append(Line(f"ρ₂ = {density}, c₂ = {speed}", x.flatten().numpy()[::8], p.numpy()[::8]))
    return Result(rows, [Plot("A pulse behind a jump at x = 2 m", "x [m]", "p [Pa]", lines)])


def sphere_response(ka: np.ndarray, kr: np.ndarray, cosine: float) -> np.ndarray:
    """p_scattered over p_incident at the centre, of exp(i(kx − ωt)) on a rigid sphere (Morse & Ingard 1968, § 8.2)."""
    total = np.zeros(ka.shape, complex)
    for l in range(30):  # noqa: E741
        h_slope = spherical_jn(l, ka, derivative=True) + 1j * spherical_yn(l, ka, derivative=True)
        h = spherical_jn(l, kr) + 1j * spherical_yn(l, kr)
        term = -(2 * l + 1) * 1j**l * spherical_jn(l, ka, derivative=True) / h_slope * h * eval_legendre(l, cosine)
        total += np.where(np.isfinite(term), term, 0)
    return total


BALL, EARS = 0.1, {"before it": (-0.2, 0.0), "behind it": (0.2, 0.0), "beside it": (0.0, 0.2)}
"""Radius of the sphere, and where the sound is heard, from its centre along x and y [m]."""


def scattered(n: int, device: str) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """ka, and p_s / p_i at each ear, from a plane pulse over a ball of voxels and in closed form."""
    grid, width = Grid((n, n, n), (1.0 / n,) * 3, LINE), 0.04
    x, y, z = places(grid)
    ball = (x - 0.5) ** 2 + (y - 0.5) ** 2 + (z - 0.5) ** 2 < BALL**2
    radius = (3 * float(ball.double().mean()) / (4 * math.pi)) ** (1 / 3)

    def pulse(at: Tensor) -> Tensor:
        return torch.exp(-(((at - 0.22) / width) ** 2)).expand(1, *grid.shape)

    moving = pulse(places(grid, 0)[0])
    velocity = torch.stack([moving, 0 * moving, 0 * moving], dim=1)
    middle = n // 2
    cells = [(round((0.5 + dx) * n - 0.5), round((0.5 + dy) * n - 0.5), middle) for dx, dy in EARS.values()]
    heard = []
    for solid in (None, ball):
        geometry = Geometry(grid, solid)
        solver = Acoustics(geometry, 1.0, dtype=torch.float32, device=device)
        state = state_of(solver, pulse(x), 1.0, velocity * geometry.open_faces)  # the pulse is not at the ball yet
        dt, record = solver.stable_step(state), []
        for _ in range(int(0.85 / dt)):  # then sound comes back from the sides
            record.append(torch.stack([state["pressure"][0][cell] for cell in (*cells, (middle,) * 3)]))
            state = solver.step(state, 0.0, dt)
        heard.append(torch.stack(record).double().cpu().numpy().T)
    k = np.linspace(4.0, 30.0, 14)
    fourier = np.exp(1j * k[:, None] * dt * np.arange(heard[0].shape[1]))
    incident = (fourier @ heard[0][3]) * np.exp(-0.5j * k / n)  # at the centre, half a cell before that cell
    spectra = {}
    for i, (name, cell) in enumerate(zip(EARS, cells, strict=True)):
        offset = (np.array(cell) + 0.5) / n - 0.5
        r = float(np.linalg.norm(offset))
        spectra[name] = (
            fourier @ (heard[1][i] - heard[0][i]) / incident,
            sphere_response(k * radius, k * r, float(offset[0] / r)),
        )
    return k * radius, spectra


def rigid_sphere(device: str, size: str) -> Result:
    """A plane pulse scattered by a ball of voxels: what is heard round it. The staircase makes an error ∝ h."""
    rows, lines, errors, cells = [], [], [], (40, 80) if size == "small" else (96, 192)
    for n in cells:
        ka, spectra = scattered(n, device)
        size2, error2 = 0.0, 0.0
        for found, expected in spectra.values():
            size2, error2 = size2 + (np.abs(expected) ** 2).sum(), error2 + (np.abs(found - expected) ** 2).sum()
        errors.append(math.sqrt(error2 / size2))
        across = 2 * BALL * n
        source, where = "closed form: Morse & Ingard (1968), § 8.2", f"{n}³ cells, {across:.0f} across the sphere, FP32"
        quantity = "difference of the scattered spectrum, ka = 0.4 … 3 [1]"
        rows.append(Row(quantity, errors[-1], 0.0, 4 / across, source, where))
    order = math.log2(errors[0] / errors[1])
    rows.append(Row("order of that difference [1]", order, 1.0, 0.3, "staircase", f"{cells[0]}³ and {cells[1]}³ cells"))
    for name, (found, expected) in spectra.items():
        lines += [
            Line(name, ka, np.abs(found)),
            Line(f"{name}, closed form", ka, np.abs(expected), is_reference=True),
        ]
    return Result(rows, [Plot("Sound scattered by a rigid sphere", "ka", "|p_s / p_i|", lines)])


def energy(device: str, size: str) -> Result:
    """The energy of the scheme over many steps in a random medium with solids."""
    n, num_steps = (24, 1000) if size == "small" else (96, 10000)
    rng = torch.Generator().manual_seed(0)
    grid = Grid((n, n, n), (1.0 / n,) * 3, CLOSED)
    geometry = Geometry(grid, torch.rand(grid.shape, generator=rng) < 0.2)
    solver = Acoustics(geometry, 0.5 + torch.rand(1, *grid.shape, generator=rng), dtype=torch.float64, device=device)
    noise = torch.randn(1, *grid.shape, generator=rng).double()
    state = state_of(solver, noise, 0.5 + torch.rand(1, *grid.shape, generator=rng).double())
    dt = solver.stable_step(state)
    start = float(solver.energy(state, dt))
    for _ in range(num_steps):
        state = solver.step(state, 0.0, dt)
    end = float(solver.energy(state, dt))
    where = f"{n}³ cells of noise, a fifth of them solid, {num_steps} steps, FP64"
    return Result([Row("relative change of the energy [1]", end / start - 1, 0.0, 1e-12, "closed form: none", where)])


CASES = [
    Case(FAMILY, "phase speed", phase_speed),
    Case(FAMILY, "a box of walls", box_of_walls),
    Case(FAMILY, "an impedance jump", impedance_jump),
    Case(FAMILY, "a rigid sphere", rigid_sphere),
    Case(FAMILY, "energy", energy),
]
