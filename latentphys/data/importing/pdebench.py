"""PDEBench: compressible and incompressible flow, scalar equations, Darcy flow, and one group per trajectory.

    density pressure Vx[ Vy[ Vz]] (b t x[ y[ z]])   {x,y,z}-coordinate, t-coordinate with one entry more than frames
    tensor (b t x[ y[ z]]), with Darcy flow nu (b x y)
    velocity (b t x y c)   particles, force, t (b t)
    0000/data (t x[ y] c), 0001/…   grid/{x,y,t} and a YAML text `config`

Boundaries are not in the files; each layout has those of the equations it was made for, unless the user says others.

Reference: Takamoto et al., PDEBench, NeurIPS Datasets and Benchmarks (2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentphys.data.importing.blocks import Part, Piece, check_axes, gather
from latentphys.data.importing.boxes import box, field_name, frames, spacing, spec
from latentphys.data.importing.channels import components, fields_of
from latentphys.data.importing.h5 import H5File, hdf5_files
from latentphys.data.importing.source import ImportOptions, Source
from latentphys.grid import Boundary, Grid

VELOCITY = ("Vx", "Vy", "Vz")
RUN_SETTINGS = frozenset(
    ("seed", "t", "tdim", "xdim", "ydim", "zdim", "n", "n_time_steps", "T_end", "n_steps", "frame_int", "n_batch")
    + ("x_left", "x_right", "y_bottom", "y_top")
)
"""Numbers of a `config` that say how long and on what grid was computed, and nothing of the physics."""
MOST_YAML = 2**20


def recognises(path: Path) -> bool:
    """Whether the first HDF5 file has one of the layouts above."""
    return any(_layout(H5File(first)) is not None for first in hdf5_files(path)[:1])


def _layout(file: H5File) -> str | None:
    names = set(file.names())
    if {"density", "pressure", "Vx"} <= names:
        return "compressible_flow"
    if "tensor" in names and (names & {"x-coordinate", "nu"}):
        return "darcy_flow" if "nu" in names else "scalar_equation"
    if {"velocity", "t"} <= names and names & {"particles", "force"}:
        return "incompressible_flow"
    if names and {"data", "grid"} <= set(file.names(min(names))):
        return "trajectory_groups"
    return None


def sources(path: Path, options: ImportOptions) -> list[Source]:
    """A file, or a folder of files.

    Raises:
        ValueError: files that are damaged, contradict themselves or have none of the layouts.
    """
    parts: list[Part] = []
    family = ""
    for name in hdf5_files(path):
        file = H5File(name)
        layout = _layout(file)
        if layout is None:
            raise ValueError(f"Expected a file of PDEBench at {name}, got one with {file.names()[:8]}.")
        if options.fields is not None and layout != "trajectory_groups":
            raise ValueError(f"Expected no names of fields for {name}, whose arrays have some, got {options.fields}.")
        family = family or layout
        parts += _READ[layout](file, options)
    if not parts:
        raise ValueError(f"Expected files of PDEBench at {path}, got no HDF5 file.")
    kind = "as said" if options.boundaries is not None else "those of the published equations; not in the files"
    return gather("pdebench", options.family or family, parts, about={"boundaries": kind})


def _shape(file: H5File, name: str, lowest: int, highest: int) -> tuple[int, ...]:
    shape = file.array(name).shape
    if shape is None or not lowest <= len(shape) <= highest:
        raise ValueError(f"Expected array {name!r} of {file.path} with {lowest} to {highest} axes, got shape {shape}.")
    return shape


def _grid(file: H5File, names: Sequence[str], shape: Sequence[int], side: Boundary, options: ImportOptions) -> Grid:
    """The box of evenly spaced cells whose centres are the coordinates."""
    sizes = []
    for name, n in zip(names, shape, strict=False):
        points = file.numbers(name)
        if points.shape != (n,):
            raise ValueError(f"Expected {n} points in {name!r} of {file.path}, got shape {points.shape}.")
        sizes.append(spacing(points, f"{name!r} of {file.path}"))
    return box(shape, sizes, [(side, side)] * len(shape), options, str(file.path))


def _frames(file: H5File, name: str, number: int) -> np.ndarray:
    """Times of the frames: those at which they begin, where the file has the end of the last one as well."""
    times = file.numbers(name)
    if times.ndim != 1 or len(times) not in (number, number + 1):
        raise ValueError(
            f"Expected {number} or {number + 1} times in {name!r} of {file.path}, got shape {times.shape}."
        )
    return frames(times[:number], f"{name!r} of {file.path}")


def _attributes(file: H5File, count: int) -> dict[str, np.ndarray]:
    """Numbers among the file's attributes, the same for every trajectory."""
    numbers = {n: v for n, v in file.attributes().items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {field_name(n): np.full(count, float(v)) for n, v in numbers.items() if np.isfinite(v)}


def _compressible(file: H5File, options: ImportOptions) -> list[Part]:
    count, num_frames, *shape = _shape(file, "density", 3, 5)
    axes = "bt" + "xyz"[: len(shape)]
    components = [name for name in VELOCITY if file.has(name)]
    if components != list(VELOCITY[: len(shape)]):
        raise ValueError(f"Expected {VELOCITY[: len(shape)]} beside the density in {file.path}, got {components}.")
    pieces = {"velocity": tuple(Piece(name, axes) for name in components)}
    pieces |= {name: (Piece(name, axes),) for name in ("density", "pressure")}
    sizes = dict(zip(axes, (count, num_frames, *shape), strict=True))
    for of_field in pieces.values():
        for piece in of_field:
            check_axes(file, piece, sizes, may_be_one="")
    names = [f"{axis}-coordinate" for axis in "xyz"]
    return [
        Part(
            path=file.path,
            indices=range(count),
            grid=_grid(file, names, shape, "periodic", options),
            times=_frames(file, "t-coordinate", num_frames),
            specs={name: spec(name, name == "velocity", options) for name in pieces},
            pieces=pieces,
            parameters=_attributes(file, count),
        )
    ]


def _scalar(file: H5File, options: ImportOptions) -> list[Part]:
    count, num_frames, *shape = _shape(file, "tensor", 3, 5)
    is_darcy = file.has("nu")
    axes = "bt" + "xyz"[: len(shape)]
    pieces = {"tensor": (Piece("tensor", axes),)}
    if is_darcy:
        pieces["nu"] = (Piece("nu", axes.replace("t", "")),)
        sizes = dict(zip(axes, (count, num_frames, *shape), strict=True))
        check_axes(file, pieces["nu"][0], sizes, may_be_one="")
    times = _frames(file, "t-coordinate", num_frames) if file.has("t-coordinate") and num_frames > 1 else np.zeros(1)
    if num_frames > len(times):
        raise ValueError(f"Expected times 't-coordinate' of {num_frames} frames in {file.path}, got none.")
    grid = _grid(file, [f"{axis}-coordinate" for axis in "xyz"], shape, "outflow" if is_darcy else "periodic", options)
    specs = {name: spec(name, False, options) for name in pieces}
    return [Part(file.path, range(count), grid, times, specs, pieces, _attributes(file, count))]


def _incompressible(file: H5File, options: ImportOptions) -> list[Part]:
    count, num_frames, *shape, _ = _shape(file, "velocity", 5, 6)
    space = "xyz"[: len(shape)]
    sizes = dict(zip("bt" + space, (count, num_frames, *shape), strict=True)) | {"c": len(shape)}
    pieces: dict[str, tuple[Piece, ...]] = {"velocity": (Piece("velocity", f"bt{space}c"),)}
    check_axes(file, pieces["velocity"][0], sizes, may_be_one="")
    if file.has("particles"):
        pieces["particles"] = (Piece("particles", f"bt{space}c"),)
        check_axes(file, pieces["particles"][0], sizes | {"c": 1}, may_be_one="")
    if file.has("force"):
        pieces["force"] = (Piece("force", f"b{space}c"),)
        check_axes(file, pieces["force"][0], sizes, may_be_one="")
    rows = file.numbers("t")
    if rows.shape != (count, num_frames):
        raise ValueError(f"Expected times 't' of shape {(count, num_frames)} in {file.path}, got {rows.shape}.")
    grid = box(shape, None, [("no_slip", "no_slip")] * len(shape), options, str(file.path))
    specs = {name: spec(name, name != "particles", options) for name in pieces}
    return [
        Part(file.path, [i], grid, frames(row, f"'t' of {file.path}, trajectory {i}"), specs, pieces)
        for i, row in enumerate(rows)
    ]


def _groups(file: H5File, options: ImportOptions) -> list[Part]:
    parts = []
    for group in file.names():
        num_frames, *shape, _ = _shape(file, f"{group}/data", 3, 5)
        config = _config(file, group)
        # only the shallow-water runs have gravity, and they let waves out
        side: Boundary = "outflow" if "gravity" in config else "free_slip"
        names = [f"{group}/grid/{axis}" for axis in "xyz"]
        axes = "t" + "xyz"[: len(shape)] + "c"
        specs, pieces = fields_of(*components(file, [f"{group}/data"], axes), options)
        parts.append(
            Part(
                path=file.path,
                indices=[0],
                grid=_grid(file, names, shape, side, options),
                times=_frames(file, f"{group}/grid/t", num_frames),
                specs=specs,
                pieces=pieces,
                parameters={field_name(n): np.array([v]) for n, v in config.items() if n not in RUN_SETTINGS},
            )
        )
    return parts


def _config(file: H5File, group: str) -> dict[str, float]:
    """The numbers of a trajectory's YAML text, under `sim` where it has that."""
    import yaml

    text = file.attributes(group).get("config")
    if text is None:
        return {}
    try:
        config: Any = yaml.safe_load(text) if isinstance(text, str) and len(text) < MOST_YAML else None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(
            f"Expected YAML in 'config' of {group!r} in {file.path}, got {str(error).split()[:6]}."
        ) from error
    if not isinstance(config, Mapping):
        raise ValueError(f"Expected a YAML mapping in 'config' of {group!r} in {file.path}, got something else.")
    config = config["sim"] if isinstance(config.get("sim"), Mapping) else config
    return {
        str(name): float(value)
        for name, value in config.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    }


_READ = {
    "compressible_flow": _compressible,
    "scalar_equation": _scalar,
    "darcy_flow": _scalar,
    "incompressible_flow": _incompressible,
    "trajectory_groups": _groups,
}
