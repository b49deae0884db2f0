"""VTKHDF files of image data, static or with steps: numbers as (z, y, x[, component]), with time in front."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from latentphys.data.importing.h5 import Array, H5File, is_hdf5
from latentphys.data.importing.vtkimage import RESAMPLE, Arrays, Centring, Image, Values, checked_image, shape

GROUPS: dict[Centring, str] = {"points": "PointData", "cells": "CellData"}


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
    extent, spacing, origin = (_numbers(attributes, key, path) for key in ("WholeExtent", "Spacing", "Origin"))
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
        for centring, group in GROUPS.items()
        if file.has(f"VTKHDF/{group}")
        for name in file.names(f"VTKHDF/{group}")
    }
    most = sum(math.prod(array.shape or (0,)) for array in arrays.values())

    def at(step: int) -> Arrays:
        return {
            key: _values(file, array, key, shape(points, key[0])[::-1], step if is_temporal else None)
            for key, array in arrays.items()
        }

    return [
        checked_image(path, points, origin, spacing, time, most, partial(at, step), direction)
        for step, time in enumerate(times)
    ]


def _values(file: H5File, array: Array, key: tuple[Centring, str], axes: tuple[int, ...], step: int | None) -> Values:
    """One array, (z, y, x[, component]), at a step, None where there are none."""
    full = array.shape or ()
    rest = full if step is None else full[1:]
    if rest[:3] != axes or len(rest) > 4:
        lead = "" if step is None else "step, "
        raise ValueError(f"Expected {array.where} of shape ({lead}{axes}[, component]), got {full}.")
    components = rest[3] if len(rest) == 4 else 1

    def read() -> np.ndarray:
        index = () if step is None else (_offset(file, key, step, full[0]),)
        return array.read(index).reshape(-1, components)

    unit = file.attributes(f"VTKHDF/{GROUPS[key[0]]}/{key[1]}").get("units")
    return Values(components, read, unit if isinstance(unit, str) and unit else None)


def _offset(file: H5File, key: tuple[Centring, str], step: int, most: int) -> int:
    """Where a step begins in an array: arrays that do not change are written once."""
    name = f"VTKHDF/Steps/{GROUPS[key[0]]}Offsets/{key[1]}"
    offset = step
    if file.has(name):
        offsets = file.numbers(name).ravel()
        offset = int(offsets[step]) if step < offsets.size else -1
    if not 0 <= offset < most:
        raise ValueError(f"Expected step {step} of {key[1]!r} in {file.path}, got only {most} of them.")
    return offset


def _numbers(attributes: dict[str, Any], key: str, path: Path) -> list[float]:
    value = attributes.get(key)
    if not isinstance(value, list) or not all(isinstance(n, int | float) for n in value):
        raise ValueError(f"Expected numbers in the attribute {key!r} of VTKHDF in {path}, got {value!r}.")
    return [float(n) for n in value]
