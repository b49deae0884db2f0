"""Every way to run the experts gives the same numbers and the same gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from latentphys.routers import Experts, dispatch

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def problem(
    num_tokens: int,
    num_experts: int,
    top_k: int = 1,
    used: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Experts]:
    """Tokens, distinct random experts per token out of the first ``used``, random weights, random experts."""
    torch.manual_seed(seed)
    experts = Experts(num_experts, dim=8, hidden=16).to(dtype)
    x = torch.randn(num_tokens, 8, dtype=dtype)
    ids = torch.rand(num_tokens, used or num_experts).topk(top_k).indices
    weights = torch.rand(num_tokens, top_k, dtype=torch.promote_types(dtype, torch.float32))
    return x, ids, weights, experts


def gradient(value: Tensor) -> Tensor:
    assert value.grad is not None
    return value.grad.clone()


def run(backend: str, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> dict[str, Tensor]:
    """Output and all gradients of a fixed nonlinear function of it."""
    experts.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = dispatch(x, ids, weights, experts, backend)
    y.float().square().sum().backward()
    assert y.dtype == x.dtype
    grads = {"x": x, "weights": weights, "w_in": experts.w_in_EDG, "w_out": experts.w_out_EFD}
    return {"y": y.detach()} | {name: gradient(value) for name, value in grads.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    for name in a:
        error = (a[name] - b[name]).abs().amax() if a[name].numel() else torch.tensor(0.0)
        scale = b[name].abs().amax() if b[name].numel() else torch.tensor(1.0)
        assert a[name].shape == b[name].shape
        assert error <= tolerance * (scale + 1e-3), f"{name}: {error} against {scale}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("used", [3, 5])
def test_grouped_loop_and_dense_agree(dtype: torch.dtype, top_k: int, used: int) -> None:
    case = problem(33, 5, top_k, used, dtype)
    loop = run("loop", *case)
    assert_same(run("grouped", *case), loop, TOLERANCE[dtype])
    assert_same(run("dense_static", *case), loop, TOLERANCE[dtype])


@given(
    num_tokens=st.integers(0, 12), num_experts=st.integers(1, 5), top_k=st.integers(1, 5), seed=st.integers(0, 2**16)
)
def test_backends_agree_for_any_load(num_tokens: int, num_experts: int, top_k: int, seed: int) -> None:
    """Zero tokens, one token, empty experts and every k."""
    case = problem(num_tokens, num_experts, min(top_k, num_experts), seed=seed)
    loop = run("loop", *case)
    assert_same(run("grouped", *case), loop, TOLERANCE[torch.float32])
    assert_same(run("dense_static", *case), loop, TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["grouped", "loop", "dense_static"])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(backend: str, num_tokens: int) -> None:
    out = run(backend, *problem(num_tokens, 4))
    assert out["y"].shape == (num_tokens, 8)
    touched = out["w_in"].flatten(1).abs().sum(1) > 0
    assert int(touched.sum()) == num_tokens


def test_fp64_loop_and_dense_agree_and_auto_is_the_loop() -> None:
    case = problem(21, 4, 2, dtype=torch.float64)
    loop = run("loop", *case)
    assert_same(run("dense_static", *case), loop, TOLERANCE[torch.float64])
    assert_same(run("auto", *case), loop, 0.0)


class Dispatcher(nn.Module):
    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return dispatch(x, ids, weights, self.experts)


def test_loop_gradients_are_those_of_finite_differences() -> None:
    x, ids, weights, experts = problem(4, 3, 2, used=2, dtype=torch.float64)

    def f(x: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        parameters = {"experts.w_in_EDG": w_in, "experts.w_out_EFD": w_out}
        return torch.func.functional_call(Dispatcher(experts), parameters, (x, ids, weights))

    arguments = (x.requires_grad_(), weights.requires_grad_(), experts.w_in_EDG, experts.w_out_EFD)
    assert torch.autograd.gradcheck(f, arguments, atol=1e-7)


def test_a_token_gets_its_own_expert_times_its_weight() -> None:
    x, _, _, experts = problem(3, 4)
    ids, weights = torch.tensor([[2], [0], [2]]), torch.tensor([[0.5], [2.0], [-1.0]])
    expected = torch.stack([w * experts.one(t[None], int(e))[0] for t, e, w in zip(x, ids, weights, strict=True)])
    torch.testing.assert_close(dispatch(x, ids, weights, experts, "grouped"), expected)


def test_the_order_of_tokens_does_not_matter() -> None:
    x, ids, weights, experts = problem(40, 4, 2)
    order = torch.randperm(40)
    y = dispatch(x, ids, weights, experts, "grouped")
    torch.testing.assert_close(dispatch(x[order], ids[order], weights[order], experts, "grouped"), y[order])


def test_grouped_takes_the_gradient_of_a_plain_sum() -> None:
    """Its gradient has stride 0, which grouped matmul itself refuses."""
    x, ids, weights, experts = problem(9, 3)
    dispatch(x, ids, weights, experts, "grouped").sum().backward()
    grad = gradient(experts.w_out_EFD)
    experts.zero_grad()
    dispatch(x, ids, weights, experts, "loop").sum().backward()
    torch.testing.assert_close(grad, gradient(experts.w_out_EFD))


@pytest.mark.parametrize("backend", ["grouped", "loop", "dense_static"])
def test_autocast_runs_the_experts_in_16_bits(backend: str) -> None:
    x, ids, weights, experts = problem(17, 3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dispatch(x, ids, weights, experts, backend)
    assert y.dtype == torch.bfloat16
    exact = dispatch(x, ids, weights, experts, "loop")
    assert (y - exact).abs().amax() <= TOLERANCE[torch.bfloat16] * exact.abs().amax()


def test_an_export_keeps_the_routing_open() -> None:
    """The graph of `auto` holds for other ids than those it was made with."""
    x, ids, weights, experts = problem(12, 3)
    program = torch.export.export(Dispatcher(experts), (x, ids, weights)).module()
    other = (ids + 1) % 3
    torch.testing.assert_close(program(x, other, weights), dispatch(x, other, weights, experts, "loop"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_eager(dtype: torch.dtype) -> None:
    x, ids, weights, experts = problem(12, 3, dtype=dtype)
    compiled = torch.compile(Dispatcher(experts), backend="aot_eager")
    compiled(x, ids, weights).float().square().sum().backward()
    grad = gradient(experts.w_in_EDG)
    reference = run("loop", x, ids, weights, experts)["w_in"]
    assert (grad - reference).abs().amax() <= TOLERANCE[dtype] * reference.abs().amax()


def test_refuses_what_it_cannot_do() -> None:
    x, ids, weights, experts = problem(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="Expected FP32 or a 16-bit type for dispatch 'grouped', got FP64"):
        dispatch(x, ids, weights, experts, "grouped")
    with pytest.raises(ValueError, match=r"Expected a dispatch backend of auto \| grouped .* got 'sparse'"):
        dispatch(x, ids, weights, experts, "sparse")
    with pytest.raises(ValueError, match=r"Expected tokens of shape \(T, 8\), got \(4, 7\)"):
        dispatch(x[:, :7], ids, weights, experts)
    with pytest.raises(ValueError, match=r"Expected ids and weights of one shape \(T, k\) with T = 4"):
        dispatch(x, ids[:3], weights[:3], experts)


@pytest.mark.parametrize(("dim", "hidden", "name", "remedy"), [(12, 16, "dim", 16), (8, 20, "hidden", 24)])
def test_refuses_rows_that_are_not_multiples_of_16_bytes(dim: int, hidden: int, name: str, remedy: int) -> None:
    with pytest.raises(ValueError, match=f"Expected {name} to be a multiple of 8 .* use {remedy}"):
        Experts(2, dim, hidden)
    with pytest.raises(ValueError, match="Expected at least 1 expert, got num_experts = 0"):
        Experts(0, 8, 8)
