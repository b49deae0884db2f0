"""AOTInductor packages: machine code, in one file, for PyTorch's C++ and Python run times."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILE = "model.pt2"
CACHE = "TORCHINDUCTOR_CACHE_DIR"
Progress = Callable[[str], None]


def write(
    modules: Mapping[str, nn.Module], examples: Mapping[str, tuple[Tensor, ...]], folder: Path, progress: Progress
) -> None:
    """Compile each function for this machine and put all of them into one package.

    Raises:
        ValueError: no C++ compiler.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError(
            "Expected a C++ compiler to make a .pt2, got none; install g++, name another in CXX, or choose --to onnx "
            "or torchscript."
        )
    from torch._inductor import aot_compile
    from torch._inductor.package import package_aoti

    files: dict[str, Any] = {}
    with _own_cache():
        for name, module in modules.items():
            progress(f"compile {name}")
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of torch's own parts, about each other
                program = torch.export.export(module, examples[name], strict=False)
                options = {"aot_inductor.package": True}
                files[name] = aot_compile(program.module(), examples[name], options=options)
        progress("package")
        package_aoti(str(folder / FILE), files)


@contextmanager
def _own_cache() -> Iterator[None]:
    """A folder for what the compiler writes, and nobody else's work in it."""
    before = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory() as cache:
        os.environ[CACHE] = cache
        try:
            yield
        finally:
            os.environ.pop(CACHE)
            os.environ.update({} if before is None else {CACHE: before})


def load(folder: Path, names: tuple[str, ...], device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """The functions in a package, by name."""
    from torch.export.pt2_archive._package import load_pt2

    runners = load_pt2(str(folder / FILE), device_index=-1 if device.index is None else device.index).aoti_runners
    return {name: runners[name] for name in names}
