"""Compiled blocks: the values and gradients of eager ones, with one graph for blocks of one size."""

import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from latentphys.routers import SemanticTop1
from latentphys.training.compilation import compile_model
from latentphys.transformer.model import LatentTransformer

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


SCRIPT = """
import sys, torch
from functools import partial
from torch import nn
from torch._dynamo.utils import counters
from latentphys.routers import SemanticTop1
from latentphys.training.compilation import compile_model
from latentphys.training.recompute import set_recompute
from latentphys.transformer.model import LatentTransformer

def new_model(depth):
    torch.manual_seed(0)
    router = partial(SemanticTop1, num_experts=4, semantic_dim=8)
    model = LatentTransformer(3, 2, 2, 1, 16, depth, 2, 16, router, dispatch="grouped")
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    return model

def gradients(model):
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 2, 3, 3, 2, 2), (2, 2), (2, 1, 3, 2, 2))
    out = model(*(torch.randn(*shape, generator=generator) for shape in shapes), (True, True, False))
    (out.increment.square().mean() + sum(r.scores.square().mean() for r in out.routings)).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}

def graphs():
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

model = new_model(2)
eager, expected = gradients(model)
compile_model(model)
set_recompute(model, sys.argv[1] == "True")
second = model.blocks[1]
compiled_call, second._compiled_call_impl = second._compiled_call_impl, None
gradients(model)
of_the_first = graphs()
second._compiled_call_impl = compiled_call
compiled, found = gradients(model)
print("graphs and breaks", of_the_first, graphs(), flush=True)
torch.testing.assert_close(compiled.increment, eager.increment, rtol=1e-5, atol=1e-5)
for name, gradient in expected.items():
    torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
for a, b in zip(compiled.routings, eager.routings, strict=True):
    assert torch.equal(a.ids, b.ids)
assert of_the_first[0] > 0 and graphs() == of_the_first
assert all("_grouped_mm" in reason for reason in counters["graph_break"]), list(counters["graph_break"])
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_say_what_eager_ones_say(recompute: bool, tmp_path: Path) -> None:
    """Values and gradients; the second of two blocks needs no graphs of its own, and the grouped product alone breaks
    them. In a process of its own, where no shapes are checked: the compiler would go through the checks."""
    script = tmp_path / "compiled.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(recompute)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


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
