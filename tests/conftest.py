"""What every test shares: one thread, one seed, off-screen pictures, and shapes that are checked at run time.

`--jaxtyping-packages` in pyproject.toml checks the jaxtyping shapes of every call into latentphys. A call with a wrong
shape then stops there, before it reaches the library's own message: a test of that message asks for `unchecked`.
"""

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if "DISPLAY" not in os.environ:
    os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from hypothesis import settings  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

    from composed import Three
    from small import Road

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
settings.register_profile("latentphys", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("latentphys")


@pytest.fixture(autouse=True, scope="module")
def lasting() -> None:
    """What is there when a module of tests begins is there to stay, mostly torch: no search for garbage goes through it
    again. Every training run ends with such a search."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> "Road":
    """Two families simulated, compressed and advanced on 16³ cells; read-only."""
    from small import build_road  # not above: the shapes of what it imports must be checked

    return build_road(tmp_path_factory.mktemp("road"))


@pytest.fixture(scope="session")
def three(road: "Road", tmp_path_factory: pytest.TempPathFactory) -> "Three":
    """The dynamics of `road` and two endpoints near it; read-only."""
    from composed import build_three

    return build_three(road, tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="session")
def flat_road(tmp_path_factory: pytest.TempPathFactory) -> "Road":
    """Two families of two dimensions, likewise; read-only."""
    from small import FLAT, build_road

    return build_road(tmp_path_factory.mktemp("flat_road"), FLAT)


@pytest.fixture(scope="session")
def pt2_artefact(road: "Road", tmp_path_factory: pytest.TempPathFactory) -> "Path":
    """The dynamics of the first porous flow of `road` as an AOTInductor package; read-only. Compiling takes a while."""
    if shutil.which("g++") is None:
        pytest.skip("a .pt2 needs a C++ compiler, and there is no g++ here")
    from latentphys.surrogate.export import export
    from latentphys.surrogate.models import Models

    store, run = road.store("porous"), os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = tmp_path_factory.mktemp("pt2") if run is None else tmp_path_factory.getbasetemp().parent / f"pt2-{run}"
    folder.mkdir(exist_ok=True)
    out = folder / "porous.artefact"
    with FileLock(folder / "lock"):  # the first of several processes makes it for all: their roads have the same bits
        if not out.is_dir():
            units = store.attributes["parameter_units"]
            export(Models.load(road.dynamics), [store[0, 0]], out, to="pt2", units=units)
    return out


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts. A shell starts what it runs in the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Calls as users make them, without the run-time check of shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
