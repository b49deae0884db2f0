"""Learning-rate schedules: closed forms, and what is the same for runs of every length."""

import math

import pytest
import torch

from latentphys.training.schedules import SCHEDULES, learning_rate_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    found = [learning_rate_factor(schedule, step, 100, 8) for step in range(9)]
    assert found == [*(n / 8 for n in range(1, 9)), 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_is_the_peak(schedule: str) -> None:
    assert learning_rate_factor(schedule, 0, 10, 0) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_is_all_warm_up_only_rises(schedule: str) -> None:
    assert [learning_rate_factor(schedule, step, 4, 8) for step in range(4)] == [1 / 8, 2 / 8, 3 / 8, 4 / 8]


def test_cosine_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    for step in range(10, 101):
        assert learning_rate_factor("cosine", step, 100, 10) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()
    assert learning_rate_factor("cosine", 100, 100, 10) == 0.0


def test_wsd_is_stable_and_then_one_minus_a_square_root() -> None:
    factors = [learning_rate_factor("wsd", step, 200, 10, cooldown=0.25) for step in range(201)]
    assert factors[10:151] == [1.0] * 141
    assert factors[150:] == [1 - math.sqrt(n / 50) for n in range(51)]
    assert factors[200] == 0.0


def test_wsd_of_a_longer_run_is_the_same_until_the_shorter_one_decays() -> None:
    short, long = (
        [learning_rate_factor("wsd", step, num_steps, 10, cooldown=0.2) for step in range(1000)]
        for num_steps in (1000, 5000)
    )
    assert short[:801] == long[:801]
    assert short[801] < 1 == long[801]


@pytest.mark.parametrize("num_steps", [1, 2, 7, 30, 1000])
@pytest.mark.parametrize("cooldown", [1e-6, 0.1, 0.5, 1.0])
def test_wsd_decays_in_whole_steps_after_the_warm_up(num_steps: int, cooldown: float) -> None:
    warmup = num_steps // 3
    factors = [learning_rate_factor("wsd", step, num_steps, warmup, cooldown) for step in range(num_steps + 1)]
    after = factors[warmup:]
    assert all(0 <= later <= earlier <= 1 for earlier, later in zip(after, after[1:], strict=False))
    assert after[0] == 1.0 and after[-1] == 0.0
    assert sum(f < 1 for f in after) == min(max(1, round(cooldown * num_steps)), num_steps - warmup)


def test_constant_stays() -> None:
    assert {learning_rate_factor("constant", step, 50, 5) for step in range(5, 50)} == {1.0}


def test_refuses_unknown_schedules() -> None:
    with pytest.raises(ValueError, match=r"Expected a schedule of cosine \| wsd \| constant, got 'linear'"):
        learning_rate_factor("linear", 0, 10, 1)


@pytest.mark.parametrize("cooldown", [0.0, -0.1, 1.1, math.nan])
def test_refuses_a_cooldown_that_is_no_share(cooldown: float) -> None:
    with pytest.raises(ValueError, match="Expected a cooldown above 0 and up to 1, as a share of the run, got"):
        learning_rate_factor("wsd", 0, 10, 1, cooldown)
