"""Passive scalar: diffusion into a slab, Taylor's dispersion in a channel, and mixing in developed turbulence."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from latentphys import operators
from latentphys.families.family import broadband, generator
from latentphys.families.passive_scalar import StirredScalar, blotches
from latentphys.families.scalar_transport import ScalarFlow
from latentphys.families.solver import Fields
from latentphys.grid import Boundaries, Geometry, Grid
from verification.case import Case, Line, Plot, Result, Row

CHANNEL: Boundaries = (("periodic", "periodic"), ("periodic", "periodic"), ("no_slip", "no_slip"))


def middles(grid: Grid, axis: int) -> Tensor:
    return (torch.arange(grid.shape[axis], dtype=torch.float64) + 0.5) * grid.spacing[axis]


def slab(device: str, size: str) -> Result:
    """A slab at rest and at zero, whose low wall is at one from t = 0 on: c = erfc(z / 2√(Dt)) at first."""
    diffusivity, duration, far = 0.01, 0.5, 1.0
    sizes = (16, 32, 64) if size == "small" else (64, 128, 256)
    errors, profiles = [], []
    for n in sizes:
        grid = Grid((2, 1, n), (1.0, 1.0, far / n), CHANNEL)
        flow = ScalarFlow(
            Geometry(grid), diffusivity, diffusivity, walls={"z-": 1.0}, dtype=torch.float64, device=device
        )
        rest = {"velocity": torch.zeros(1, 3, *grid.shape), "scalar": torch.zeros(1, *grid.shape)}
        z = middles(grid, 2)
        exact = torch.erfc(z / (2 * math.sqrt(diffusivity * duration)))
        found = flow.advance(flow.working(rest), 0.0, duration)["scalar"][0, 0, 0].cpu()
        errors.append(float((found - exact).abs().amax()))
        profiles.append((z.numpy(), found.numpy(), exact.numpy()))
    settings = f"{sizes[-1]} cells, D t = {diffusivity * duration:g} m², FP64"
    taken = float(profiles[-1][1].sum()) * far / sizes[-1]
    rows = [
        Row(
            "error of a heated slab [1]", errors[-1], 0.0, 2e-3, "closed form (Carslaw & Jaeger 1959, § 2.5)", settings
        ),
        Row(
            "taken up through the wall [m]",
            taken,
            2 * math.sqrt(diffusivity * duration / math.pi),
            5e-3,
            "closed form",
            settings,
        ),
        Row(
            "order in h [1]",
            math.log2(errors[-2] / errors[-1]),
            2.0,
            0.05,
            "second-order scheme",
            f"{sizes[-2]} → {sizes[-1]}",
        ),
    ]
    at, here, closed = profiles[0]
    lines = [Line(f"{sizes[0]} cells", at, here), Line("closed form", at, closed, is_reference=True)]
    return Result(rows, [Plot("Heated slab", "z [m]", "c [1]", lines)])


def dispersion(device: str, size: str) -> Result:
    """A long wave of a scalar in plane Poiseuille flow decays as if it diffused with D (1 + Pe²/210), Pe = UH/D."""
    viscosity, diffusivity, length = 0.05, 0.05, 60.0
    sizes = (8, 16, 32) if size == "small" else (32, 64, 128)
    expected = diffusivity * (1 + (1 / diffusivity) ** 2 / 210)
    found = []
    for nz in sizes:
        grid = Grid((64, 1, nz), (length / 64, 1.0, 1.0 / nz), CHANNEL)
        flow = ScalarFlow(
            Geometry(grid),
            viscosity,
            diffusivity,
            lambda t: torch.tensor([12.0 * viscosity, 0.0, 0.0]),
            dtype=torch.float64,
            device=device,
        )
        z, k = middles(grid, 2), 2 * math.pi / length
        u = torch.zeros(1, 3, *grid.shape, dtype=torch.float64)
        u[:, 0] = 6 * z * (1 - z)
        wave = torch.cos(k * middles(grid, 0))[:, None, None].expand(1, *grid.shape)
        fields = flow.working({"velocity": operators.flux_of(u, grid), "scalar": wave})
        fields = flow.advance(fields, 0.0, 10.0)
        early = amplitude(fields)
        fields = flow.advance(fields, 10.0, 20.0)
        found.append(math.log(early / amplitude(fields)) / 20.0 / k**2)
    settings = f"64 × {sizes[-1]} cells, Pe = {1 / diffusivity:g}, wave length {length:g} H, FP64"
    values = np.array(found)
    rows = [
        Row(
            "effective diffusivity [m²/s]",
            values[-1],
            expected,
            0.01,
            "Taylor (1953), Aris (1956); Wooding (1960), planes",
            settings,
        ),
        Row(
            "the same, h → 0 [m²/s]",
            values[-1] + (values[-1] - values[-2]) / 3,
            expected,
            0.005,
            "Richardson, two finest grids",
            settings,
        ),
    ]
    h = 1 / np.array(sizes)
    lines = [Line("here", h, values), Line("Taylor–Aris", h, np.full(len(h), expected), is_reference=True)]
    return Result(rows, [Plot("Dispersion in a channel", "h/H [1]", "effective diffusivity [m²/s]", lines, "log")])


def amplitude(fields: Fields) -> float:
    """Of the longest wave of the mean over the channel."""
    mean = fields["scalar"][0].mean((1, 2))
    return float(torch.fft.rfft(mean)[1].abs()) * 2 / len(mean)


def mixed_skewness(flux: Tensor, scalar: Tensor, grid: Grid, axis: int) -> float:
    """Of ∂u/∂x and (∂c/∂x)² along an axis, both in cells."""
    u = operators.velocity(flux, grid)[axis]
    stretch = u.roll(-1, axis) - u
    below = (scalar - scalar.roll(1, axis)).square()
    square = 0.5 * (below + below.roll(-1, axis))
    return float((stretch * square).mean() / (stretch.square().mean().sqrt() * square.mean()))


def mixing(device: str, size: str) -> Result:
    """A scalar on a mean gradient in stationary turbulence: what the gradient feeds, diffusion takes."""
    n, viscosity, spin_up, num_frames = (48, 0.03, 5.0, 20) if size == "small" else (256, 0.003, 6.0, 20)
    grid = Grid((n, n, n), (2 * math.pi / n,) * 3)
    geometry, interval, gradient = Geometry(grid), 0.4, 1.0
    solver = StirredScalar(geometry, viscosity, viscosity, 1.0, 2, gradient, device=device, compiled=size == "large")
    rng = generator(0, 0, 1)
    first = {"velocity": broadband(geometry, 2.0, -5 / 6, rng), "scalar": blotches(grid, 1.0, rng)}
    fields = solver.working({name: value[None] for name, value in first.items()})
    fields = solver.advance(fields, 0.0, spin_up)
    variances, production, loss, skew, times = [], [], [], [], []
    for frame in range(num_frames + 1):
        flux, scalar = fields["velocity"][0].double().cpu(), fields["scalar"][0].double().cpu()
        u = operators.cell_velocity(flux, grid)[0]
        slopes = operators.grad(scalar, grid) / grid.spacing[0]
        times.append(frame * interval)
        variances.append(float(scalar.square().mean()))
        production.append(-2 * gradient * float((u * scalar).mean()))
        loss.append(2 * viscosity * float(slopes.square().sum(0).mean()))
        skew.append(np.mean([mixed_skewness(flux, scalar, grid, axis) for axis in range(3)]))
        if frame < num_frames:
            fields = solver.advance(fields, spin_up + frame * interval, interval)
    change = (variances[-1] - variances[0]) / times[-1]
    balance = float(np.trapezoid(np.array(production) - np.array(loss), times)) / times[-1]
    settings = f"{n}³, ν = D = {viscosity}, {num_frames} frames in {times[-1]:g} s, FP32"
    rows = [
        Row(
            "(production − change of ⟨c²⟩)/2χ [1]",
            1 + (balance - change) / float(np.mean(loss)),
            1.0,
            0.03,
            "variance budget",
            settings,
        ),
        Row(
            "mixed skewness of ∂u/∂x, ∂c/∂x [1]",
            float(np.mean(skew)),
            -0.5,
            0.25,
            "Kerr, J. Fluid Mech. 153 (1985), mean over the axes",
            settings,
        ),
    ]
    lines = [Line("production", np.array(times), np.array(production)), Line("2χ", np.array(times), np.array(loss))]
    return Result(rows, [Plot("Scalar variance", "t [s]", "rate of change of ⟨c²⟩ [kg²/m⁶/s]", lines)])


CASES: list[Case] = [
    Case("passive_scalar", "heated slab", slab),
    Case("passive_scalar", "Taylor–Aris dispersion", dispersion),
    Case("passive_scalar", "mixing in turbulence", mixing),
]
