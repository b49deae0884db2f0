"""Where the C, C++ and Fortran sources of the package lie."""

from pathlib import Path


def include_dir() -> Path:
    """The folder for a compiler's include path; it holds ``latentphys/surrogate.hpp`` and ``latentphys/finish.h``."""
    return Path(__file__).parent / "include"
