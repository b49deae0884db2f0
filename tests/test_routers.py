"""Routers choose, weigh and stay balanced."""

import math

import pytest
import torch

from latentphys.routers import (
    BiasBalance,
    DenseRouter,
    Experts,
    Layout,
    MoEFeedForward,
    RandomRouter,
    Routing,
    SemanticTop1,
    telemetry,
)
from latentphys.routers.routing import Router

ROUTERS = [SemanticTop1(16, 4), RandomRouter(16, 4), DenseRouter(16)]


def two_families(num_tokens: int = 2000, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens around two distant centres, and which centre."""
    torch.manual_seed(0)
    families = torch.arange(num_tokens) % 2
    return torch.randn(num_tokens, dim) + 4 * torch.randn(2, dim)[families], families


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: type(r).__name__)
def test_every_router_keeps_the_contract(router: Router) -> None:
    tokens = torch.randn(50, 16)
    routing = router(tokens)
    assert routing.ids.shape == routing.weights.shape == (50, router.top_k)
    assert (
        routing.ids.dtype == torch.int64 and 0 <= int(routing.ids.min()) <= int(routing.ids.max()) < router.num_experts
    )
    assert routing.scores.shape == (50, router.num_experts) == (50, routing.num_experts)
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(50))
    assert torch.equal(router(tokens).ids, routing.ids)
    assert "bias_E" in router.state_dict()
    assert router(tokens[:0]).ids.shape == (0, router.top_k)
    with pytest.raises(ValueError, match=r"Expected tokens of shape \(T, D\), got \(2, 25, 16\)"):
        router(tokens.reshape(2, 25, 16))


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: type(r).__name__)
def test_routing_is_fp32_under_autocast(router: Router) -> None:
    tokens = torch.randn(50, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(tokens)
    assert inside.scores.dtype == inside.weights.dtype == torch.float32
    assert torch.equal(inside.scores, router(tokens).scores)


def test_top1_is_the_softmax_of_the_cosine() -> None:
    router = SemanticTop1(16, 3, semantic_dim=8, temperature=0.2)
    token = torch.randn(1, 16)
    semantic = router.projection_SD @ token[0]
    cosines = torch.stack([torch.cosine_similarity(semantic, prototype, dim=0) for prototype in router.prototypes_ES])
    routing = router(token)
    torch.testing.assert_close(routing.scores[0], (cosines / 0.2).softmax(0))
    torch.testing.assert_close(routing.weights[0, 0], routing.scores.max())
    torch.testing.assert_close(router(7 * token).scores, routing.scores)


def test_the_router_learns_through_an_unnormalised_weight() -> None:
    """The same layer with the weight normalised over k = 1 gives the router no gradient."""
    router = SemanticTop1(16, 4)
    layer = MoEFeedForward(16, 16, router)
    x = torch.randn(2, 30, 16)
    layer(x)[0].square().sum().backward()
    for parameter in router.parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 1e-2

    router.zero_grad()
    routing = router(x.flatten(0, 1))
    (routing.weights / routing.weights.sum(-1, keepdim=True)).square().sum().backward()
    for parameter in router.parameters():
        assert parameter.grad is not None and parameter.grad.norm() < 1e-4


def test_training_teaches_the_router_to_part_two_families() -> None:
    """Each family needs another linear map; joint training drives family and expert to agree."""
    x, families = two_families(512)
    x = torch.nn.functional.layer_norm(x, (16,))
    target = torch.where(families[:, None] == 0, x.roll(1, -1), -x)
    router = SemanticTop1(16, 4)
    layer = MoEFeedForward(16, 16, router, num_shared=0)
    balance = BiasBalance(1e-2)
    optimiser = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(200):
        y, routing = layer(x[None])
        optimiser.zero_grad()
        (y[0] - target).square().mean().backward()
        optimiser.step()
        router.bias_E.copy_(balance.update(router.bias_E, telemetry.expert_counts(routing.ids, 4)))
    joint = telemetry.joint_counts(layer(x[None])[1].ids, families, 4, 2)
    assert telemetry.mutual_information(joint).normalised > 0.9
    assert telemetry.entropy(joint.sum(0)) > 1.9


def test_bias_selects_and_never_weighs() -> None:
    router = SemanticTop1(16, 4)
    tokens = torch.randn(20, 16)
    before = router(tokens)
    router.bias_E[2] = 2.0
    after = router(tokens)
    assert torch.equal(after.ids, torch.full((20, 1), 2))
    assert torch.equal(after.scores, before.scores)
    assert torch.equal(after.weights[:, 0], before.scores[:, 2])


def test_bias_stays_fp32_in_a_16_bit_model() -> None:
    router = SemanticTop1(16, 4)
    router.bias_E += 1.0 + 1e-3
    model = torch.nn.Sequential(router).bfloat16()
    assert model[0].prototypes_ES.dtype == torch.bfloat16
    assert router.bias_E.dtype == torch.float32 and torch.equal(router.bias_E, torch.full((4,), 1.0 + 1e-3))
    assert router(torch.randn(3, 16)).scores.dtype == torch.float32


def test_temperature_is_in_the_checkpoint() -> None:
    state = SemanticTop1(16, 4, temperature=0.3).state_dict()
    router = SemanticTop1(16, 4)
    router.load_state_dict(state)
    assert router.log_temperature.exp().item() == pytest.approx(0.3)


def test_random_routing_is_even_and_blind() -> None:
    tokens, families = two_families()
    ids = RandomRouter(16, 4)(tokens).ids
    assert telemetry.entropy(telemetry.expert_counts(ids, 4)) > 1.99
    assert telemetry.mutual_information(telemetry.joint_counts(ids, families, 4, 2)).bits < 0.01
    assert not torch.equal(RandomRouter(16, 4, seed=1)(tokens).ids, ids)
    assert torch.equal(RandomRouter(16, 4)(tokens).ids, ids)


def test_top1_routing_of_two_families_is_not_blind() -> None:
    """What the random control is measured against: even an untrained semantic router sees the family."""
    tokens, families = two_families()
    joint = telemetry.joint_counts(SemanticTop1(16, 4)(tokens).ids, families, 4, 2)
    assert telemetry.mutual_information(joint).bits > 0.1


def test_shared_experts_see_every_token() -> None:
    layer = MoEFeedForward(16, 16, SemanticTop1(16, 4), num_shared=2, shared_hidden=24)
    assert layer.shared is not None and layer.shared.w_out.weight.shape == (16, 48)
    x = torch.randn(2, 5, 16)
    y, routing = layer(x)
    assert y.shape == x.shape and routing.ids.shape == (10, 1)
    with torch.no_grad():
        layer.experts.w_out_EFD.zero_()
    torch.testing.assert_close(layer(x)[0], layer.shared(x))


def test_the_dense_control_is_an_ordinary_feed_forward() -> None:
    layer = MoEFeedForward(16, 32, DenseRouter(16), num_shared=0)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(layer(x)[0], layer.experts.one(x, 0))


@pytest.mark.parametrize("num_experts", [1, 16])
def test_experts_start_alike_however_many_there_are(num_experts: int) -> None:
    experts = Experts(num_experts, 64, 128)
    for weight, fan_in in ((experts.w_in_EDG, 64), (experts.w_out_EFD, 128)):
        for expert in weight.detach():
            assert float(expert.std()) == pytest.approx(1 / math.sqrt(fan_in), rel=0.05)


def test_refuses_what_no_router_can_be() -> None:
    with pytest.raises(ValueError, match="Expected at least 1 expert, got num_experts = 0"):
        SemanticTop1(16, 0)
    with pytest.raises(ValueError, match="Expected a positive temperature, got 0"):
        SemanticTop1(16, 4, temperature=0)
    with pytest.raises(ValueError, match="Expected 1 expert in the dense control, got 4; set num_experts to 1"):
        DenseRouter(16, num_experts=4)
    with pytest.raises(ValueError, match=r"Expected top_k in 1…4 \(the number of experts\), got 5"):
        _TopK(4, top_k=5)
    with pytest.raises(ValueError, match="Expected num_shared ≥ 0, got -1"):
        MoEFeedForward(16, 16, DenseRouter(16), num_shared=-1)


class _TopK(Router):
    def route(self, rows_RD: torch.Tensor, layout: Layout | None) -> Routing:
        return self.select(rows_RD.softmax(-1))


def test_select_takes_the_k_best() -> None:
    routing = _TopK(4, top_k=2)(torch.tensor([[0.1, 3.0, 2.0, -1.0]]))
    assert routing.ids.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.weights, routing.scores[:, [1, 2]])
