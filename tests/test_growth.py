"""New experts that only new families may choose: whatever they learn, old families get the same bits as before."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from latentphys.routers import BiasBalance, DenseRouter, Experts, Layout, Nested, Router, SemanticTop1, TopK
from latentphys.routers.growth import NOISE, grow
from latentphys.training import lora
from latentphys.transformer.conditioning import Conditioning
from latentphys.transformer.dynamics import Dynamics
from latentphys.transformer.model import LatentTransformer

Factory = Callable[[int], Router]
ROUTERS: dict[str, tuple[Factory, str]] = {
    "top1": (partial(SemanticTop1, num_experts=4, semantic_dim=8), "block"),
    "top1 per sample": (partial(SemanticTop1, num_experts=5, semantic_dim=8, per="sample"), "block"),
    "top2": (partial(TopK, num_experts=5, top_k=2), "block"),
    "top1 of functions": (partial(TopK, num_experts=4, top_k=1, normalise=False), "function"),
}
PERIODIC = (True, True, False)


def new_model(name: str, dtype: torch.dtype = torch.float32) -> Dynamics:
    """Two blocks with open gates and moved biases, which knows one family."""
    torch.manual_seed(0)
    router, routing = ROUTERS[name]
    transformer = LatentTransformer(3, 1, 2, 1, 16, 2, 2, 16, router, routing=routing)
    for parameter in transformer.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    for each in transformer.routers():
        nn.init.normal_(each.bias_E, std=0.05)
    return Dynamics(transformer, Conditioning([]), {"old": 1.0}, latent_channels=3).to(dtype)


def grown(name: str, dtype: torch.dtype = torch.float32, num_new: int = 3) -> Dynamics:
    """The same, with experts for a second family that the first may not choose."""
    model = new_model(name, dtype)
    num_experts = model.transformer.routers()[0].num_experts
    model.requires_grad_(False)
    grow(model.transformer, num_new)
    model.intervals["new"], model.experts["old"] = 1.0, num_experts
    return model


def samples(dtype: torch.dtype, seed: int = 1, number: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((number, 1, 3, 4, 3, 2), (number, 2), (number, 1, 4, 3, 2))
    latents, condition, geometry = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
    return latents.to(dtype), condition.to(dtype), geometry.to(dtype)


def train(model: Dynamics, family: str, steps: int = 6) -> None:
    """With weight decay and balance, as the trainer does; the experts' load is evened out hard."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.1)
    dtype = model.latent_mean.dtype
    for step in range(steps):
        latents, condition, geometry = samples(dtype, seed=10 + step)
        result = model(latents, condition, geometry, PERIODIC, family)
        (result.latent - 2 * latents[:, -1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for router, routing in zip(model.transformer.routers(), result.routings, strict=True):
            counts = torch.bincount(routing.ids.flatten(), minlength=router.num_experts)
            router.even_out(BiasBalance(0.05), counts)


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROUTERS)
def test_old_families_get_the_same_bits_after_training_on_a_new_one(
    name: str, dtype: torch.dtype, threads: int
) -> None:
    # torch folds a product with a weight that needs a gradient, which rounds otherwise: both are frozen.
    model, other = new_model(name, dtype).requires_grad_(False), grown(name, dtype)
    given = samples(dtype)
    before = other(*given, PERIODIC, "new").latent
    train(other, "new")
    for gradients in (True, False):  # on a CPU these run other products
        with torch.set_grad_enabled(gradients):
            expected, found = model(*given, PERIODIC), other(*given, PERIODIC, "old")
            assert torch.equal(found.latent, expected.latent)
            for a, b in zip(found.routings, expected.routings, strict=True):
                assert torch.equal(a.ids, b.ids) and torch.equal(a.weights, b.weights)
    assert not torch.equal(other(*given, PERIODIC, "new").latent, before)


@pytest.mark.parametrize("name", ROUTERS)
def test_only_the_new_family_chooses_new_experts(name: str) -> None:
    model = grown(name)
    train(model, "new")
    num_old = model.experts["old"]
    given = samples(torch.float32, number=8)
    old, new = model(*given, PERIODIC, "old").routings, model(*given, PERIODIC, "new").routings
    for routing in (*old, *new):
        assert routing.num_experts == num_old + 3
        torch.testing.assert_close(routing.scores.sum(-1), torch.ones(len(routing.scores)))
    assert all(int(routing.ids.max()) < num_old and not routing.scores[:, num_old:].any() for routing in old)
    assert all(bool((routing.ids >= num_old).any()) and bool((routing.scores > 0).all()) for routing in new)
    with pytest.raises(ValueError, match=r"Expected the family of the samples .*one of \['new', 'old'\]"):
        model(*given, PERIODIC)


@pytest.mark.parametrize("name", ROUTERS)
def test_new_experts_are_noisy_copies_of_those_that_are_used_most(name: str) -> None:
    model, plain = new_model(name), new_model(name)
    routers = model.transformer.routers()
    counts = [torch.arange(router.num_experts) % 3 + n for n, router in enumerate(routers)]
    grow(model.transformer, 2, counts)
    lora.merge(model)
    for n, block in enumerate(model.transformer.blocks):
        before = plain.transformer.blocks[n].get_submodule("feed_forward.experts")
        layer = block.get_submodule("feed_forward.experts")
        assert layer.num_experts == routers[0].num_experts and len(layer.get_parameter("w_in_EDG")) == layer.num_experts
        for name_, weight in before.named_parameters():
            now, spread = layer.get_parameter(name_), weight.std()
            assert torch.equal(now[:-2], weight)
            # Of 0, 1, 2, 0, …: expert 2 comes first, then the first of those with 1.
            distance = (now[-2:] - weight[[2, 1]]).square().mean((1, 2)).sqrt() / spread
            assert (distance > 0.7 * NOISE).all() and (distance < 1.5 * NOISE).all()
    for router, old in zip(routers, plain.transformer.routers(), strict=True):
        assert torch.equal(router.bias_E[-2:], old.bias_E[[2, 1]]) and router.bias_E.dtype == torch.float32


def test_a_merged_model_has_the_same_bits_and_can_grow_again() -> None:
    """Three generations of families: each may choose the experts of those before it, and its own."""
    model = grown("top2")
    train(model, "new")
    given = samples(torch.float32)
    expected = {family: model(*given, PERIODIC, family).latent for family in ("old", "new")}
    lora.merge(model)
    assert set(model.state_dict()) == set(new_model("top2").state_dict())
    model.requires_grad_(False)
    model.experts["new"] = 8
    grow(model.transformer, 2)
    model.intervals["third"] = 1.0
    train(model, "third")
    for family, latent in expected.items():
        assert torch.equal(model(*given, PERIODIC, family).latent, latent)
    assert int(model(*samples(torch.float32, number=8), PERIODIC, "third").routings[0].ids.max()) >= 8


def test_idle_experts_do_not_change_how_busy_ones_round() -> None:
    """On as many threads as make an unfilled group of the last busy experts."""
    few, many = Experts(7, 16, 64), Experts(10, 16, 64)
    ends = torch.tensor([10, 20, 30, 40, 50, 60, 67], dtype=torch.int32)
    x, before = torch.randn(67, 16), torch.get_num_threads()
    with torch.no_grad():
        for name, weight in few.named_parameters():
            many.get_parameter(name)[:7] = weight
        torch.set_num_threads(5)
        try:
            assert torch.equal(many(x, torch.cat([ends, ends[-1:].repeat(3)])), few(x, ends))
        finally:
            torch.set_num_threads(before)


def test_a_frozen_router_keeps_its_weights_and_its_bias() -> None:
    router = SemanticTop1(16, num_experts=4)
    router.freeze()
    router.even_out(BiasBalance(0.1), torch.tensor([9, 0, 0, 0]))
    assert not router.bias_E.any() and not any(p.requires_grad for p in router.parameters())
    routing = router(torch.randn(7, 16, requires_grad=True))
    assert routing.weights.requires_grad  # towards the tokens


def test_the_balance_of_a_grown_router_evens_out_the_new_experts_among_themselves() -> None:
    model = grown("top1")
    router = model.transformer.routers()[0]
    before = router.bias_E.clone()
    router.even_out(BiasBalance(0.1), torch.tensor([100, 0, 0, 0, 4, 2, 0]))
    moved = router.bias_E - before
    assert not moved[:4].any()
    torch.testing.assert_close(moved[4:], torch.tensor([-0.1, 0.0, 0.1]))
    free = SemanticTop1(16, num_experts=4)
    free.even_out(BiasBalance(0.1), torch.tensor([9, 0, 0, 0]))
    torch.testing.assert_close(free.bias_E, BiasBalance(0.1).update(torch.zeros(4), torch.tensor([9, 0, 0, 0])))


@pytest.mark.parametrize("router", [SemanticTop1(8, num_experts=6), TopK(8, num_experts=6, top_k=2)])
def test_samples_that_may_choose_few_experts_route_as_if_there_were_no_others(router: Router) -> None:
    """The bias of the others, however large, is not looked at."""
    tokens = torch.randn(12, 8)
    small = SemanticTop1(8, num_experts=4) if isinstance(router, SemanticTop1) else TopK(8, num_experts=4, top_k=2)
    small.load_state_dict(
        {n: t[:4] if n in ("prototypes_ES", "gate_ED", "bias_E") else t for n, t in router.state_dict().items()}
    )
    router.bias_E[4:] = 5.0
    found, expected = router(tokens, Layout(3, (1, 2, 2), num_experts=4)), small(tokens, Layout(3, (1, 2, 2)))
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.weights, expected.weights)
    assert torch.equal(found.scores[:, :4], expected.scores) and not found.scores[:, 4:].any()
    everyone = router(tokens, Layout(3, (1, 2, 2)))
    assert bool((everyone.ids >= 4).all())


def test_what_cannot_grow_is_refused() -> None:
    for router in (partial(Nested, num_experts=4, num_groups=2, top_groups=1), partial(DenseRouter, num_experts=1)):
        model = LatentTransformer(3, 1, 2, 1, 16, 1, 2, 16, router)
        with pytest.raises(ValueError, match="take new experts, SemanticTop1 or TopK, got a (Nested|DenseRouter)"):
            grow(model, 1)
    model = new_model("top1").transformer
    with pytest.raises(ValueError, match="at least 1 new expert, got 0"):
        grow(model, 0)
    with pytest.raises(ValueError, match="counts of 2 routers, one per expert, got others"):
        grow(model, 1, [torch.ones(4)])
    with pytest.raises(ValueError, match="counts of 2 routers, one per expert, got others"):
        grow(model, 1, [torch.ones(4), torch.ones(5)])
    with pytest.raises(ValueError, match="a model with routers and experts, got one without"):
        grow(Experts(2, 8, 8), 1)
