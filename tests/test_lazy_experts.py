"""Experts read from the checkpoint when tokens first visit them do what experts in memory do, bit for bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import Road, train
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentphys.cli import main
from latentphys.data import open_store
from latentphys.rollout import rollout_store
from latentphys.routers import Experts, LazyExperts, dispatch, load_lazily
from latentphys.training import load_dynamics, manifest, open_checkpoint
from latentphys.transformer.dynamics import Dynamics

E, D, F = 6, 16, 24


def stored(folder: Path, activation: str = "swiglu", num_experts: int = E) -> tuple[Experts, Path]:
    """Experts, and a file that holds them among other things."""
    experts, file = Experts(num_experts, D, F, activation), folder / "model.safetensors"
    save_file({f"layer.experts.{name}": w for name, w in experts.state_dict().items()} | {"other": torch.ones(3)}, file)
    return experts, file


def lazy(experts: Experts, file: Path, max_resident: int = E) -> LazyExperts:
    with torch.device("meta"):
        like = Experts(experts.num_experts, D, F, experts.activation)
    return LazyExperts(like, file, "layer.experts", max_resident)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("max_resident", [1, 2, E])
def test_they_give_the_bits_of_experts_in_memory(tmp_path: Path, activation: str, max_resident: int) -> None:
    """Expert 3 is never visited, and never read."""
    experts, file = stored(tmp_path, activation)
    others = lazy(experts, file, max_resident)
    assert not list(others.parameters()) and others.num_experts == E and others.dim == D
    for seed in range(3):
        torch.manual_seed(seed)
        x, ids = torch.randn(40, D), torch.tensor([0, 1, 2, 4, 5])[torch.randint(5, (40, 2))]
        weights = torch.rand(40, 2)
        with torch.no_grad():
            assert torch.equal(dispatch(x, ids, weights, others, "loop"), dispatch(x, ids, weights, experts, "loop"))
            for dtype in (torch.float64, torch.bfloat16):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                    given = x.double() if dtype == torch.float64 else x
                    whole = experts.double() if dtype == torch.float64 else experts.float()
                    expected = dispatch(given, ids, weights.to(given), whole, "loop")
                    found = dispatch(given, ids, weights.to(given), others, "loop")
                assert found.dtype == expected.dtype == dtype and torch.equal(found, expected)
            experts.float()
        assert 3 not in others.resident and len(others.resident) == min(max_resident, 5)
    assert others.num_reads == 5 if max_resident == E else others.num_reads > 5


def test_an_expert_is_read_once_and_the_one_visited_least_recently_goes(tmp_path: Path) -> None:
    others, x = lazy(*stored(tmp_path), max_resident=2), torch.randn(3, D)
    for expert, reads, resident in (
        (4, 1, [4]),
        (0, 2, [4, 0]),
        (4, 2, [0, 4]),
        (5, 3, [4, 5]),
        (4, 3, [5, 4]),
        (0, 4, [4, 0]),
        (5, 5, [0, 5]),
    ):
        others.one(x, expert)
        assert (others.num_reads, others.resident) == (reads, resident)
    others.one(x[:0], 1)
    assert others.num_reads == 5


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation made room for: on no meta device, and no view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = any(returned.alias_info is not None for returned in func._schema.returns)
        if isinstance(out, Tensor) and out.device.type != "meta" and not views:
            self.numel = max(self.numel, out.numel())
        return out


SETTINGS = ["dynamics.num_shared=1", "trainer.num_steps=3", "dynamics.hidden=64", "router.num_experts=8"]


@pytest.fixture(scope="module")
def runs(road: Road, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dynamics models of every way to route: a tree over whole functions, and tokens in every block."""
    folder = tmp_path_factory.mktemp("lazy")
    routing = {
        "tree": ["router=tree", "dynamics.routing=function"],
        "top1": ["router=top1"],
        "random": ["router=random"],
    }
    return {
        name: train("dynamics", road.inputs("dynamics"), folder / name, *more, *SETTINGS).parent
        for name, more in routing.items()
    }


def experts_of(dynamics: Dynamics) -> list[LazyExperts]:
    found = [module for module in dynamics.modules() if isinstance(module, LazyExperts)]
    assert len(found) == len(dynamics.transformer.blocks)
    return found


def inputs(dynamics: Dynamics, batch: int = 1) -> tuple[Tensor, Tensor, Tensor, tuple[bool, bool, bool]]:
    t = dynamics.transformer
    latents = torch.randn(batch, t.num_frames, t.latent_channels, 4, 4, 4)
    geometry = torch.randn(batch, t.geometry_channels, 4, 4, 4)
    return latents, torch.randn(batch, t.condition_channels), geometry, (True, True, False)


def by_loop(dynamics: Dynamics) -> Dynamics:
    for block in dynamics.transformer.blocks:
        block.feed_forward.dispatch = "loop"  # type: ignore[union-attr]
    return dynamics


@pytest.mark.parametrize("name", ["tree", "top1", "random"])
def test_a_model_loaded_lazily_is_the_model(runs: dict[str, Path], name: str) -> None:
    few, whole = load_dynamics(runs[name], max_resident_experts=2)[0], load_dynamics(runs[name])[0]
    state, expected = few.state_dict(), whole.state_dict()
    routed = {key for key in expected if ".feed_forward.experts." in key}
    assert len(routed) == 4 and state.keys() == expected.keys() - routed
    assert all(torch.equal(state[key], expected[key]) for key in state)
    assert sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in few.parameters()) == 2 * 8 * 3 * 32 * 64
    assert not few.training and not any(t.is_meta for t in [*few.parameters(), *few.buffers()])
    with torch.no_grad():
        for batch in (1, 5):
            given = inputs(few, batch)
            step, reference, grouped = few(*given), by_loop(whole)(*given), load_dynamics(runs[name])[0](*given)
            assert torch.equal(step.latent, reference.latent)
            torch.testing.assert_close(step.latent, grouped.latent)
            assert all(torch.equal(a.ids, b.ids) for a, b in zip(step.routings, reference.routings, strict=True))


def test_loading_never_holds_the_experts_of_a_layer(runs: dict[str, Path]) -> None:
    """Nothing is made in memory that is larger than one expert or the rest of the model, here or in a step."""
    whole, autoencoder = load_dynamics(runs["tree"])
    sizes = {key: t.numel() for key, t in whole.state_dict().items()}
    rest = max(size for key, size in sizes.items() if ".feed_forward.experts." not in key)
    all_experts = 8 * 32 * 128
    assert all_experts in sizes.values() and max(rest, 32 * 128) < all_experts / 2
    there = patch("latentphys.training.models.load_autoencoder", return_value=autoencoder)
    with Largest() as largest, torch.no_grad(), there:
        dynamics = load_dynamics(runs["tree"], max_resident_experts=1)[0]
        dynamics(*inputs(dynamics))
    assert 32 * 128 <= largest.numel < all_experts


def test_one_function_through_a_tree_reads_one_expert_of_each_layer(runs: dict[str, Path]) -> None:
    dynamics, _ = load_dynamics(runs["tree"], max_resident_experts=8)
    layers = experts_of(dynamics)
    assert [layer.num_reads for layer in layers] == [0, 0]
    given = inputs(dynamics)
    with torch.no_grad():
        for _ in range(3):
            (routing,) = dynamics(*given).routings
    (leaf,) = routing.ids.unique().tolist()
    assert [(layer.num_reads, layer.resident) for layer in layers] == [(1, [leaf]), (1, [leaf])]
    tokens, _ = load_dynamics(runs["random"], max_resident_experts=8)
    with torch.no_grad():
        routings = tokens(*given).routings
    for layer, one in zip(experts_of(tokens), routings, strict=True):
        assert layer.num_reads == len(one.ids.unique()) > 1


@pytest.mark.parametrize("name", ["tree", "top1"])
def test_a_rollout_with_few_experts_is_the_rollout(
    road: Road, runs: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store, stores = road.store("porous"), {}
    whole, autoencoder = load_dynamics(runs[name])
    for kind, model in (("loop", by_loop(whole)), ("few", load_dynamics(runs[name], 1)[0])):
        rollout_store(autoencoder, model, store, tmp_path / kind, num_steps=3, trajectories=[0, 3])
        stores[kind] = open_store(tmp_path / kind)
    assert stores["few"].attributes["checksums"] == stores["loop"].attributes["checksums"]
    command = [
        "rollout",
        str(runs[name]),
        str(store.path),
        str(tmp_path / "cli"),
        "--steps=3",
        "--trajectories",
        "0",
        "3",
    ]
    assert main([*command, "--resident-experts", "1"]) == 0
    made = open_store(tmp_path / "cli")
    assert torch.equal(made.read("velocity", 1, slice(None)), stores["loop"].read("velocity", 1, slice(None)))
    assert main([*command, "--overwrite", "--resident-experts", "0"]) == 2
    assert "Expected at least 1 resident expert, got 0" in capsys.readouterr().err


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    if (file.parent / manifest.NAME).is_file():
        manifest.seal(file.parent, {key: value for key, value in manifest.read(file.parent).items() if key != "sha256"})


W_IN = "transformer.blocks.1.feed_forward.experts.w_in_EDG"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(W_IN), rf"Expected {W_IN} of shape \[8, 32, 128\] in .*model\.safetensors, got none"),
        (
            lambda t: t.update({W_IN: torch.zeros(7, 32, 128)}),
            rf"Expected {W_IN} of shape \[8, 32, 128\] in .*, got \[7, 32, 128\]",
        ),
        (lambda t: t.pop("transformer.head.bias"), "weights that fit the model .*, got others: Missing key"),
        (lambda t: t.update({"more": torch.zeros(1)}), "weights that fit the model .*, got others: Unexpected key"),
        (
            lambda t: t.update({"transformer.head.bias": torch.zeros(3)}),
            "weights that fit the model .*, got others: size mismatch for transformer.head.bias",
        ),
    ],
    ids=["no experts", "fewer experts", "missing", "unexpected", "another size"],
)
def test_weights_of_another_model_are_refused(
    runs: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    run = Path(shutil.copytree(runs["tree"], tmp_path / "run"))
    rewrite(open_checkpoint(run).path / "model.safetensors", change)
    with pytest.raises(ValueError, match=message) as caught:
        load_dynamics(run, max_resident_experts=1)
    assert "\n" not in str(caught.value)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, r"Expected weights in .*model\.safetensors, got no such file"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "Expected a readable safetensors file, got"),
    "empty": (lambda p: p.write_bytes(b""), "Expected a readable safetensors file, got"),
    "a folder": (_folder, "Expected a readable safetensors file, got"),
}
"""What is done to the weights, and what a model that is loaded already says of it."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_clear_error_whenever_it_is_met(
    runs: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    run = Path(shutil.copytree(runs["tree"], tmp_path / "run"))
    dynamics, _ = load_dynamics(run, max_resident_experts=1)
    spoil, message = DAMAGE[damage]
    path = open_checkpoint(run).path
    spoil(path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        dynamics(*inputs(dynamics))
    with pytest.raises(ValueError, match=r"^Expected .*model\.safetensors, got .*; copy it again"):
        load_dynamics(path, max_resident_experts=1)


def test_weights_are_never_mixed_with_those_of_a_later_checkpoint(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["tree"], tmp_path / "run"))
    dynamics, _ = load_dynamics(run, max_resident_experts=1)
    rewrite(open_checkpoint(run).path / "model.safetensors", lambda t: t[W_IN].mul_(2.0))
    with pytest.raises(ValueError, match=r"model\.safetensors as it was when the model was loaded, got another"):
        dynamics(*inputs(dynamics))


def test_what_cannot_be_read_one_by_one_is_refused(tmp_path: Path) -> None:
    experts, file = stored(tmp_path)
    with pytest.raises(ValueError, match="at least 1 resident expert, got 0"):
        lazy(experts, file, 0)
    with pytest.raises(ValueError, match="dispatch 'loop' for experts that are read one at a time, got 'grouped'"):
        dispatch(
            torch.randn(4, D), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), lazy(experts, file), "grouped"
        )
    with pytest.raises(ValueError, match=r"Expected weights in .*none, got no such file"):
        load_lazily(torch.nn.Linear(2, 2), tmp_path / "none", 1)
