"""`import latentphys` stays light, its linked folders keep to the package, and running the package is the program."""

import subprocess
import sys

HEAVY = {"dask", "h5netcdf", "h5py", "hydra", "matplotlib", "onnx", "pyvista", "tifffile"} | {
    "torch_harmonics",
    "vtkmodules",
    "xarray",
}
LINKED = {"autoencoders", "routers", "validators", "configs"}


def run(*arguments: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a statement loads in a fresh interpreter."""
    names = "{name.partition('.')[0] for name in sys.modules}"
    return set(run("-c", f"{statement}\nimport sys\nprint(*{names})").split())


def test_import_loads_no_heavy_package() -> None:
    loaded = loaded_by("import latentphys")
    assert "latentphys" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_linked_folders_import_only_under_the_package() -> None:
    loaded = loaded_by("import " + ", ".join(f"latentphys.{name}" for name in sorted(LINKED)))
    assert loaded.isdisjoint(LINKED | HEAVY)


def test_package_runs_as_the_program() -> None:
    assert "simulate" in run("-m", "latentphys", "--help")
