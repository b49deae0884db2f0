"""The SwiGLU of the experts, whose gradient is written out, against what autograd makes of its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentphys.routers import FeedForward
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
