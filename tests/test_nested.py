"""Nested routing: groups per sample, experts per token inside them."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from latentphys.configuration import compose
from latentphys.routers import (
    AuxiliaryLosses,
    BiasBalance,
    Layout,
    MoEFeedForward,
    Nested,
    Routing,
    TopK,
    expert_counts,
)
from latentphys.routers.auxiliary import measure, switch_loss
from latentphys.routers.telemetry import entropy
from latentphys.training.models import build
from latentphys.transformer import LatentTransformer

LAYOUT = Layout(3, (2, 3, 2))


def tokens_of(layout: Layout = LAYOUT, dim: int = 8) -> Tensor:
    """Samples with means apart from each other, FP64."""
    means = torch.randn(layout.num_samples, 1, dim, dtype=torch.float64)
    return (means + torch.randn(layout.num_samples, layout.cells, dim, dtype=torch.float64)).flatten(0, 1)


def load_loss(routing: Routing) -> Tensor:
    """E Σ_e share_e · score_e."""
    return switch_loss(measure([[routing]])[0])


def by_hand(router: Nested, tokens: Tensor, layout: Layout) -> tuple[list[list[int]], list[list[float]]]:
    """Expert ids and weights, sample after sample and token after token."""
    num_groups, per_group = router.num_groups, router.num_experts // router.num_groups
    all_ids, all_weights = [], []
    for sample in tokens.reshape(layout.num_samples, layout.cells, -1):
        p = (router.group_gate_GD.detach() @ sample.mean(0)).softmax(0)
        bias = router.bias_E.reshape(num_groups, per_group)
        groups = sorted(range(num_groups), key=lambda g: -float(p[g] + bias[g].mean()))[: router.top_groups]
        for token in sample:
            ids, weights = [], []
            for g in groups:
                q = (router.expert_gate_ED.detach().reshape(num_groups, per_group, -1)[g] @ token).softmax(0)
                ranked = sorted(range(per_group), key=lambda s: -float(q[s] + bias[g, s]))
                places = ranked[: router.top_k_in_group]
                w_group = p[g] / (sum(p[h] for h in groups) if len(groups) > 1 else 1)
                for s in places:
                    ids.append(g * per_group + s)
                    weights.append(float(w_group * q[s] / (sum(q[r] for r in places) if len(places) > 1 else 1)))
            all_ids.append(ids)
            all_weights.append(weights)
    return all_ids, all_weights


@pytest.mark.parametrize(("top_groups", "top_k"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_what_two_loops_say(top_groups: int, top_k: int, biased: bool) -> None:
    router = Nested(8, 12, 3, top_groups, top_k).double()
    if biased:
        router.bias_E = 0.3 * torch.randn(12)
    tokens = tokens_of()
    routing = router(tokens, LAYOUT)
    ids, weights = by_hand(router, tokens, LAYOUT)
    assert routing.ids.tolist() == ids
    torch.testing.assert_close(routing.weights, torch.tensor(weights, dtype=torch.float64))
    assert routing.ids.shape == (36, router.top_k) == (36, top_groups * top_k)


def test_scores_are_products_and_sum_to_one() -> None:
    router, tokens = Nested(8, 12, 3).double(), tokens_of()
    routing = router(tokens, LAYOUT)
    groups = (tokens.reshape(3, 12, 8).mean(1) @ router.group_gate_GD.mT).softmax(-1)
    places = (tokens @ router.expert_gate_ED.mT).reshape(3, 12, 3, 4).softmax(-1)
    torch.testing.assert_close(routing.scores, (groups[:, None, :, None] * places).reshape(36, 12))
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(36, dtype=torch.float64))
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(36, dtype=torch.float64))


def test_one_group_is_topk_over_its_experts() -> None:
    nested, flat, tokens = Nested(8, 6, 1, top_groups=1, top_k=3), TopK(8, 6, 3), tokens_of().float()
    with torch.no_grad():
        flat.gate_ED.copy_(nested.expert_gate_ED)
    one, other = nested(tokens, LAYOUT), flat(tokens)
    assert torch.equal(one.ids, other.ids)
    torch.testing.assert_close(one.weights, other.weights)
    torch.testing.assert_close(one.scores, other.scores)


def test_groups_of_one_expert_are_topk_of_whole_samples() -> None:
    nested, flat = Nested(8, 6, 6, top_groups=3, top_k=1), TopK(8, 6, 3, per="sample")
    tokens = tokens_of().float()
    with torch.no_grad():
        flat.gate_ED.copy_(nested.group_gate_GD)
    one, other = nested(tokens, LAYOUT), flat(tokens, LAYOUT)
    assert torch.equal(one.ids, other.ids)
    torch.testing.assert_close(one.weights, other.weights)
    torch.testing.assert_close(one.scores, other.scores)


def test_every_token_of_a_sample_stays_in_its_groups_and_chooses_its_own_experts() -> None:
    routing = Nested(8, 36, 6).double()(tokens_of(), LAYOUT)
    groups = (routing.ids // 6).reshape(3, 12, 4)
    assert bool((groups == groups[:, :1]).all()) and len({tuple(g) for g in groups[:, 0].tolist()}) > 1
    assert groups[..., 0].equal(groups[..., 1]) and groups[..., 2].equal(groups[..., 3])
    assert not bool((groups[..., 1] == groups[..., 2]).any())
    assert len({tuple(row) for row in routing.ids[:12].tolist()}) > 4
    assert all(len(set(row)) == 4 for row in routing.ids.tolist())


def test_samples_do_not_see_each_other() -> None:
    router, tokens = Nested(8, 36, 6).double(), tokens_of()
    whole = router(tokens, LAYOUT)
    for b, sample in enumerate(tokens.split(12)):
        alone = router(sample, Layout(1, LAYOUT.shape))
        assert torch.equal(alone.ids, whole.ids[12 * b : 12 * (b + 1)])
        torch.testing.assert_close(alone.weights, whole.weights[12 * b : 12 * (b + 1)])


@pytest.mark.parametrize(("top_groups", "top_k"), list(itertools.product((1, 2), repeat=2)))
def test_both_gates_learn(top_groups: int, top_k: int) -> None:
    layer = MoEFeedForward(16, 16, Nested(16, 12, 3, top_groups, top_k))
    layer(torch.randn(4, 12, 16), Layout(4, LAYOUT.shape))[0].square().sum().backward()
    assert layer.router is not None
    for parameter in layer.router.parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0.3


def test_weights_and_scores_have_the_gradients_of_finite_differences() -> None:
    router = Nested(3, 6, 3, 2, 1).double()

    def f(tokens: Tensor, groups: Tensor, experts: Tensor) -> tuple[Tensor, ...]:
        parameters = {"group_gate_GD": groups, "expert_gate_ED": experts}
        routing: Routing = torch.func.functional_call(router, parameters, (tokens, Layout(2, (2, 1, 1))))
        levels = [x for level in routing.levels for x in (level.weights, level.scores, level.log_z)]
        return routing.weights, routing.scores, *(x for x in levels if x is not None)

    tokens = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (tokens, router.group_gate_GD, router.expert_gate_ED))


def test_bias_moves_groups_by_its_mean_and_experts_by_itself() -> None:
    router, tokens = Nested(8, 12, 3, 2, 2).double(), tokens_of()
    before = router(tokens, LAYOUT)
    router.bias_E[8:] = 5.0  # all of group 2
    router.bias_E[9] = 6.0
    after = router(tokens, LAYOUT)
    assert bool((after.ids[:, 0] == 9).all()) and bool((after.ids[:, 1] // 4 == 2).all())
    assert torch.equal(after.scores, before.scores)
    router.bias_E = torch.zeros(12)
    router.bias_E[[0, 4, 8]] = 3.0  # the groups as before
    first = router(tokens, LAYOUT)
    assert torch.equal(first.ids // 4, before.ids // 4) and bool((first.ids[:, [0, 2]] % 4 == 0).all())


def test_levels_are_the_two_decisions() -> None:
    router, tokens = Nested(8, 12, 3, 2, 2).double(), tokens_of()
    routing = router(tokens, LAYOUT)
    groups, experts = routing.levels
    assert groups.ids.shape == (3, 2) and groups.scores.shape == (3, 3)
    assert experts.ids.shape == (72, 2) and experts.scores.shape == (72, 12)
    one = torch.ones(72, dtype=torch.float64)
    torch.testing.assert_close(experts.scores.sum(-1), one)
    torch.testing.assert_close(groups.scores.sum(-1), one[:3])
    assert torch.equal(experts.ids.reshape(36, 4), routing.ids)
    assert torch.equal(experts.ids // 4, LAYOUT.spread(groups.ids, LAYOUT.shape).reshape(72, 1).expand(72, 2))
    product = LAYOUT.spread(groups.weights, LAYOUT.shape).reshape(72, 1) * experts.weights
    torch.testing.assert_close(product.reshape(36, 4), routing.weights)
    # the score of an expert is that of its group times that inside the group
    inside = experts.scores.gather(1, experts.ids)
    outside = LAYOUT.spread(groups.scores.gather(1, groups.ids), LAYOUT.shape).reshape(72, 1)
    torch.testing.assert_close((inside * outside).reshape(36, 4), routing.scores.gather(1, routing.ids))
    assert groups.log_z is not None and experts.log_z is not None
    own = router.expert_gate_ED.reshape(3, 4, 8)[groups.ids[0, 1]] @ tokens[0]
    torch.testing.assert_close(experts.log_z[1, 0], own.logsumexp(0))
    means = tokens.reshape(3, 12, 8).mean(1)
    torch.testing.assert_close(groups.log_z, (means @ router.group_gate_GD.mT).logsumexp(-1, keepdim=True))


def one_hot_problem(even: bool) -> tuple[Nested, Tensor, Layout]:
    """Two groups of two experts; half the samples go to each. Inside, tokens go to both places evenly, or all tokens of
    a group go to one place, which is another in either group."""
    router = Nested(4, 4, 2, top_groups=1, top_k=1)
    big = 50.0
    with torch.no_grad():
        router.group_gate_GD.copy_(big * torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
        place = [[0, 0, 1.0, 0], [0, 0, 0, 1.0]]
        fixed = [[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1.0, 0, 0]]
        router.expert_gate_ED.copy_(big * torch.tensor(place + place if even else fixed))
    family = torch.eye(4)[torch.tensor([0, 0, 1, 1])]
    tokens = family + torch.eye(4)[torch.tensor([2, 3, 2, 3])]
    return router, tokens, Layout(2, (2, 1, 1))


def test_the_second_level_sees_a_collapse_that_groups_together_would_hide() -> None:
    for even, expected in ((True, 1.0), (False, 2.0)):
        router, tokens, layout = one_hot_problem(even)
        groups, experts = router(tokens, layout).levels
        assert load_loss(groups).item() == pytest.approx(1.0)
        assert load_loss(experts).item() == pytest.approx(expected)
        pooled = Routing(experts.ids % 2, experts.weights, experts.scores.reshape(-1, 2, 2).sum(1))
        assert load_loss(pooled).item() == pytest.approx(1.0)


def test_uneven_groups_raise_the_second_level_but_do_not_push_it() -> None:
    """Its value is G Σ share², and even experts inside get no gradient from that."""
    router = Nested(4, 4, 2, top_groups=1, top_k=1)
    logits = torch.zeros(8, 2, requires_grad=True)
    group = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])[:, None]
    ids = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])[:, None]
    places = Routing(ids, torch.ones(8, 1), logits.softmax(-1))
    experts = router._among_all(places, group, 2)
    loss = load_loss(experts)
    assert loss.item() == pytest.approx(2 * (0.75**2 + 0.25**2))
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.zeros(8, 2))


def test_each_level_balances_its_own_gate() -> None:
    router, layout = Nested(8, 12, 3), Layout(8, (2, 2, 2))
    for level, name, other in ((0, "group_gate_GD", "expert_gate_ED"), (1, "expert_gate_ED", "group_gate_GD")):
        router.zero_grad()
        weights = [0.0, 0.0]
        weights[level] = 1.0
        AuxiliaryLosses({"switch": weights})([[router(tokens_of(layout).float(), layout)]])[0].backward()
        for parameter, least in ((name, 1e-3), (other, 0.0)):
            gradient = router.get_parameter(parameter).grad
            assert gradient is not None and bool(gradient.any()) == bool(least) and gradient.norm() >= least


def test_the_second_level_pushes_down_the_overloaded_expert_of_each_group() -> None:
    """Descent on it evens out the experts inside every group."""
    router, layout = Nested(8, 12, 3, top_groups=3), Layout(30, (2, 2, 2))
    tokens = tokens_of(layout).float() + 2.0

    def inside() -> list[float]:
        counts = expert_counts(router(tokens, layout).ids, 12).reshape(3, 4)
        return [entropy(group) for group in counts]

    before = inside()
    optimiser = torch.optim.Adam([router.expert_gate_ED], lr=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        load_loss(router(tokens, layout).levels[1]).backward()
        optimiser.step()
    assert min(before) < 1.5 and min(inside()) > 1.99


def test_the_bias_evens_out_groups_and_experts() -> None:
    layout = Layout(60, (2, 2, 2))
    router, tokens = Nested(8, 12, 3), tokens_of(layout).float() + 2.0

    def counts() -> Tensor:
        return expert_counts(router(tokens, layout).ids, 12)

    groups, experts = entropy(counts().reshape(3, 4).sum(1)), entropy(counts())
    for _ in range(300):
        router.bias_E = BiasBalance(5e-3).update(router.bias_E, counts())
    assert groups < 1.2 and entropy(counts().reshape(3, 4).sum(1)) > math.log2(3) - 0.02
    assert experts < 2.8 and entropy(counts()) > math.log2(12) - 0.04


def test_routing_is_fp32_under_autocast() -> None:
    router, tokens = Nested(8, 12, 3), tokens_of().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(tokens, LAYOUT)
    outside = router(tokens, LAYOUT)
    assert torch.equal(inside.scores, outside.scores) and torch.equal(inside.ids, outside.ids)
    for routing in (inside, *inside.levels):
        assert routing.scores.dtype == routing.weights.dtype == torch.float32
    assert router.bfloat16()(tokens.bfloat16(), LAYOUT).weights.dtype == torch.float32


def test_no_sample_and_one_cell() -> None:
    router = Nested(8, 12, 3)
    empty = router(torch.zeros(0, 8), Layout(0, (2, 3, 2)))
    assert empty.ids.shape == (0, 4) and empty.levels[1].scores.shape == (0, 12)
    assert router(torch.randn(2, 8), Layout(2, (1, 1, 1))).ids.shape == (2, 4)


def test_a_transformer_of_nested_blocks_learns_everywhere() -> None:
    router = partial(Nested, num_experts=6, num_groups=3, top_groups=2, top_k=1)
    model = LatentTransformer(2, 1, 1, 0, dim=32, depth=2, num_heads=2, hidden=16, router=router)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    latents = torch.randn(4, 1, 2, 3, 2, 2)
    prediction = model(latents, torch.randn(4, 1), torch.zeros(4, 0, 3, 2, 2), (True, True, False))
    prediction.increment.square().sum().backward()
    assert all(len(routing.levels) == 2 for routing in prediction.routings)
    for one in model.routers():
        for parameter in one.parameters():
            assert parameter.grad is not None and parameter.grad.norm() > 1e-4


@pytest.mark.parametrize("dynamics", ["tiny", "small", "base"])
def test_the_yaml_is_that_of_nestor_for_every_size(dynamics: str) -> None:
    config = compose("train", ["stores=[a]", "run=run", f"dynamics={dynamics}", "router=nested"])
    router = build(config["router"], dim=8)
    assert isinstance(router, Nested) and config["dynamics"]["router"] == config["router"]
    assert (router.num_experts, router.num_groups, router.top_groups, router.top_k) == (36, 6, 2, 4)
    config = compose("train", ["stores=[a]", "run=run", "router=nested", "router.num_experts=12"])
    assert build(config["router"], dim=8).num_experts == 12


def test_the_number_of_experts_says_itself() -> None:
    assert "num_experts=12, num_groups=3, top_groups=2, top_k_in_group=2" in repr(Nested(8, 12, 3))


def test_refuses_impossible_numbers() -> None:
    for num_groups in (5, 0, -3):
        with pytest.raises(ValueError, match=rf"divides num_experts = 36, got num_groups = {num_groups}; set num_exp"):
            Nested(8, 36, num_groups)
    with pytest.raises(ValueError, match="set num_experts to a multiple such as 6"):
        Nested(8, 4, 6)
    with pytest.raises(ValueError, match=r"Expected top_groups in 1…6 \(the number of groups\), got 7"):
        Nested(8, 36, 6, top_groups=7)
    with pytest.raises(ValueError, match=r"Expected top_k in 1…4 \(the experts of one group\), got 5"):
        Nested(8, 24, 6, top_k=5)
    with pytest.raises(ValueError, match=r"Expected top_k in 1…4 \(the experts of one group\), got 0"):
        Nested(8, 24, 6, top_k=0)
    with pytest.raises(ValueError, match="divides num_experts = 0, got num_groups = 1; set num_experts to a multiple"):
        Nested(8, 0, 1)
    router = Nested(8, 12, 3)
    with pytest.raises(ValueError, match="Expected the layout of the tokens for a Nested that looks at whole samples"):
        router(torch.randn(12, 8))
    with pytest.raises(ValueError, match=r"Expected 3 samples of \(2, 3, 2\) latent cells, got 12 tokens"):
        router(torch.randn(12, 8), LAYOUT)
