"""Reaction and diffusion against closed forms, an ODE solver, linear stability theory and measured orders."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import BOUNDARIES, box, order, points
from scipy.integrate import solve_ivp
from torch import Tensor

from latentphys.data import open_store
from latentphys.families import GrayScottPatterns, ReactionDiffusion, simulate
from latentphys.families.reaction_diffusion import Fisher, GrayScott, Kinetics
from latentphys.families.solver import Fields
from latentphys.grid import Geometry, Grid


def solver_of(grid: Grid, diffusivity: dict[str, float | Tensor], kinetics: Kinetics) -> ReactionDiffusion:
    return ReactionDiffusion(grid, diffusivity, kinetics, dtype=torch.float64)


def line(num_cells: int, length: float) -> Grid:
    """A line between walls."""
    return Grid(
        (num_cells, 1, 1), (length / num_cells, 1.0, 1.0), (("free_slip", "free_slip"), *BOUNDARIES["periodic"][1:])
    )


def gray_scott_fields(grid: Grid, *batch: int) -> Fields:
    return {
        "u": 0.2 + 0.8 * torch.rand(*batch, *grid.shape).double(),
        "v": 0.5 * torch.rand(*batch, *grid.shape).double(),
    }


@pytest.mark.parametrize("boundaries", ["periodic", "closed", "mixed"])
def test_diffusion_is_exact_in_time_and_second_order_in_space(boundaries: str) -> None:
    """One step, however long: a mode of the box decays by exp(−D λ t), with λ → k²; each trajectory has its own D."""
    duration, diffusivity, errors = 0.1, torch.tensor([0.02, 0.05], dtype=torch.float64), []
    for n in (8, 16, 32):
        grid = box(boundaries, (n, n, n), (2.0 / n, 1.0 / n, 3.0 / n))
        wave, discrete, exact = torch.ones(1, dtype=torch.float64), 0.0, 0.0
        for x, h, length, periodic in zip(
            points(grid, (0.5,) * 3), grid.spacing, grid.lengths, grid.periodic, strict=True
        ):
            k = math.pi * (2 if periodic else 1) / length
            wave = wave * torch.cos(k * x)
            discrete, exact = discrete + (2 / h * math.sin(k * h / 2)) ** 2, exact + k**2
        solver = solver_of(grid, {"u": diffusivity}, Fisher(0.0))
        after = solver.step({"u": (2 + wave).expand(2, n, n, n)}, 0.0, duration)["u"]
        decay = [torch.exp(-diffusivity * rate * duration).reshape(2, 1, 1, 1) for rate in (discrete, exact)]
        torch.testing.assert_close(after, 2 + decay[0] * wave, rtol=0, atol=1e-13)
        errors.append(float((after - 2 - decay[1] * wave).norm() / wave.norm()))
    assert all(1.9 < p < 2.1 for p in order(errors)), order(errors)


def test_a_stirred_tank_is_the_solution_of_its_rate_equations() -> None:
    """Against LSODA; third order in time, for nothing diffuses."""
    grid, feed, kill = box("periodic", (2, 2, 2)), 0.03, 0.055
    start = {"u": 0.6, "v": 0.3}
    solver = solver_of(grid, {"u": 0.1, "v": 0.1}, GrayScott(feed, kill))

    def rates(t: float, y: np.ndarray) -> list[float]:
        made = y[0] * y[1] ** 2
        return [feed * (1 - y[0]) - made, made - (feed + kill) * y[1]]

    expected = solve_ivp(rates, (0, 40), list(start.values()), "LSODA", rtol=1e-12, atol=1e-14).y[:, -1]
    errors = []
    for num_steps in (20, 40, 80):
        fields = {name: torch.full((1, 2, 2, 2), value, dtype=torch.float64) for name, value in start.items()}
        for _ in range(num_steps):
            fields = solver.step(fields, 0.0, 40 / num_steps)
        found = np.array([float(fields[name].mean()) for name in ("u", "v")])
        errors.append(float(np.abs(found - expected).max()))
    assert errors[-1] < 1e-6 and all(2.7 < p < 3.3 for p in order(errors)), (errors, order(errors))


def test_splitting_is_second_order_in_time() -> None:
    grid = box("mixed", (6, 5, 4), (0.1, 0.1, 0.1))
    solver, start = solver_of(grid, {"u": 2e-3, "v": 1e-3}, GrayScott(0.03, 0.055)), gray_scott_fields(grid, 1)

    def end(num_steps: int) -> Tensor:
        fields = start
        for _ in range(num_steps):
            fields = solver.step(fields, 0.0, 4.0 / num_steps)
        return torch.stack([fields["u"], fields["v"]])

    ends = [end(n) for n in (4, 8, 16, 32)]
    differences = [float((a - b).norm()) for a, b in zip(ends, ends[1:], strict=False)]
    assert all(1.9 < p < 2.1 for p in order(differences)), order(differences)


def jacobian(feed: float, kill: float) -> tuple[np.ndarray, np.ndarray]:
    """The uniform steady state (u, v) that is not empty, and the Jacobian of the rates there."""
    total = feed + kill
    u = 0.5 * (1 - math.sqrt(1 - 4 * total**2 / feed))
    v = feed * (1 - u) / total
    return np.array([u, v]), np.array([[-feed - v**2, -2 * total], [v**2, total]])


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4, 6])
def test_disturbances_grow_as_linear_theory_says(mode: int, unchecked: None) -> None:
    """σ = the larger eigenvalue of J − D λ, about a uniform state that is steady: Turing's band is modes 2 to 4."""
    feed, kill, diffusivity, n = 0.05, 0.06, np.array([4e-3, 1e-3]), 24
    grid = Grid((n, 1, 1), (3.0 / n, 1.0, 1.0))
    steady, rates = jacobian(feed, kill)
    laplacian = (2 / grid.spacing[0] * math.sin(math.pi * mode / n)) ** 2
    growth, vectors = np.linalg.eig(rates - np.diag(diffusivity) * laplacian)
    largest = int(np.argmax(growth.real))
    sigma, vector = growth[largest], vectors[:, largest]
    assert (sigma.real > 0) == (mode in (2, 3, 4)), sigma
    wave = torch.cos(2 * math.pi * mode * (torch.arange(n).double() + 0.5) / n).reshape(1, n, 1, 1)
    fields = {name: steady[i] + 1e-7 * float(vector[i].real) * wave for i, name in enumerate(("u", "v"))}
    solver = solver_of(grid, {"u": float(diffusivity[0]), "v": float(diffusivity[1])}, GrayScott(feed, kill))
    duration, num_steps = 20.0, 200
    for _ in range(num_steps):
        fields = solver.step(fields, 0.0, duration / num_steps)
    for i, name in enumerate(("u", "v")):
        found = float(((fields[name] - steady[i]) * wave).mean() / wave.square().mean()) / 1e-7
        assert found == pytest.approx((vector[i] * np.exp(sigma * duration)).real, rel=2e-3, abs=2e-4), name


def test_a_travelling_wave_of_fisher_is_second_order(unchecked: None) -> None:
    """The closed form u = (1 + exp((x − 5t/√6)/√6))⁻² (Ablowitz & Zeppetella, Bull. Math. Biol. 41, 1979)."""
    errors, duration = [], 5.0
    for n in (50, 100, 200):
        x = (torch.arange(n, dtype=torch.float64).reshape(1, n, 1, 1) + 0.5) * (100 / n) - 50

        def wave(t: float, x: Tensor = x) -> Tensor:
            return (1 + torch.exp((x - 5 * t / math.sqrt(6)) / math.sqrt(6))) ** -2

        fields = {"u": wave(0.0)}
        solver = solver_of(line(n, 100.0), {"u": 1.0}, Fisher(1.0))
        for _ in range(n):
            fields = solver.step(fields, 0.0, duration / n)
        errors.append(float((fields["u"] - wave(duration)).abs().amax()))
    assert errors[-1] < 0.01 and all(1.8 < p < 2.2 for p in order(errors)), (errors, order(errors))


@pytest.mark.parametrize("boundaries", ["periodic", "closed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_concentrations_stay_positive(boundaries: str, dtype: torch.dtype) -> None:
    """From fields that are zero nearly everywhere, in the largest steps; only rounding is ever cut off."""
    grid = box(boundaries, (8, 8, 8), (0.05,) * 3)
    v = torch.where(torch.rand(2, *grid.shape) < 0.02, 3.0, 0.0).to(dtype)
    fields = {"u": torch.where(v > 0, 0.0, 1.0).to(dtype), "v": v}
    parameters = torch.tensor([0.02, 0.03])
    solver = ReactionDiffusion(grid, {"u": 2e-4, "v": 1e-4}, GrayScott(parameters, 0.05), dtype=dtype)
    for _ in range(10):
        dt = solver.stable_step(fields)
        reacted = solver._react(fields, torch.tensor(0.5 * dt, dtype=dtype))
        for name, value in reacted.items():
            diffused = solver.laplacian(value, solver._decay(dt)[name])
            assert float(diffused.amin()) > -10 * torch.finfo(dtype).eps * float(value.amax())
        assert all(bool((value >= 0).all()) for value in reacted.values())
        fields = solver.step(fields, 0.0, dt)
        assert all(bool((value >= 0).all()) for value in fields.values())
    assert float(fields["v"].amax()) > 0 and float(fields["u"].amax()) <= 1 + 1e-6


def test_the_stable_step_is_stable_and_many_of_them_are_not() -> None:
    grid = box("periodic", (4, 4, 4), (0.1,) * 3)
    solver = solver_of(grid, {"u": 1e-4, "v": 1e-4}, GrayScott(0.03, 0.055))
    for factor, holds in ((1.0, True), (24.0, False)):
        fields = gray_scott_fields(grid, 1)
        fields["v"] = fields["v"] + 2.0
        dt = factor * solver.stable_step(fields)
        for _ in range(20):
            fields = solver.step(fields, 0.0, dt)
        assert all(bool((value.abs() < 4).all()) for value in fields.values()) == holds, factor


def test_a_batch_of_solutions_is_its_solutions_and_fused_ones_are_the_same(
    monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # traced, but not built
    grid, feed = box("closed", (5, 4, 6)), torch.tensor([0.02, 0.04], dtype=torch.float64)
    diffusivity, start = torch.tensor([0.01, 0.03], dtype=torch.float64), gray_scott_fields(grid, 2)
    together = solver_of(grid, {"u": diffusivity, "v": diffusivity / 2}, GrayScott(feed, 0.05)).step(start, 0.0, 0.9)
    fused = ReactionDiffusion(
        grid, {"u": diffusivity, "v": diffusivity / 2}, GrayScott(feed, 0.05), dtype=torch.float64, compiled=True
    ).step(start, 0.0, 0.9)
    for i in range(2):
        d = float(diffusivity[i])
        alone = solver_of(grid, {"u": d, "v": d / 2}, GrayScott(float(feed[i]), 0.05))
        after = alone.step({name: value[i : i + 1] for name, value in start.items()}, 0.0, 0.9)
        for name in ("u", "v"):
            torch.testing.assert_close(together[name][i], after[name][0], rtol=0, atol=1e-14)
            torch.testing.assert_close(together[name], fused[name], rtol=0, atol=1e-14)


def test_impossible_solutions_and_families_are_refused(unchecked: None) -> None:
    open_box = Grid((4, 4, 4), (1.0,) * 3, (("inflow", "outflow"), *BOUNDARIES["periodic"][1:]))
    with pytest.raises(ValueError, match="Expected a box of walls and periodic axes, got .*; close its sides"):
        ReactionDiffusion(open_box, {"u": 1.0}, Fisher(1.0))
    with pytest.raises(ValueError, match=r"Expected a diffusivity ≥ 0 \[m²/s\] of 'u', got -1.0"):
        ReactionDiffusion(box("periodic"), {"u": -1.0}, Fisher(1.0))
    for arguments, message in [
        ({"feed": (0.02, 0.1)}, r"range of feed rates, two numbers with 0 < a ≤ b < 0.0625, got \[0.02, 0.1\]"),
        ({"excess": (-0.1, 0.0)}, "range of excess kill rates"),
        ({"diffusivity": (0.0, 1.0)}, "range of diffusivities"),
        ({"ratio": 0.0}, "Expected a finite ratio of diffusivities > 0, got 0.0"),
        ({"sides": "open"}, r"sides that are periodic \| closed, got 'open'"),
    ]:
        with pytest.raises(ValueError, match=message):
            GrayScottPatterns(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("sides", ["periodic", "closed"])
def test_a_data_set_of_patterns_is_positive_and_alive(sides: str, tmp_path: Path, unchecked: None) -> None:
    family = GrayScottPatterns(sides=sides, spin_up=30.0)  # type: ignore[arg-type]
    path = simulate(family, tmp_path / "a", shape=(16, 16, 16), num_trajectories=3, num_frames=4, seed=1)
    store = open_store(path)
    assert store.family == "reaction_diffusion" and set(store.parameters) == set(family.parameter_units)
    assert store.grid.boundaries[0][0] == ("periodic" if sides == "periodic" else "free_slip")
    first = {name: store.read(name, 0, 0) for name in ("u", "v")}
    assert not torch.equal(first["v"], store.read("v", 1, 0))
    for i in range(3):
        u, v = store.read("u", i, slice(None)), store.read("v", i, slice(None))
        assert bool((u >= 0).all()) and bool((v >= 0).all()) and float(u.amax()) <= 1 + 1e-6
        assert bool((v.std((1, 2, 3)) > 0.02).all())
        drawn = family.draw(1, i)
        excess = drawn["kill"] - math.sqrt(drawn["feed"]) / 2 + drawn["feed"]
        assert family.excess[0] <= excess <= family.excess[1] and drawn["diffusivity_u"] == 2 * drawn["diffusivity_v"]
    geometry = Geometry(family.grid((8, 8, 8)))
    again = [family.initial(geometry, family.draw(1, 2), 1, 2)["v"] for _ in range(2)]
    assert torch.equal(*again) and not torch.equal(again[0], family.initial(geometry, family.draw(1, 1), 1, 1)["v"])
