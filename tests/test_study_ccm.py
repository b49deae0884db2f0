"""The choices of α in the study of composed weights: on curves whose best α is known."""

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("ccm_compare")
    for name in [name for name in sys.modules if name.startswith("ccm_")]:
        del sys.modules[name]


def test_alpha_by_the_other_targets_never_sees_its_own(load: ModuleType) -> None:
    bank = torch.tensor(load.BANK)
    curves = {x: 1 + (bank - (0.25 + 0.5 * x)).square() for x in load.TARGETS}
    for x in load.TARGETS:
        spoilt = {**curves, x: curves[x].flip(0)}
        assert load.by_others(x, spoilt) == pytest.approx(0.25 + 0.5 * x)


def test_alpha_stays_within_the_bank(load: ModuleType) -> None:
    bank = torch.tensor(load.BANK)
    curves = {x: (bank - 2 * x).square() for x in load.TARGETS}
    assert load.by_others(2.0, curves) == load.BANK[-1]


def test_one_alpha_for_all_weighs_targets_by_their_own_best(load: ModuleType) -> None:
    """A target whose errors are a thousand times larger does not decide alone."""
    bank = torch.tensor(load.BANK)
    curves = {-0.5: 1 + (bank + 1).square(), 0.5: 1000 * (1 + (bank - 1).square())}
    assert load.fixed(curves) == 0.0


@pytest.mark.parametrize("name", ["reaction_diffusion", "navier_stokes", "porous"])
def test_parts_of_a_pool_share_no_trajectory(load: ModuleType, name: str) -> None:
    stores = sys.modules["ccm_stores"]
    problem = sys.modules["ccm_problems"].PROBLEMS[name]
    parts = stores.plan(problem)
    taken = [i for part in parts for i in stores.members(problem, part)]
    coordinates = [x for part in parts.values() for x in part]
    assert taken == list(range(len(coordinates)))
    assert all(coordinates[i] == -1.5 for i in stores.members(problem, "test-1.5"))


@pytest.mark.parametrize("name", ["reaction_diffusion", "navier_stokes", "porous"])
def test_endpoints_lie_at_one_on_either_scale(load: ModuleType, name: str) -> None:
    problem = sys.modules["ccm_problems"].PROBLEMS[name]
    middle = load.other_scale(problem, 0.0)
    assert [load.other_scale(problem, x) for x in (-1.0, 1.0)] == pytest.approx([-1.0, 1.0])
    assert 0 < abs(middle) < 0.5  # the middle of one scale is not that of the other
    assert math.copysign(1, middle) == (1 if name == "porous" else -1)


def test_vortices_lie_in_the_plane_and_lose_energy_to_viscosity(load: ModuleType) -> None:
    problems = sys.modules["ccm_problems"]
    energies = []
    for x in (-1.0, 1.0):
        family = problems.navier_stokes(x)
        grid = family.grid((16, 16, 1))
        flow = family.initial(problems.Geometry(grid), {}, 0, 0)
        assert flow["velocity"][2].abs().max() == 0
        assert problems.operators.div(flow["velocity"], grid).abs().max() < 1e-12 * flow["velocity"].abs().max()
        solver = family.solver(problems.Geometry(grid), {"viscosity": problems.np.array([family.viscosity])})
        later = solver.advance(solver.working({"velocity": flow["velocity"][None]}), 0.0, family.interval)
        energies.append(float(later["velocity"].square().sum() / flow["velocity"].square().sum()))
    assert 0.3 < energies[1] < energies[0] < 1


def test_reduction_is_a_mean_of_ratios(load: ModuleType) -> None:
    report = importlib.import_module("ccm_report")
    anchor, errors = {"-2": 1.0, "+2": 0.1}, {"-2": 0.5, "+2": 0.1}
    assert report.reduction(errors, anchor, (-2.0, 2.0)) == pytest.approx(25.0)
