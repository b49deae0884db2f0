"""Stores from the files of others."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentphys.data.creation import create_store
from latentphys.data.importing.detect import detect, reader
from latentphys.data.importing.floor import measured, solenoidal_floor
from latentphys.data.importing.source import ImportOptions, Source
from latentphys.data.relayout import FLUX_UNIT, convert, converted_spec
from latentphys.data.writer import StoreWriter
from latentphys.exact import conserve
from latentphys.fields import FieldSpec
from latentphys.grid import Geometry

SAID_OF: dict[str, frozenset[str]] = {
    "well": frozenset({"lengths", "units"}),
    "pdebench": frozenset({"lengths", "units", "fields"}),
    "dpot": frozenset({"lengths", "units", "fields", "axes", "time_step"}),
    "hdf5": frozenset({"lengths", "units", "fields", "axes", "time_step", "dataset"}),
    "netcdf": frozenset({"lengths", "units", "axes", "time_step", "dataset"}),
    "vtk": frozenset({"lengths", "units", "time_step", "dataset"}),
    "openfoam": frozenset({"units", "dataset"}),
    "voxels": frozenset({"lengths", "axes", "shape", "dtype", "pore"}),
}
"""What a user can say of the files of each format, beside the family and the boundaries."""


def import_files(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    options: ImportOptions | None = None,
    flux: Sequence[str] = (),
    spectral: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write a store for each grid and set of times in the files of others.

    Snapshots go one by one from the files to the store. Vectors stay vectors at cell centres, unless they are named in
    `flux`. How far every vector is from solenoidal is measured first and stored in the attribute `floor`.

    Args:
        path: a file or a folder.
        out: the store; further ones, where the files have several grids or sets of times, are named after it, as in
            ``out.zarr, out-2.zarr``. Either all of them have their names at the end, or nothing has changed.
        format: one of `detect.FORMATS`. Default: found out from the content.
        options: what the files do not say.
        flux: names of vectors in m/s or T that become solenoidal fluxes (m³/s, Wb), the nearest ones to them.
        spectral: convert those exactly, as trigonometric polynomials, where the box is periodic; what is not
            solenoidal is taken off in spectral space. Default: interpolate to faces and project.
        dtype: ``float32`` or ``float64``. Default: float64 for stores with fluxes, and else what the files have.
            Fluxes stored as float64 have net flux 0.0 in every cell, bit for bit.
        overwrite: replace stores that are there. Default: refuse.
        progress: called with the number of snapshots done (measured or written) and that of all.

    Returns:
        The stores, in the order of the files.

    Raises:
        ValueError: files of no known format, damaged, contradictory or with numbers that are not finite; options that
            files of their format do not take, units of no field, or `spectral` without `flux`; fields in `flux` that
            are no velocity or magnetic field; or stores that exist.
    """
    path, out, options = Path(path), Path(out), options or ImportOptions()
    if not path.exists():
        raise ValueError(f"Expected files to import at {path}, got nothing there; check the path.")
    if spectral and not flux:
        raise ValueError("Expected the names of fields that shall become fluxes (flux) beside `spectral`, got none.")
    is_raw = options.shape is not None and options.dtype is not None
    format = format or ("voxels" if is_raw else detect(path))
    _check_options(format, options)
    sources = reader(format).sources(path, options)
    if not sources:
        raise ValueError(f"Expected data to import at {path}, got none.")
    _check_units(sources, options)
    plans = [_Plan(source, path, flux, spectral, dtype) for source in sources]
    missing = sorted(set(flux) - {name for plan in plans for name in plan.converted})
    if missing:
        specs = [spec for source in sources for spec in source.specs.values()]
        vectors = sorted({spec.name for spec in specs if spec.kind == "vector" and spec.unit in FLUX_UNIT})
        raise ValueError(
            f"Expected vectors in {' or '.join(FLUX_UNIT)} to make fluxes of ({', '.join(vectors) or 'none'}), got "
            f"{missing[0]!r}; say their units if the files do not."
        )
    targets = [out if i == 0 else out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(len(plans))]
    for plan, target in zip(plans, targets, strict=True):
        plan.writer(target, {}, overwrite)  # says at once what no store can be made of, and where one is already
    total, done = sum(plan.num_measured + plan.num_snapshots for plan in plans), 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        progress(done, total)

    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.import-", dir=out.parent))
    try:
        for plan, target in zip(plans, targets, strict=True):
            plan.write(scratch / target.name, advance)
        _rename([scratch / target.name for target in targets], targets, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return targets


def _check_options(format: str, options: ImportOptions) -> None:
    """Refuse what would be passed over in silence, and a family that no file can be named after."""
    given = [one.name for one in fields(options) if getattr(options, one.name) not in (None, {})]
    unused = set(given) - SAID_OF.get(format, frozenset(given)) - {"family", "boundaries"}
    if unused:
        raise ValueError(
            f"Expected of files of the format {format!r} nothing but {', '.join(sorted(SAID_OF[format]))}, family and "
            f"boundaries to be said, got {', '.join(sorted(unused))}; leave it out."
        )
    family = options.family
    if family is not None and (not family or Path(family).name != family or family.startswith(".")):
        raise ValueError(f"Expected a family that files can be named after, got {family!r}.")


def _check_units(sources: Sequence[Source], options: ImportOptions) -> None:
    known: set[str] = set()
    for source in sources:
        known |= set(source.specs)
        for old in source.about.get("names", {}).values():
            known |= {old} if isinstance(old, str) else set(filter(None, old))
    unknown = sorted(set(options.units) - known)
    if unknown:
        raise ValueError(f"Expected units of the fields {', '.join(sorted(known))}, got one of {unknown[0]!r}.")


def _rename(made: Sequence[Path], targets: Sequence[Path], scratch: Path) -> None:
    """Give all stores their names, or none."""
    old: list[tuple[Path, Path]] = []
    new: list[Path] = []
    try:
        for store, target in zip(made, targets, strict=True):
            if target.exists():
                aside = scratch / f"{target.name}.replaced"
                target.rename(aside)
                old.append((aside, target))
            store.rename(target)
            new.append(target)
    except BaseException:
        for target in new:
            shutil.rmtree(target, ignore_errors=True)
        for aside, target in old:
            aside.rename(target)
        raise


class _Plan:
    """One source and the store it becomes."""

    def __init__(self, source: Source, path: Path, flux: Sequence[str], spectral: bool, dtype: str | None) -> None:
        self.source, self.path = source, path
        self.specs = {n: converted_spec(s, to_faces=True) if n in flux else s for n, s in source.specs.items()}
        self.converted = [name for name, spec in self.specs.items() if spec != source.specs[name]]
        self.before = "cell_spectral" if spectral else "cell_centred"
        if spectral and self.converted and (source.solid is not None or not all(source.grid.periodic)):
            raise ValueError(
                f"Expected a periodic box without solids for a spectral conversion, got {source.grid.boundaries}; "
                "leave `spectral` out."
            )
        has_fluxes = any(spec.kind == "flux" for spec in self.specs.values())
        self.dtype = dtype or ("float64" if has_fluxes else self._dtype_of_files())
        self.layout = "face_flux" if self.converted else source.layout
        self.num_snapshots = source.num_trajectories * len(source.times)
        self.num_measured = len(measured(source))

    def _dtype_of_files(self) -> str:
        types = [np.asarray(self.source.read(name, 0, 0)).dtype for name in self.source.specs]
        return "float64" if np.result_type(np.float32, *types) == np.float64 else "float32"

    def _solenoidal(self, spec: FieldSpec) -> bool:
        return (spec.kind, spec.constraint) == ("flux", "solenoidal")

    def writer(self, path: Path, floor: dict[str, Any], overwrite: bool) -> StoreWriter:
        source = self.source
        is_exact = self.dtype == "float64" and any(self._solenoidal(spec) for spec in self.specs.values())
        imported = {"format": source.format, "path": str(self.path.resolve()), **source.about}
        return create_store(
            path,
            grid=source.grid,
            specs=self.specs,
            family=source.family,
            num_trajectories=source.num_trajectories,
            times=source.times,
            parameters=source.parameters,
            parameter_units=source.parameter_units,
            solid=None if source.solid is None else torch.from_numpy(np.array(source.solid)),
            dtype=self.dtype,
            layout=self.layout,
            provenance={"exact": is_exact, "imported": imported},
            attributes={"floor": floor},
            overwrite=overwrite,
        )

    def write(self, path: Path, advance: Callable[[int], None]) -> None:
        source = self.source
        floor = solenoidal_floor(source, progress=advance)
        with self.writer(path, floor, overwrite=False) as out:
            for trajectory in range(source.num_trajectories):
                geometry = source.geometry(trajectory)
                for frame in range(len(source.times)):
                    for name in self.specs:
                        out.write(name, trajectory, frame, self._snapshot(name, trajectory, frame, geometry))
                    advance(1)

    def _snapshot(self, name: str, trajectory: int, frame: int, geometry: Geometry) -> Any:
        values = self.source.snapshot(name, trajectory, frame)
        if name in self.converted:
            return convert(torch.from_numpy(values.astype(np.float64)), geometry, self.before, "face_flux")
        if self.dtype == "float64" and self._solenoidal(self.specs[name]):
            return conserve(flux=torch.from_numpy(values.astype(np.float64)), geometry=geometry)
        return values
