"""Every way to run the experts gives the same numbers and the same gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from latentphys.routers import Experts, dispatch

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest error relative to the largest value, whatever is compared."""
BACKENDS = ["grouped", "loop", "dense_static"]
ACTIVATIONS = ["swiglu", "gelu"]


def problem(
    num_tokens: int,
    num_experts: int,
    top_k: int = 1,
    used: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    activation: str = "swiglu",
) -> tuple[Tensor, Tensor, Tensor, Experts]:
    """Tokens, distinct random experts per token out of the first ``used``, random weights, random experts."""
    torch.manual_seed(seed)
    experts = Experts(num_experts, 8, 16, activation).to(dtype)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("used", [3, 5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_grouped_loop_and_dense_agree(dtype: torch.dtype, top_k: int, used: int, activation: str) -> None:
    case = problem(33, 5, top_k, used, dtype, activation=activation)
    loop = run("loop", *case)
    assert_same(run("grouped", *case), loop, TOLERANCE[dtype])
    assert_same(run("dense_static", *case), loop, TOLERANCE[dtype])


@given(
    num_tokens=st.integers(0, 12),
    num_experts=st.integers(1, 5),
    top_k=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_backends_agree_for_any_load(num_tokens: int, num_experts: int, top_k: int, seed: int, activation: str) -> None:
    """Zero tokens, one token, empty experts and every k."""
    case = problem(num_tokens, num_experts, min(top_k, num_experts), seed=seed, activation=activation)
    loop = run("loop", *case)
    assert_same(run("grouped", *case), loop, TOLERANCE[torch.float32])
    assert_same(run("dense_static", *case), loop, TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_token_and_one_token(backend: str, num_tokens: int, activation: str) -> None:
    out = run(backend, *problem(num_tokens, 4, activation=activation))
    assert out["y"].shape == (num_tokens, 8)
    touched = out["w_in"].flatten(1).abs().sum(1) > 0
    assert int(touched.sum()) == num_tokens


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fp64_loop_and_dense_agree_and_auto_is_the_loop(activation: str) -> None:
    case = problem(21, 4, 2, dtype=torch.float64, activation=activation)
    loop = run("loop", *case)
    assert_same(run("dense_static", *case), loop, TOLERANCE[torch.float64])
    assert_same(run("auto", *case), loop, 0.0)


class Dispatcher(nn.Module):
    def __init__(self, experts: Experts, backend: str = "auto") -> None:
        super().__init__()
        self.experts, self.backend = experts, backend

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return dispatch(x, ids, weights, self.experts, self.backend)


@pytest.mark.parametrize("backend", ["loop", "dense_static"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(backend: str, activation: str) -> None:
    """With an expert that gets no token, and a token that asks for one expert twice."""
    x, ids, weights, experts = problem(4, 3, 2, used=2, dtype=torch.float64, activation=activation)
    ids[0] = 1

    def f(x: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        parameters = {"experts.w_in_EDG": w_in, "experts.w_out_EFD": w_out}
        return torch.func.functional_call(Dispatcher(experts, backend), parameters, (x, ids, weights))

    arguments = (x.requires_grad_(), weights.requires_grad_(), experts.w_in_EDG, experts.w_out_EFD)
    assert torch.autograd.gradcheck(f, arguments, atol=1e-7)


def by_hand(x: Tensor, expert: int, experts: Experts) -> Tensor:
    """One token through the formula of one expert."""
    hidden = x @ experts.w_in_EDG[expert]
    if experts.activation == "swiglu":
        gate, up = hidden[:16], hidden[16:]
        hidden = gate / (1 + torch.exp(-gate)) * up
    else:
        hidden = hidden / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    return hidden @ experts.w_out_EFD[expert]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_token_gets_its_own_experts_times_their_weights(backend: str, activation: str) -> None:
    x, _, _, experts = problem(3, 4, activation=activation)
    ids, weights = torch.tensor([[2, 1], [0, 3], [2, 0]]), torch.tensor([[0.5, 1.0], [2.0, 0.0], [-1.0, 3.0]])
    expected = [
        sum(w * by_hand(token, int(e), experts) for e, w in zip(chosen, row, strict=True))
        for token, chosen, row in zip(x, ids, weights, strict=True)
    ]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = dispatch(x, ids, weights, experts, backend)
        torch.testing.assert_close(y, torch.stack([torch.as_tensor(row) for row in expected]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_tokens_and_of_choices_does_not_matter(backend: str) -> None:
    x, ids, weights, experts = problem(40, 4, 2)
    order = torch.randperm(40)
    y = dispatch(x, ids, weights, experts, backend)
    torch.testing.assert_close(dispatch(x[order], ids[order], weights[order], experts, backend), y[order])
    torch.testing.assert_close(dispatch(x, ids.flip(1), weights.flip(1), experts, backend), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_chosen_twice_counts_twice(backend: str) -> None:
    x, ids, weights, experts = problem(12, 3, 2)
    twice = dispatch(x, ids[:, :1].expand(-1, 2), weights, experts, backend)
    once = dispatch(x, ids[:, :1], weights.sum(1, keepdim=True), experts, backend)
    torch.testing.assert_close(twice, once)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_linear_in_the_weights(backend: str) -> None:
    x, ids, weights, experts = problem(12, 3, 2)
    y = dispatch(x, ids, weights, experts, backend)
    torch.testing.assert_close(dispatch(x, ids, -3 * weights, experts, backend), -3 * y)
    assert not dispatch(x, ids, 0 * weights, experts, backend).any()


@pytest.mark.parametrize("reduce", ["sum", "mean", "expand"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_grouped_takes_gradients_of_stride_0(reduce: str, activation: str) -> None:
    """Such as that of a plain sum, which grouped matmul itself refuses."""
    x, ids, weights, experts = problem(9, 3, activation=activation)
    found = []
    for backend in ("grouped", "loop"):
        experts.zero_grad()
        y = dispatch(x, ids, weights, experts, backend)
        if reduce == "expand":
            y.backward(torch.tensor(0.7).expand_as(y))
        else:
            getattr(y, reduce)().backward()
        found.append({"w_in": gradient(experts.w_in_EDG), "w_out": gradient(experts.w_out_EFD)})
    assert_same(found[0], found[1], TOLERANCE[torch.float32])


@pytest.mark.parametrize("num_tokens", [0, 1, 17])
@pytest.mark.parametrize("used", [1, 4])
def test_no_row_is_left_beyond_the_last_expert(num_tokens: int, used: int) -> None:
    """Such rows would hold whatever was in memory."""
    x, ids, weights, experts = problem(num_tokens, 4, 1, used)
    seen: list[tuple[Tensor, Tensor]] = []
    experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    dispatch(x, ids, weights, experts, "grouped")
    ((rows, ends),) = seen
    assert ends.dtype == torch.int32 and int(ends[-1]) == len(rows) == num_tokens
    assert ends.tolist() == [int((ids <= expert).sum()) for expert in range(4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_without_tokens_gets_a_zero_gradient(backend: str) -> None:
    """And not none, which optimisers and gradient reduction over ranks would trip over."""
    out = run(backend, *problem(9, 4, 2, used=3))
    assert not out["w_in"][3].any() and not out["w_out"][3].any()
    assert out["w_in"][:3].flatten(1).any(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_takes_tokens_and_weights_in_any_memory_order(backend: str) -> None:
    x, ids, weights, experts = problem(15, 3, 2)
    expected = run(backend, x, ids, weights, experts)
    strided = torch.randn(15, 11)[:, 3:]
    strided.copy_(x)
    columns = (x.t().contiguous().t(), ids.t().contiguous().t(), weights.t().contiguous().t())
    for tokens in (columns, (strided, ids, weights)):
        assert not tokens[0].is_contiguous()
        y = dispatch(*tokens, experts, backend)
        torch.testing.assert_close(y, expected["y"])
        experts.zero_grad()
        y.float().square().sum().backward()
        torch.testing.assert_close(gradient(experts.w_in_EDG), expected["w_in"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_gives_the_same_bits_each_time(dtype: torch.dtype) -> None:
    case = problem(50, 4, 3, dtype=dtype)
    first = run("grouped", *case)
    assert_same(run("grouped", *case), first, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_the_experts_in_16_bits(backend: str) -> None:
    x, ids, weights, experts = problem(17, 3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dispatch(x, ids, weights, experts, backend)
    assert y.dtype == torch.bfloat16
    exact = dispatch(x, ids, weights, experts, "loop")
    assert (y - exact).abs().amax() <= TOLERANCE[torch.bfloat16] * exact.abs().amax()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_an_export_and_a_trace_keep_the_routing_open(activation: str) -> None:
    """The graph of `auto` holds for other ids than those it was made with."""
    x, ids, weights, experts = problem(12, 3, activation=activation)
    other = (ids + 1) % 3
    expected = dispatch(x, other, weights, experts, "loop")
    program = torch.export.export(Dispatcher(experts), (x, ids, weights))
    torch.testing.assert_close(program.module()(x, other, weights), expected)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("nonzero" in target or "grouped" in target for target in targets)
    traced = torch.jit.trace(Dispatcher(experts), (x, ids, weights))
    torch.testing.assert_close(traced(x, other, weights), expected)


@pytest.mark.parametrize(
    ("dtype", "activation"), [(torch.float32, "swiglu"), (torch.bfloat16, "swiglu"), (torch.bfloat16, "gelu")]
)
def test_compiled_is_eager(dtype: torch.dtype, activation: str) -> None:
    x, ids, weights, experts = problem(12, 3, dtype=dtype, activation=activation)
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
    with pytest.raises(ValueError, match=r"Expected an activation of swiglu \| gelu, got 'relu'"):
        Experts(2, 8, 8, "relu")
