"""Any HDF5 file, where the user says which array it is and what its axes mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latentphys.data.importing.blocks import Part, Piece, check_axes, gather
from latentphys.data.importing.boxes import box, even_times, field_name
from latentphys.data.importing.channels import components, fields_of, parse_axes
from latentphys.data.importing.h5 import H5File, hdf5_files
from latentphys.data.importing.source import ImportOptions, Source

MOST_LISTED = 12


def recognises(path: Path) -> bool:
    """Whether there is an HDF5 file."""
    return bool(hdf5_files(path))


def sources(path: Path, options: ImportOptions) -> list[Source]:
    """A file, or a folder of files that are alike.

    `axes` is needed; `dataset` too, one name or several with commas between, unless there is one array only. Without
    `lengths`, cells are cubes and the longest edge is 1 m; without `boundaries` the box is periodic. Every component
    is a scalar, unless `fields` gives two or three of them one name, which makes a vector of these.

    Raises:
        ValueError: no axes, no or several arrays to choose from (the message lists them), or damaged files.
    """
    parts = []
    for name in hdf5_files(path):
        file = H5File(name)
        arrays = [part.strip() for part in (options.dataset or "").split(",") if part.strip()]
        found = [array for array, _ in file.arrays()]
        arrays = arrays or (found if len(found) == 1 else [])
        if not arrays or options.axes is None or not all(file.is_array(array) for array in arrays):
            listed = ", ".join(f"{array} {shape}" for array, shape in list(file.arrays())[:MOST_LISTED]) or "none"
            raise ValueError(
                f"Expected the array to read from {name} (dataset) and its axes (such as 'b t x y z c'), "
                f"got dataset {options.dataset!r} and axes {options.axes!r}; its arrays: {listed}."
            )
        parts += parts_of(file, arrays, options.axes, options)
    if not parts:
        raise ValueError(f"Expected an HDF5 file at {path}, got none.")
    about = {"axes": options.axes, "boundaries": "periodic" if options.boundaries is None else "as said"}
    return gather("hdf5", options.family or field_name(path.stem), parts, about=about)


def parts_of(file: H5File, arrays: Sequence[str], axes: str, options: ImportOptions) -> list[Part]:
    """The trajectories in some arrays of one file, all with the same axes."""
    shape = file.array(arrays[0]).shape or ()
    letters = parse_axes(axes, len(shape), f"{arrays[0]!r} of {file.path}")
    sizes = dict(zip(letters, shape, strict=True))
    for array in arrays:
        check_axes(file, Piece(array, letters), {a: n for a, n in sizes.items() if a != "c"}, may_be_one="")
    specs, pieces = fields_of(*components(file, arrays, letters), options)
    space = [sizes[axis] for axis in "xyz" if axis in sizes]
    return [
        Part(
            path=file.path,
            indices=range(sizes.get("b", 1)),
            grid=box(space, None, [("periodic", "periodic")] * len(space), options, str(file.path)),
            times=even_times(sizes.get("t", 1), options),
            specs=specs,
            pieces=pieces,
        )
    ]
