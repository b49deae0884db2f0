"""The C interface of the finish, compiled once and called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentphys.grid import Geometry
from latentphys.surrogate import include_dir

SOURCES = (include_dir() / "latentphys" / "finish.cpp", Path(__file__).parent / "native" / "pieces.cpp")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
COMPILER = shutil.which("g++")


def compile_library(folder: Path) -> Library:
    out = folder / "libfinish.so"
    command = [str(COMPILER), "-std=c++17", "-O2", *WARNINGS, f"-I{include_dir()}", "-shared", "-fPIC"]
    subprocess.run([*command, *map(str, SOURCES), "-o", str(out)], check=True)
    return Library(out)


class Library:
    """The functions of finish.h and tests/native/pieces.cpp."""

    def __init__(self, path: Path) -> None:
        self.call = ctypes.CDLL(str(path))
        self.call.latentphys_finish_create.restype = ctypes.c_void_p
        self.call.latentphys_finish_net_flux_max.restype = ctypes.c_double
        self.call.sum_of.restype = ctypes.c_double
        for name in ("latentphys_error", "describe_safetensors", "describe_artefact", "keep_sum"):
            getattr(self.call, name).restype = ctypes.c_char_p

    def create(
        self, shape: tuple[int, ...], spacing: tuple[float, ...], boundaries: str, solid: np.ndarray | None = None
    ) -> int | None:
        voxels = None if solid is None else np.ascontiguousarray(solid, dtype=np.uint8).ctypes.data_as(ctypes.c_void_p)
        sizes, widths = (ctypes.c_int64 * 3)(*shape), (ctypes.c_double * 3)(*spacing)
        handle: int | None = self.call.latentphys_finish_create(sizes, widths, boundaries.encode(), voxels)
        return handle

    def error(self) -> str:
        text: bytes = self.call.latentphys_error()
        return text.decode()

    def finish(self, geometry: Geometry) -> Finish:
        grid = geometry.grid
        solid = None if geometry.solid is None else geometry.solid.numpy()
        handle = self.create(grid.shape, grid.spacing, " ".join(sum(grid.boundaries, ())), solid)
        assert handle is not None, self.error()
        return Finish(self, handle)

    def keep_sum(self, values: Tensor, solid: Tensor, total: float, load: float) -> Tensor:
        kept, voxels = values.numpy().copy(), solid.numpy().astype(np.uint8)
        pointers = (x.ctypes.data_as(ctypes.c_void_p) for x in (kept, voxels))
        numbers = ctypes.c_int64(kept.size), ctypes.c_double(total), ctypes.c_double(load)
        if error := self.call.keep_sum(*pointers, *numbers):
            raise ValueError(error.decode())
        return torch.from_numpy(kept)

    def sum_of(self, values: Tensor, solid: Tensor) -> float:
        arrays = values.numpy(), solid.numpy().astype(np.uint8)
        pointers = (x.ctypes.data_as(ctypes.c_void_p) for x in arrays)
        return float(self.call.sum_of(*pointers, ctypes.c_int64(values.numel())))


class Finish:
    """One handle; freed with the object."""

    def __init__(self, library: Library, handle: int) -> None:
        self.library, self.handle = library, ctypes.c_void_p(handle)
        self.num_iterations = -1

    def set(self, tolerance: float = 1e-13, max_iterations: int = 1000, warm_start: bool = False) -> int:
        call: Any = self.library.call.latentphys_finish_set
        return int(call(self.handle, ctypes.c_double(tolerance), max_iterations, int(warm_start)))

    def conserve(self, flux: Tensor) -> Tensor:
        """A conserved copy; ValueError with the library's text where it refuses, which must leave the flux alone."""
        values, iterations = flux.double().numpy().copy(), ctypes.c_int()
        pointer = values.ctypes.data_as(ctypes.c_void_p)
        if self.library.call.latentphys_finish_conserve(self.handle, pointer, ctypes.byref(iterations)):
            assert np.array_equal(values, flux.double().numpy(), equal_nan=True)
            raise ValueError(self.library.error())
        self.num_iterations = iterations.value
        return torch.from_numpy(values)

    def net_flux_max(self, flux: Tensor) -> float:
        values = flux.double().numpy().copy()
        pointer = values.ctypes.data_as(ctypes.c_void_p)
        return float(self.library.call.latentphys_finish_net_flux_max(self.handle, pointer))

    def __del__(self) -> None:
        self.library.call.latentphys_finish_destroy(self.handle)
