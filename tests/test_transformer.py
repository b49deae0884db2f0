"""Symmetries, starting point and settings of the latent transformer."""

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from latentphys.routers import DenseRouter, RandomRouter, SemanticTop1
from latentphys.transformer import LatentTransformer
from latentphys.transformer.attention import SelfAttention
from latentphys.transformer.rotary import rotary, rotate

CONFIGS = Path(__file__).parents[1] / "configs"
SHAPE = (4, 3, 2)


def build(**changes: Any) -> LatentTransformer:
    """A small model with every parameter random, so that nothing is switched off."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "dim": 32,
        "depth": 2,
        "num_heads": 2,
        "hidden": 16,
        "router": partial(SemanticTop1, num_experts=4),
    }
    model = LatentTransformer(2, num_frames=2, condition_channels=3, geometry_channels=1, **(settings | changes))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, 2, 2, *SHAPE), (batch, 3), (batch, 1, *SHAPE))
    latents, condition, geometry = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return latents, condition, geometry


def test_untrained_is_persistence() -> None:
    model = LatentTransformer(
        2, 2, 3, 1, dim=32, depth=1, num_heads=2, hidden=16, router=partial(RandomRouter, num_experts=2)
    )
    prediction = model(*inputs(), periodic=(True, True, True))
    assert prediction.increment.shape == (2, 2, *SHAPE)
    assert torch.equal(prediction.increment, torch.zeros(2, 2, *SHAPE))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rolling_a_periodic_axis_rolls_the_answer(axis: int) -> None:
    model = build().double()
    latents, condition, geometry = inputs(dtype=torch.float64)
    periodic = (True, True, True)
    expected = model(latents, condition, geometry, periodic).increment.roll(1, axis - 3)
    found = model(latents.roll(1, axis - 3), condition, geometry.roll(1, axis - 3), periodic).increment
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_rolling_a_walled_axis_does_not() -> None:
    model = build().double()
    latents, condition, geometry = inputs(dtype=torch.float64)
    expected = model(latents, condition, geometry, (False, True, True)).increment.roll(1, -3)
    found = model(latents.roll(1, -3), condition, geometry.roll(1, -3), (False, True, True)).increment
    assert (found - expected).abs().max() > 1e-3


def test_logits_depend_on_differences_of_position_only() -> None:
    """On a walled axis too, short of the ends: cells (0, 1) and (2, 3) are as far apart."""
    table = rotary((5, 1, 1), (False, True, True), 12, dtype=torch.float64)
    q, k = torch.randn(2, 12, dtype=torch.float64)
    logits = rotate(q.expand(5, 12), table) @ rotate(k.expand(5, 12), table).mT
    torch.testing.assert_close(logits[0, 1], logits[2, 3])
    torch.testing.assert_close(logits[2, 0], logits[4, 2])
    assert (logits[0, 0] - logits[0, 1]).abs() > 1e-3


@pytest.mark.parametrize("n", [7, 16])
def test_logits_on_a_periodic_axis_wrap_around(n: int) -> None:
    table = rotary((1, n, 1), (False, True, False), 36, dtype=torch.float64)
    q, k = torch.randn(2, 36, dtype=torch.float64)
    logits = rotate(q.expand(n, 36), table) @ rotate(k.expand(n, 36), table).mT
    torch.testing.assert_close(logits.roll((1, 1), (0, 1)), logits, rtol=0, atol=1e-12)
    assert logits[0].std() > 0.1


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_a_periodic_axis_tells_all_its_cells_apart(n: int) -> None:
    table = rotary((n, 1, 1), (True, True, True), 36)
    distances = torch.cdist(table.movedim(1, 0).flatten(1), table.movedim(1, 0).flatten(1)) + 9 * torch.eye(n)
    assert distances.min() > 0.5


def test_samples_do_not_see_each_other() -> None:
    model = build().double()
    latents, condition, geometry = inputs(3, torch.float64)
    order = torch.tensor([2, 0, 1])
    expected = model(latents, condition, geometry, (True, False, True))
    found = model(latents[order], condition[order], geometry[order], (True, False, True))
    torch.testing.assert_close(found.increment, expected.increment[order])
    alone = model(latents[:1], condition[:1], geometry[:1], (True, False, True))
    torch.testing.assert_close(alone.increment, expected.increment[:1])
    assert torch.equal(alone.routings[1].ids, expected.routings[1].ids[:24])


def test_condition_geometry_and_older_frames_matter() -> None:
    model = build()
    latents, condition, geometry = inputs()
    base = model(latents, condition, geometry, (True, True, True)).increment
    older = latents.clone()
    older[:, 0] += 1
    for changed in (
        (latents, condition + 1, geometry),
        (latents, condition, geometry.exp()),
        (older, condition, geometry),
    ):
        assert (model(*changed, (True, True, True)).increment - base).abs().max() > 1e-3


def test_every_parameter_of_a_top1_model_learns() -> None:
    model = build()
    model(*inputs(4), periodic=(True, True, False)).increment.square().sum().backward()
    assert len(model.routers()) == 2
    for router in model.routers():
        for parameter in router.parameters():
            assert parameter.grad is not None and parameter.grad.norm() > 1e-6
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_autocast_keeps_router_input_and_output_in_fp32() -> None:
    model = build()
    embedded = []
    model.embed.register_forward_hook(lambda module, args, out: embedded.append(out.dtype))
    model.head.register_forward_hook(lambda module, args, out: embedded.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model(*inputs(), periodic=(True, True, True))
    assert embedded == [torch.float32, torch.float32]
    assert all(routing.scores.dtype == routing.weights.dtype == torch.float32 for routing in prediction.routings)
    exact = model(*inputs(), periodic=(True, True, True))
    kept = (prediction.routings[0].ids == exact.routings[0].ids).float().mean()
    assert kept > 0.9


def test_runs_on_latents_of_any_shape_with_and_without_geometry() -> None:
    model = LatentTransformer(
        2, 1, 1, 0, dim=32, depth=1, num_heads=2, hidden=16, router=partial(SemanticTop1, num_experts=2)
    )
    for shape in ((1, 1, 1), (5, 2, 3)):
        prediction = model(
            torch.randn(1, 1, 2, *shape), torch.ones(1, 1), torch.ones(1, 0, *shape), (True, False, True)
        )
        assert prediction.increment.shape == (1, 2, *shape)


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_attention_backends_agree(backend: str) -> None:
    table, x = rotary((3, 2, 2), (True, False, True), 16), torch.randn(2, 12, 32)
    attention = SelfAttention(32, 2)
    expected = attention(x, table)
    attention.backend = backend
    torch.testing.assert_close(attention(x, table), expected)


def test_flash_attn_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stand-in with that package's layout, (batch, token, head, channel)."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    package = ModuleType("flash_attn")
    monkeypatch.setattr(package, "__spec__", ModuleSpec("flash_attn", None))
    monkeypatch.setattr(package, "flash_attn_func", flash_attn_func, raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    attention, table = SelfAttention(32, 2, "flash_attn"), rotary((3, 2, 2), (True, False, True), 16)
    x = torch.randn(2, 12, 32)
    with pytest.raises(
        ValueError, match="Expected bfloat16 or float16 tokens for attention 'flash_attn', got torch.float32"
    ):
        attention(x, table)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention(x, table)
        attention.backend = "auto"
        torch.testing.assert_close(found, attention(x, table), rtol=1e-2, atol=1e-2)


def test_refuses_backends_that_are_unknown_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"Expected an attention backend of auto \| math .* got 'fast'"):
        build(attention="fast")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="Expected a torch with cuDNN for attention 'cudnn'"):
        build(attention="cudnn")
    monkeypatch.setattr("latentphys.transformer.attention.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Expected the package flash-attn for attention 'flash_attn'"):
        build(attention="flash_attn")
    with pytest.raises(ValueError, match="Expected a dispatch backend"):
        build(dispatch="fast")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "Expected a width that 3 heads divide, got dim = 32"),
        ({"num_heads": 8}, "Expected an even head width of at least 6"),
        ({"depth": 0}, "Expected depth ≥ 1, got 0"),
        (
            {"router": lambda dim: torch.nn.Linear(dim, 4)},
            "Expected a router factory, dim -> Router, got one that makes Linear",
        ),
    ],
)
def test_refuses_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.usefixtures("unchecked")
def test_refuses_inputs_of_other_shapes() -> None:
    model, (latents, condition, geometry) = build(), inputs()
    periodic = (True, True, True)
    with pytest.raises(ValueError, match=r"Expected latents of shape \(b, 2, 2, x, y, z\), got \(2, 1, 2, 4, 3, 2\)"):
        model(latents[:, :1], condition, geometry, periodic)
    with pytest.raises(ValueError, match=r"Expected a condition of shape \(2, 3\), got \(2, 2\)"):
        model(latents, condition[:, :2], geometry, periodic)
    with pytest.raises(ValueError, match=r"Expected geometry of shape \(2, 1, 4, 3, 2\)"):
        model(latents, condition, geometry[..., :1], periodic)
    with pytest.raises(ValueError, match="Expected geometry_channels ≥ 0, got -1"):
        LatentTransformer(
            2, 1, 1, -1, dim=32, depth=1, num_heads=2, hidden=16, router=partial(SemanticTop1, num_experts=2)
        )


def preset(*overrides: str) -> LatentTransformer:
    """The model that a command line with these overrides makes, without its numbers."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(overrides=list(overrides))
    with torch.device("meta"):
        return instantiate(config.dynamics, latent_channels=8, condition_channels=2, geometry_channels=1)


@pytest.mark.parametrize(("size", "depth", "num_experts"), [("tiny", 3, 4), ("small", 8, 8), ("base", 16, 16)])
def test_presets(size: str, depth: int, num_experts: int) -> None:
    routers = preset("+router=top1", f"+dynamics={size}").routers()
    assert [type(router) for router in routers] == [SemanticTop1] * depth
    assert {router.num_experts for router in routers} == {num_experts}


def test_presets_with_controls() -> None:
    assert isinstance(preset("+router=random", "+dynamics=tiny").routers()[0], RandomRouter)
    assert isinstance(preset("+router=dense", "+dynamics=tiny", "router.num_experts=1").routers()[0], DenseRouter)
    assert preset("+router=top1", "+dynamics=tiny", "router.num_experts=64").routers()[0].num_experts == 64
