"""The bias that evens out the load moves once per training step, by all ranks' tokens, each counted once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small import Road, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentphys.routers import (
    AuxiliaryLosses,
    BiasBalance,
    Layout,
    Router,
    Routing,
    SemanticTop1,
    telemetry,
)
from latentphys.training import Trainer, open_checkpoint
from latentphys.training.tasks import DynamicsTask, Output
from latentphys.transformer.block import TransformerBlock
from latentphys.transformer.rotary import rotary


def counts(routing: Routing) -> Tensor:
    return telemetry.expert_counts(routing.ids, routing.num_experts)


def test_it_lowers_the_overloaded_and_keeps_the_mean() -> None:
    bias, tokens = torch.zeros(4), torch.tensor([9, 1, 1, 1])
    updated = BiasBalance(0.1).update(bias, tokens)
    torch.testing.assert_close(updated, torch.tensor([-0.15, 0.05, 0.05, 0.05]))
    assert torch.equal(bias, torch.zeros(4)) and torch.equal(tokens, torch.tensor([9, 1, 1, 1]))
    assert torch.equal(BiasBalance(0.1).update(updated, torch.tensor([3, 3, 3, 3])), updated)
    assert torch.equal(BiasBalance(0.1).update(updated, torch.zeros(4, dtype=torch.long)), updated)


def test_it_evens_out_a_skewed_router() -> None:
    tokens = torch.randn(2000, 16) + 4 * torch.randn(2, 16)[torch.arange(2000) % 2]
    router = SemanticTop1(16, 4)
    before = telemetry.entropy(counts(router(tokens)))
    for _ in range(400):
        router.bias_E = BiasBalance(2e-3).update(router.bias_E, counts(router(tokens)))
    assert before < 1.8 and telemetry.entropy(counts(router(tokens))) > 1.98


def test_small_steps_add_up_in_a_16_bit_model() -> None:
    """In bfloat16 a bias of 0.5 would not feel a step of 1e-3."""
    model = nn.Sequential(SemanticTop1(16, 2)).bfloat16()
    router = model[0]
    assert isinstance(router, Router)
    router.bias_E.copy_(torch.tensor([0.5, -0.5]))
    for _ in range(10):
        router.bias_E.copy_(BiasBalance(1e-3).update(router.bias_E, torch.tensor([0, 5])))
    torch.testing.assert_close(router.bias_E, torch.tensor([0.51, -0.51]))
    assert torch.equal(model.state_dict()["0.bias_E"], router.bias_E) and router.bias_E.dtype == torch.float32


def test_refuses_what_is_no_balance() -> None:
    for rate in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"Expected a finite balance rate ≥ 0, got {rate}"):
            BiasBalance(rate)
    with pytest.raises(ValueError, match=r"Expected one count per expert, \(4,\), got \(3,\)"):
        BiasBalance().update(torch.zeros(4), torch.zeros(3))


class Pass:
    """One forward and backward pass of a block, under activation checkpointing or not."""

    def __init__(self, use_reentrant: bool | None, move: Callable[[Router], object] = lambda router: None) -> None:
        torch.manual_seed(0)
        router = SemanticTop1(16, 4)
        block = TransformerBlock(16, 8, 2, 16, router)
        nn.init.normal_(block.modulation.linear.weight)
        self.ids: list[Tensor] = []
        router.register_forward_hook(lambda module, given, routing: self.ids.append(routing.ids))
        x, condition = torch.randn(3, 8, 16, requires_grad=True), torch.randn(3, 8)
        table = rotary((2, 2, 2), (True, True, True), 8, x.device, x.dtype)
        arguments = (x, condition, table, Layout(3, (2, 2, 2)))
        if use_reentrant is None:
            y, routing = block(*arguments)
        else:
            y, routing = checkpoint(block, *arguments, use_reentrant=use_reentrant)
        self.routing: Routing = routing
        auxiliary, _ = AuxiliaryLosses({"switch": 1.0})([[routing]])
        move(router)
        (y.square().sum() + auxiliary).backward()
        self.gradients = {name: p.grad for name, p in block.named_parameters()}
        self.auxiliary = float(auxiliary.detach())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_counts_once_and_routes_the_same_way_again(use_reentrant: bool) -> None:
    plain, checkpointed = Pass(None), Pass(use_reentrant)
    assert len(plain.ids) == 1 and len(checkpointed.ids) == 2
    assert torch.equal(checkpointed.ids[0], checkpointed.ids[1]) and torch.equal(checkpointed.ids[0], plain.ids[0])
    assert int(counts(checkpointed.routing).sum()) == 24
    assert torch.equal(counts(checkpointed.routing), counts(plain.routing))


def test_auxiliary_losses_go_through_checkpointing_without_reentry_only() -> None:
    plain, checkpointed, reentrant = Pass(None), Pass(False), Pass(True)
    assert plain.auxiliary == checkpointed.auxiliary > 0 and reentrant.auxiliary == 0
    torch.testing.assert_close(checkpointed.gradients, plain.gradients)


def test_a_bias_that_moves_before_the_backward_pass_would_route_tokens_another_way() -> None:
    """Why it is moved after the optimiser's step."""
    moved = Pass(False, lambda router: router.bias_E.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0])))
    assert not torch.equal(moved.ids[0], moved.ids[1])


SETTINGS = (
    "dynamics_training.unroll=2",
    "dynamics_training.balance_losses.switch=0.1",
    "dynamics_training.balance_losses.z=1e-3",
)


@pytest.fixture
def task(road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DynamicsTask:
    """What a run would train."""
    made: list[DynamicsTask] = []

    def fit(self: Trainer, task: DynamicsTask, run: Path, *_: object) -> Path:
        made.append(task)
        return run

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "fit", fit)
        train("dynamics", road.inputs("dynamics"), tmp_path / "run", *SETTINGS)
    return made[0]


def refuse(*_: object) -> None:
    raise AssertionError("no rank may wait for the others here")


def test_evaluation_balances_nothing_and_waits_for_nobody(task: DynamicsTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", refuse)
    windows = task.test_windows.sample(0, 2, 1)
    outputs = [task.eval()(windows) for _ in range(2)]
    (family,) = {name.partition("/")[0] for name in outputs[0].figures}
    assert set(outputs[0].figures) == {f"{family}/latent_mse"}
    assert torch.equal(outputs[0].loss, outputs[0].figures[f"{family}/latent_mse"])
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert not any(router.bias_E.any() for router in task.routers())
    with pytest.raises(AssertionError, match="no rank may wait"):
        task.train()(windows)


def test_training_adds_the_losses_and_counts_every_step_of_the_unrolled_pass(task: DynamicsTask) -> None:
    output = task.train()(task.train_windows.sample(0, 2, 0))
    (family,) = {name.partition("/")[0] for name in output.figures}
    figure = {name: float(output.figures[f"{family}/{name}"]) for name in ("latent_mse", "balance/switch", "balance/z")}
    assert len(output.figures) == 3 and figure["balance/switch"] > 0.99 and figure["balance/z"] > 0
    expected = figure["latent_mse"] + 0.1 * figure["balance/switch"] + 1e-3 * figure["balance/z"]
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert output.loss.dtype == torch.float32
    cells = 2 * 4**3
    assert [int(counts.sum()) for counts in output.expert_counts] == [2 * cells, 2 * cells]


def test_the_bias_moves_by_the_counts_of_the_step(task: DynamicsTask, monkeypatch: pytest.MonkeyPatch) -> None:
    output = task.train()(task.train_windows.sample(0, 2, 0))
    task.after_step(output)
    expected = [BiasBalance(1e-2).update(torch.zeros(4), tokens) for tokens in output.expert_counts]
    assert all(bias.any() for bias in expected)
    assert all(torch.equal(router.bias_E, bias) for router, bias in zip(task.routers(), expected, strict=True))
    task.balance = BiasBalance(0.0)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", refuse)
    task.after_step(output)
    assert all(torch.equal(router.bias_E, bias) for router, bias in zip(task.routers(), expected, strict=True))


def test_a_run_moves_the_bias_once_per_step_whatever_is_tested_between(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[list[Tensor]] = []
    after_step = DynamicsTask.after_step

    def spy(self: DynamicsTask, output: Output) -> None:
        tokens.append(output.expert_counts)
        after_step(self, output)

    monkeypatch.setattr(DynamicsTask, "after_step", spy)
    settings = [*SETTINGS, "trainer.num_steps=4", "trainer.test_every=1"]
    run = train("dynamics", road.inputs("dynamics"), tmp_path / "run", *settings)
    weights = load_file(open_checkpoint(run).path / "model.safetensors")
    assert len(tokens) == 4
    for layer in range(2):
        bias = torch.zeros(4)
        for step in tokens:
            bias = BiasBalance(1e-2).update(bias, step[layer])
        found = weights[f"transformer.blocks.{layer}.feed_forward.router.bias_E"]
        assert torch.equal(found, bias) and found.dtype == torch.float32
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = {name.partition("/")[2] for line in lines for name in line if "balance" in name}
    assert logged == {"balance/switch", "balance/z"}


def test_settings_that_cannot_be_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    for setting, message in (
        ("balance_losses.switch=-1", "a finite weight ≥ 0 for the auxiliary loss 'switch', .* got -1"),
        ("balance_rate=-1", "a finite balance rate ≥ 0, got -1"),
        ("balance_losses.cv2=0.1", "options that train.yaml knows: .*'dynamics_training.balance_losses.cv2'"),
        ("balance_losses=0.1", "Expected options for 'dynamics_training.balance_losses', got 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            train("dynamics", [tmp_path / "nowhere.zarr"], tmp_path / "run", f"dynamics_training.{setting}")
