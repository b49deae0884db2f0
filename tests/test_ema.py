"""The average of the weights: its closed form, an exact way back to the weights, and continuation."""

import math
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn

from latentphys.training.ema import EMA


class Model(nn.Module):
    """A trainable matrix and vector, a frozen matrix, and a buffer."""

    bias_E: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.register_buffer("bias_E", torch.zeros(3))


@torch.no_grad()
def move(model: nn.Module, step: int) -> None:
    """New weights, as if the optimiser had made them."""
    for n, parameter in enumerate(model.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + n)))


def test_a_constant_decay_is_a_geometric_average() -> None:
    """Long after the start: shadow_n = d^n shadow_0 + (1 − d) Σ d^(n − i) w_i."""
    model, decay, num_steps = Model().double(), 0.75, 20
    ema = EMA(model, decay)
    expected = model.linear.weight.detach() * decay**num_steps
    for i in range(num_steps):
        move(model, i)
        ema.update(model, step=1000 + i)
        expected = expected + (1 - decay) * decay ** (num_steps - 1 - i) * model.linear.weight.detach()
    torch.testing.assert_close(ema.tensors()["linear.weight"], expected, rtol=1e-13, atol=1e-13)


def test_the_decay_warms_up() -> None:
    """After the first step the initial weights count a tenth, after the second a tenth of two elevenths of it."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1.0)
        ema = EMA(model, 0.999)
        model.weight.zero_()
    found = []
    for step in range(12_000):
        ema.update(model, step)
        found.append(ema.tensors()["weight"].item())
    assert found[0] == pytest.approx(1 / 10, rel=1e-13)
    assert found[1] == pytest.approx(1 / 10 * 2 / 11, rel=1e-13)
    assert found[30] == pytest.approx(math.prod((1 + s) / (10 + s) for s in range(31)), rel=1e-12)
    # (1 + s) / (10 + s) reaches 0.999 at s = 8990.
    assert found[8989] / found[8988] < 0.999 == pytest.approx(found[11_999] / found[11_998], rel=1e-12)
    assert found[8990] / found[8989] == pytest.approx(0.999, rel=1e-12)


def test_trainable_parameters_alone_are_averaged_in_fp32_and_apart_from_the_model() -> None:
    model = Model().bfloat16()
    ema = EMA(model, 0.99)
    assert {name: tensor.dtype for name, tensor in ema.tensors().items()} == {
        "linear.weight": torch.float32,
        "linear.bias": torch.float32,
    }
    before = ema.tensors()["linear.weight"].clone()
    move(model, 0)
    assert torch.equal(ema.tensors()["linear.weight"], before)
    # Steps that are lost in 8 bits add up in the average.
    with torch.no_grad():
        model.linear.weight.copy_(before + 1)
    ema.update(model, 10**6)
    assert torch.allclose(ema.tensors()["linear.weight"], before + 0.01 * (model.linear.weight.float() - before))


@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_come_back_to_the_bit(fails: bool) -> None:
    model = Model()
    ema = EMA(model, 0.9)
    move(model, 0)
    ema.update(model, 100)
    move(model, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    average = {name: tensor.clone() for name, tensor in ema.tensors().items()}
    try:
        with ema.applied(model):
            inside = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            model.bias_E.fill_(3.0)
            if fails:
                raise KeyError("a test that stops")
    except KeyError:
        assert fails
    for name, tensor in inside.items():
        assert torch.equal(tensor, average.get(name, before[name])), name
    assert not torch.equal(inside["linear.weight"], before["linear.weight"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, torch.full((3,), 3.0) if name == "bias_E" else before[name]), name
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(torch.equal(ema.tensors()[name], tensor) for name, tensor in average.items())


def test_averaged_weights_can_be_left_within_training() -> None:
    """The optimiser goes on with its own weights as if nothing had been."""
    results = []
    for looks in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        ema = EMA(model, 0.9)
        for step in range(6):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model, step)
            if looks:
                with ema.applied(model), torch.no_grad():
                    model(x)
        results.append([*model.parameters(), *ema.tensors().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_average_goes_on_where_it_was() -> None:
    model = Model()
    whole = EMA(model, 0.95)
    for step in range(5):
        move(model, step)
        whole.update(model, step)
    kept = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    resumed = EMA(model, 0.95)
    assert not torch.equal(resumed.tensors()["linear.weight"], kept["linear.weight"])
    resumed.load(kept)
    for step in range(5, 9):
        move(model, step)
        whole.update(model, step)
        resumed.update(model, step)
    assert all(torch.equal(tensor, whole.tensors()[name]) for name, tensor in resumed.tensors().items())
    assert not torch.equal(resumed.tensors()["linear.weight"], kept["linear.weight"])


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, math.nan])
def test_refuses_a_decay_that_is_none(decay: float) -> None:
    with pytest.raises(ValueError, match="Expected a decay between 0 and 1, got"):
        EMA(Model(), decay)


@pytest.mark.parametrize("change", [{"linear.bias": None}, {"frozen": torch.ones(2, 2)}])
def test_refuses_an_average_of_other_parameters(change: dict[str, torch.Tensor | None]) -> None:
    ema = EMA(Model(), 0.9)
    tensors = {name: tensor for name, tensor in (ema.tensors() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=f"of the 2 parameters that are trained, got .* differ in '{[*change][0]}'"):
        ema.load(tensors)


def test_refuses_an_average_of_other_shapes() -> None:
    ema = EMA(Model(), 0.9)
    with pytest.raises(ValueError, match=r"Expected an average of shape \(3, 4\) for 'linear.weight', got \(4,\)"):
        ema.load(ema.tensors() | {"linear.weight": torch.zeros(4)})


SHARDED = """
import torch, torch.distributed as dist
from functools import partial
from torch.distributed.tensor import DTensor
from latentphys.routers import SemanticTop1
from latentphys.training.ema import EMA
from latentphys.training.sharding import gather, scatter_like, shard
from latentphys.transformer.model import LatentTransformer

def new_model():
    torch.manual_seed(0)
    return LatentTransformer(3, 2, 2, 1, 16, 1, 2, 16, partial(SemanticTop1, num_experts=2, semantic_dim=8))

@torch.no_grad()
def move(model, step):
    for name, parameter in model.named_parameters():
        whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + len(name)))
        parameter.copy_(scatter_like(whole, parameter))

def outputs(model, grad):
    generator = torch.Generator().manual_seed(7)
    shapes = ((2, 2, 3, 2, 2, 2), (2, 2), (2, 1, 2, 2, 2))
    inputs = [torch.randn(*shape, generator=generator) for shape in shapes]
    with torch.set_grad_enabled(grad):
        increment = model(*inputs, (True, True, True)).increment
    if grad:
        (0 * increment.sum()).backward()
    return increment.detach()

dist.init_process_group("gloo")
rank = dist.get_rank()
one, two = new_model(), new_model()
shard(two, expert_parallel=2)
averages = [EMA(one, 0.9), EMA(two, 0.9)]
for step in range(4):
    for model, ema in zip((one, two), averages):
        move(model, step)
        outputs(model, grad=False)
        ema.update(model, step + 3)
assert all(isinstance(tensor, DTensor) for tensor in averages[1].tensors().values())
wholes = gather(averages[1].tensors())
for name, whole in wholes.items():
    assert torch.equal(whole, averages[0].tensors()[name]), name
own = outputs(two, grad=False)
with averages[1].applied(two):
    averaged = outputs(two, grad=False)
assert torch.equal(outputs(two, grad=True), own), "gathered weights of the average went on"
move(one, 3)
torch.testing.assert_close(own, outputs(one, grad=False))
with averages[0].applied(one):
    torch.testing.assert_close(averaged, outputs(one, grad=False))
assert not torch.allclose(averaged, own)
again = EMA(two, 0.9)
again.load({name: tensor.clone() for name, tensor in averages[0].tensors().items()})
for name, tensor in again.tensors().items():
    assert isinstance(tensor, DTensor) and torch.equal(tensor.to_local(), averages[1].tensors()[name].to_local()), name
dist.destroy_process_group()
"""


def test_the_average_of_a_sharded_model_is_that_of_the_whole(tmp_path: Path) -> None:
    run_ranks(SHARDED, tmp_path)
