"""Reaction and diffusion: linear stability, a travelling wave, and a pattern against a spectral solution."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from latentphys.families.reaction_diffusion import Fisher, GrayScott, ReactionDiffusion
from latentphys.families.solver import Fields
from latentphys.grid import Boundaries, Grid
from verification.case import Case, Line, Plot, Result, Row

FAMILY = "reaction_diffusion"
LINE: Boundaries = (("free_slip", "free_slip"), ("periodic", "periodic"), ("periodic", "periodic"))


def amplitude(values: Tensor, wave: Tensor) -> float:
    return float((values * wave).mean() / wave.square().mean())


def growth_rates(device: str, size: str) -> Result:
    """Growth of disturbances of a uniform steady state of Gray–Scott, against the Jacobian's eigenvalues."""
    feed, kill, diffusivity, n = 0.05, 0.06, np.array([4e-3, 1e-3]), 1024 if size == "small" else 4096
    total = feed + kill
    u = 0.5 * (1 - math.sqrt(1 - 4 * total**2 / feed))
    steady = (u, feed * (1 - u) / total)
    jacobian = np.array([[-feed - steady[1] ** 2, -2 * total], [steady[1] ** 2, total]])
    grid = Grid((n, 1, 1), (3.0 / n, 1.0, 1.0))
    x = (torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n
    rows, modes, found, expected = [], range(7), [], []
    for mode in modes:
        k = 2 * math.pi * mode / 3.0
        values, vectors = np.linalg.eig(jacobian - np.diag(diffusivity) * k**2)
        largest = int(np.argmax(values.real))
        vector, sigma = vectors[:, largest].real, values[largest]
        if abs(sigma.imag) > 1e-12:
            continue  # an oscillation has no growth of one sign to measure
        wave = torch.cos(2 * math.pi * mode * x).reshape(1, n, 1, 1)
        fields: Fields = {name: steady[i] + 1e-7 * vector[i] * wave for i, name in enumerate(("u", "v"))}
        solver = ReactionDiffusion(
            grid,
            {"u": diffusivity[0], "v": diffusivity[1]},
            GrayScott(feed, kill),
            dtype=torch.float64,
            device=device,
        )
        sizes = []
        for _ in range(2):  # what is not of the fastest mode has gone by half the time
            for _ in range(400):
                fields = solver.step(fields, 0.0, 0.05)
            sizes.append(amplitude(fields["v"] - steady[1], wave))
        found.append(math.log(sizes[1] / sizes[0]) / 20.0)
        expected.append(float(sigma.real))
        rows.append(
            Row(
                f"growth rate σ of mode {mode} [1/s]",
                found[-1],
                expected[-1],
                5e-3,
                "closed form: eigenvalue of J − D k²",
                f"{n} cells, FP64, Δt = 0.05 s, F = {feed}, k = {kill}, D = 4e-3, 1e-3 m²/s",
            )
        )
    numbers = np.linspace(0, 2 * math.pi * 6 / 3.0, 60)
    curve = np.array([np.linalg.eigvals(jacobian - np.diag(diffusivity) * q**2).real.max() for q in numbers])
    lines = [
        Line("eigenvalue of J − D k²", numbers, curve, is_reference=True),
        Line(
            "solver", 2 * math.pi / 3.0 * np.array([r.quantity.split()[5] for r in rows], dtype=float), np.array(found)
        ),
    ]
    return Result(rows, [Plot("Growth of disturbances, Gray–Scott", "k [1/m]", "σ [1/s]", lines)])


def travelling_wave(device: str, size: str) -> Result:
    """Fisher's equation with the closed form that travels at 5/√6 (Ablowitz & Zeppetella, 1979)."""
    errors, cells, duration = [], (100, 200, 400) if size == "small" else (200, 400, 800, 1600), 8.0
    plots = []
    for n in cells:
        x = (torch.arange(n, dtype=torch.float64, device=device).reshape(1, n, 1, 1) + 0.5) * (120 / n) - 60

        def wave(t: float, x: Tensor = x) -> Tensor:
            return (1 + torch.exp((x - 5 * t / math.sqrt(6)) / math.sqrt(6))) ** -2

        grid = Grid((n, 1, 1), (120 / n, 1.0, 1.0), LINE)
        solver = ReactionDiffusion(grid, {"u": 1.0}, Fisher(1.0), dtype=torch.float64, device=device)
        fields: Fields = {"u": wave(0.0)}
        mass = [float(fields["u"].sum()) * 120 / n]
        for _ in range(4 * n):
            fields = solver.step(fields, 0.0, duration / (4 * n))
        mass.append(float(fields["u"].sum()) * 120 / n)
        errors.append(float((fields["u"] - wave(duration)).abs().amax()))
        found, exact = (f.flatten().cpu().numpy() for f in (fields["u"], wave(duration)))
        at = x.flatten().cpu().numpy()
        plots.append(Line(f"{n} cells", at, found))
    where, source = f"{cells[-1]} cells on 120 m, FP64, D = r = 1", "closed form: Ablowitz & Zeppetella (1979)"
    order = math.log2(errors[-2] / errors[-1])
    rows = [
        Row("speed of the front [m/s]", (mass[1] - mass[0]) / duration, 5 / math.sqrt(6), 2e-3, source, where),
        Row("largest error of u at t = 8 s [1]", errors[-1], 0.0, 5e-3, source, where),
        Row("order in space and time [1]", order, 2.0, 0.05, "closed form", f"{cells[-2]} and {cells[-1]} cells"),
    ]
    lines = [*plots[-1:], Line("closed form", at[::10], exact[::10], is_reference=True)]
    return Result(rows, [Plot("Travelling wave of Fisher's equation, t = 8 s", "x [m]", "u [1]", lines)])


def spectral_solution(n: int, u: np.ndarray, v: np.ndarray, d: tuple[float, float], rates: tuple[float, float],
                      duration: float) -> np.ndarray:  # fmt: skip
    """Gray–Scott on n² points of a periodic unit square by Fourier collocation and DOP853."""
    k = 2 * math.pi * np.fft.fftfreq(n, 1 / n)
    square = k[:, None] ** 2 + k[None, : n // 2 + 1] ** 2

    def rhs(t: float, y: np.ndarray) -> np.ndarray:
        u, v = y.reshape(2, n, n)
        lap = [-d_i * np.fft.irfft2(square * np.fft.rfft2(c), s=(n, n)) for d_i, c in zip(d, (u, v), strict=True)]
        made = u * v**2
        change = [lap[0] - made + rates[0] * (1 - u), lap[1] + made - sum(rates) * v]
        return np.stack(change).ravel()

    start = np.stack([u, v]).ravel()
    return solve_ivp(rhs, (0, duration), start, "DOP853", rtol=1e-9, atol=1e-11).y[:, -1].reshape(2, n, n)


def patterns(device: str, size: str) -> Result:
    """A growing Gray–Scott pattern in a plane, against Fourier collocation with an adaptive integrator of order 8."""
    d, rates, duration, fine = (1e-4, 5e-5), (0.025, 0.0535), 200.0, 64 if size == "small" else 128

    def start(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.exp(3 * (np.cos(2 * np.pi * (x - 0.4)) + np.cos(2 * np.pi * (y - 0.55)) - 1.7)) + 0.4 * np.exp(
            6 * (np.cos(2 * np.pi * (x - 0.8)) + np.cos(2 * np.pi * (y - 0.2)) - 2)
        )

    def cloud(n: int) -> tuple[np.ndarray, np.ndarray]:
        at = (np.arange(n) + 0.5) / n
        s = start(at[:, None], at[None]) / 2.5
        return 1 - 0.5 * s, 0.25 * s

    reference = np.fft.fft2(spectral_solution(fine, *cloud(fine), d, rates, duration))
    k = np.fft.fftfreq(fine, 1 / fine)
    errors, cells, lines = [], (64, 128, 256), []
    for n in cells:
        # the reference at the centres of these cells, half a cell of each grid apart
        shift = np.exp(2j * np.pi * k * (0.5 / n - 0.5 / fine))
        modes = np.zeros((2, n, n), complex)
        keep = np.abs(k) < min(fine, n) / 2
        index = k[keep].astype(int) % n
        shifted = (reference * shift[:, None] * shift[None])[:, keep][:, :, keep]
        modes[:, index[:, None], index] = shifted * (n / fine) ** 2
        expected = np.fft.ifft2(modes).real
        u, v = (torch.from_numpy(c)[None, :, :, None].to(device) for c in cloud(n))
        grid = Grid((n, n, 1), (1 / n, 1 / n, 1.0))
        solver = ReactionDiffusion(grid, {"u": d[0], "v": d[1]}, GrayScott(*rates), dtype=torch.float64, device=device)
        fields: Fields = {"u": u, "v": v}
        for _ in range(8 * n):
            fields = solver.step(fields, 0.0, duration / (8 * n))
        found = np.stack([fields[name][0, :, :, 0].cpu().numpy() for name in ("u", "v")])
        errors.append(
            float(np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean((1, 2), keepdims=True)))
        )
        lines.append(Line(f"{n}² cells", (np.arange(n) + 0.5) / n, found[1][:, n // 2]))
    lines.append(Line("spectral", (np.arange(n) + 0.5)[::4] / n, expected[1][::4, n // 2], is_reference=True))
    source, order = f"Fourier collocation on {fine}², scipy's DOP853", math.log2(errors[-2] / errors[-1])
    rows = [
        Row("error of a pattern, relative to its variation [1]", errors[-1], 0.0, 1e-2, source, f"{cells[-1]}², FP64"),
        Row("order in space and time [1]", order, 2.0, 0.1, source, f"{cells[-2]}² and {cells[-1]}², FP64"),
    ]
    largest = {"u": torch.from_numpy(expected[:1, ..., None]), "v": torch.from_numpy(expected[1:, ..., None])}
    for name, start_fields in {"u": cloud(n)[0], "v": cloud(n)[1]}.items():
        fields[name] = torch.from_numpy(start_fields)[None, :, :, None].to(device)
    fields = solver.advance(fields, 0.0, duration)
    off = torch.cat([fields["u"], fields["v"]]).cpu() - torch.cat([largest["u"], largest["v"]])
    scale = np.linalg.norm(expected - expected.mean((1, 2), keepdims=True))
    rows.append(Row("the same in the largest steps [1]", float(off.norm() / scale), 0.0, 2e-2, source, f"{n}², FP64"))
    return Result(rows, [Plot(f"Gray–Scott, t = {duration:.0f} s, y = ½", "x [m]", "v [1]", lines)])


CASES = [
    Case(FAMILY, "growth of disturbances", growth_rates),
    Case(FAMILY, "a travelling wave", travelling_wave),
    Case(FAMILY, "a pattern against a spectral solution", patterns),
]
