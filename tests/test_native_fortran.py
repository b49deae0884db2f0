"""The finish called from Fortran, and, where FTorch is installed, a model stepped from Fortran."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import box, random_flux, random_geometry
from safetensors.torch import load_file
from small import Road

from latentphys import exact, operators
from latentphys.surrogate import include_dir
from latentphys.surrogate.export import export, open_artefact
from latentphys.surrogate.models import Models

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("gfortran", "g++")), reason="needs the compilers gfortran and g++"
)
ROOT = Path(__file__).parent.parent
QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command: object, folder: Path) -> str:
    process = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, env=QUIET)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_fortran_conserves_as_python_does(tmp_path: Path) -> None:
    sources = include_dir() / "latentphys"
    run("g++", "-std=c++17", "-O2", "-c", sources / "finish.cpp", "-o", "finish_cpp.o", folder=tmp_path)
    strict = ("-std=f2018", "-Wall", "-Wextra", "-Werror", "-fcheck=all")
    program = ROOT / "tests" / "native" / "conserve.f90"
    run(
        "gfortran",
        *strict,
        sources / "finish.f90",
        program,
        "finish_cpp.o",
        "-lstdc++",
        "-o",
        "conserve",
        folder=tmp_path,
    )

    geometry = random_geometry(box("bend"))
    grid, flux = geometry.grid, random_flux(box("bend"))
    numbers = np.asarray(grid.shape, dtype=np.int64), np.asarray(grid.spacing), (~geometry.fluid).numpy(), flux.numpy()
    (tmp_path / "given").write_bytes(b"".join(x.tobytes() for x in numbers))
    text = run("./conserve", " ".join(sum(grid.boundaries, ())), "given", "conserved", folder=tmp_path)
    said = dict(line.split(": ", 1) for line in text.splitlines())
    assert said.pop("iterations").isdigit() and float(said.pop("net")) == 0.0
    missing = "Expected a finish that latentphys_finish_create made, got NULL; see the error of that call."
    assert said == {
        "before create": f"1 {missing}",
        "net before create": "T",
        "five words short": "1 Expected six boundaries, x- x+ y- y+ z- z+, got 'periodic'.",
        "create": "0 F",
        "set": "1 Expected a tolerance from 0 to below 1, got 2.000000.",
        "other shape": "1 Expected a flux of the shape (nz, ny, nx, 3) of the voxels, got another. 0 T",
    }
    result = torch.from_numpy(np.fromfile(tmp_path / "conserved")).reshape(flux.shape)
    assert bool((operators.div(result, grid) == 0.0).all())
    expected = exact.conserve(geometry=geometry, flux=flux)
    assert float((result - expected).abs().max()) <= 1e-10 * float(flux.abs().max())


@pytest.mark.skipif(
    shutil.which("cmake") is None or "FTORCH_DIR" not in os.environ,
    reason="needs cmake, and FTorch built against the installed PyTorch in the folder that FTORCH_DIR names",
)
def test_ftorch_steps_a_model_as_python_does(road: Road, tmp_path: Path) -> None:
    store, num_steps = road.store("porous"), 20
    units = store.attributes["parameter_units"]
    folder = export(Models.load(road.dynamics), [store[0, 0]], tmp_path / "artefact", to="torchscript", units=units)
    options = f"-DPython3_EXECUTABLE={sys.executable}", f"-DCMAKE_PREFIX_PATH={os.environ['FTORCH_DIR']}"
    run("cmake", "-S", ROOT / "examples" / "fortran", "-B", "build", *options, folder=tmp_path)
    run("cmake", "--build", "build", folder=tmp_path)
    text = run("build/surrogate", folder, num_steps, "flux.bin", folder=tmp_path)
    assert [float(line.split()[-1]) for line in text.splitlines()] == [0.0] * num_steps

    artefact, arrays = open_artefact(folder), load_file(folder / "arrays.safetensors")
    stepper = artefact.stepper(artefact.geometry, artefact.family)
    latent, parameters = stepper.encode(arrays["test.fields"]), store[0, 0].parameters
    for _ in range(num_steps):
        latent = stepper.step(latent[:, None], [parameters], [parameters]).latent
    expected = stepper.decode(latent)[0]
    flux = torch.from_numpy(np.fromfile(tmp_path / "flux.bin")).reshape(expected.shape)
    assert bool((operators.div(flux, artefact.geometry.grid) == 0.0).all())
    assert float((flux - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
