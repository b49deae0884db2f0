"""The Well: HDF5 with fields by tensor order, boundary conditions as masks, and parameters as attributes.

Reference: Ohana et al., The Well, NeurIPS Datasets and Benchmarks (2024), data format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latentphys.data.importing.blocks import Part, Piece, gather
from latentphys.data.importing.boxes import box, field_name, frames, spacing, spec
from latentphys.data.importing.h5 import MOST_SMALL_NUMBERS, H5File, hdf5_files, texts
from latentphys.data.importing.source import ImportOptions, Source
from latentphys.fields import FieldSpec
from latentphys.grid import Boundary, Grid

MARKS = {"dataset_name", "grid_type", "n_spatial_dims"}
GROUPS = ("dimensions", "boundary_conditions", "scalars", "t0_fields", "t1_fields", "t2_fields")
BOUNDARY_OF: Mapping[str, Boundary] = {"WALL": "no_slip", "OPEN": "outflow", "PERIODIC": "periodic"}


def recognises(path: Path) -> bool:
    """Whether the first HDF5 file has the attributes or the groups of The Well."""
    for first in hdf5_files(path)[:1]:
        file = H5File(first)
        return set(file.attributes()) >= MARKS or ({"dimensions", "t0_fields"} <= set(file.names()))
    return False


def sources(path: Path, options: ImportOptions) -> list[Source]:
    """A file, a folder of files, or a tree with ``data/train`` and so on.

    Fields of order 1 are vectors, the components of those of order 2 scalars ``name_xy`` (the upper ones where they are
    symmetric). Fields that do not vary in time are repeated in every frame; one of them named ``solid`` is the voxels.
    The Well's coordinates are points; each is taken as the centre of a cell.

    Raises:
        ValueError: files that are damaged or contradict themselves, or grids other than even Cartesian ones.
    """
    files = hdf5_files(path)
    if not files:
        raise ValueError(f"Expected files of The Well at {path}, got no HDF5 file.")
    names, parts, units = [], [], dict[str, str]()
    for file in files:
        contents = _Contents(H5File(file), options)
        names.append(contents.name)
        parts += contents.parts()
        units |= contents.parameter_units
    about = {"boundaries": "WALL no_slip, OPEN outflow, PERIODIC periodic", "points": "centres of cells"}
    return gather("well", options.family or field_name(names[0]), parts, units, about)


class _Contents:
    """One file."""

    def __init__(self, file: H5File, options: ImportOptions) -> None:
        self.file, self.options, self.where = file, options, str(file.path)
        self.attributes = file.attributes()
        for group in GROUPS:
            if not file.has(group):
                raise ValueError(f"Expected a group {group!r} in {self.where}, got only {file.names()}.")
        grid_type = str(self._attribute("grid_type"))
        if grid_type.lower() != "cartesian":
            raise ValueError(
                f"Expected grid_type 'cartesian' in {self.where}, got {grid_type!r}; interpolate to such a grid first."
            )
        self.name = str(self._attribute("dataset_name"))
        self.parameter_units: dict[str, str] = {}
        self.count, num_axes = self._whole("n_trajectories"), self._whole("n_spatial_dims")
        self.axes = texts(file.attributes("dimensions").get("spatial_dims"))
        if len(self.axes) != num_axes or num_axes > 3:
            raise ValueError(f"Expected {num_axes} spatial_dims, three at most, in {self.where}, got {self.axes}.")

    def _attribute(self, name: str) -> Any:
        if name not in self.attributes:
            raise ValueError(f"Expected an attribute {name!r} in {self.where}, got {sorted(self.attributes)}.")
        return self.attributes[name]

    def _whole(self, name: str) -> int:
        value = self._attribute(name)
        if not isinstance(value, int | float) or value not in range(1, MOST_SMALL_NUMBERS):
            raise ValueError(f"Expected a whole number {name!r} in {self.where}, got {value!r}.")
        return int(value)

    def parts(self) -> list[Part]:
        times, boxes = self._times(), self._boxes()
        specs, pieces, solid = self._fields(boxes[0], times.shape[1])
        parameters = self._parameters(times.shape[1])
        groups: dict[Any, list[int]] = {}
        for i in range(self.count):
            groups.setdefault((boxes[i % len(boxes)], times[i % len(times)].tobytes()), []).append(i)
        return [
            Part(
                path=self.file.path,
                indices=indices,
                grid=boxes[indices[0] % len(boxes)],
                times=frames(times[indices[0] % len(times)], self.where),
                specs=specs,
                pieces=pieces,
                parameters={name: values[indices] for name, values in parameters.items()},
                solid=solid,
            )
            for indices in groups.values()
        ]

    def _rows(self, name: str) -> np.ndarray:
        """Times or coordinates, one row for all trajectories or one each."""
        values, attributes = self.file.numbers(f"dimensions/{name}"), self.file.attributes(f"dimensions/{name}")
        rows = self.count if attributes.get("sample_varying") else 1
        if attributes.get("time_varying") and name != "time":
            raise ValueError(f"Expected points that stay in place in {self.where}, got {name!r} varying in time.")
        if values.ndim != (2 if attributes.get("sample_varying") else 1) or (values.ndim == 2 and len(values) != rows):
            raise ValueError(
                f"Expected {name!r} of {rows} rows in {self.where}, got shape {values.shape} for {self.count} "
                "trajectories."
            )
        return values.reshape(rows, -1)

    def _times(self) -> np.ndarray:
        return self._rows("time")

    def _boxes(self) -> list[Grid]:
        rows, sides = [self._rows(axis) for axis in self.axes], self._boundaries()
        where = f"{self.where}, dimensions"
        return [
            box(
                [row.shape[1] for row in rows],
                [spacing(row[i % len(row)], f"{where}/{axis}") for axis, row in zip(self.axes, rows, strict=True)],
                sides,
                self.options,
                self.where,
            )
            for i in range(max(len(row) for row in rows))
        ]

    def _boundaries(self) -> list[tuple[Boundary, Boundary]]:
        """Per axis: open, unless a mask says otherwise at its first or last point.

        A mask over several axes makes a side open or periodic where any of its points is, and a wall where all are.
        """
        sides: list[list[Boundary]] = [["outflow", "outflow"] for _ in self.axes]
        for name in self.file.names("boundary_conditions"):
            group = f"boundary_conditions/{name}"
            attributes = self.file.attributes(group)
            kind, axes = str(attributes.get("bc_type")).upper(), texts(attributes.get("associated_dims"))
            if kind not in BOUNDARY_OF or not set(axes) <= set(self.axes):
                raise ValueError(
                    f"Expected a bc_type of {' | '.join(BOUNDARY_OF)} on {self.axes} in {group!r} of {self.where}, got "
                    f"{attributes.get('bc_type')!r} on {axes}."
                )
            mask = self.file.array(f"{group}/mask")
            assert mask.shape is not None
            if len(mask.shape) != len(axes):
                raise ValueError(f"Expected {mask.where} over the axes {axes}, got shape {mask.shape}.")
            for place, axis in enumerate(axes):
                for side, index in enumerate((0, mask.shape[place] - 1)):
                    edge = mask.read((slice(None),) * place + (index,))
                    if edge.all() if kind == "WALL" else edge.any():
                        sides[self.axes.index(axis)][side] = BOUNDARY_OF[kind]
        for axis, pair in zip(self.axes, sides, strict=True):
            if (pair[0] == "periodic") != (pair[1] == "periodic") and self.options.boundaries is None:
                raise ValueError(
                    f"Expected axis {axis!r} to be periodic at both ends or neither in {self.where}, got {pair}; "
                    "say the boundaries yourself."
                )
        return [(low, high) for low, high in sides]

    def _fields(
        self, grid: Grid, num_frames: int
    ) -> tuple[dict[str, FieldSpec], dict[str, tuple[Piece, ...]], Piece | None]:
        specs: dict[str, FieldSpec] = {}
        pieces: dict[str, tuple[Piece, ...]] = {}
        solid = None
        for order in range(3):
            group = f"t{order}_fields"
            for name in texts(self.file.attributes(group).get("field_names")):
                array, attributes = f"{group}/{name}", self.file.attributes(f"{group}/{name}")
                varies = bool(attributes.get("time_varying"))
                axes = self._axes_of(array, attributes, order, num_frames, grid)
                if name == "solid" and order == 0 and not varies:
                    solid = Piece(array, axes)
                    continue
                for label, piece in self._components(name, Piece(array, axes), order, attributes):
                    new = spec(label, order == 1, self.options, _unit(attributes))
                    if new.name in specs:
                        raise ValueError(f"Expected each field once in {self.where}, got {new.name!r} twice.")
                    specs[new.name], pieces[new.name] = new, (piece,)
        if not specs:
            raise ValueError(f"Expected at least one field in {self.where}, got none.")
        return specs, pieces, solid

    def _axes_of(self, array: str, attributes: Mapping[str, Any], order: int, num_frames: int, grid: Grid) -> str:
        """The axes of a field; those along which it does not vary are absent or of length 1."""
        d = len(self.axes)
        dims = attributes.get("dim_varying", [True] * d)
        if not isinstance(dims, list) or len(dims) != d:
            raise ValueError(f"Expected dim_varying of {d} axes for {array!r} of {self.where}, got {dims}.")
        leading = "b" * bool(attributes.get("sample_varying")) + "t" * bool(attributes.get("time_varying"))
        varying = "".join(axis for axis, varies in zip("xyz", dims, strict=False) if varies)
        still = set("xyz") - set(varying)
        sizes = {"b": self.count, "t": num_frames} | dict(zip("xyz", grid.shape, strict=True))
        all_tails: list[dict[str, dict[str, int]]] = [
            {"": {}},
            {"c": {"c": d}},
            {"cd": {"c": d, "d": d}, "c": {"c": d * d}},
        ]
        tails = all_tails[order]
        shape = self.file.array(array).shape or ()
        for space in ("xyz"[:d], varying):
            for tail, more in tails.items():
                axes = leading + space + tail
                wanted = [(axis, (sizes | more)[axis]) for axis in axes]
                if len(shape) == len(axes) and all(
                    n == size or (n == 1 and axis in still) for n, (axis, size) in zip(shape, wanted, strict=True)
                ):
                    return axes
        expected = ", ".join(f"{axis} = {sizes.get(axis, d)}" for axis in leading + varying + next(iter(tails)))
        raise ValueError(
            f"Expected array {array!r} of {self.where} with axes ({expected}), got shape {shape}: other numbers of "
            "trajectories, frames or points than the file says."
        )

    def _components(
        self, name: str, piece: Piece, order: int, attributes: Mapping[str, Any]
    ) -> list[tuple[str, Piece]]:
        if order < 2:
            return [(name, piece)]
        d, upper = len(self.axes), bool(attributes.get("symmetric"))
        return [
            (
                f"{name}_{self.axes[i]}{self.axes[j]}",
                Piece(piece.array, piece.axes, (i, j) if piece.axes.endswith("cd") else (i * d + j,)),
            )
            for i in range(d)
            for j in range(d)
            if j >= i or not upper
        ]

    def _parameters(self, num_frames: int) -> dict[str, np.ndarray]:
        """Attributes of the file and scalars, one number or row per trajectory."""
        result = {}
        for name in texts(self.attributes.get("simulation_parameters")):
            value = self.attributes.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                result[field_name(name)] = np.full(self.count, float(value))
        for name in texts(self.file.attributes("scalars").get("field_names")):
            values, attributes = self.file.numbers(f"scalars/{name}"), self.file.attributes(f"scalars/{name}")
            leading = (self.count,) * bool(attributes.get("sample_varying"))
            leading += (num_frames,) * bool(attributes.get("time_varying"))
            if values.shape[: len(leading)] != leading:
                raise ValueError(
                    f"Expected scalar {name!r} of shape {leading} in {self.where}, got {values.shape}: other numbers "
                    "of trajectories or frames than the fields have."
                )
            rest = values.size // max(1, int(np.prod(leading)))
            shape = (self.count, num_frames, rest) if attributes.get("time_varying") else (self.count, rest)
            if not attributes.get("sample_varying"):
                values = values[None]
            values = np.broadcast_to(values.reshape(-1, *shape[1:]), shape)
            self.parameter_units[field_name(name)] = _unit(attributes) or "1"
            result[field_name(name)] = values[:, 0] if values.ndim == 2 and rest == 1 else values
        bad = [name for name, values in result.items() if not np.isfinite(values).all()]
        if bad:
            raise ValueError(f"Expected finite parameters in {self.where}, got NaN or infinity in {bad[0]!r}.")
        return result


def _unit(attributes: Mapping[str, Any]) -> str | None:
    """The unit of an array, which The Well leaves out and this library's export does not."""
    return str(attributes["units"]) if "units" in attributes else None
