"""What every test shares: one thread, one seed, off-screen pictures, and shapes that are checked at run time.

`--jaxtyping-packages` in pyproject.toml checks the jaxtyping shapes of every call into latentphys. A call with a wrong
shape then stops there, before it reaches the library's own message: a test of that message asks for `unchecked`.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if "DISPLAY" not in os.environ:
    os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

if TYPE_CHECKING:
    from small import Road

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
settings.register_profile("latentphys", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("latentphys")


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
def flat_road(tmp_path_factory: pytest.TempPathFactory) -> "Road":
    """Two families of two dimensions, likewise; read-only."""
    from small import FLAT, build_road

    return build_road(tmp_path_factory.mktemp("flat_road"), FLAT)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Calls as users make them, without the run-time check of shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
