"""Shallow water on the sphere: the cases of Williamson et al. (1992), gravity waves, and Galewsky's jet."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.integrate import quad
from torch import Tensor

from latentphys import sphere as harmonics
from latentphys.families.shallow_water import ShallowWater, truncation
from latentphys.families.solver import Fields
from latentphys.sphere import Sphere
from verification.case import Case, Line, Plot, Result, Row

FAMILY = "shallow_water_sphere"
RADIUS, ROTATION, GRAVITY, DAY = 6.37122e6, 7.292e-5, 9.80616, 86400.0


def earth(nlat: int) -> Sphere:
    return Sphere(nlat, 2 * nlat, RADIUS)


def layer(nlat: int, depth: float, device: str, **options: float | tuple[float, float]) -> ShallowWater:
    arguments = {"rotation": ROTATION, "gravity": GRAVITY, "mean_depth": depth} | options
    return ShallowWater(earth(nlat), dtype=torch.float64, device=device, **arguments)  # type: ignore[arg-type]


def mean(values: Tensor, sphere: Sphere) -> Tensor:
    return (values * sphere.areas).sum((-2, -1)) / (4 * math.pi * sphere.radius**2)


def at_rest(solver: ShallowWater, depth: float, flow: Tensor | None = None) -> Fields:
    """A level layer, at rest or with winds that it is not in balance with."""
    shape = solver.sphere.shape
    u = torch.zeros(2, *shape, dtype=torch.float64) if flow is None else flow
    return solver.working({"height": torch.full((1, *shape), depth, dtype=torch.float64), "velocity": u[None]})


def steady_flow(device: str, size: str) -> Result:
    """Williamson's case 2: a layer that rotates as a whole about any axis stays as it is; errors after five days."""
    nlat, wind, level = 32 if size == "small" else 128, 2 * math.pi * RADIUS / (12 * DAY), 2.94e4
    rows = []
    for name, angle in {"0": 0.0, "0.05": 0.05, "π/2 − 0.05": math.pi / 2 - 0.05, "π/2": math.pi / 2}.items():
        solver = layer(nlat, level / GRAVITY, device, axis=(angle, math.pi))
        theta, phi = solver.sphere.colatitudes[:, None], solver.sphere.longitudes
        mu = theta.cos() * math.cos(angle) - theta.sin() * phi.cos() * math.sin(angle)
        height = (level - (RADIUS * ROTATION * wind + wind**2 / 2) * mu**2) / GRAVITY
        east = wind * (theta.sin() * math.cos(angle) + theta.cos() * phi.cos() * math.sin(angle))
        velocity = torch.stack([wind * phi.sin() * math.sin(angle) + 0 * theta, east])
        state = solver.working({"height": height[None], "velocity": velocity[None]})
        end = solver.recorded(solver.advance(state, 0.0, 5 * DAY))
        error = mean((end["height"][0] - height).square(), solver.sphere) / mean(height.square(), solver.sphere)
        where = f"T{truncation(solver.sphere)}, {nlat} × {2 * nlat} points, α = {name}, FP64"
        source = "closed form: Williamson et al. (1992), case 2"
        rows.append(Row("l₂ error of h after 5 days [1]", float(error.sqrt()), 0.0, 1e-12, source, where))
        apart = (end["velocity"][0] - velocity).square().sum(0)
        error = mean(apart, solver.sphere) / mean(velocity.square().sum(0), solver.sphere)
        rows.append(Row("l₂ error of u after 5 days [1]", float(error.sqrt()), 0.0, 1e-11, source, where))
    return Result(rows)


def gravity_waves(device: str, size: str) -> Result:
    """Frequencies of infinitesimal waves on a sphere at rest, all degrees at once; third order in time."""
    nlat, depth = 32 if size == "small" else 128, 5e3
    solver = layer(nlat, depth, device, rotation=0.0)
    degrees = np.arange(1, solver.last + 1)
    exact = np.sqrt(GRAVITY * depth * degrees * (degrees + 1)) / RADIUS
    start = at_rest(solver, depth)
    start["height"][0, 1 : solver.last + 1, 0, 0] = 1e-6
    dt, errors = solver.stable_step(start), []
    for halvings in range(3):
        state, size_of_step = start, dt / 2**halvings
        for _ in range(2**halvings):
            state = solver.step(state, 0.0, size_of_step)
        h = state["height"][0, 1 : solver.last + 1, 0, 0].cpu().numpy() / 1e-6
        rate = state["divergence"][0, 1 : solver.last + 1, 0, 0].cpu().numpy() / 1e-6 * depth / exact
        found = np.arctan2(rate, h) / dt  # h = cos ωt, −∂h/∂t / ω = H δ / ω = sin ωt
        errors.append(np.abs(found / exact - 1))
    where = f"T{solver.last}, FP64, Δt = {dt:.0f} s"
    source = "closed form: ω² = g H l(l + 1)/a²"
    rows = [
        Row("frequency of degree 5 against the closed form [1]", 1 + float(errors[0][4]), 1.0, 2e-3, source, where),
        Row("frequency of the last degree, quarter step [1]", 1 + float(errors[2][-1]), 1.0, 1e-2, source, where),
        Row(
            "order of the phase in Δt, degree 5 [1]",
            math.log2(errors[1][4] / errors[2][4]),
            4.0,
            0.2,
            "Runge–Kutta",
            where,
        ),
    ]
    lines = [
        Line("solver", degrees, exact * (1 + errors[0])),
        Line("closed form", degrees, exact, is_reference=True),
    ]
    return Result(rows, [Plot("Gravity waves in the largest step", "degree l", "ω [1/s]", lines)])


def haurwitz_stream_function(sphere: Sphere, wavenumber: int, omega: float) -> Tensor:
    latitude, phi = math.pi / 2 - sphere.colatitudes[:, None], sphere.longitudes
    wave = latitude.cos() ** wavenumber * latitude.sin() * (wavenumber * phi).cos()
    return RADIUS**2 * omega * (wave - latitude.sin())


def rossby_haurwitz(device: str, size: str) -> Result:
    """Angular speed of Rossby–Haurwitz waves in layers so deep that the flow has no divergence."""
    nlat, omega, duration, rows = 16 if size == "small" else 48, 7.848e-6, 6 * 3600.0, []
    speeds, depths = [], (1e6, 4e6, 1.6e7)
    for wavenumber in (2, 3, 4):
        expected = (wavenumber * (3 + wavenumber) * omega - 2 * ROTATION) / ((1 + wavenumber) * (2 + wavenumber))
        found = []
        for depth in depths if wavenumber == 4 else depths[-1:]:
            solver = layer(nlat, depth, device)
            flow = harmonics.velocity(haurwitz_stream_function(solver.sphere, wavenumber, omega), None, solver.sphere)
            states = [solver.balance(at_rest(solver, depth, flow))]
            states.append(solver.advance(states[0], 0.0, duration))
            before, after = (torch.view_as_complex(s["vorticity"])[0, wavenumber + 1, wavenumber] for s in states)
            found.append(float((before / after).angle()) / (wavenumber * duration))
        if wavenumber == 4:
            speeds = found
        where = f"T{solver.last}, H = {depths[-1]:g} m, 6 hours, FP64, R = {wavenumber}"
        source = "Williamson et al. (1992), eq. 147; Haurwitz (1940)"
        rows.append(Row("angular speed of the wave [1/s]", found[-1], expected, 2e-3, source, where))
    deep, away = np.array(depths), np.abs(np.array(speeds) / expected - 1)
    lines = [
        Line("solver, R = 4", deep, away),
        Line("∝ 1/H", deep, away[0] * deep[0] / deep, is_reference=True),
    ]
    return Result(
        rows, [Plot("Haurwitz's speed in a layer of depth H", "H [m]", "relative difference", lines, "log", "log")]
    )


def haurwitz_conservation(device: str, size: str) -> Result:
    """Williamson's case 6 in its own depth, 8 km: what is conserved over days, without any damping."""
    nlat, days = (32, 3) if size == "small" else (128, 14)
    solver = layer(nlat, 8e3, device)
    flow = harmonics.velocity(haurwitz_stream_function(solver.sphere, 4, 7.848e-6), None, solver.sphere)
    state = solver.balance(at_rest(solver, 8e3, flow))
    before = solver.invariants(state)
    after = solver.invariants(solver.advance(state, 0.0, days * DAY))
    where, rows = f"T{solver.last}, {days} days, FP64, no damping", []
    for name, tolerance in {"mass": 1e-14, "energy": 1e-6, "enstrophy": 1e-4}.items():
        change = float(after[name] / before[name]) - 1
        rows.append(Row(f"relative change of {name} [1]", change, 0.0, tolerance, "closed form: none", where))
    return Result(rows)


def jet(latitude: np.ndarray | float) -> np.ndarray:
    """Zonal wind of Galewsky et al. (2004), eq. 2 [m/s]."""
    south, north = math.pi / 7, math.pi / 2 - math.pi / 7
    peak = math.exp(-4 / (north - south) ** 2)
    latitude = np.asarray(latitude, dtype=float)
    inside = (latitude > south) & (latitude < north)
    product = np.where(inside, (latitude - south) * (latitude - north), -1.0)
    return np.where(inside, 80.0 / peak * np.exp(1 / product), 0.0)


def galewsky(device: str, size: str) -> Result:
    """Galewsky's jet: its depth by quadrature of the wind, and its instability after a bump of the depth."""
    nlat, days = (64, 5) if size == "small" else (256, 6)
    solver = layer(nlat, 1e4, device, damping_time=3600.0 * 6)
    grid = solver.sphere
    latitude = math.pi / 2 - grid.colatitudes.numpy()

    def slope(y: float) -> float:
        u = float(jet(y))
        return RADIUS * u * (2 * ROTATION * math.sin(y) + math.tan(y) * u / RADIUS) / GRAVITY

    depth = -np.array([quad(slope, -math.pi / 2, y, points=(math.pi / 7, math.pi / 2 - math.pi / 7) if y > 1 else None,
                            epsabs=1e-9, epsrel=1e-11, limit=200)[0] for y in latitude])  # fmt: skip
    exact = torch.from_numpy(depth)[:, None].expand(grid.shape)
    exact = exact + 1e4 - mean(exact, grid)
    wind = torch.from_numpy(jet(latitude))[:, None].expand(grid.shape)
    balanced = solver.balance(at_rest(solver, 1e4, torch.stack([0 * wind, wind])))
    height = solver.on_grid(balanced)[0][0].cpu()
    error = float((height - exact).abs().amax() / (exact.amax() - exact.amin()))
    where = f"T{solver.last}, {nlat} × {2 * nlat} points, FP64"
    source = "Galewsky et al. (2004), eq. 3, by scipy's quad"
    rows = [Row("depth that balances the jet, largest difference over its range [1]", error, 0.0, 5e-3, source, where)]
    phi = grid.longitudes.numpy()
    bump = 120.0 * np.cos(latitude)[:, None] * np.exp(-((3 * np.minimum(phi, 2 * math.pi - phi)) ** 2))
    bump = bump * np.exp(-((15 * (math.pi / 4 - latitude)) ** 2))[:, None]
    height, velocity = solver.on_grid(balanced)
    state = solver.working({"height": height + torch.from_numpy(bump).to(height), "velocity": velocity})
    before = solver.invariants(state)
    state = solver.advance(state, 0.0, days * DAY)
    after = solver.invariants(state)
    rows.append(
        Row(
            "relative change of mass [1]",
            float(after["mass"] / before["mass"]) - 1,
            0.0,
            1e-14,
            "closed form: none",
            where,
        )
    )
    vorticity = harmonics.vorticity(solver.on_grid(state)[1], grid)[0].cpu()
    row = int(np.argmin(np.abs(latitude - math.radians(45.0))))
    lines = [Line(f"day {days}, 45° N", np.degrees(phi), 1e5 * vorticity[row].numpy())]
    return Result(rows, [Plot("Galewsky's jet breaks up", "longitude [°]", "ζ [10⁻⁵/s]", lines)])


CASES = [
    Case(FAMILY, "a steady flow about any axis", steady_flow),
    Case(FAMILY, "gravity waves", gravity_waves),
    Case(FAMILY, "Rossby–Haurwitz waves", rossby_haurwitz),
    Case(FAMILY, "conservation in a Rossby–Haurwitz wave", haurwitz_conservation),
    Case(FAMILY, "Galewsky's jet", galewsky),
]
