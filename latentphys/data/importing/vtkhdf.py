"""VTKHDF files of image data, static or with steps: numbers as (z, y, x[, component]), with time in front."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from latentphys.data.importing.h5 import Array, H5File, is_hdf5
from latentphys.data.importing.vtkimage import RESAMPLE, Arrays, Centring, Image, Values, checked_image

GROUPS: tuple[tuple[Centring, str], ...] = (("points", "PointData"), ("cells", "CellData"))


def recognises(path: Path) -> bool:
    """Whether this is an HDF5 file with a group VTKHDF."""
    if not is_hdf5(path):
        return False
    try:
        return H5File(path).has("VTKHDF")
    except ValueError:
        return False


def read(path: Path) -> list[Image]:
    """Every step of a file; numbers when they are asked for.

    Raises:
        ValueError: another type of data, or a file that is damaged or lacks what the format asks for.
    """
    file = H5File(path)
    attributes = file.attributes("VTKHDF")
    if attributes.get("Type") != "ImageData":
        raise ValueError(f"Expected VTKHDF ImageData in {path}, got {attributes.get('Type')!r}; {RESAMPLE}.")
    extent, spacing = _numbers(attributes, "WholeExtent", path), _numbers(attributes, "Spacing", path)
    origin = _numbers(attributes, "Origin", path)
    if len(extent) != 6 or len(origin) != 3 or len(spacing) != 3:
        raise ValueError(f"Expected WholeExtent, Origin and Spacing of three axes in {path}, got {attributes}.")
    points = [int(high - low) + 1 for low, high in zip(extent[::2], extent[1::2], strict=True)]
    origin = [o + low * h for o, low, h in zip(origin, extent[::2], spacing, strict=True)]
    direction = _numbers(attributes, "Direction", path) if "Direction" in attributes else None
    times: list[float | None] = [None]
    is_temporal = file.has("VTKHDF/Steps")
    if is_temporal:
        times = [float(t) for t in file.numbers("VTKHDF/Steps/Values").ravel()]
        number = file.attributes("VTKHDF/Steps").get("NSteps")
        if number != len(times):
            raise ValueError(f"Expected NSteps = {len(times)}, the number of times in {path}, got {number}.")
    arrays = {
        (centring, name): file.array(f"VTKHDF/{group}/{name}")
        for centring, group in GROUPS
        if file.has(f"VTKHDF/{group}")
        for name in file.names(f"VTKHDF/{group}")
    }
    most = sum(math.prod(array.shape or (0,)) for array in arrays.values())
    steps = []
    for step, time in enumerate(times):
        found = _Step(file, arrays, points, step, is_temporal)
        steps.append(checked_image(path, points, origin, spacing, time, most, found, direction))
    return steps


class _Step:
    """The arrays of one step."""

    def __init__(
        self, file: H5File, arrays: dict[tuple[Centring, str], Array], points: list[int], step: int, is_temporal: bool
    ) -> None:
        self._file, self._arrays, self._points, self._step = file, arrays, points, step
        self._is_temporal = is_temporal

    def __call__(self) -> Arrays:
        return {key: self._values(key) for key in self._arrays}

    def _values(self, key: tuple[Centring, str]) -> Values:
        centring, name = key
        array = self._arrays[key]
        shape = tuple(n if centring == "points" else max(n - 1, 1) for n in self._points[::-1])
        full = array.shape or ()
        axes = full[1:] if self._is_temporal else full
        if axes[:3] != shape or len(axes) > 4:
            lead = "step, " if self._is_temporal else ""
            raise ValueError(f"Expected {array.where} of shape ({lead}{shape}[, component]), got {full}.")
        components = axes[3] if len(axes) == 4 else 1

        def read() -> np.ndarray:
            index: tuple[int | slice, ...] = (self._offset(key, full[0]),) if self._is_temporal else ()
            return array.read(index).reshape(math.prod(shape), components)

        group = "PointData" if centring == "points" else "CellData"
        unit = self._file.attributes(f"VTKHDF/{group}/{name}").get("units")
        return Values(components, read, unit if isinstance(unit, str) and unit else None)

    def _offset(self, key: tuple[Centring, str], most: int) -> int:
        """Where a step begins in an array: arrays that do not change are written once."""
        group = "PointDataOffsets" if key[0] == "points" else "CellDataOffsets"
        name = f"VTKHDF/Steps/{group}/{key[1]}"
        offset = self._step
        if self._file.has(name):
            offsets = self._file.numbers(name).ravel()
            offset = int(offsets[self._step]) if self._step < offsets.size else -1
        if not 0 <= offset < most:
            raise ValueError(f"Expected step {self._step} of {key[1]!r} in {self._file.path}, got only {most} of them.")
        return offset


def _numbers(attributes: dict[str, Any], key: str, path: Path) -> list[float]:
    value = attributes.get(key)
    if not isinstance(value, list) or not all(isinstance(n, int | float) for n in value):
        raise ValueError(f"Expected numbers in the attribute {key!r} of VTKHDF in {path}, got {value!r}.")
    return [float(n) for n in value]
