"""The wheel holds the whole package, its linked folders and data too, and works away from the repository."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "latentphys", "autoencoders", "routers", "validators", "configs")
LINKED = ("autoencoders", "routers", "validators", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that no build folder appears in the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", out, source], check=True)
    (built,) = out.glob("latentphys-*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("folder", ["", *LINKED])
def test_wheel_holds_every_module_and_data_file(names: set[str], folder: str) -> None:
    root = ROOT / folder if folder else ROOT / "latentphys"
    suffixes = {".py", ".yaml", ".j2", ".html", ".css", ".js", ".json", ".typed", ".hpp", ".h", ".cpp", ".f90"}
    files = [path for path in root.rglob("*") if path.suffix in suffixes or path.name == "py.typed"]
    expected = {Path("latentphys", folder, path.relative_to(root)).as_posix() for path in files}
    assert expected and expected <= names


def test_wheel_adds_only_latentphys(names: set[str]) -> None:
    assert {name.partition("/")[0] for name in names} == {"latentphys", "latentphys-0.1.0.dist-info"}
    assert not any("__pycache__" in name for name in names)


def test_wheel_works_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    code = (
        "import importlib.resources as r\n"
        "import latentphys, latentphys.autoencoders, latentphys.routers, latentphys.validators\n"
        "print(latentphys.__file__, latentphys.routers.__file__)\n"
        "print(r.files('latentphys.configs').joinpath('accelerate', 'cpu.yaml').read_text())"
    )
    env = {**os.environ, "PYTHONPATH": str(unpacked)}
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    modules, config = process.stdout.split("\n", 1)
    assert all(Path(path).is_relative_to(unpacked) for path in modules.split())
    assert "use_cpu: true" in config


def test_extras_keep_compiled_attention_out_of_all() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["all"] == ["latentphys[sphere,viz,export,trackers,soap,sweeps,formats]"]
    assert "flash" in extras and not any("flash" in requirement for requirement in extras["all"])
