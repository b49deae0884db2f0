"""Four processes that share a model's experts and everything else train it as one process does on all samples.

The processes are started once. Each writes what it found as safetensors, and the tests compare that with one process.
"""

import os
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_forked
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from latentphys.routers import BiasBalance, Experts, Router, SemanticTop1, counts_over_ranks, dispatch, expert_counts
from latentphys.routers.topk import TopK
from latentphys.training import checkpoint, open_checkpoint
from latentphys.training.sharding import by_mesh, clip_grad_norm, shard
from latentphys.transformer.conditioning import Conditioning
from latentphys.transformer.dynamics import Dynamics
from latentphys.transformer.model import LatentTransformer

RANKS = 4
DEVICE = "cuda" if torch.cuda.device_count() >= RANKS else "cpu"
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}
CLIP = 0.05

Factory = Callable[[int], Router]
MODELS: dict[str, tuple[Factory, str, str]] = {
    "top1": (partial(SemanticTop1, num_experts=4, semantic_dim=8), "block", "attention"),
    "top2": (partial(TopK, num_experts=8, top_k=2), "block", "fourier"),
    "function": (partial(TopK, num_experts=4, top_k=1, normalise=False), "function", "attention"),
}
RUNS = [
    *((name, parallel, torch.float32) for name in ("top1", "top2") for parallel in (1, 2, 4)),
    *(("top1", parallel, torch.float64) for parallel in (1, 2, 4)),
    ("top2", 2, torch.float64),
    ("function", 2, torch.float64),
    ("function", 4, torch.float64),
]


def new_model(name: str, dtype: torch.dtype = torch.float32) -> Dynamics:
    """Two blocks whose gates are open, so that every parameter has a gradient."""
    torch.manual_seed(0)
    router, routing, mixer = MODELS[name]
    transformer = LatentTransformer(3, 2, 2, 1, 16, 2, 2, 16, router, routing=routing, mixer=mixer)
    for parameter in transformer.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    return Dynamics(transformer, Conditioning([]), {}, latent_channels=3).to(DEVICE, dtype)


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """A group for each mesh and weight decay, fused as on a GPU. Epsilon keeps gradients of rounding size out."""
    groups = [
        {"params": [p for p in group if (p.ndim >= 2) == decays], "weight_decay": 0.1 * decays}
        for group in by_mesh(model.parameters())
        for decays in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-4, fused=True)


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()


def train(model: Dynamics, optimizer: torch.optim.Optimizer, rank: int, world: int, steps: range) -> dict[str, Tensor]:
    """Steps of training on this rank's share of eight samples, two frames unrolled; everything that came out."""
    found: dict[str, Tensor] = {}
    routers = model.transformer.routers()
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        shapes = ((8, 2, 3, 3, 2, 2), (8, 2), (8, 1, 3, 2, 2), (8, 3, 3, 2, 2))
        samples = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
        latents, condition, geometry, target = (x.to(model.latent_mean).chunk(world)[rank] for x in samples)
        first = model(latents, condition, geometry, (True, True, False))
        frames = torch.stack([latents[:, -1], first.latent], dim=1)
        second = model(frames, condition, geometry, (True, True, False))
        loss = (first.latent - target).square().mean() + (second.latent - target).square().mean()
        (loss / world).backward()
        found |= {f"{step}.gradient.{name}": whole(p.grad) for name, p in model.named_parameters()}
        clip = clip_grad_norm if world > 1 else nn.utils.clip_grad_norm_
        found[f"{step}.norm"] = whole(clip(model.parameters(), CLIP))
        found |= {f"{step}.clipped.{name}": whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        counts = [
            expert_counts(torch.cat([a.ids, b.ids]), a.num_experts)
            for a, b in zip(first.routings, second.routings, strict=True)
        ]
        for n, (router, counts_E) in enumerate(zip(routers, counts_over_ranks(counts), strict=True)):
            router.bias_E.copy_(BiasBalance(0.05).update(router.bias_E, counts_E))
            found[f"{step}.counts.{n}"] = counts_E.double()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        found[f"{step}.loss"] = mean / world
    return found | {f"after.{name}": whole(tensor) for name, tensor in model.state_dict().items()}


class Layer(nn.Module):
    """Dispatch alone."""

    def __init__(self, dtype: torch.dtype, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = Experts(4, dim=8, hidden=16).to(DEVICE, dtype)
        self.backend = backend

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return dispatch(x, ids, weights, self.experts, self.backend)


LOADS = {"even": [6, 6, 6, 6], "one rank has none": [7, 0, 12, 5], "one rank has all": [0, 0, 24, 0], "none": [0] * 4}
EXPERTS_USED = {"any": [0, 1, 2, 3], "first": [0], "last": [3], "middle": [1, 2]}
LAYERS = list(product(LOADS, EXPERTS_USED, ("loop", "grouped")))


def run_layer(layer: Layer, load: str, used: str, top_k: int, rank: int, world: int) -> dict[str, Tensor]:
    """Output and gradients of some share of 24 tokens; the loss is a sum, for ranks have different numbers."""
    layer.zero_grad()
    dtype, generator = next(layer.parameters()).dtype, torch.Generator().manual_seed(1)
    total = sum(LOADS[load])
    x = torch.randn(total, 8, generator=generator, dtype=torch.float64)
    choices = torch.tensor(EXPERTS_USED[used])
    k = min(top_k, len(choices))
    ids = choices[torch.rand(total, len(choices), generator=generator).argsort(-1)[:, :k]]
    weights = torch.rand(total, k, generator=generator, dtype=torch.float64)
    if world > 1:
        x, ids, weights = (part.split(LOADS[load])[rank] for part in (x, ids, weights))
    x, weights = (part.to(DEVICE, dtype).requires_grad_() for part in (x, weights))
    y = layer(x, ids.to(DEVICE), weights)
    y.pow(3).sum().backward()
    mine = {"y": y.detach().clone(), "x": whole(x.grad), "weights": whole(weights.grad)}
    return mine | {name: whole(p.grad) for name, p in layer.named_parameters()}


def resume(path: Path, parallel: int | None) -> tuple[Dynamics, torch.optim.Optimizer]:
    """A model and an optimiser with the contents of a checkpoint, on one process (None) or sharded over all."""
    model = new_model("top1")
    nn.init.zeros_(model.transformer.embed.weight)
    if parallel is not None:
        shard(model, parallel)
    optimizer = new_optimizer(model)
    found = open_checkpoint(path)
    found.load_into(model)
    checkpoint.load_optimizer(found.path, optimizer, model)
    return model, optimizer


def save(path: Path, model: Dynamics, optimizer: torch.optim.Optimizer) -> None:
    checkpoint.save(path, kind="dynamics", model=model, config={}, extra={}, step=2, optimizer=optimizer)
    if dist.is_initialized():
        dist.barrier()


def bfloat16(model: Dynamics) -> dict[str, Tensor]:
    """Gradients under bfloat16 autocast, and the item sizes of the weights in use and of the rows on their way."""
    sizes: dict[str, Tensor] = {}

    def size(tensor: Tensor) -> Tensor:
        return torch.tensor(float(tensor.element_size()))

    def note(name: str) -> Callable[[nn.Module, object], None]:
        return lambda module, _: sizes.update(
            {f"{name}.{key}": size(weight) for key, weight in module.named_parameters(recurse=False)}
        )

    def exchange(output: Tensor, rows: Tensor, *given: Any, **named: Any) -> None:
        if rows.is_floating_point():
            sizes["rows"] = torch.maximum(size(rows), sizes.get("rows", size(rows)))
        original(output, rows, *given, **named)

    block = model.transformer.blocks[0]
    for name in ("feed_forward.experts", "feed_forward.router", "attention.norm_q"):
        block.get_submodule(name).register_forward_pre_hook(note(name))
    rank, world = (dist.get_rank(), RANKS) if dist.is_initialized() else (0, 1)
    original = dist.all_to_all_single
    with mock.patch.object(dist, "all_to_all_single", exchange), torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = train(model, new_optimizer(model), rank, world, range(1))
    return found | {f"size.{name}": size for name, size in sizes.items()}


def work(folder: Path) -> None:
    """What each of the processes does."""
    rank = int(os.environ["RANK"])
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    assert dist.get_world_size() == RANKS

    def write(name: str, found: dict[str, Tensor]) -> None:
        save_file({key: value.cpu() for key, value in found.items()}, folder / f"{name}.{rank}")

    for name, parallel, dtype in RUNS:
        model = new_model(name, dtype)
        shard(model, parallel)
        write(f"{name}.{parallel}.{dtype}", train(model, new_optimizer(model), rank, RANKS, range(2)))
    for parallel, backend in product((2, 4), ("loop", "grouped")):
        layer = Layer(torch.float64 if backend == "loop" else torch.float32, backend)
        shard(layer, parallel)
        for load, used in product(LOADS, EXPERTS_USED):
            write(f"{load}.{used}.{backend}.{parallel}", run_layer(layer, load, used, 2, rank, RANKS))
    model = new_model("top1")
    shard(model, 2, mixed_precision=True)
    write("bfloat16", bfloat16(model))

    model, optimizer = resume(folder / "one", 4)
    save(folder / "four", model, optimizer)
    model, optimizer = resume(folder / "four", 2)
    save(folder / "two", model, optimizer)
    write("resumed", train(model, optimizer, rank, RANKS, range(2, 3)))
    model, optimizer = resume(folder / "two", 1)
    save(folder / "copies", model, optimizer)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes wrote; their first checkpoint comes from one."""
    path = tmp_path_factory.mktemp("ranks")
    model = new_model("top1")
    optimizer = new_optimizer(model)
    train(model, optimizer, 0, 1, range(2))
    save(path / "one", model, optimizer)
    run_forked(work, path, path, world=RANKS, timeout=280)
    return path


def read(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{name}.{rank}") for rank in range(RANKS)]


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor within a share of its largest number."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        if value.numel():
            error, size = (found[name] - value.cpu()).abs().amax(), value.abs().amax()
            assert error <= tolerance * size, f"{name}: {error} of {size}"


def assert_trained_alike(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """All gradients of a step as one vector, and so all weights, and each number beside them; in FP64 every tensor.

    In FP32 the gradient of a router is a sum that cancels, and good to a few 1e-6 of itself alone.
    """
    vectors: dict[str, list[str]] = {}
    for name in expected:
        vectors.setdefault(name.partition(".transformer.")[0], []).append(name)
    for name, parts in vectors.items():
        a, b = (torch.cat([values[part].cpu().double().flatten() for part in parts]) for values in (found, expected))
        assert (a - b).norm() <= TOLERANCE[dtype] * b.norm(), name
    assert_near(found, expected, TOLERANCE[dtype] if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("name", "parallel", "dtype"), RUNS)
def test_four_processes_train_as_one_does(folder: Path, name: str, parallel: int, dtype: torch.dtype) -> None:
    """Loss, gradients, norm, clipped gradients, counts, and after two steps the weights and the routers' biases."""
    model = new_model(name, dtype)
    expected = train(model, new_optimizer(model), 0, 1, range(2))
    assert expected["0.norm"] > 2 * CLIP
    assert all(value.any() for key, value in expected.items() if ".gradient." in key)
    assert all(router.bias_E.any() for router in model.transformer.routers())
    for found in read(folder, f"{name}.{parallel}.{dtype}"):
        assert_trained_alike(found, expected, dtype)


@pytest.mark.parametrize("parallel", [2, 4])
@pytest.mark.parametrize(("load", "used", "backend"), LAYERS)
def test_any_load_gives_what_one_process_gives(folder: Path, load: str, used: str, backend: str, parallel: int) -> None:
    """Ranks without tokens, experts without tokens, and all tokens for the experts of one rank."""
    layer = Layer(torch.float64 if backend == "loop" else torch.float32, backend)
    expected = run_layer(layer, load, used, 2, 0, 1)
    ranks = read(folder, f"{load}.{used}.{backend}.{parallel}")
    together = {name: torch.cat([found[name] for found in ranks]) for name in ("y", "x", "weights")}
    for found in ranks:
        assert_near(found | together, expected, 1e-14 if backend == "loop" else 1e-6)
    idle = sorted({0, 1, 2, 3} - set(EXPERTS_USED[used]))
    assert not ranks[0]["experts.w_in_EDG"][idle].any()


def test_bfloat16_gathers_experts_in_16_bits_and_the_rest_in_32(folder: Path) -> None:
    expected = bfloat16(new_model("top1"))
    (found, *_) = read(folder, "bfloat16")
    sizes = {name.partition(".")[2]: value.item() for name, value in found.items() if name.startswith("size.")}
    assert sizes == {
        "rows": 2,
        "feed_forward.experts.w_in_EDG": 2,
        "feed_forward.experts.w_out_EFD": 2,
        "feed_forward.router.projection_SD": 4,
        "feed_forward.router.prototypes_ES": 4,
        "feed_forward.router.log_temperature": 4,
        "attention.norm_q.weight": 4,
    }
    assert found["0.gradient.transformer.blocks.0.feed_forward.experts.w_in_EDG"].dtype == torch.float32
    assert abs(found["0.norm"] / expected["0.norm"] - 1) < 1e-2


def test_checkpoints_are_the_same_bits_on_any_number_of_ranks(folder: Path) -> None:
    """One process → 4 ranks with experts over 4 → over 2 → over none → one process."""
    save(folder / "back", *resume(folder / "copies", None))
    contents = {
        name: [(folder / name / file).read_bytes() for file in ("model.safetensors", "optimizer.safetensors")]
        for name in ("one", "four", "two", "copies", "back")
    }
    assert all(contents[name] == contents["one"] for name in contents)
    moments = load_file(folder / "one" / "optimizer.safetensors")
    assert moments["transformer.blocks.0.feed_forward.experts.w_in_EDG.exp_avg"].any()
    assert moments["transformer.head.bias.step"] == 2


def test_a_resumed_run_goes_on_as_on_one_process(folder: Path) -> None:
    model, optimizer = resume(folder / "one", None)
    expected = train(model, optimizer, 0, 1, range(2, 3))
    for found in read(folder, "resumed"):
        assert_trained_alike(found, expected, torch.float32)


@pytest.mark.parametrize(
    ("world", "parallel", "message"),
    [
        (4, 3, "Expected expert_parallel to divide the 4 ranks, got 3"),
        (4, 0, "Expected expert_parallel to divide the 4 ranks, got 0"),
        (8, 8, "Expected expert_parallel to divide the 4 experts, got 8; choose a divisor"),
        (6, 2, "Expected widths that the 3 ranks which share an expert divide, got dim = 16 and hidden = 16; raise"),
    ],
)
def test_refuses_what_does_not_divide(monkeypatch: pytest.MonkeyPatch, world: int, parallel: int, message: str) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    with pytest.raises(ValueError, match=message):
        shard(new_model("top1"), parallel)


def test_refuses_what_is_not_sharded() -> None:
    model = new_model("top1")
    with pytest.raises(ValueError, match="Expected a process group, got none; start with torchrun"):
        shard(model)
    model.transformer.head.weight.grad = torch.zeros_like(model.transformer.head.weight)
    with pytest.raises(ValueError, match="Expected parameters of a sharded model, got some"):
        clip_grad_norm(model.parameters(), 1.0)


def test_spread_experts_refuse_the_dense_form() -> None:
    layer = Layer(torch.float32, "dense_static")
    layer.experts.group = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Expected 'grouped' or 'loop' for experts that are spread over ranks"):
        layer(torch.zeros(2, 8), torch.zeros(2, 1).long(), torch.ones(2, 1))


def test_moments_of_another_model_are_refused(folder: Path) -> None:
    model = new_model("top2")
    with pytest.raises(ValueError, match="Expected moments of the optimiser's parameters in .*, got some of"):
        checkpoint.load_optimizer(folder / "one", new_optimizer(model), model)
