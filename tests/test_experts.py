"""The SwiGLU of the experts, whose gradient is written out, against what autograd makes of its formula."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from latentphys.routers import Experts, FeedForward
from latentphys.routers.experts import activation_of

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}
swiglu, _ = activation_of("swiglu")


def formula(hidden: Tensor) -> Tensor:
    gate, up = hidden[..., : hidden.shape[-1] // 2], hidden[..., hidden.shape[-1] // 2 :]
    return F.silu(gate) * up


def gradient(f: object, hidden: Tensor, grad: Tensor) -> Tensor:
    assert callable(f)
    hidden = hidden.clone().requires_grad_()
    return torch.autograd.grad(f(hidden), hidden, grad)[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 8), (0, 4)])
def test_value_and_gradient_are_those_of_the_formula(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    hidden = 3 * torch.randn(shape, dtype=dtype)
    grad = torch.randn(*shape[:-1], shape[-1] // 2, dtype=dtype)
    assert torch.equal(swiglu(hidden.clone().requires_grad_()), formula(hidden))
    assert torch.equal(swiglu(hidden), formula(hidden))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        gradient(swiglu, hidden, grad), gradient(formula, hidden, grad), rtol=tolerance, atol=tolerance
    )


def test_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(swiglu, torch.randn(5, 6, dtype=torch.float64, requires_grad=True))


def test_takes_the_gradient_of_a_plain_sum_and_of_columns() -> None:
    """Gradients with stride 0, and hidden values that are not contiguous."""
    torch.manual_seed(0)
    hidden = torch.randn(6, 10).mT[:, :4]
    ones = torch.ones(()).expand(10, 2)
    torch.testing.assert_close(gradient(swiglu, hidden, ones), gradient(formula, hidden, ones))


def test_refuses_a_second_derivative() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(swiglu(hidden).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_keeps_the_hidden_values_alone() -> None:
    """For its gradient a layer of T tokens stores T·(D + 2F + F) numbers besides its weights."""
    layer, kept = FeedForward(8, 16), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(5, 8, requires_grad=True))
    weights = {p.data_ptr() for p in layer.parameters()}
    stored = {t.data_ptr(): t.numel() for t in kept if t.data_ptr() not in weights}
    assert sum(stored.values()) == 5 * (8 + 32 + 16)


@pytest.fixture(params=[1, 2, 4])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("counts", [[7, 0, 13, 9, 1], [6, 7, 8, 9, 0, 0], [0, 30, 0, 0], [0, 0], [5]])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_run_alike_with_and_without_gradients(
    activation: str, dtype: torch.dtype, counts: list[int], num_threads: int
) -> None:
    """A few at a time on a CPU that needs no gradients, at the price of half as many rows again at most."""
    torch.manual_seed(0)
    experts = Experts(len(counts), 16, 24, activation).to(dtype)
    x, ends = torch.randn(sum(counts), 16, dtype=dtype), torch.tensor(counts).cumsum(0).int()
    with_gradients = experts(x, ends)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        without = experts(x, ends)
    assert with_gradients.requires_grad and not without.requires_grad
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(without, with_gradients.detach(), rtol=tolerance, atol=tolerance)
    needed = 2 * sum(counts) * 16 * 24 * (3 if activation == "swiglu" else 2)
    assert needed <= counter.get_total_flops() <= (1 if num_threads == 1 else 1.5) * needed
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert experts(x, ends).dtype == torch.bfloat16


def test_values_that_are_not_there_are_not_asked_for() -> None:
    """Tensors without numbers, as compilers and counts use them, take the grouped product."""
    experts = Experts(5, 16, 24).bfloat16()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        x, ends = torch.randn(30, 16, dtype=torch.bfloat16), torch.tensor([7, 7, 20, 29, 30], dtype=torch.int32)
        assert experts(fake.from_tensor(x), fake.from_tensor(ends)).shape == (30, 16)
