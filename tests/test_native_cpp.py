"""The C++ surrogate: built with CMake against the installed PyTorch, stepped in a loop, equal to the model itself."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import Road

from latentphys import operators
from latentphys.surrogate.export import open_artefact
from latentphys.surrogate.models import Models

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("cmake", "g++")), reason="needs cmake and the compiler g++"
)

NUM_STEPS = 100
DRIFT = 1e-4
"""Largest difference from the eager model after so many steps, relative to the largest flux. One step may differ by the
artefact's tolerance of 1e-5; this model forgets faster than it gathers, others may need more."""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the example's program and the tests' own."""
    out = tmp_path_factory.mktemp("build")
    options = [f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
    for command in (["-S", str(Path(__file__).parent / "native"), "-B", str(out), *options], ["--build", str(out)]):
        process = subprocess.run(["cmake", *command], capture_output=True, text=True, env=quiet())
        assert process.returncode == 0, process.stdout + process.stderr
    return out


def quiet() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=quiet())


def step(build: Path, folder: Path, num_steps: int, out: Path) -> subprocess.CompletedProcess[str]:
    return run(build / "example" / "surrogate", folder, num_steps, out)


def test_the_example_says_how_it_is_called(build: Path) -> None:
    process = run(build / "example" / "surrogate")
    assert process.returncode == 2 and process.stderr.startswith("Usage: surrogate FOLDER NUM_STEPS OUT")


def test_a_hundred_steps_are_those_of_the_model(build: Path, pt2_artefact: Path, road: Road, tmp_path: Path) -> None:
    process = step(build, pt2_artefact, NUM_STEPS, tmp_path / "flux.bin")
    assert process.returncode == 0, process.stderr
    lines = re.findall(r"step (\d+) energy (\S+) net (\S+)", process.stdout)
    assert [int(n) for n, _, _ in lines] == list(range(1, NUM_STEPS + 1))
    assert {net for _, _, net in lines} == {"0"}
    assert "repeated bit for bit" in process.stdout

    artefact, arrays = open_artefact(pt2_artefact), load_file(pt2_artefact / "arrays.safetensors")
    geometry, values, parameters = artefact.geometry, arrays["test.now"][0].double().numpy(), {}
    for quantity in artefact.contract(artefact.family).parameters:
        parameters[quantity.name], values = values[: quantity.size], values[quantity.size :]
    eager = Models.load(road.dynamics).stepper(geometry, artefact.family)
    latent, energies = eager.encode(arrays["test.fields"]), []
    for _ in range(NUM_STEPS):
        latent = eager.step(latent[:, None], [parameters], [parameters]).latent
        energies.append(float(operators.kinetic_energy(eager.decode(latent)[0], geometry.grid)))
    expected = eager.decode(latent)[0]
    flux = torch.from_numpy(np.fromfile(tmp_path / "flux.bin")).reshape(3, *geometry.grid.shape)
    assert bool((operators.div(flux, geometry.grid) == 0.0).all())
    assert not bool(flux[~geometry.open_faces].any())
    assert float((flux - expected).abs().max()) <= DRIFT * float(expected.abs().max())
    assert np.allclose([float(energy) for _, energy, _ in lines], energies, rtol=2 * DRIFT, atol=0.0)
    start = float(operators.kinetic_energy(arrays["test.fields"][0], geometry.grid))
    assert abs(energies[-1] / start - 1) > 100 * DRIFT  # else nothing would have been compared


def test_calls_do_what_they_say(build: Path, pt2_artefact: Path) -> None:
    process = run(build / "checks", pt2_artefact)
    assert process.returncode == 0, process.stdout + process.stderr
    said = dict(line.split(": ", 1) for line in process.stdout.splitlines())
    expected = {
        "step before init": "Expected init before this call, got a surrogate without a state.",
        "flux before init": "Expected init before this call, got a surrogate without a state.",
        "short fields": "Expected fields of 12288 values, got 12287.",
        "nan fields": "Expected finite fields, got NaN or infinity; step back to a snapshot.",
        "unknown parameter": "Expected parameters that the model knows, got 'depth'.",
        "parameter of another size": "Expected 1 numbers for 'viscosity', got 2.",
        "nan parameter": "Expected a finite 'viscosity', got NaN or infinity.",
        "missing parameter": "Expected the parameter 'viscosity' [m2/s], got none.",
        "no steps": "Expected at least 1 step, got 0.",
        "time": "4",
        "four steps at once": "equal",
        "time restored": "2",
        "constant parameters of a function": "equal",
        "times asked for": "0 1 1 2 2 3 3 4",
        "other parameters": "different",
        "parameters that end": "Expected the parameter 'force' [m/s2], got none.",
        "after a refused step": "equal",
        "changed by a solver": "taken",
        "changed by a solver, then": "different",
        "net": "0",
        "lost state": "Expected finite fields from 'decode', got NaN or infinity; restore a snapshot, or init with a "
        "solver's flow.",
        "token used again": "equal",
    }
    assert said == expected


def _edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        arrays = load_file(folder / "arrays.safetensors")
        save_file({**arrays, name: change(arrays[name])}, folder / "arrays.safetensors")

    return edit


def _replace(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / "artefact.txt").read_text()
        assert old in text
        (folder / "artefact.txt").write_text(text.replace(old, new))

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "latent": (
        _edit("test.latent", lambda x: x * 1.001),
        "Expected 'encode' of the exported model to give what it gave",
    ),
    "next": (_edit("test.next", lambda x: x + 0.01), "Expected 'step' of the exported model to give"),
    "decoded": (_edit("test.decoded", lambda x: x * 1.001), "Expected 'decode' of the exported model to give"),
    "finished": (_edit("test.finished", lambda x: x * 1.001), "Expected 'decode' of the exported model to give"),
    "solid": (_edit("solid", lambda x: x.roll(1, 0)), "Expected 'decode' of the exported model to give"),
    "dtype": (_edit("test.next", lambda x: x.double()), "Expected an array of F32, got F64; export it again"),
    "bytes": (_edit("test.latent", lambda x: x.to(torch.uint8)), "Expected an array of F32, got U8; export it again"),
    "shape": (
        _edit("test.now", lambda x: x[:, 1:].clone()),
        "Expected 'test.now' of the shape that artefact.txt",
    ),
    "flux": (
        _replace("flux solenoidal", "flux none"),
        "Expected fluxes that are solenoidal, got 'velocity' of",
    ),
    "channels": (_replace("m3/s 0 3", "m3/s 1 3"), "Expected the channels of 'velocity' behind those before it"),
    "schema": (_replace("artefact/1", "artefact/2"), "Expected an exported model of schema latentphys.artefact/1, got"),
    "voxels": (_edit("solid", lambda x: x[:-1]), "Expected solid voxels for every cell, got another number"),
    "nan": (_edit("test.next", lambda x: x * torch.nan), "Expected 'step' of the exported model to give"),
    "format": (_replace("format pt2", "format onnx"), "Expected a model exported to pt2, got onnx"),
    "batch": (_replace("batch 1", "batch 4"), "Expected a model exported for a batch of 1, got one of 4"),
    "model": (lambda folder: (folder / "model.pt2").unlink(), "Expected a compiled model at"),
    "arrays": (lambda folder: (folder / "arrays.safetensors").unlink(), "Expected a safetensors file at"),
    "text": (lambda folder: (folder / "artefact.txt").unlink(), "Expected an exported model with"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_changed_artefact_is_refused(build: Path, pt2_artefact: Path, tmp_path: Path, name: str) -> None:
    damage, words = DAMAGE[name]
    folder = shutil.copytree(pt2_artefact, tmp_path / "artefact")
    damage(folder)
    process = step(build, folder, 1, tmp_path / "flux.bin")
    assert process.returncode == 1 and words in process.stderr, process.stdout + process.stderr
    assert not (tmp_path / "flux.bin").exists()
