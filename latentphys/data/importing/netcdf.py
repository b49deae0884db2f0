"""NetCDF files, classic and NetCDF-4, through xarray: axes and velocities by the CF conventions, as in `cf`.

Points are centres of cells. Three components of a velocity in m/s become the vector ``velocity``; along an axis that
the data lack it is zero. A dimension of three called component or axis makes vectors too. Coordinates that descend are
turned round. Boundaries are not in such files: the user says them, or the box is periodic.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentphys.data.importing import cf, h5
from latentphys.data.importing.boxes import box, field_name, frames, spacing, spec
from latentphys.data.importing.damaged import readable
from latentphys.data.importing.numbered import series_name
from latentphys.data.importing.source import ImportOptions, Source
from latentphys.fields import FieldSpec
from latentphys.grid import Boundary

if TYPE_CHECKING:
    import xarray

CLASSIC = (b"CDF\x01", b"CDF\x02")
MOST_COORDINATES = 2**24
PERIODIC: tuple[Boundary, Boundary] = ("periodic", "periodic")
VECTORS = ("velocity", "vel", "u")
"""Names, in lower case, under which a variable with three components is taken for the velocity."""


def recognises(path: Path) -> bool:
    """Whether this is a NetCDF file: the classic signature, or HDF5 with the marks of NetCDF-4."""
    if not path.is_file():
        return False
    if _head(path)[:3] == b"CDF":
        return True
    if not h5.is_hdf5(path):
        return False
    try:
        file = h5.H5File(path)
        if "_NCProperties" in file.attributes():
            return True
        return any(file.is_array(name) and "_Netcdf4Dimid" in file.attributes(name) for name in file.names())
    except ValueError:
        return False


def sources(path: Path, options: ImportOptions) -> list[Source]:
    """The variables of a file on its box, as one or more trajectories.

    Args:
        path: the file.
        options: `axes` says what the dimensions of the variables mean, in order, where the file does not; `lengths`,
            `boundaries`, `time_step`, `units`, `family`; `dataset` takes one variable only.

    Raises:
        ValueError: latitudes and longitudes, uneven or missing coordinates, variables on different points, times
            without a fixed unit, or a file that is damaged. Missing values are refused when they are read.
    """
    data = _open(path)
    letters = _letters(data, options, path)
    variables, dims = _variables(data, letters, options, path)
    space = [axis for axis in "xyz" if axis in dims]
    _check_complete(data, [*variables, *(name for name in dims.values() if name in data.variables)], path)
    steps = {axis: _step(data, dims[axis], options, path) for axis in space}
    shape = [data.sizes[dims[axis]] if axis in dims else 1 for axis in "xyz"]
    lengths = options.lengths
    if lengths is not None and len(lengths) == len(space):
        lengths = [lengths[space.index(axis)] if axis in space else 1.0 for axis in "xyz"]
    grid = box(
        shape,
        [abs(steps.get(axis, 0.0)) for axis in "xyz"],
        [PERIODIC] * 3,
        ImportOptions(lengths=lengths, boundaries=options.boundaries),
        str(path),
    )
    specs, parts = _fields(data, variables, letters, space, options)
    reader = _Reader(data, path, letters, [axis for axis in space if steps[axis] < 0])

    def read(name: str, trajectory: int, frame: int) -> np.ndarray:
        zero = np.zeros((1, *grid.shape), np.float32)
        found = [zero if part is None else reader.snapshot(part, trajectory, frame) for part in parts[name]]
        values = np.concatenate(found)
        return values if specs[name].kind == "vector" else values[0]

    used = {name for part in parts.values() for name in part if name}
    return [
        Source(
            format="netcdf",
            paths=[path],
            family=options.family or field_name(series_name(path) or "netcdf"),
            grid=grid,
            times=_times(data, dims.get("t"), options, path),
            num_trajectories=data.sizes[dims["b"]] if "b" in dims else 1,
            specs=specs,
            read=read,
            about={
                "axes": {axis: dims[axis] for axis in sorted(dims)},
                "names": {name: list(part) for name, part in parts.items()},
                "left_out": sorted({str(name) for name in data.data_vars} - used),
                "turned_round": reader.flipped,
                "boundaries": "given" if options.boundaries is not None else "taken to be periodic",
            },
        )
    ]


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(4)
    except OSError:
        return b""


def _open(path: Path) -> xarray.Dataset:
    """The file, its numbers still on disk."""
    try:
        import xarray
    except ImportError as error:
        raise ValueError("Expected xarray for NetCDF files, got none; install latentphys[formats].") from error
    head = _head(path)
    if head not in CLASSIC and not h5.is_hdf5(path):
        raise ValueError(
            f"Expected NetCDF-3 (classic or 64-bit offset) or NetCDF-4 in {path}, got a file that begins with "
            f"{head!r}; convert it with nccopy -k nc4."
        )
    # SciPy warns of its open map of the file when the header is damaged, beside the error it raises
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning), readable(path, "a NetCDF file"):
        return xarray.open_dataset(
            path,
            engine="scipy" if head in CLASSIC else "h5netcdf",
            decode_times=False,
            decode_timedelta=False,
            create_default_indexes=False,
            cache=False,
            backend_kwargs={} if head in CLASSIC else {"phony_dims": "sort"},
        )


def _check_complete(data: xarray.Dataset, names: Sequence[str], path: Path) -> None:
    """Numbers that were never written would read as missing, and sizes without numbers cost memory."""
    if _head(path) in CLASSIC:
        promised = sum(data[name].nbytes for name in names)
        if promised > 8 * path.stat().st_size:  # packed numbers take up to eight times as much
            raise ValueError(f"Expected {promised} bytes of numbers in {path}, got a file too small; it is cut off.")
    else:
        file = h5.H5File(path)
        for name in names:
            file.array(name)


def _letters(data: xarray.Dataset, options: ImportOptions, path: Path) -> dict[str, str]:
    """Dimension → what it means, for those of which anything is known."""
    result: dict[str, str] = {}
    wanted = (options.axes or "").replace(",", " ").split()
    for variable in data.data_vars.values():
        if wanted and variable.ndim == len(wanted):
            result |= dict(zip(map(str, variable.dims), wanted, strict=True))
    if set(wanted) - set("btxyzc"):
        raise ValueError(f"Expected axes of the letters b t x y z c for {path}, got {options.axes!r}.")
    for dim in map(str, data.sizes):
        if dim not in result:
            attributes = data[dim].attrs if dim in data.variables else {}
            try:
                letter = cf.axis_of(dim, attributes)
            except ValueError as error:
                raise ValueError(f"{error} (in {path})") from error
            if letter is not None:
                result[dim] = letter
    return result


def _variables(
    data: xarray.Dataset, letters: Mapping[str, str], options: ImportOptions, path: Path
) -> tuple[list[str], dict[str, str]]:
    """The variables with the most axes of space, and the dimension that each letter is."""
    known = {
        str(name): "".join(letters[str(dim)] for dim in variable.dims)
        for name, variable in data.data_vars.items()
        if variable.dtype.kind in "fiub" and variable.size and all(str(dim) in letters for dim in variable.dims)
    }
    space = {name: frozenset(axes) & frozenset("xyz") for name, axes in known.items() if len(set(axes)) == len(axes)}
    if options.dataset is not None:
        if options.dataset not in space:
            raise ValueError(
                f"Expected a variable with known axes in {path}, got {options.dataset!r}; there are {sorted(space)}."
            )
        space = {options.dataset: space[options.dataset]}
    most = max((len(axes) for axes in space.values()), default=0)
    found = [name for name, axes in space.items() if len(axes) == most]
    if not most:
        all_dims = {str(name): list(map(str, v.dims)) for name, v in data.data_vars.items()}
        raise ValueError(f"Expected variables on axes of space in {path}, got {all_dims}; pass what the axes mean.")
    dims: dict[str, str] = {}
    for name in found:
        for dim in map(str, data[name].dims):
            if dims.setdefault(letters[dim], dim) != dim:
                raise ValueError(
                    f"Expected all variables of {path} on the same points, got {name!r} on {dim!r} and others on "
                    f"{dims[letters[dim]]!r}; interpolate them first, or take one variable."
                )
    return found, dims


def _coordinate(data: xarray.Dataset, dim: str, path: Path) -> np.ndarray | None:
    if dim not in data.variables:
        return None
    if data.sizes[dim] > MOST_COORDINATES:
        raise ValueError(f"Expected at most {MOST_COORDINATES} points along {dim!r} of {path}, got {data.sizes[dim]}.")
    with readable(path, "a NetCDF file"):
        values = np.asarray(data[dim].values, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"Expected finite coordinates along {dim!r} of {path}, got NaN, infinity or several axes.")
    return values


def _step(data: xarray.Dataset, dim: str, options: ImportOptions, path: Path) -> float:
    """Distance of points along a dimension [m], negative where the coordinate descends; 0 for a single point."""
    points = _coordinate(data, dim, path)
    if points is None:
        if options.lengths is None and data.sizes[dim] > 1:
            raise ValueError(
                f"Expected coordinates along {dim!r} in {path}, got none; pass the lengths of the box [m]."
            )
        return 0.0
    sign = -1.0 if points[-1] < points[0] else 1.0
    h = spacing(points if sign > 0 else points[::-1], f"{dim!r} of {path}")
    if options.lengths is not None:
        return sign * h
    try:
        return sign * h * cf.metres(str(data[dim].attrs.get("units", "")))
    except ValueError as error:
        raise ValueError(f"{error} along {dim!r} of {path}; pass the lengths of the box [m].") from error


def _fields(
    data: xarray.Dataset,
    variables: Sequence[str],
    letters: Mapping[str, str],
    space: Sequence[str],
    options: ImportOptions,
) -> tuple[dict[str, FieldSpec], dict[str, list[str | None]]]:
    """The fields and the variables that each consists of."""
    scalars, vectors = {}, []
    for name in variables:
        num_components = next((data.sizes[dim] for dim in data[name].dims if letters[str(dim)] == "c"), 1)
        if num_components == 3:
            vectors.append(name)
        elif num_components == 1:
            scalars[name] = data[name].attrs
    specs: dict[str, FieldSpec] = {}
    parts: dict[str, list[str | None]] = {}

    def add(raw: str, name: str, is_vector: bool, part: list[str | None]) -> None:
        units = str(data[raw].attrs.get("units", ""))
        found = spec(name, is_vector, options)
        if raw in options.units:
            found = FieldSpec(found.name, found.kind, options.units[raw])
        elif units and found.name not in options.units:
            found = FieldSpec(found.name, found.kind, "m/s" if cf.is_speed(units) else units)
        if found.name in specs:
            raise ValueError(
                f"Expected one variable to be the field {found.name!r}, got {raw!r} too; take one variable."
            )
        specs[found.name], parts[found.name] = found, part

    components = cf.velocity(scalars, space)
    if components is not None:
        first = next(name for name in components if name)
        add(first, "velocity", True, components)
        specs["velocity"] = FieldSpec("velocity", "vector", "m/s")
    for name in vectors:
        is_velocity = name.lower() in VECTORS and cf.is_speed(str(data[name].attrs.get("units", "")))
        add(name, "velocity" if is_velocity else name, True, [name])
    for name in scalars:
        if name not in (components or ()):
            add(name, name, False, [name])
    if not specs:
        raise ValueError(f"Expected scalars or vectors of three components, got only {list(variables)}.")
    return specs, parts


def _times(data: xarray.Dataset, dim: str | None, options: ImportOptions, path: Path) -> np.ndarray:
    """Times t [s]: from the first frame where the file counts from a date, else as they are."""
    if dim is None:
        return np.array([0.0])
    points, number = _coordinate(data, dim, path), data.sizes[dim]
    if options.time_step is not None:
        return frames(options.time_step * np.arange(number), str(path))
    if points is None:
        if number > 1:
            raise ValueError(f"Expected the times of {number} frames in {path}, got none; pass the time step [s].")
        return np.array([0.0])
    units = str(data[dim].attrs.get("units", ""))
    try:
        factor = cf.seconds(units)
    except ValueError as error:
        raise ValueError(f"{error} along {dim!r} of {path}; pass the time step [s].") from error
    return frames(factor * (points - points[0] if " since " in units else points), f"{dim!r} of {path}")


class _Reader:
    """Snapshots of variables."""

    def __init__(self, data: xarray.Dataset, path: Path, letters: Mapping[str, str], flipped: list[str]) -> None:
        self._data, self._path, self._letters, self.flipped = data, path, letters, flipped

    def snapshot(self, name: str, trajectory: int, frame: int) -> np.ndarray:
        """One snapshot (component, nx, ny, nz)."""
        place = {"b": trajectory, "t": frame}
        variable: Any = self._data[name]
        dims = {self._letters[str(dim)]: str(dim) for dim in variable.dims}
        with readable(self._path, "a NetCDF file"):
            chosen = variable.isel({dim: place[axis] for axis, dim in dims.items() if axis in place})
            values = np.asarray(chosen.values)
        axes = [axis for axis in map(self._letters.__getitem__, map(str, variable.dims)) if axis not in place]
        values = values.transpose([axes.index(axis) for axis in "cxyz" if axis in axes])
        kept = iter(values.shape)
        values = values.reshape([next(kept) if axis in axes else 1 for axis in "cxyz"])
        values = np.flip(values, tuple("cxyz".index(axis) for axis in self.flipped))
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(
                f"Expected numbers everywhere in {name!r} of {self._path}, got missing values, NaN or infinity in "
                f"trajectory {trajectory}, frame {frame}; fill them or cut a box without them."
            )
        return values
