"""The sparse layer never waits for a GPU: no operation's shape, and no branch of the program, depends on numbers.

Two guards stand for the GPU. Fake tensors have no numbers, so that whatever asks for one fails. And a guard over real
tensors refuses every operation that torch itself marks as one whose output's shape, or value on the host, depends on
data. Both refuse copies between host and device. What a kernel does inside is out of their sight; in bfloat16 the
kernels that these models call do not wait either.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from latentphys.routers import (
    AuxiliaryLosses,
    BiasBalance,
    Layout,
    MoEFeedForward,
    Nested,
    Router,
    SemanticTop1,
    TopK,
    expert_counts,
)
from latentphys.transformer import LatentTransformer
from latentphys.transformer.block import TransformerBlock
from latentphys.transformer.rotary import rotary

SHAPE = (4, 3, 2)
LAYOUT = Layout(2, SHAPE)
ROUTERS: dict[str, Callable[[int], Router]] = {
    "top1": partial(SemanticTop1, num_experts=6),
    "topk": partial(TopK, num_experts=6, top_k=2),
    "nested": partial(Nested, num_experts=6, num_groups=3, top_k=1),
    "top1 of samples": partial(SemanticTop1, num_experts=6, per="sample"),
    "topk of blocks": partial(TopK, num_experts=6, top_k=2, per=(2, 3, 1)),
}
BOOLEAN = (torch.bool, torch.uint8)


class HostAccess(RuntimeError):
    """Something that would make a GPU and its host wait for each other."""


class NoCopies(TorchFunctionMode):
    """Refuses tensors made of Python numbers, and tensors brought to the host."""

    refused = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.cpu, Tensor.numpy, Tensor.tolist)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_a_device = func is Tensor.to and any(
            isinstance(a, str | torch.device) for a in (*args[1:], *kwargs.values())
        )
        if func in self.refused or to_a_device:
            raise HostAccess(str(func))
        return func(*args, **kwargs)


class NoData(TorchDispatchMode):
    """Refuses operations whose output depends on numbers in a way that the host has to know, backward pass included."""

    marks = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        marked = any(mark in func.tags for mark in self.marks)
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default):
            # Indexing is marked for the sake of masks only.
            marked = any(index is not None and index.dtype in BOOLEAN for index in args[1])
        if marked:
            raise HostAccess(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def guard(kind: str) -> Iterator[Callable[[Tensor], Tensor]]:
    """No access from the host in here; gives what makes tensors of this kind."""
    if kind == "real":
        with NoCopies(), NoData():
            yield lambda t: t
    else:
        mode = FakeTensorMode()
        try:
            with mode, NoCopies():
                yield lambda t: mode.from_tensor(t)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostAccess(str(error)) from error


def step(kind: str, module: nn.Module, arguments: tuple[Any, ...], pick: Callable[[Any], Tensor]) -> Any:
    """Forward under bfloat16 autocast, and backward, of a module under guard; every parameter gets a gradient."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with guard(kind) as make:
        made = {name: make(tensor) for name, tensor in state.items()}
        inputs = tuple(make(a) if isinstance(a, Tensor) else a for a in arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = torch.func.functional_call(module, made, inputs)
        pick(out).float().square().sum().backward()
    assert all(made[name].grad is not None for name, _ in module.named_parameters())
    return out


@pytest.mark.parametrize("kind", ["real", "fake"])
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_layer_with_shared_experts(kind: str, name: str, activation: str) -> None:
    layer = MoEFeedForward(16, 16, ROUTERS[name](16), num_shared=2, activation=activation, dispatch="grouped")
    y, routing = step(kind, layer, (torch.randn(2, 24, 16), LAYOUT), lambda out: out[0])
    assert y.dtype == torch.bfloat16 and y.shape == (2, 24, 16) and routing.ids.shape[0] == 48


@pytest.mark.parametrize("name", ROUTERS)
def test_a_layer_in_fp32(name: str) -> None:
    """Guarded over real tensors alone: torch has no fake grouped matmul in FP32."""
    layer = MoEFeedForward(16, 16, ROUTERS[name](16), dispatch="grouped")
    with guard("real"):
        layer(torch.randn(2, 24, 16), LAYOUT)[0].square().sum().backward()


@pytest.mark.parametrize("kind", ["real", "fake"])
@pytest.mark.parametrize("name", ["top1", "nested"])
@pytest.mark.parametrize("mixer", ["attention", "fourier"])
def test_a_block(kind: str, name: str, mixer: str) -> None:
    block = TransformerBlock(32, 16, 2, 16, ROUTERS[name](32), mixer=mixer, dispatch="grouped")
    table = rotary(SHAPE, (True, True, False), 16)
    step(kind, block, (torch.randn(2, 24, 32), torch.randn(2, 16), table, LAYOUT), lambda out: out[0])


@pytest.mark.parametrize("kind", ["real", "fake"])
def test_balance_and_auxiliary_losses(kind: str) -> None:
    layer = MoEFeedForward(16, 16, ROUTERS["nested"](16), dispatch="grouped")
    losses = AuxiliaryLosses({"switch": [3e-2, 1e-4], "importance": 1e-2, "z": 1e-3})

    def total(out: tuple[Tensor, Any]) -> Tensor:
        assert layer.router is not None
        BiasBalance(1e-3).update(torch.zeros(6), expert_counts(out[1].ids, 6))
        return out[0].sum() + losses([[out[1]]])[0]

    step(kind, layer, (torch.randn(2, 24, 16), LAYOUT), total)


@pytest.mark.parametrize("routing", ["block", "function"])
@pytest.mark.parametrize("mixer", ["attention", "fourier"])
def test_a_whole_transformer(mixer: str, routing: str) -> None:
    model = LatentTransformer(
        2, 1, 1, 0, 32, depth=2, num_heads=2, hidden=16, router=ROUTERS["topk"], mixer=mixer, routing=routing
    )
    inputs = torch.randn(2, 1, 2, *SHAPE), torch.randn(2, 1), torch.zeros(2, 0, *SHAPE), (True, False, False)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    mode = FakeTensorMode()
    made: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in state.items()}
    fakes = tuple(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in inputs)
    with mode, torch.autocast("cpu", dtype=torch.bfloat16):
        torch.func.functional_call(model, made, fakes).increment.float().square().sum().backward()
    assert all(made[name].grad is not None for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["real", "fake"])
@pytest.mark.parametrize("name", ROUTERS)
def test_the_guards_catch_the_loop(kind: str, name: str) -> None:
    """It asks which tokens each expert got."""
    layer = MoEFeedForward(16, 16, ROUTERS[name](16), dispatch="loop")
    with pytest.raises(HostAccess, match="nonzero"):
        step(kind, layer, (torch.randn(2, 24, 16), LAYOUT), lambda out: out[0])


class Squeal(torch.autograd.Function):
    """Reads a number in the backward pass only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * float(grads[0].sum())


OFFENCES: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: 1 if x.sum() > 0 else 0,
    "length": lambda x: x[: int(x.sum())],
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask assignment": lambda x: x.clone().index_put((x > 0,), x.detach()[:1]),
    "bincount": lambda x: torch.bincount(x.long().abs()),
    "unique": lambda x: torch.unique(x),
    "repeat": lambda x: x.repeat_interleave(x.long().abs()),
    "equal": lambda x: torch.equal(x, x + 1),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "to device": lambda x: x.to(device=torch.device("cpu")),
    "numpy": lambda x: x.detach().numpy(),
    "from host": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "backward": lambda x: Squeal.apply(x).sum().backward(),
}


# The result of an assignment by mask has a known shape, so fake tensors let it pass.
CAUGHT = [("real", name) for name in OFFENCES] + [("fake", name) for name in OFFENCES if name != "mask assignment"]


@pytest.mark.parametrize(("kind", "name"), CAUGHT)
def test_the_guards_catch(kind: str, name: str) -> None:
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    with pytest.raises(HostAccess), guard(kind) as make:
        OFFENCES[name](make(x))


@pytest.mark.parametrize("kind", ["real", "fake"])
def test_the_guards_let_pass_what_stays_on_the_device(kind: str) -> None:
    with guard(kind) as make:
        x = make(torch.randn(3, 4))
        order = x[:, 0].argsort()
        assert (x[order].to(torch.bfloat16) + torch.arange(4)).shape == (3, 4)
        assert torch.where(x > 0, x, 0.0).index_put((order,), x).shape == (3, 4)
