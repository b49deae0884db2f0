"""Top-k routing by a linear gate: closed forms, gradients, and balance."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentphys.configuration import compose
from latentphys.routers import BiasBalance, Layout, MoEFeedForward, TopK, expert_counts, telemetry
from latentphys.training.models import build


def gate(router: TopK, *rows: list[float]) -> TopK:
    """The router with a gate that is given."""
    with torch.no_grad():
        router.gate_ED.copy_(torch.tensor(rows))
    return router


def test_weights_of_a_token_by_hand() -> None:
    rows = [[0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]
    token = torch.tensor([[1.0, 0.0]])  # logits 0, 2, 1, −1
    odds = torch.tensor([0.0, 2.0, 1.0, -1.0]).exp()
    for normalise, total in ((True, odds[1] + odds[2]), (False, odds.sum())):
        routing = gate(TopK(2, 4, top_k=2, normalise=normalise), *rows)(token)
        assert routing.ids.tolist() == [[1, 2]]
        torch.testing.assert_close(routing.weights, torch.stack([odds[1], odds[2]])[None] / total)
        torch.testing.assert_close(routing.scores, (odds / odds.sum())[None])
        torch.testing.assert_close(routing.log_z, odds.sum().log().reshape(1, 1))
        assert routing.levels == ()


@given(num_experts=st.integers(2, 6), top_k=st.integers(2, 6), normalise=st.booleans(), seed=st.integers(0, 2**16))
def test_the_chosen_are_distinct_best_first_and_weighed_by_their_scores(
    num_experts: int, top_k: int, normalise: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    k = min(top_k, num_experts)
    router = TopK(8, num_experts, k, normalise).double()
    routing = router(torch.randn(9, 8, dtype=torch.float64))
    best = routing.scores.sort(dim=-1, descending=True)
    assert torch.equal(routing.ids, best.indices[:, :k])
    expected = best.values[:, :k] / (best.values[:, :k].sum(-1, keepdim=True) if normalise else 1)
    torch.testing.assert_close(routing.weights, expected)
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(9, dtype=torch.float64))


def test_all_experts_chosen_is_the_whole_softmax() -> None:
    tokens = torch.randn(7, 8)
    router = TopK(8, 4, top_k=4)
    routing = router(tokens)
    torch.testing.assert_close(routing.weights, routing.scores.gather(1, routing.ids))
    assert routing.ids.sort(-1).values.tolist() == [[0, 1, 2, 3]] * 7


def test_renaming_the_experts_renames_the_choice() -> None:
    tokens, order = torch.randn(20, 8), torch.tensor([2, 0, 4, 1, 3])
    one, other = TopK(8, 5, 2), TopK(8, 5, 2)
    one.bias_E = 0.3 * torch.randn(5)
    with torch.no_grad():
        other.gate_ED.copy_(one.gate_ED[order])
    other.bias_E = one.bias_E[order]
    assert torch.equal(order[other(tokens).ids], one(tokens).ids)
    torch.testing.assert_close(other(tokens).weights, one(tokens).weights)


@pytest.mark.parametrize("normalise", [True, False])
def test_bias_selects_and_never_weighs(normalise: bool) -> None:
    router, tokens = TopK(8, 5, 2, normalise), torch.randn(20, 8)
    before = router(tokens)
    router.bias_E[3] = 2.0
    after = router(tokens)
    assert torch.equal(after.scores, before.scores) and bool((after.ids[:, 0] == 3).all())
    chosen = after.scores.gather(1, after.ids)
    torch.testing.assert_close(after.weights, chosen / chosen.sum(-1, keepdim=True) if normalise else chosen)


def test_a_bias_against_a_gate_that_is_sure_leaves_finite_weights() -> None:
    """Both chosen scores underflow to 0 in FP32; their ratio does not."""
    router = gate(TopK(2, 3, 2), [0.0, 0.0], [-200.0, 0.0], [-201.0, 0.0])
    router.bias_E = torch.tensor([-9.0, 0.0, 0.0])
    routing = router(torch.tensor([[1.0, 0.0]]))
    assert routing.scores.tolist() == [[1.0, 0.0, 0.0]]
    assert routing.ids.sort(-1).values.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.weights.sort(-1).values, torch.tensor([[-1.0, 0.0]]).softmax(-1))
    routing.weights[:, 0].sum().backward()
    assert router.gate_ED.grad is not None and bool(router.gate_ED.grad.isfinite().all())


@pytest.mark.parametrize(("top_k", "normalise"), [(1, False), (2, False), (2, True), (4, True)])
def test_the_gate_learns(top_k: int, normalise: bool) -> None:
    layer = MoEFeedForward(16, 16, TopK(16, 4, top_k, normalise))
    layer(torch.randn(2, 30, 16))[0].square().sum().backward()
    assert layer.router is not None
    for parameter in layer.router.parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 1.0


def test_weights_and_log_z_have_the_gradients_of_finite_differences() -> None:
    router = TopK(3, 4, 2).double()

    def f(tokens: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routing = torch.func.functional_call(router, {"gate_ED": weight}, (tokens,))
        return routing.weights, routing.scores, routing.log_z

    tokens = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (tokens, router.gate_ED))


def test_training_and_evaluation_route_alike_and_one_sample_is_enough() -> None:
    """A gate with batch statistics would do neither."""
    router, tokens = TopK(8, 4, 2).double(), torch.randn(5, 8, dtype=torch.float64)
    training = router.train()(tokens)
    torch.testing.assert_close(router.eval()(tokens).weights, training.weights, rtol=0, atol=0)
    torch.testing.assert_close(router.train()(tokens[2:3]).weights, training.weights[2:3])
    assert not list(router.buffers())[1:]


def test_whole_samples_take_one_way() -> None:
    """As MoE-POT routes."""
    tokens = torch.randn(2 * 24, 8)
    router = TopK(8, 16, 4, per="sample")
    routing = router(tokens, Layout(2, (4, 3, 2)))
    ids = routing.ids.unflatten(0, (2, 24))
    assert bool((ids == ids[:, :1]).all()) and not torch.equal(ids[0], ids[1])
    torch.testing.assert_close(routing.scores[0], (router.gate_ED @ tokens[:24].mean(0)).softmax(-1))


def test_routing_is_fp32_under_autocast() -> None:
    router, tokens = TopK(8, 4, 2), torch.randn(50, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(tokens)
    assert inside.scores.dtype == inside.weights.dtype == torch.float32
    assert inside.log_z is not None and inside.log_z.dtype == torch.float32
    assert torch.equal(inside.scores, router(tokens).scores) and torch.equal(inside.ids, router(tokens).ids)
    assert router.bfloat16()(tokens.bfloat16()).weights.dtype == torch.float32


def test_balance_evens_out_a_skewed_gate() -> None:
    tokens = torch.randn(1000, 16) + 2.0
    router = TopK(16, 8, 2)

    def evenness() -> float:
        return telemetry.entropy(expert_counts(router(tokens).ids, 8))

    before = evenness()
    for _ in range(300):
        router.bias_E = BiasBalance(5e-3).update(router.bias_E, expert_counts(router(tokens).ids, 8))
    assert before < 2.2 and evenness() > 2.95


@pytest.mark.parametrize(("dynamics", "num_experts"), [("tiny", 4), ("small", 8), ("base", 16)])
def test_the_yaml_takes_the_number_of_experts_of_the_size(dynamics: str, num_experts: int) -> None:
    config = compose("train", ["stores=[a]", "run=run", f"dynamics={dynamics}", "router=topk"])
    router = build(config["router"], dim=8)
    assert isinstance(router, TopK) and router.normalise
    assert (router.num_experts, router.top_k, router.per) == (num_experts, 4, "token")


def test_refuses_what_cannot_learn_or_be() -> None:
    with pytest.raises(ValueError, match=r"Expected top_k ≥ 2 for normalised weights, got 1: .* set normalise=False"):
        TopK(8, 4, top_k=1)
    with pytest.raises(ValueError, match=r"Expected top_k in 1…3 \(the number of experts\), got 4"):
        TopK(8, 3)
    with pytest.raises(ValueError, match="Expected at least 1 expert, got num_experts = 0"):
        TopK(8, 0)
    with pytest.raises(ValueError, match="Expected per = token . sample"):
        TopK(8, 4, 2, per="batch")
