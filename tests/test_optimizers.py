"""Optimisers: who decays, one step in closed form, continuation to the bit, and SOAP's progress against AdamW's."""

import io
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from latentphys.routers import Experts
from latentphys.training.optimizers import OPTIMIZERS, new_optimizer

needs_soap = pytest.mark.skipif(find_spec("pytorch_optimizer") is None, reason="without pytorch-optimizer")
EACH = [pytest.param(name, marks=needs_soap if name == "soap" else []) for name in OPTIMIZERS]


class Mixed(nn.Module):
    """Weights of every rank that the models have: vectors, matrices, stacked experts, convolutions; one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts(3, dim=8, hidden=8)
        self.conv = nn.Conv3d(2, 8, kernel_size=3)
        self.norm = nn.LayerNorm(8)
        self.log_temperature = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(self.conv(x).flatten(2).mT.flatten(0, 1))
        return self.experts.one(rows, 0) + self.experts.one(rows, 2) * self.log_temperature.exp()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        loss = (model(x) - x.mean()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", EACH)
def test_matrices_decay_and_vectors_do_not(name: str) -> None:
    """With a gradient of zero everywhere a step is the decay alone."""
    model = Mixed()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = new_optimizer(name, model, learning_rate=0.5, weight_decay=0.1)
    for _ in range(2 if name == "soap" else 1):  # the first step of SOAP makes its basis
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    for key, value in model.state_dict().items():
        decays = value.ndim >= 2 and key != "frozen"
        torch.testing.assert_close(value, before[key] * (0.95 if decays else 1.0), rtol=1e-6, atol=0, msg=key)


@pytest.mark.parametrize("name", EACH)
def test_every_trainable_parameter_is_in_one_group_with_a_rate_of_its_own(name: str) -> None:
    model = Mixed()
    optimizer = new_optimizer(name, model, 0.5, 0.1)
    found = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * len(optimizer.param_groups)
    assert all(group["params"] for group in optimizer.param_groups)


def test_adamw_is_fused_and_makes_the_step_of_the_formula() -> None:
    model = nn.Linear(3, 2).double()
    weight, grads = model.weight.detach().clone(), torch.randn(3, 2, 3).double()
    optimizer = new_optimizer("adamw", model, learning_rate=0.1, weight_decay=0.2)
    first, second = torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    for n, grad in enumerate(grads, start=1):
        model.weight.grad, model.bias.grad = grad.clone(), torch.zeros(2).double()
        optimizer.step()
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad.square()
        update = first / (1 - 0.9**n) / ((second / (1 - 0.999**n)).sqrt() + 1e-8)
        weight = weight * (1 - 0.1 * 0.2) - 0.1 * update
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-12, atol=1e-12)
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]


@needs_soap
def test_soap_is_adam_in_the_basis_of_its_preconditioner() -> None:
    """A single matrix, a second step: the update is Adam's of the rotated gradient, rotated back."""
    model = nn.Linear(4, 3, bias=False).double()
    before = model.weight.detach().clone()
    optimizer = new_optimizer("soap", model, learning_rate=0.1, weight_decay=0.0)
    first, grad = torch.randn(2, 3, 4).double()
    model.weight.grad = first.clone()
    optimizer.step()
    assert torch.equal(model.weight, before)
    model.weight.grad = grad.clone()
    optimizer.step()
    left, right = (torch.linalg.eigh(product).eigenvectors for product in (first @ first.mT, first.mT @ first))
    rotated = left.mT @ grad @ right
    update = left @ (rotated / (rotated.square().sqrt() + 1e-8 / math.sqrt(0.05))) @ right.mT
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * update, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("stop", [1, 9, 10, 11, 13])
def test_training_goes_on_to_the_bit(name: str, stop: int) -> None:
    """Through a file, at steps before and after SOAP renews its basis (every tenth)."""
    model = Mixed()
    optimizer = new_optimizer(name, model, 1e-2, 1e-2)
    train(model, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    whole = train(model, optimizer, range(stop, 24))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(1)
    resumed = Mixed()
    resumed.load_state_dict(saved["model"])
    other = new_optimizer(name, resumed, 1e-2, 1e-2)
    other.load_state_dict(saved["optimizer"])
    assert train(resumed, other, range(stop, 24)) == whole
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def valley(name: str, learning_rate: float, num_steps: int = 200) -> float:
    """Final |L (W − W*) R|², with L and R of condition 100 in bases that are not those of W's entries."""
    torch.manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(16, 16)).Q for _ in range(2)]
    left, right = (turn * torch.logspace(0, -2, 16) @ turn.mT for turn in turns)
    model, target = nn.Linear(16, 16, bias=False), torch.randn(16, 16)
    optimizer = new_optimizer(name, model, learning_rate, 0.0)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * step / num_steps)) / 2
        loss = (left @ (model.weight - target) @ right).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@needs_soap
def test_soap_gets_further_in_as_many_steps() -> None:
    """Each at the best of a few rates: Adam is slow where the curvature is not along the entries of a matrix."""
    best = {name: min(valley(name, rate) for rate in (3e-2, 1e-1, 3e-1)) for name in OPTIMIZERS}
    assert best["soap"] < 0.1 * best["adamw"]


def test_refuses_unknown_optimisers() -> None:
    with pytest.raises(ValueError, match=r"Expected an optimiser of adamw \| soap, got 'sgd'"):
        new_optimizer("sgd", nn.Linear(2, 2), 1e-3, 0.0)


def test_refuses_a_model_with_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="Expected a model with parameters to train"):
        new_optimizer("adamw", nn.Linear(2, 2).requires_grad_(False), 1e-3, 0.0)


def test_soap_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match=r"got none; run `pip install latentphys\[soap\]`"):
        new_optimizer("soap", nn.Linear(2, 2), 1e-3, 0.0)


def test_the_package_of_soap_is_loaded_for_soap_alone() -> None:
    code = (
        "import sys, torch; from latentphys.training.optimizers import new_optimizer; "
        "new_optimizer('adamw', torch.nn.Linear(2, 2), 1e-3, 0.0); sys.exit('pytorch_optimizer' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


SHARDED = """
import torch, torch.distributed as dist
from functools import partial
from latentphys.routers import SemanticTop1
from latentphys.training.optimizers import new_optimizer
from latentphys.training.sharding import gather, shard
from latentphys.transformer.model import LatentTransformer

def new_model():
    torch.manual_seed(0)
    return LatentTransformer(3, 2, 2, 1, 16, 1, 2, 16, partial(SemanticTop1, num_experts=2, semantic_dim=8))

def train(model):
    optimizer = new_optimizer("adamw", model, 1e-2, 1e-1)
    for step in range(3):
        for name, parameter in model.named_parameters():
            full = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + len(name)))
            parameter.grad = scatter_like(full, parameter)
        optimizer.step()
    return optimizer

from latentphys.training.sharding import scatter_like
dist.init_process_group("gloo")
rank = dist.get_rank()
one = new_model()
train(one)
two = new_model()
shard(two, expert_parallel=2)
optimizer = train(two)
assert len(optimizer.param_groups) == 3, len(optimizer.param_groups)
assert all(group["fused"] for group in optimizer.param_groups)
for name, whole in gather(dict(two.named_parameters())).items():
    torch.testing.assert_close(whole, one.get_parameter(name).detach(), rtol=1e-6, atol=1e-7)
try:
    new_optimizer("soap", two, 1e-3, 0.0)
except ValueError as error:
    assert "got one sharded over processes; use 'adamw'" in str(error), error
else:
    raise AssertionError("SOAP took a sharded model")
dist.destroy_process_group()
"""


def test_sharded_parameters_are_trained_fused_and_refused_by_soap(tmp_path: Path) -> None:
    run_ranks(SHARDED, tmp_path)
