"""Counted costs: closed forms, torch's own counter, invariants of sparsity, and what may not change by counting."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import velocity_scale
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from latentphys.accounting import Parts, count, count_autoencoder
from latentphys.autoencoders import Autoencoder
from latentphys.autoencoders.encoder import Encoder
from latentphys.autoencoders.place import num_conditions
from latentphys.flops import count_flops
from latentphys.grid import Boundary, Geometry, Grid
from latentphys.info import Amount
from latentphys.routers import (
    DenseRouter,
    Layout,
    Nested,
    RandomRouter,
    Routing,
    SemanticTop1,
    TopK,
    TreeRouter,
    load_lazily,
)
from latentphys.transformer import LatentTransformer
from latentphys.transformer.attention import SelfAttention
from latentphys.transformer.conditioning import Conditioning
from latentphys.transformer.dynamics import Dynamics

SHAPE = (4, 3, 2)
TOKENS, DIM, DEPTH, HIDDEN = 24, 32, 2, 16
CHANNELS, FRAMES, CONDITIONS, GEOMETRY = 2, 2, 3, 1
EXPERT = 3 * DIM * HIDDEN  # weights of one SwiGLU expert
PERIODIC = (True, True, True)


TOP1 = partial(SemanticTop1, num_experts=4)


def build(router: Callable[..., Any] = TOP1, **changes: Any) -> LatentTransformer:
    settings: dict[str, Any] = {"dim": DIM, "depth": DEPTH, "num_heads": 2, "hidden": HIDDEN, "router": router}
    return LatentTransformer(CHANNELS, FRAMES, CONDITIONS, GEOMETRY, **(settings | changes))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((1, FRAMES, CHANNELS, *SHAPE), (1, CONDITIONS), (1, GEOMETRY, *SHAPE))
    latents, condition, geometry = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return latents, condition, geometry


@pytest.mark.parametrize("num_shared", [0, 1, 2])
@pytest.mark.parametrize(("activation", "factor"), [("swiglu", 2), ("gelu", 1)])
@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (8, 2), (6, 6)])
def test_closed_forms_of_every_part(num_experts: int, k: int, activation: str, factor: int, num_shared: int) -> None:
    router = partial(TopK, num_experts=num_experts, top_k=k, normalise=k > 1)
    cost = count(build(router, activation=activation, num_shared=num_shared), SHAPE)
    expert = DIM * factor * HIDDEN + HIDDEN * DIM
    width_in, condition_dim = FRAMES * CHANNELS + GEOMETRY, DIM
    modulations = DEPTH * 6 + 2
    weights = {
        "token": width_in * DIM + DIM * CHANNELS,
        "sample": CONDITIONS * condition_dim + condition_dim**2 + modulations * DIM * condition_dim,
    }
    biases = DIM + CHANNELS + 2 * condition_dim + modulations * DIM
    assert cost.num_tokens == TOKENS
    assert cost.stored == Parts(
        experts=DEPTH * num_experts * expert,
        shared=DEPTH * num_shared * expert,
        mixing=DEPTH * (4 * DIM**2 + 2 * DIM // 2),
        routing=DEPTH * num_experts * DIM,
        rest=sum(weights.values()) + biases,
    )
    assert cost.flops == Parts(
        experts=DEPTH * 2 * TOKENS * k * expert,
        shared=DEPTH * 2 * TOKENS * num_shared * expert,
        mixing=DEPTH * (2 * TOKENS * 4 * DIM**2 + 4 * TOKENS**2 * DIM),
        routing=DEPTH * 2 * TOKENS * num_experts * DIM,
        rest=2 * TOKENS * weights["token"] + 2 * weights["sample"],
    )
    assert cost.every_expert == cost.flops.total + DEPTH * 2 * TOKENS * (num_experts - k) * expert


def test_stored_is_every_parameter_once() -> None:
    for model in (build(), build(routing="function"), build(mixer="fourier"), build(num_shared=0)):
        assert count(model, SHAPE).stored.total == sum(p.numel() for p in model.parameters())


KINDS: dict[str, tuple[Callable[..., Any], int]] = {
    "top1": (partial(SemanticTop1, num_experts=8), 1),
    "top1 per sample": (partial(SemanticTop1, num_experts=8, per="sample"), 1),
    "top1 per block": (partial(SemanticTop1, num_experts=8, per=(2, 3, 1)), 1),
    "topk": (partial(TopK, num_experts=8, top_k=3), 3),
    "nested": (partial(Nested, num_experts=12, num_groups=3, top_groups=2, top_k=2), 4),
    "dense": (DenseRouter, 1),
    "random": (partial(RandomRouter, num_experts=8), 1),
}


@pytest.mark.parametrize("dispatch", ["auto", "grouped", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_meets_k_experts_of_each_layer(kind: str, dispatch: str) -> None:
    router, k = KINDS[kind]
    model = build(router, dispatch=dispatch)
    cost, num_experts = count(model, SHAPE), model.routers()[0].num_experts
    assert model.routers()[0].top_k == k
    assert cost.active.experts == DEPTH * k * EXPERT
    idle = DEPTH * (num_experts - k) * EXPERT
    assert cost.stored.total - idle == cost.active.total
    assert cost.active.always_on == cost.stored.always_on == cost.stored.total - DEPTH * num_experts * EXPERT
    assert cost.flops.routing > 0 or kind == "dense"


@pytest.mark.parametrize("dispatch", ["auto", "loop"])
@pytest.mark.parametrize("routing", ["block", "function"])
def test_more_experts_are_stored_and_not_run(routing: str, dispatch: str) -> None:
    few, many = (
        count(build(partial(TopK, num_experts=e, top_k=2), routing=routing, dispatch=dispatch), SHAPE) for e in (4, 16)
    )
    assert many.stored.experts == 4 * few.stored.experts
    assert many.stored.routing == 4 * few.stored.routing and many.flops.routing == 4 * few.flops.routing
    assert many.active.total - many.active.routing == few.active.total - few.active.routing
    assert many.flops.total - many.flops.routing == few.flops.total - few.flops.routing


def test_one_decision_for_a_whole_function_costs_one_row() -> None:
    num_features = 2 * CHANNELS + GEOMETRY + CONDITIONS
    cost = count(build(partial(TopK, num_experts=4, top_k=2), routing="function"), SHAPE)
    assert cost.stored.routing == 4 * num_features and cost.flops.routing == 2 * 4 * num_features
    assert cost.active.experts == DEPTH * 2 * EXPERT


@pytest.mark.parametrize(("branching", "depth"), [(2, 1), (2, 3), (3, 2)])
def test_a_tree_stores_much_and_compares_little(branching: int, depth: int) -> None:
    router = partial(TreeRouter, num_experts=branching**depth, branching=branching)
    cost = count(build(router, routing="function"), SHAPE)
    num_features = 2 * CHANNELS + GEOMETRY + CONDITIONS
    num_centroids = sum(branching**level for level in range(1, depth + 1))
    assert cost.stored.routing == 0
    # the mean and spread of the features, whether it was fitted, and the bias that every router has
    assert cost.routing_buffers == (num_centroids + 2) * num_features + 1 + branching**depth
    assert cost.flops.routing == 3 * branching * depth * num_features
    assert cost.active.experts == DEPTH * EXPERT and cost.stored.experts == DEPTH * branching**depth * EXPERT


@pytest.mark.parametrize("kind", ["top1", "topk", "nested"])
def test_running_every_expert_is_exposed(kind: str) -> None:
    router, k = KINDS[kind]
    sparse, loop, dense = (
        count(build(router, dispatch=dispatch), SHAPE) for dispatch in ("grouped", "loop", "dense_static")
    )
    num_experts = sparse.stored.experts // (DEPTH * EXPERT)
    assert loop == sparse
    assert dense.flops.experts * k == sparse.flops.experts * num_experts > sparse.flops.experts * k
    assert dense.active.total == dense.stored.total
    assert dense.flops.total == sparse.every_expert == dense.every_expert


@pytest.mark.parametrize("mixer", ["attention", "fourier"])
@pytest.mark.parametrize("dispatch", ["loop", "dense_static"])
def test_torch_counts_the_same_when_all_is_worked_out(mixer: str, dispatch: str) -> None:
    """The oracle knows neither grouped products nor fused attention on CPUs nor Fourier transforms."""
    model = build(mixer=mixer, attention="math", dispatch=dispatch)
    with torch.no_grad(), FlopCounterMode(display=False) as oracle:
        model(*inputs(), PERIODIC)
    found = count(model, SHAPE)
    assert oracle.get_total_flops() + (DEPTH * _transforms() if mixer == "fourier" else 0) == found.flops.total
    names = {"shared": "feed_forward.shared", "routing": "feed_forward.router"} | (
        {"mixing": "attention"} if mixer == "attention" else {}
    )
    for part, name in names.items():
        flops = sum(
            sum(oracle.get_flop_counts()[f"LatentTransformer.blocks.{i}.{name}"].values()) for i in range(DEPTH)
        )
        assert flops == getattr(found.flops, part) > 0


def _transforms() -> int:
    """A real transform of TOKENS numbers there and back, for each channel."""
    return 2 * round(2.5 * DIM * TOKENS * math.log2(TOKENS))


def test_fourier_mixer() -> None:
    cost = count(build(mixer="fourier"), SHAPE)
    num_modes, width = 4 * 3 * (2 // 2 + 1), DIM // 2
    # two layers of complex products, four real ones each, of two diagonal blocks
    products = 2 * 4 * 2 * num_modes * 2 * width**2
    assert cost.flops.mixing == DEPTH * (products + _transforms())
    assert cost.stored.mixing == DEPTH * (2 * 2 * 2 * width**2 + 2 * 2 * 2 * width)


@pytest.mark.parametrize(
    ("call", "flops"),
    [
        (lambda: torch.fft.rfftn(torch.ones(3, 8, 4), dim=(1, 2)), 2.5 * 3 * 32 * 5),
        (lambda: torch.fft.irfftn(torch.ones(3, 8, 3) + 0j, s=(8, 4), dim=(1, 2)), 2.5 * 3 * 32 * 5),
        (lambda: torch.fft.fft(torch.ones(3, 16) + 0j), 5 * 3 * 16 * 4),
        (lambda: torch.ones(6, 5) @ torch.ones(5), 60),
        (lambda: torch.ones(5) @ torch.ones(5), 10),
        (lambda: torch.addmv(torch.ones(6), torch.ones(6, 5), torch.ones(5)), 60),
        (lambda: _grouped([3, 5]), 2 * 5 * 16 * 24),
        (lambda: _grouped([0, 8]), 2 * 8 * 16 * 24),
        (lambda: _grouped([0, 0]), 0),
        (lambda: F.scaled_dot_product_attention(*torch.ones(3, 2, 4, 10, 8)), 2 * 4 * 4 * 10 * 10 * 8),
    ],
)  # fmt: skip
def test_single_operations(call: Callable[[], Any], flops: int) -> None:
    assert count_flops(call, {}) == {"rest": flops}
    with torch.inference_mode():
        assert count_flops(call, {}) == {"rest": flops}


def _grouped(ends: list[int]) -> Tensor:
    return F.grouped_mm(torch.ones(8, 16), torch.ones(2, 16, 24), offs=torch.tensor(ends, dtype=torch.int32))


def test_counting_leaves_no_trace() -> None:
    model = build(attention="math").train()
    model.blocks[0].eval()
    before, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = count(model, SHAPE)
    assert count(model, SHAPE) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert all(m.backend == "math" for m in model.modules() if isinstance(m, SelfAttention))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_step_that_fails_leaves_no_trace(unchecked: None) -> None:
    model = build(partial(SemanticTop1, num_experts=4, per=(3, 1, 1)), attention="math").train()
    with pytest.raises(ValueError, match="Expected blocks that divide"):
        count(model, SHAPE)
    assert all(module.training for module in model.modules()) and torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(m.backend == "math" for m in model.modules() if isinstance(m, SelfAttention))


@pytest.mark.parametrize("mixer", ["attention", "fourier"])
def test_neither_precision_nor_inference_mode_nor_kernel_matters(mixer: str) -> None:
    expected = count(build(mixer=mixer), SHAPE)
    assert count(build(mixer=mixer).double(), SHAPE) == expected
    if mixer == "attention":  # torch has no Fourier transform of bfloat16 on CPUs
        assert count(build(mixer=mixer).bfloat16(), SHAPE) == expected
    with torch.inference_mode():
        assert count(build(mixer=mixer), SHAPE) == expected
    model = build(mixer=mixer)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.backend = "cudnn"  # which only a GPU can run
    assert count(model, SHAPE) == expected


def test_a_dynamics_model_costs_what_its_transformer_does() -> None:
    model = build()
    assert count(Dynamics(model, Conditioning([]), {}, CHANNELS), SHAPE) == count(model, SHAPE)


def test_large_models_are_counted_without_their_memory() -> None:
    """Four layers of the base preset: 2 GB of weights."""
    small = build()
    expected = count(small, SHAPE)
    with torch.device("meta"):
        model = LatentTransformer(
            32, 1, 3, 16, dim=1024, depth=4, num_heads=16, hidden=2048, router=partial(SemanticTop1, num_experts=16)
        )
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert count(small, SHAPE) == expected
        cost = count(model.to_empty(device="cpu"), (16, 16, 16))
    assert cost.stored.experts == 4 * 16 * 3 * 1024 * 2048 and cost.active.experts == cost.stored.experts // 16
    assert cost.flops.mixing == 4 * (2 * 4096 * 4 * 1024**2 + 4 * 4096**2 * 1024)


@pytest.mark.parametrize("shape", [(4, 4), (4, 0, 4)])
def test_latent_shapes_that_are_none(shape: Any, unchecked: None) -> None:
    with pytest.raises(ValueError, match="Expected three numbers of latent cells ≥ 1"):
        count(build(), shape)


def test_experts_left_in_a_file_are_not_taken_for_none(tmp_path: Path) -> None:
    save_file(build().state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = build()
    load_lazily(model, tmp_path / "model.safetensors", max_resident=1)
    with pytest.raises(ValueError, match="Expected experts in memory"):
        count(model, SHAPE)


class Cubes(DenseRouter):
    """Raises what it sees to a power that is no distance."""

    def route(self, rows_RD: Tensor, layout: Layout | None) -> Routing:
        return super().route(rows_RD.pow(3), layout)


def test_powers_are_pointwise_work_and_squares_outside_routers_too() -> None:
    assert count(build(Cubes), SHAPE).flops.routing == 0
    assert count_flops(lambda: torch.ones(3).square(), {}) == {}


def _autoencoder(shape: tuple[int, int, int], walls: bool) -> Autoencoder:
    side: Boundary = "no_slip" if walls else "periodic"
    grid = Grid(shape, (0.1, 0.2, 0.1), (("periodic", "periodic"), ("periodic", "periodic"), (side, side)))
    scale = velocity_scale(grid)
    return Autoencoder({"a": scale}, latent_channels=8, widths=[8, 16], num_blocks=[1, 1])


@pytest.mark.parametrize("walls", [False, True])
def test_autoencoder(walls: bool) -> None:
    model = _autoencoder(
        (20, 12, 28), walls
    ).train()  # a box that nothing else has met: what its head keeps is made here
    cost = count_autoencoder(model, "a")
    assert count_autoencoder(model, "a") == cost and model.training
    geometry = Geometry(model.scale("a").grid)
    latent = torch.randn(1, 8, 5, 3, 7)
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as oracle:
        flux = model.decode(latent, geometry, "a")
        model.encode(flux, geometry, "a")
    convolutions = {name: sum(flops.values()) for name, flops in oracle.get_flop_counts().items()}
    assert convolutions["Encoder"] == cost.encode and convolutions["Decoder"] == cost.decode
    # the projection transforms one number per cell there and back; between walls by a matrix
    cells, length = 20 * 12 * 28, 20 * 12 * (1 if walls else 28)
    assert cost.head == 2 * round(2.5 * cells * math.log2(length)) + (2 * 2 * cells * 28 if walls else 0)
    # no zeros of a count have been kept for later solves
    exact = model.decode(latent, geometry, "a", exact=True)
    assert float((flux - exact).abs().max() / exact.abs().max()) < 1e-5 and float(exact.abs().max()) > 0


def test_the_patch_stem_is_a_product_over_cells() -> None:
    """The convolutions of an encoder by hand: 3³ over the stem's cells, 1³ for patches, geometry and latents."""
    model = _autoencoder((8, 8, 8), walls=False)
    fine, coarse = 4**3, 2**3
    levels = 2 * 27 * (8 * 8 * fine + 16 * 16 * coarse) + 2 * 8 * 16 * fine + 2 * 64 * 32 * coarse
    others = 27 * 24 * 8 * fine + 64 * 16 * coarse + 27 * 192 * 8 * coarse + 16 * 8 * coarse
    others += num_conditions(1) * 64 + 64**2 + 2 * 64 * (8 + 16)  # what the blocks are told of the box
    assert isinstance(model.encoder, Encoder)
    assert count_autoencoder(model, "a").encode == 2 * (levels + others)


def test_a_family_that_the_autoencoder_does_not_know() -> None:
    with pytest.raises(ValueError, match="Expected a family of"):
        count_autoencoder(_autoencoder((8, 8, 8), walls=False), "b")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"), (7, "", "7"), (999, "", "999"), (1000, "", "1 k"), (1234, "", "1.23 k"), (999_499, "", "999 k"),
        (999_500, "", "1 M"), (12_345_678, "", "12.3 M"), (3_400_000_000, "FLOP", "3.4 GFLOP"), (12, "FLOP", "12 FLOP"),
        (15_677_487_449_600, "FLOP", "15.7 TFLOP"), (2 * 10**15, "", "2 P"),
    ],
)  # fmt: skip
def test_amounts_read_as_people_write_them(value: int, unit: str, text: str) -> None:
    assert f"{Amount(value, unit)}" == text and Amount(value, unit) == value
