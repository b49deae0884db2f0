"""No bad step reaches the weights, and too many of them stop a run."""

import json
import math

import pytest

from latentphys.training.guards import ENOUGH, RECENT, DeadExperts, Guard


def fed(guard: Guard, losses: list[float], family: str = "porous") -> list[str | None]:
    return [guard.verdict(step, family, loss, 1.0) for step, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("loss", "norm", "message"),
    [
        (math.nan, 1.0, "the loss of porous is nan"),
        (-math.inf, 1.0, "the loss of porous is -inf"),
        (1.0, math.inf, "the gradient of porous has the norm inf"),
        (1.0, math.nan, "the gradient of porous has the norm nan"),
    ],
)
def test_what_is_not_finite_is_refused(loss: float, norm: float, message: str) -> None:
    guard = Guard()
    assert guard.verdict(0, "porous", 1.0, 1.0) is None
    assert guard.verdict(1, "porous", loss, norm) == message
    assert guard.total == 1 and not guard.gives_up


def test_a_leap_is_measured_against_the_median_of_its_own_family() -> None:
    guard = Guard(spike=5.0)
    assert fed(guard, [2.0, 4.0] * (ENOUGH // 2)) == [None] * ENOUGH
    assert fed(guard, [0.01] * ENOUGH, "channel") == [None] * ENOUGH
    assert guard.verdict(50, "porous", 15.0, 1.0) is None
    reason = guard.verdict(51, "porous", 21.0, 1.0)
    assert reason is not None and reason.startswith("the loss of porous leapt to 21, 5.25 times its median")
    assert guard.verdict(52, "channel", 0.049, 1.0) is None
    assert guard.verdict(53, "channel", 0.051, 1.0) is not None
    # What was refused moves no median.
    assert all(guard.verdict(54, "porous", 21.0, 1.0) for _ in range(RECENT))


def test_a_few_losses_say_nothing_of_leaps_and_the_first_are_forgotten() -> None:
    guard = Guard(spike=2.0)
    assert fed(guard, [1.0] * (ENOUGH - 1) + [100.0]) == [None] * ENOUGH
    late = Guard(spike=2.0)
    fed(late, [1.9**n for n in range(30)])
    assert len(late.state()["losses"]["porous"]) < 30
    slow = Guard(spike=2.0)
    assert fed(slow, [math.exp(-n / 40) for n in range(300)]) == [None] * 300
    assert len(slow.state()["losses"]["porous"]) == RECENT
    assert slow.verdict(300, "porous", 3 * math.exp(-250 / 40), 1.0) is not None
    assert Guard(spike=0.0).verdict(0, "porous", 1e30, 1.0) is None


def test_it_gives_up_after_too_many_in_a_hundred_steps() -> None:
    guard = Guard(max_skipped=2)
    for step in (0, 5, 101, 105):
        guard.verdict(step, "porous", math.nan, 1.0)
        assert not guard.gives_up
    guard.verdict(150, "porous", math.nan, 1.0)
    assert guard.gives_up and guard.total == 5
    strict = Guard(max_skipped=0)
    strict.verdict(0, "porous", math.nan, 1.0)
    assert strict.gives_up


def test_what_json_gives_back_judges_alike() -> None:
    losses = [math.exp(-n / 7) * (1.1 + math.sin(n)) for n in range(60)] + [math.nan, 9.0] + [0.01] * 5
    whole, first = Guard(spike=4.0), Guard(spike=4.0)
    expected = fed(whole, losses)
    fed(first, losses[:33])
    second = Guard(spike=4.0)
    second.load(json.loads(json.dumps(first.state())))
    verdicts = [second.verdict(step, "porous", loss, 1.0) for step, loss in enumerate(losses) if step >= 33]
    assert verdicts == expected[33:] and any(verdicts)
    assert second.state() == whole.state()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_skipped": -1}, "Expected max_skipped ≥ 0, got -1"), ({"spike": 1.0}, "Expected spike > 1, .* got 1.0")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guard(**settings)  # type: ignore[arg-type]


def test_dead_experts_are_reported_once_and_again_after_they_have_lived() -> None:
    dead = DeadExperts(50)

    def line(layer: int, **ages: int) -> dict[str, object]:
        return {"layer": layer, "dead": [int(name[1:]) for name in ages], "dead_age": list(ages.values())}

    assert dead.newly_dead([line(0, e1=49), line(1, e0=10)]) == []
    assert dead.newly_dead([line(0, e1=59), line(1, e0=20, e3=50)]) == [(0, 1, 59), (1, 3, 50)]
    assert dead.newly_dead([line(0, e1=69), line(1, e3=60)]) == []
    assert dead.newly_dead([line(0), line(1, e3=70)]) == []
    assert dead.newly_dead([line(0, e1=55), line(1, e3=80)]) == [(0, 1, 55)]
