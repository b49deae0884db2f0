"""Auxiliary losses: closed forms, gradients, no dependence on the size of the batch, and what they do to a router."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latentphys.routers import (
    AuxiliaryLosses,
    BiasBalance,
    DenseRouter,
    Layout,
    Nested,
    RandomRouter,
    Router,
    Routing,
    SemanticTop1,
    TopK,
    telemetry,
)
from latentphys.routers.auxiliary import LOSSES, measure

LAYOUT = Layout(75, (2, 2, 2))


def value(name: str, *steps: Routing) -> Tensor:
    return LOSSES[name](measure([steps])[0])


def chosen(ids: Tensor, num_experts: int) -> Routing:
    """Routing that is as sure as can be of its choices, which share the weight."""
    scores = torch.nn.functional.one_hot(ids, num_experts).double().mean(1)
    return Routing(ids, torch.full(ids.shape, 1 / ids.shape[1], dtype=torch.float64), scores)


def softmax_routing(logits: Tensor, ids: Tensor) -> Routing:
    scores = logits.softmax(-1)
    return Routing(ids, scores.gather(-1, ids), scores, logits.logsumexp(-1, keepdim=True))


def draw(seed: int, num_tokens: int, num_experts: int, k: int) -> tuple[Tensor, Tensor]:
    """Logits and choices that need not be the best ones, as under a bias."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    return logits, torch.rand(num_tokens, num_experts, generator=generator).topk(k).indices


def two_families() -> Tensor:
    """Tokens around two distant centres."""
    torch.manual_seed(0)
    return torch.randn(600, 16) + 4 * torch.randn(2, 16)[torch.arange(600) % 2]


def load_entropy(routing: Routing) -> float:
    return telemetry.entropy(telemetry.expert_counts(routing.ids, routing.num_experts))


def trained(router: Router, weights: dict[str, float], rate: float = 0.0, steps: int = 120) -> Routing:
    """What a router says after some steps of Adam on auxiliary losses alone, with or without the bias."""
    tokens, losses, balance = two_families(), AuxiliaryLosses(weights), BiasBalance(rate)
    optimiser = torch.optim.Adam(router.parameters(), lr=1e-2)
    for _ in range(steps):
        routing = router(tokens, LAYOUT)
        optimiser.zero_grad()
        losses([[routing]])[0].backward()
        optimiser.step()
        router.bias_E.copy_(balance.update(router.bias_E, telemetry.expert_counts(routing.ids, router.num_experts)))
    return router(tokens, LAYOUT)


@pytest.mark.parametrize("num_tokens", [8, 800])
@pytest.mark.parametrize("k", [1, 2])
def test_even_load_and_collapse_in_closed_form(num_tokens: int, k: int) -> None:
    """On n of E experts the load loss is E/n, CV² is E/n − 1."""
    places = torch.arange(k) + k * torch.arange(num_tokens)[:, None]
    for experts in (8, 4, 2):
        routing = chosen(places % experts, 8)
        assert float(value("switch", routing)) == pytest.approx(8 / experts, rel=1e-14)
        assert float(value("importance", routing)) == pytest.approx(8 / experts - 1, abs=1e-14)
    one = chosen(torch.zeros(num_tokens, 1, dtype=torch.long), 8)
    assert (float(value("switch", one)), float(value("importance", one))) == pytest.approx((8.0, 7.0), rel=1e-14)


def test_the_load_loss_is_one_where_the_scores_are_even_whoever_is_chosen() -> None:
    routing = softmax_routing(torch.zeros(6, 3), torch.zeros(6, 1, dtype=torch.long))
    assert float(value("switch", routing)) == pytest.approx(1.0)


def test_the_z_loss_is_the_mean_square_of_log_z() -> None:
    routing = softmax_routing(torch.tensor([[1.0, 1.0], [-3.0, -3.0]]).double(), torch.zeros(2, 1, dtype=torch.long))
    expected = ((1 + math.log(2)) ** 2 + (-3 + math.log(2)) ** 2) / 2
    assert float(value("z", routing)) == pytest.approx(expected, rel=1e-14)


def test_the_importance_of_an_expert_is_the_weight_it_got() -> None:
    """Three tokens with weights 0.5, 0.25 and 0.25: CV² by hand. A common factor cancels."""
    ids, weights = torch.tensor([[0], [1], [1]]), torch.tensor([[0.5], [0.25], [0.25]])
    even = Routing(ids, weights, torch.full((3, 2), 0.5))
    assert float(value("importance", even)) == pytest.approx(0.0, abs=1e-15)
    skewed = Routing(ids, torch.tensor([[0.5], [0.75], [0.25]]), torch.full((3, 2), 0.5))
    assert float(value("importance", skewed)) == pytest.approx((0.25 / 0.75) ** 2)
    scaled = Routing(ids, 7 * skewed.weights, skewed.scores)
    assert float(value("importance", scaled)) == pytest.approx((0.25 / 0.75) ** 2)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("k", [1, 2])
def test_gradients(name: str, k: int) -> None:
    logits, ids = draw(0, 7, 4, k)
    assert torch.autograd.gradcheck(lambda x: value(name, softmax_routing(x, ids)), logits.requires_grad_())


def test_the_load_loss_pushes_down_the_overloaded_expert() -> None:
    logits = torch.zeros(6, 3, requires_grad=True)
    value("switch", softmax_routing(logits, torch.tensor([[0], [0], [0], [0], [1], [2]]))).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


@given(
    seed=st.integers(0, 2**31),
    num_tokens=st.integers(1, 12),
    num_experts=st.integers(2, 9),
    k=st.integers(1, 2),
    times=st.integers(2, 5),
)
def test_the_size_of_the_batch_does_not_matter(
    seed: int, num_tokens: int, num_experts: int, k: int, times: int
) -> None:
    """Every token repeated n times: the same loss, and 1/n of the gradient for each."""
    logits, ids = draw(seed, num_tokens, num_experts, k)
    logits.requires_grad_()
    for name in LOSSES:
        once = value(name, softmax_routing(logits, ids))
        (gradient,) = torch.autograd.grad(once, logits)
        copies = logits.detach().repeat_interleave(times, 0).requires_grad_()
        more = value(name, softmax_routing(copies, ids.repeat_interleave(times, 0)))
        torch.testing.assert_close(more, once, rtol=1e-12, atol=1e-14)
        (per_copy,) = torch.autograd.grad(more, copies)
        torch.testing.assert_close(per_copy * times, gradient.repeat_interleave(times, 0), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_the_steps_of_an_unrolled_pass_are_one_batch(name: str) -> None:
    (first, ids_1), (second, ids_2) = draw(1, 9, 4, 2), draw(2, 5, 4, 2)
    steps = [softmax_routing(logits.requires_grad_(), ids) for logits, ids in ((first, ids_1), (second, ids_2))]
    whole = softmax_routing(torch.cat([first, second]), torch.cat([ids_1, ids_2]))
    total, _ = AuxiliaryLosses({name: 1.0})([[routing] for routing in steps])
    torch.testing.assert_close(total, value(name, whole))
    assert abs(total.item() - value(name, steps[0]).item()) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_without_tokens_there_is_no_loss(name: str) -> None:
    logits, ids = draw(0, 0, 4, 2)
    nothing = softmax_routing(logits.requires_grad_(), ids)
    loss = value(name, nothing)
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and logits.grad.shape == (0, 4)
    some = softmax_routing(*draw(1, 5, 4, 2))
    assert torch.equal(value(name, some, nothing), value(name, some))


def test_the_sum_is_weighted_and_averaged_over_routers() -> None:
    first, second = (
        softmax_routing(logits.requires_grad_(), ids) for logits, ids in (draw(1, 9, 4, 2), draw(2, 9, 8, 1))
    )
    total, parts = AuxiliaryLosses({"switch": 0.3, "importance": 0, "z": 2})([[first, second]])
    means = {name: (value(name, first) + value(name, second)).detach() / 2 for name in ("switch", "z")}
    assert set(parts) == {"switch", "z"}
    torch.testing.assert_close(parts, means)
    torch.testing.assert_close(total.detach(), 0.3 * means["switch"] + 2 * means["z"])
    assert total.requires_grad and not any(part.requires_grad for part in parts.values())


def test_each_level_has_its_weight() -> None:
    tokens, router = torch.randn(600, 16), Nested(16, 12, num_groups=3, top_groups=2, top_k=2)
    routing = router(tokens, LAYOUT)
    outer, inner = (value("switch", level).item() for level in routing.levels)
    assert abs(outer - inner) > 1e-3
    total, parts = AuxiliaryLosses({"switch": [3e-2, 1e-4]})([[routing, routing]])
    assert float(total.detach()) == pytest.approx(3e-2 * outer + 1e-4 * inner)
    assert {name: float(part) for name, part in parts.items()} == pytest.approx({"switch/0": outer, "switch/1": inner})
    assert float(AuxiliaryLosses({"switch": 0.5})([[routing]])[0].detach()) == pytest.approx(0.5 * (outer + inner))

    def reaches(weights: list[float]) -> list[bool]:
        total, _ = AuxiliaryLosses({"switch": weights})([[routing]])
        gates = (router.group_gate_GD, router.expert_gate_ED)
        return [bool(gradient.any()) for gradient in torch.autograd.grad(total, gates, retain_graph=True)]

    assert (reaches([1, 0]), reaches([0, 1])) == ([True, False], [False, True])


@pytest.mark.parametrize("router", [RandomRouter(16, 4), DenseRouter(16)], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("weights", [0.1, [0.1, 0.2]])
def test_a_router_with_nothing_to_learn_has_no_loss(
    router: Router, weights: float | list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    routing = router(torch.randn(10, 16, requires_grad=True))
    total, parts = AuxiliaryLosses(dict.fromkeys(LOSSES, weights))([[routing, routing]])
    assert (float(total), parts) == (0.0, {})
    assert all(math.isfinite(value(name, routing)) for name in LOSSES)

    def refuse(*_: object) -> None:
        raise AssertionError("nothing to add up over ranks")

    monkeypatch.setattr(dist, "all_reduce", refuse)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert float(AuxiliaryLosses({"switch": 1.0})([[routing]])[0]) == 0.0
    assert float(AuxiliaryLosses({"switch": 0.0})([[softmax_routing(*draw(0, 3, 4, 1))]])[0]) == 0.0


ROUTERS: list[Callable[[], Router]] = [
    lambda: SemanticTop1(16, 4),
    lambda: TopK(16, 8, top_k=2),
    lambda: Nested(16, 8, num_groups=2, top_groups=1, top_k=1),
]


@pytest.mark.parametrize("make", ROUTERS, ids=["SemanticTop1", "TopK", "Nested"])
def test_the_load_loss_alone_evens_out_a_skewed_router(make: Callable[[], Router]) -> None:
    router = make()
    full = math.log2(router.num_experts)
    assert load_entropy(router(two_families(), LAYOUT)) < full - 0.5
    assert load_entropy(trained(router, {"switch": 1.0})) > full - 0.02


def test_cv2_alone_evens_out_experts_that_are_chosen() -> None:
    torch.manual_seed(1)
    router = TopK(16, 4, top_k=2)
    assert load_entropy(router(two_families())) < 1.6
    assert load_entropy(trained(router, {"importance": 1.0})) > 1.99


def test_cv2_does_not_reach_experts_that_nobody_chooses_and_the_bias_does() -> None:
    torch.manual_seed(2)
    router = TopK(16, 8, top_k=2)
    routing = router(two_families())
    dead = telemetry.dead_experts(telemetry.expert_counts(routing.ids, 8))
    assert 0 < len(dead) < 6
    for name, reached in (("importance", False), ("switch", True)):
        (gradient,) = torch.autograd.grad(value(name, routing), router.gate_ED, retain_graph=True)
        assert bool(gradient[dead].any()) == reached
    assert load_entropy(trained(router, {"importance": 1.0}, rate=1e-2)) > 2.98


def test_the_z_loss_alone_keeps_logits_small() -> None:
    router = TopK(16, 8, top_k=2)
    before = float(value("z", router(two_families())))
    assert before > 10 and float(value("z", trained(router, {"z": 1.0}))) < 0.1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cv2": 0.1}, r"Expected auxiliary losses of switch \| importance \| z, got 'cv2'"),
        ({"switch": -0.1}, r"Expected a finite weight ≥ 0 for the auxiliary loss 'switch', .*, got -0\.1"),
        ({"z": math.nan}, "Expected a finite weight ≥ 0 for the auxiliary loss 'z', .*, got nan"),
        ({"z": [0.1, math.inf]}, r"one per level of the routers, got \[0\.1, inf\]"),
        ({"z": []}, r"one per level of the routers, got \[\]"),
        ({"z": "0.1"}, "one per level of the routers, got '0.1'"),
        ({"z": True}, "one per level of the routers, got True"),
    ],
)
def test_refuses_weights_that_cannot_be(unchecked: None, weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AuxiliaryLosses(weights)


def test_refuses_another_number_of_weights_than_levels() -> None:
    logits, ids = draw(0, 5, 4, 1)
    routing = softmax_routing(logits.requires_grad_(), ids)
    with pytest.raises(
        ValueError, match=r"one weight of the auxiliary loss 'switch', or 1, as many .* levels, got \[1, 2, 3\]"
    ):
        AuxiliaryLosses({"switch": [1, 2, 3]})([[routing]])


def test_no_weights_are_no_losses() -> None:
    for weights in (None, {}, {"switch": None, "z": 0.0, "importance": [0, 0]}):
        assert not AuxiliaryLosses(weights)
    assert AuxiliaryLosses({"switch": [0, 1e-4]})
