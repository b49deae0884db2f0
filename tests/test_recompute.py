"""Activations that are worked out twice: the same gradients to the bit, the same routing, and less memory."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from reference import velocity_scale
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentphys.autoencoders import Autoencoder, Bottleneck
from latentphys.grid import Geometry, Grid
from latentphys.routers import (
    DenseRouter,
    Nested,
    RandomRouter,
    Router,
    Routing,
    SemanticTop1,
    TreeRouter,
    expert_counts,
)
from latentphys.routers import moe as moe_module
from latentphys.routers.topk import TopK
from latentphys.training.recompute import set_recompute
from latentphys.transformer.block import TransformerBlock
from latentphys.transformer.model import LatentTransformer, Prediction

ROUTERS: dict[str, tuple[Callable[[int], Router], str]] = {
    "top1": (partial(SemanticTop1, num_experts=4, semantic_dim=8), "block"),
    "top1 of blocks": (partial(SemanticTop1, num_experts=4, semantic_dim=8, per=(1, 2, 1)), "block"),
    "topk": (partial(TopK, num_experts=4, top_k=2), "block"),
    "nested": (partial(Nested, num_experts=8, num_groups=4), "block"),
    "random": (partial(RandomRouter, num_experts=4), "block"),
    "dense": (DenseRouter, "block"),
    "topk of functions": (partial(TopK, num_experts=4, top_k=2), "function"),
    "tree": (partial(TreeRouter, num_experts=4), "function"),
}


def new_model(router: str = "top1", mixer: str = "attention", dtype: torch.dtype = torch.float32) -> LatentTransformer:
    """Two blocks whose gates are open, so that every parameter has a gradient."""
    torch.manual_seed(0)
    factory, routing = ROUTERS[router]
    model = LatentTransformer(3, 2, 2, 1, 16, 2, 2, 16, factory, routing=routing, mixer=mixer)
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    if isinstance(model.router, TreeRouter):
        model.router.fit(torch.randn(32, model.router.dim))
    return model.to(dtype)


def new_inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, 2, 3, 3, 2, 2), (3, 2), (3, 1, 3, 2, 2))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def gradients(model: LatentTransformer, bf16: bool = False) -> tuple[Prediction, dict[str, Tensor]]:
    """Of a loss on the increment and on all that the routers say, as auxiliary losses take it."""
    model.zero_grad()
    dtype = model.embed.weight.dtype
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        prediction = model(*new_inputs(dtype), (True, True, False))
    loss = prediction.increment.square().mean()
    for routing in prediction.routings:
        loss = loss + routing.scores.square().mean() + routing.weights.pow(3).mean()
        loss = loss if routing.log_z is None else loss + routing.log_z.square().mean()
    loss.backward()
    return prediction, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("mixer", ["attention", "fourier"])
@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_are_the_same_to_the_bit(router: str, mixer: str, precision: str) -> None:
    model = new_model(router, mixer, torch.float64 if precision == "fp64" else torch.float32)
    results, calls = [], 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for module in model.routers():
        module.register_forward_hook(count)
    for on in (False, True):
        set_recompute(model, on)
        calls = 0
        results.append(gradients(model, precision == "bf16"))
        assert calls == len(model.routers())
    (plain, expected), (recomputed, found) = results
    assert torch.equal(plain.increment, recomputed.increment)
    assert found.keys() == expected.keys() and len(found) > 20
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for a, b in zip(plain.routings, recomputed.routings, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.weights, b.weights)
        assert torch.equal(expert_counts(a.ids, a.num_experts), expert_counts(b.ids, b.num_experts))


@pytest.mark.parametrize("router", ["top1", "topk", "nested"])
def test_a_near_tie_does_not_go_another_way_the_second_time(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that sees tokens that differ by 1e-7 when it is run again, one of them on the border of two experts."""
    model = new_model(router, dtype=torch.float64)
    block = model.blocks[0]
    assert isinstance(block, TransformerBlock)
    gate, given = block.feed_forward.router, []
    assert gate is not None
    gate.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    gradients(model)
    z, layout = given[0]

    # Bisect along a line to where the decision changes.
    line = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        here, low, high = gate(z, layout).ids, 0.0, 1.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if torch.equal(gate(z + middle * line, layout).ids, here) else (low, middle)
        start, shift = (part.unflatten(0, (3, -1)) for part in (low * line, 1e-7 * line))
        there = gate(z + (low + 1e-7) * line, layout).ids
    assert not torch.equal(here, there)

    before, after, dispatched, runs = block._before_routing, block._after_routing, [], 0
    dispatch = moe_module.dispatch

    def at_the_border(*inputs: Any) -> tuple[Tensor, Tensor]:
        x, tokens = before(*inputs)
        return x, tokens + start

    def noisy(x: Tensor, tokens: Tensor, *rest: Any) -> tuple[Tensor, Routing]:
        nonlocal runs
        runs += 1
        return after(x, tokens if runs == 1 else tokens + shift, *rest)

    def note(x: Tensor, ids: Tensor, *rest: Any) -> Tensor:
        dispatched.append(ids)
        return dispatch(x, ids, *rest)

    monkeypatch.setattr(block, "_before_routing", at_the_border)
    monkeypatch.setattr(block, "_after_routing", noisy)
    monkeypatch.setattr(moe_module, "dispatch", note)
    set_recompute(model, True)
    prediction, _ = gradients(model)
    assert runs == 2 and torch.equal(prediction.routings[0].ids, here)
    first, second = (routing.ids for routing in prediction.routings)
    assert [len(ids) for ids in dispatched] == [len(here)] * 4
    assert all(torch.equal(a, b) for a, b in zip(dispatched, (first, second, second, first), strict=True))


def test_random_numbers_in_a_block_are_drawn_alike_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model()
    for block in model.blocks:
        mix = block._mix
        monkeypatch.setattr(block, "_mix", lambda x, *rest, mix=mix: mix(nn.functional.dropout(x, 0.5), *rest))
    results = []
    for on in (False, True):
        set_recompute(model, on)
        torch.manual_seed(3)
        results.append((gradients(model)[1], torch.get_rng_state()))
    (expected, before), (found, after) = results
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(before, after)


class Live(TorchDispatchMode):
    """The bytes of all that was made while it was on and is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.made[reference.cdata] = reference, storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def kept(model: nn.Module, call: Callable[[], Any]) -> dict[bool, int]:
    """Bytes kept for the gradient, without and with recomputing."""
    result = {}
    for on in (False, True):
        set_recompute(model, on)
        with Live() as live:
            out = call()
        result[on] = live.bytes()
        del out
    return result


def test_the_transformer_keeps_less() -> None:
    torch.manual_seed(0)
    model = LatentTransformer(4, 2, 2, 1, 64, 4, 4, 128, ROUTERS["top1"][0])
    inputs = [torch.randn(1, 2, 4, 8, 8, 8), torch.randn(1, 2), torch.randn(1, 1, 8, 8, 8)]
    found = kept(model, lambda: model(*inputs, (True, True, True)))
    assert found[True] < 0.35 * found[False]
    # Tokens before, between and after the two parts of each block, and the routers' own: the narrow semantic rows.
    assert found[True] > 4 * 2 * 512 * 64 * 4


def new_autoencoder() -> tuple[Autoencoder, Callable[[], Tensor]]:
    torch.manual_seed(0)
    grid = Grid((16, 16, 16), (0.1, 0.1, 0.1), (("periodic", "periodic"),) * 2 + (("no_slip", "no_slip"),))
    scale = velocity_scale(grid, torch.zeros(3, 1, 1, 16, dtype=torch.float64))
    model = Autoencoder({"flow": scale}, 8, [16, 32], [2, 2], bottleneck=Bottleneck(noise=0.1))
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.05)
    geometry, flux = Geometry(grid), torch.randn(2, 3, 16, 16, 16)
    return model, lambda: model(flux, geometry, "flow").fields


@pytest.mark.parametrize("bf16", [False, True])
def test_the_autoencoder_has_the_same_gradients_and_keeps_less(bf16: bool) -> None:
    model, call = new_autoencoder()
    results = []
    for on in (False, True):
        set_recompute(model, on)
        model.zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            flux = call()
        flux.square().mean().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((flux, grads))
    (flux, expected), (again, found) = results
    assert torch.equal(flux, again)
    assert len(expected) == len(list(model.parameters()))
    assert all(torch.equal(grad, found[name]) for name, grad in expected.items())
    assert any(grad.any() for name, grad in expected.items() if "blocks" in name)
    if not bf16:
        sizes = kept(model, call)
        assert sizes[True] < 0.6 * sizes[False]


@pytest.mark.parametrize("state", ["evaluation", "without gradients"])
def test_nothing_is_recomputed_where_nothing_is_trained(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("recomputed")

    monkeypatch.setattr("latentphys.transformer.block.checkpoint", refuse)
    monkeypatch.setattr("latentphys.autoencoders.layers.checkpoint", refuse)
    model, (autoencoder, call) = new_model(), new_autoencoder()
    for module in (model, autoencoder):
        set_recompute(module, True)
        module.train(state != "evaluation")
    with torch.set_grad_enabled(state == "evaluation"):
        model(*new_inputs(), (True, True, False))
        call()
    with pytest.raises(AssertionError, match="recomputed"):
        model.train()(*new_inputs(), (True, True, False))


def test_refuses_a_model_without_blocks() -> None:
    with pytest.raises(ValueError, match="Expected a model with transformer blocks or levels .* got Linear"):
        set_recompute(nn.Linear(2, 2), True)


SHARDED = """
import torch, torch.distributed as dist
from functools import partial
from torch import nn
from latentphys.routers import SemanticTop1
from latentphys.training.recompute import set_recompute
from latentphys.training.sharding import shard
from latentphys.transformer.model import LatentTransformer

dist.init_process_group("gloo")
rank = dist.get_rank()
for parallel in (1, 2):
    torch.manual_seed(0)
    model = LatentTransformer(3, 2, 2, 1, 16, 2, 2, 16, partial(SemanticTop1, num_experts=4, semantic_dim=8))
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    shard(model, expert_parallel=parallel)
    results = []
    for on in (False, True, True):
        set_recompute(model, on)
        model.zero_grad()
        for n in range(2):  # unrolled: every block runs twice before the gradient
            generator = torch.Generator().manual_seed(10 * rank + n)
            shapes = ((2, 2, 3, 3, 2, 2), (2, 2), (2, 1, 3, 2, 2))
            out = model(*(torch.randn(*s, generator=generator) for s in shapes), (True, True, False))
            part = out.increment.square().mean() + sum(r.scores.square().mean() for r in out.routings)
            loss = part if n == 0 else loss + part
        loss.backward()
        results.append({name: p.grad.to_local().clone() for name, p in model.named_parameters()})
    for again in results[1:]:
        for name, grad in results[0].items():
            assert torch.equal(again[name], grad), (parallel, name)
dist.destroy_process_group()
"""


def test_sharded_models_and_spread_experts_recompute_alike(tmp_path: Path) -> None:
    run_ranks(SHARDED, tmp_path)
