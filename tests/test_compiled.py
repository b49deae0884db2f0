"""Compiled blocks: the values and gradients of eager ones, with one graph for blocks of one size."""

import shutil
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from latentphys.routers import SemanticTop1
from latentphys.training.compilation import compile_model
from latentphys.training.recompute import set_recompute
from latentphys.transformer.model import LatentTransformer, Prediction

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
    reason="without a C++ compiler",
)


def new_model(depth: int = 2) -> LatentTransformer:
    torch.manual_seed(0)
    model = LatentTransformer(
        3, 2, 2, 1, 16, depth, 2, 16, partial(SemanticTop1, num_experts=4, semantic_dim=8), dispatch="grouped"
    )
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: LatentTransformer) -> tuple[Prediction, dict[str, Tensor]]:
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 2, 3, 3, 2, 2), (2, 2), (2, 1, 3, 2, 2))
    prediction = model(*(torch.randn(*shape, generator=generator) for shape in shapes), (True, True, False))
    loss = prediction.increment.square().mean() + sum(r.scores.square().mean() for r in prediction.routings)
    loss.backward()
    return prediction, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_say_what_eager_ones_say(recompute: bool) -> None:
    from torch._dynamo.utils import counters

    results, graphs = [], []
    for depth in (1, 2):
        torch.compiler.reset()
        counters.clear()
        model = new_model(depth)
        eager, expected = gradients(model)
        compile_model(model)
        set_recompute(model, recompute)
        compiled, found = gradients(model)
        graphs.append((counters["stats"]["unique_graphs"], len(counters["graph_break"])))
        results.append((eager, expected, compiled, found))
    for eager, expected, compiled, found in results:
        torch.testing.assert_close(compiled.increment, eager.increment, rtol=1e-5, atol=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        for a, b in zip(compiled.routings, eager.routings, strict=True):
            assert torch.equal(a.ids, b.ids)
    # Something is compiled, the second block needs no graphs of its own, and the grouped product alone breaks them.
    assert graphs[0][0] > 0 and graphs[0] == graphs[1]
    assert [key for key in counters["graph_break"] if "_grouped_mm" not in key] == []


@needs_compiler
def test_names_of_weights_stay_as_they_are() -> None:
    model = new_model()
    names = list(model.state_dict())
    compile_model(model)
    assert list(model.state_dict()) == names
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    assert model.head._compiled_call_impl is None


def test_refuses_a_model_without_blocks() -> None:
    with pytest.raises(ValueError, match="Expected a model with blocks to compile, got Linear, which has none"):
        compile_model(nn.Linear(2, 2))


def test_refuses_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"got no g\+\+ or clang\+\+ on the path; install g\+\+"):
        compile_model(new_model())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="got no no-such-compiler on the path"):
        compile_model(new_model())


def test_refuses_a_machine_without_headers_of_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ValueError, match="Expected Python's headers to compile the model with, got no Python.h in"):
        compile_model(new_model())
