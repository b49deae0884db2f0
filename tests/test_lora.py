"""Low-rank updates: nothing at the start, the only thing that trains, and plain weights of the same bits in the end."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_forked
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from latentphys.routers import Experts, TopK
from latentphys.routers.growth import grow
from latentphys.training import checkpoint, lora, open_checkpoint, sharding
from latentphys.training.sharding import clip_grad_norm, shard
from latentphys.transformer.model import LatentTransformer

RANKS, RANK = 2, 3
DTYPES = [torch.float32, torch.float64]


def new_model(mixer: str = "attention", adapted: bool = True, dtype: torch.dtype = torch.float32) -> LatentTransformer:
    """Two blocks with open gates."""
    torch.manual_seed(0)
    router = partial(TopK, num_experts=4, top_k=2)
    model = LatentTransformer(3, 1, 2, 1, 16, 2, 2, 24, router, mixer=mixer)
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    if adapted:
        lora.add(model, RANK, alpha=6)
    return model.to(dtype)


def new_grown(dtype: torch.dtype) -> LatentTransformer:
    """The same with two more experts per layer, which alone train."""
    model = new_model(adapted=False).requires_grad_(False)
    grow(model, 2)
    return model.to(dtype)


SHARDED = {"lora": partial(new_model, dtype=torch.float64), "experts": partial(new_grown, torch.float64)}


def samples(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 1, 3, 4, 3, 2), (4, 2), (4, 1, 4, 3, 2))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(model: LatentTransformer, given: list[Tensor]) -> Tensor:
    return model(*given, (True, True, False)).increment


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, eps=1e-4, fused=True)


def train(
    model: LatentTransformer, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, world: int = 1
) -> list[float]:
    losses = []
    for step in steps:
        given = [x.chunk(world)[rank] for x in samples(step, next(model.parameters()).dtype)]
        loss = (run(model, given) - 2 * given[0][:, -1]).square().mean()
        (loss / world).backward()
        (clip_grad_norm if world > 1 else nn.utils.clip_grad_norm_)(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixer", ["attention", "fourier"])
def test_at_the_start_every_bit_is_that_of_the_model_without(mixer: str, dtype: torch.dtype) -> None:
    plain, model, given = new_model(mixer, False, dtype), new_model(mixer, dtype=dtype), samples(1, dtype)
    for gradients in (True, False):
        # torch folds a product with a weight that needs a gradient, which rounds otherwise: compare like with like.
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(gradients and name not in model.state_dict())
        with torch.set_grad_enabled(gradients):
            assert torch.equal(run(model, given), run(plain, given))
    if dtype == torch.float32:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(model, given), run(plain, given))


@pytest.mark.parametrize("mixer", ["attention", "fourier"])
def test_the_weights_are_those_of_the_formula(mixer: str) -> None:
    plain, model = new_model(mixer, False), new_model(mixer)
    train(model, new_optimizer(model), range(4))
    state, seen = model.state_dict(), 0
    for name, weight in plain.named_parameters():
        path, _, key = name.rpartition(".")
        stem = f"{path}.parametrizations.{key}"
        if f"{stem}.original" not in state:
            assert torch.equal(state[name], weight)
            continue
        seen += 1
        assert torch.equal(state[f"{stem}.original"], weight)
        a, b = state[f"{stem}.0.a"], state[f"{stem}.0.b"]
        update = torch.einsum("...ir,...rj->...ij", a, b) * 6 / RANK
        assert torch.linalg.matrix_rank(update).max() == RANK  # of each expert
        torch.testing.assert_close(getattr(model.get_submodule(path), key), weight + update)
        assert update.abs().max() > 1e-3
    assert seen == 2 * 6


def test_only_the_factors_train() -> None:
    """One pair for each expert: 16·3 + 3·48 in, 24·3 + 3·16 out, and so on."""
    model = new_model()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith((".a", ".b")) for name in trained)
    experts = 4 * RANK * ((16 + 48) + (24 + 16))
    shared = RANK * ((16 + 48) + (24 + 16))
    attention = RANK * ((16 + 48) + (16 + 16))
    assert sum(p.numel() for p in trained.values()) == 2 * (experts + shared + attention)
    losses = train(model, new_optimizer(model), range(30))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_an_expert_without_tokens_keeps_its_pair() -> None:
    torch.manual_seed(0)
    layer = Experts(3, 8, 16)
    lora.add(layer, 2)
    factors = dict(layer.named_parameters())
    for name, factor in factors.items():
        if name.endswith((".a", ".b")):
            nn.init.normal_(factor)
    x, ends = torch.randn(10, 8), torch.tensor([6, 6, 10], dtype=torch.int32)
    grouped, looped = layer(x, ends), layer.each(x, ends)
    torch.testing.assert_close(grouped, looped)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, ends), grouped)
    grouped.square().mean().backward()
    for name, factor in factors.items():
        assert (factor.grad is not None) == name.endswith((".a", ".b"))
        if factor.grad is not None:
            assert not factor.grad[1].any() and factor.grad[0].any() and factor.grad[2].any()


@pytest.mark.parametrize("mixer", ["attention", "fourier"])
def test_merging_gives_a_plain_model_of_the_same_bits(mixer: str) -> None:
    model, given = new_model(mixer), samples(9, torch.float32)
    train(model, new_optimizer(model), range(3))
    with torch.no_grad():
        expected = run(model, given)
        lora.merge(model)
        assert all(p.requires_grad for p in model.parameters())
        assert torch.equal(run(model.requires_grad_(False), given), expected)
    plain = new_model(mixer, False).requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(run(plain, given), expected)
    lora.add(model, RANK)  # and it can be adapted again
    with torch.no_grad():
        assert torch.equal(run(model, given), expected)


def test_a_run_that_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model = new_model()
    optimizer = new_optimizer(model)
    train(model, optimizer, range(2))
    checkpoint.save(tmp_path / "half", kind="dynamics", model=model, config={}, extra={}, step=2, optimizer=optimizer)
    train(model, optimizer, range(2, 4))
    resumed = new_model()
    again = new_optimizer(resumed)
    found = open_checkpoint(tmp_path / "half")
    found.load_into(resumed)
    checkpoint.load_optimizer(found.path, again, resumed)
    train(resumed, again, range(2, 4))
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_ranks_that_save_nothing_are_refused() -> None:
    for rank in (0, 16, 40):
        with pytest.raises(ValueError, match=rf"a rank from 1 to 15 for weights of 48 × 16, got {rank}"):
            lora.add(new_model(adapted=False), rank)
    with pytest.raises(ValueError, match="a rank from 1 to 7 for weights of 8 × 8, got 8"):
        lora.add(new_model("fourier", adapted=False), 8)
    with pytest.raises(ValueError, match="a model with attention, mixers or experts, got one without"):
        lora.add(nn.Linear(8, 8), 2)


def work(folder: Path) -> None:
    """What each of two processes does with a sharded model."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for way, make in SHARDED.items():
        model = make()
        shard(model)
        optimizer = new_optimizer(model)
        train(model, optimizer, range(3), rank, RANKS)
        checkpoint.save(folder / way, kind="dynamics", model=model, config={}, extra={}, step=3, optimizer=optimizer)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert frozen and all(isinstance(p, DTensor) and p.grad is None for p in frozen)
    save_file({"done": torch.ones(1)}, folder / f"rank{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_that_share_the_model_train_it_as_one(tmp_path: Path) -> None:
    run_forked(work, tmp_path, tmp_path, world=RANKS)
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0.safetensors", "rank1.safetensors"]
    for way, make in SHARDED.items():
        model = make()
        train(model, new_optimizer(model), range(3))
        stored, state = load_file(tmp_path / way / "model.safetensors"), model.state_dict()
        assert set(stored) == set(state)
        for name, tensor in stored.items():
            torch.testing.assert_close(tensor, state[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [new_model, partial(new_grown, torch.float32)], ids=["lora", "grown"])
def test_adapted_experts_are_not_spread_over_ranks(make: Callable[[], LatentTransformer]) -> None:
    layers = [module for module in make().modules() if isinstance(module, Experts)]
    for layer in layers:
        with pytest.raises(ValueError, match=r"Expected plain experts to spread over ranks, .*set expert_parallel = 1"):
            sharding._check(layer, 2, 1)
        sharding._check(layer, 1, 2)
