"""One decision per token, per sample, or per block of latent cells."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latentphys.routers import Layout, MoEFeedForward, RandomRouter, Router, Routing, SemanticTop1, TopK
from latentphys.routers.routing import Per
from latentphys.transformer import LatentTransformer

SHAPE = (4, 6, 2)
LAYOUT = Layout(2, SHAPE)
KINDS: dict[str, Callable[..., Router]] = {
    "top1": partial(SemanticTop1, 8, 5, semantic_dim=6),
    "topk": partial(TopK, 8, 5, 2),
    "random": partial(RandomRouter, 8, 5),
}


def make(kind: str, per: Per) -> Router:
    """A router with the same weights whatever its decisions hold for."""
    torch.manual_seed(7)
    return KINDS[kind](per=per).double()


def tokens_of(layout: Layout = LAYOUT) -> Tensor:
    return torch.randn(layout.num_samples * layout.cells, 8, dtype=torch.float64)


def assert_same(a: Routing, b: Routing) -> None:
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.weights, b.weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-12)
    assert (a.log_z is None) == (b.log_z is None)
    if a.log_z is not None:
        torch.testing.assert_close(a.log_z, b.log_z, rtol=0, atol=1e-12)


def group_of(layout: Layout, block: tuple[int, int, int]) -> Tensor:
    """The number of each token's block, counted cell by cell."""
    numbers: dict[tuple[int, ...], int] = {}
    groups = []
    for cell in itertools.product(range(layout.num_samples), *(range(n) for n in layout.shape)):
        key = (cell[0], *(i // length for i, length in zip(cell[1:], block, strict=True)))
        groups.append(numbers.setdefault(key, len(numbers)))
    return torch.tensor(groups, dtype=torch.long)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [(2, 3, 1), (1, 6, 2), (4, 1, 1)])
def test_a_block_is_judged_by_its_mean_and_its_tokens_share_the_decision(
    kind: str, block: tuple[int, int, int]
) -> None:
    tokens, groups = tokens_of(), group_of(LAYOUT, block)
    routing = make(kind, block)(tokens, LAYOUT)
    means = torch.stack([tokens[groups == g].mean(0) for g in range(int(groups.max()) + 1)])
    decided = make(kind, "token")(means)
    spread = Routing(
        decided.ids[groups],
        decided.weights[groups],
        decided.scores[groups],
        None if decided.log_z is None else decided.log_z[groups],
    )
    assert_same(routing, spread)
    assert len(torch.unique(decided.ids[:, 0])) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_box_is_the_sample_and_one_cell_is_the_token(kind: str) -> None:
    tokens = tokens_of()
    assert_same(make(kind, SHAPE)(tokens, LAYOUT), make(kind, "sample")(tokens, LAYOUT))
    assert_same(make(kind, (1, 1, 1))(tokens, LAYOUT), make(kind, "token")(tokens))
    assert_same(make(kind, "token")(tokens, LAYOUT), make(kind, "token")(tokens))
    assert not torch.equal(make(kind, "sample")(tokens, LAYOUT).ids, make(kind, "token")(tokens).ids)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_blocks_are_routed_like_their_tokens(kind: str) -> None:
    """Spreading and then pooling is the identity, so nothing is lost where a block is uniform."""
    block = (2, 2, 2)
    values = torch.randn(2 * 2 * 3 * 1, 8, dtype=torch.float64)
    tokens = LAYOUT.spread(values, block)
    torch.testing.assert_close(LAYOUT.pool(tokens, block), values)
    assert_same(make(kind, block)(tokens, LAYOUT), make(kind, "token")(tokens))


@given(
    shape=st.tuples(*(st.integers(1, 4) for _ in range(3))),
    factors=st.tuples(*(st.integers(1, 3) for _ in range(3))),
    num_samples=st.integers(0, 3),
)
def test_pool_is_the_mean_over_each_block_and_spread_its_scaled_adjoint(
    shape: tuple[int, int, int], factors: tuple[int, int, int], num_samples: int
) -> None:
    x, y, z = (n * f for n, f in zip(shape, factors, strict=True))
    layout = Layout(num_samples, (x, y, z))
    tokens = torch.randn(num_samples * layout.cells, 3, dtype=torch.float64)
    pooled = layout.pool(tokens, factors)
    groups, volume = group_of(layout, factors), factors[0] * factors[1] * factors[2]
    expected = torch.zeros_like(pooled).index_add(0, groups, tokens) / volume
    torch.testing.assert_close(pooled, expected)
    other = torch.randn_like(pooled)
    torch.testing.assert_close((pooled * other).sum() * volume, (tokens * layout.spread(other, factors)).sum())


@pytest.mark.parametrize("kind", ["top1", "topk"])
def test_gradients_are_those_of_an_explicit_mean(kind: str) -> None:
    block, experts = (2, 3, 2), torch.randn(5, dtype=torch.float64)

    def gradients(router: Router, value: Tensor, tokens: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, [tokens, *router.parameters()]))

    tokens = tokens_of().requires_grad_()
    pooled = make(kind, block)
    routing = pooled(tokens, LAYOUT)
    found = gradients(pooled, (routing.weights * experts[routing.ids]).sum().square(), tokens)
    plain = make(kind, "token")
    means = rearrange(tokens, "(b i x j y z) d -> b i j x y z d", b=2, i=2, x=2, j=2, y=3, z=2).mean((3, 4, 5))
    decided = plain(means.flatten(0, 2))
    total = 12 * (decided.weights * experts[decided.ids]).sum()
    for a, b in zip(found, gradients(plain, total.square(), tokens), strict=True):
        assert b.abs().amax() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 6, 1), (1, 6, 2), (4, 1, 1), (1, 1, 1)])
def test_blocks_are_cut_at_thin_axes(kind: str, shape: tuple[int, int, int]) -> None:
    layout = Layout(2, shape)
    tokens, (bx, by, bz) = tokens_of(layout), (min(2, n) for n in shape)
    assert_same(make(kind, (2, 2, 2))(tokens, layout), make(kind, (bx, by, bz))(tokens, layout))
    assert_same(make(kind, (9, 9, 9))(tokens, layout), make(kind, "sample")(tokens, layout))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", ["token", "sample", (2, 2, 2)])
def test_samples_do_not_mix_and_evaluation_is_repeatable(kind: str, per: Per) -> None:
    layout = Layout(3, SHAPE)
    router, tokens = make(kind, per).eval(), tokens_of(layout)
    whole = router(tokens, layout)
    assert torch.equal(router(tokens, layout).ids, whole.ids)
    assert torch.equal(router(tokens.clone(), layout).weights, whole.weights)
    for b, sample in enumerate(tokens.split(layout.cells)):
        rows = slice(b * layout.cells, (b + 1) * layout.cells)
        log_z = None if whole.log_z is None else whole.log_z[rows]
        assert_same(
            router(sample, Layout(1, SHAPE)),
            Routing(whole.ids[rows], whole.weights[rows], whole.scores[rows], log_z),
        )
    changed = tokens.clone()
    changed[-layout.cells :] += 3.0
    assert torch.equal(router(changed, layout).scores[: -layout.cells], whole.scores[: -layout.cells])


def test_a_layer_routes_its_blocks() -> None:
    layer = MoEFeedForward(8, 8, make("topk", (2, 2, 2)), num_shared=0).double()
    x = tokens_of().unflatten(0, (2, -1))
    y, routing = layer(x, LAYOUT)
    assert_same(routing, make("topk", (2, 2, 2))(x.flatten(0, 1), LAYOUT))
    assert y.shape == x.shape
    with pytest.raises(ValueError, match="Expected the layout of the tokens for a TopK that looks at whole samples"):
        layer(x)


def test_a_transformer_routes_samples_and_blocks_of_its_latents() -> None:
    for per, num_ways in (("sample", 1), ([2, 1, 2], 6), ("token", 24)):
        model = LatentTransformer(
            2, 1, 1, 0, dim=32, depth=2, num_heads=2, hidden=16, router=partial(TopK, num_experts=9, top_k=4, per=per)
        )
        latents = torch.randn(2, 1, 2, 4, 3, 2)
        prediction = model(latents, torch.ones(2, 1), torch.ones(2, 0, 4, 3, 2), (True, True, True))
        assert len(prediction.routings) == 2
        for routing in prediction.routings:
            for sample in routing.scores.split(24):
                assert len(torch.unique(sample, dim=0)) == num_ways


@pytest.mark.parametrize("per", ["batch", (2, 2), (2, 2, 2, 2), (0, 2, 2), (2, 2, -1), (2.0, 2, 2), []])
@pytest.mark.usefixtures("unchecked")
def test_refuses_what_no_decision_can_hold_for(per: Per) -> None:
    with pytest.raises(ValueError, match=r"Expected per = token \| sample \| three block lengths ≥ 1 such as \[2, 2"):
        TopK(8, 5, 2, per=per)


def test_refuses_blocks_layouts_and_tokens_that_do_not_fit() -> None:
    tokens = tokens_of()
    with pytest.raises(ValueError, match=r"blocks that divide the \(4, 6, 2\) latent cells, got \(3, 3, 2\); choose"):
        make("topk", (3, 3, 2))(tokens, LAYOUT)
    for per in ("sample", (2, 2, 2)):
        with pytest.raises(ValueError, match=r"Expected the layout .* a SemanticTop1 that looks at whole samples"):
            make("top1", per)(tokens)
        with pytest.raises(ValueError, match=r"Expected 3 samples of \(4, 6, 2\) latent cells, got 96 tokens"):
            make("top1", per)(tokens, Layout(3, SHAPE))
