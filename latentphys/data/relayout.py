"""The same flows in another layout: stores of face fluxes from stores of cell-centred velocities, and back.

face_flux       volume fluxes through the low faces [m³/s], what models, solvers and validators of this library take
cell_centred    velocities at cell centres [m/s], as finite-volume codes store them; second order either way
cell_spectral   velocities at cell centres [m/s], as values of a trigonometric polynomial; exact either way, in
                periodic boxes without solids
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentphys import conversions, operators
from latentphys.data.creation import create_store
from latentphys.data.store import ATTRIBUTES, Store
from latentphys.exact import conserve
from latentphys.fields import FieldSpec
from latentphys.grid import Geometry

LAYOUTS = ("face_flux", "cell_centred", "cell_spectral")
FLUX_UNIT = {"m/s": "m3/s", "T": "Wb"}
"""Unit of a vector → that of its flux through a face, for the vectors that are solenoidal."""
COMPUTED = {*ATTRIBUTES, "schema", "layout", "channels", "provenance"}
"""Attributes that a new store works out for itself; all others are copied."""


@torch.no_grad()
def relayout(
    store: Store,
    out: str | os.PathLike[str],
    layout: str,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda num_frames: None,
) -> Path:
    """Write a store's flows in another layout, snapshot by snapshot; everything else is copied.

    Solenoidal fluxes become vector fields (m3/s m/s, Wb T), and these vector fields become solenoidal fluxes, by the
    functions of `latentphys.conversions`, in FP64. Fluxes are projected (spectral velocities first in spectral space,
    which drops the part of them that is not solenoidal) and end at net 0.0 bit for bit when stored as float64. Memory
    holds one shard of snapshots, and the voxels of all trajectories.

    Args:
        store: where from.
        out: the new store; it has its name when it is complete, and not before.
        layout: ``face_flux | cell_centred | cell_spectral``; one of the two is face_flux.
        dtype: ``float64`` or ``float32``. Default: that of the store.
        device: where to compute. Default: CPU.
        overwrite: replace the store that is at `out`. Default: refuse.
        progress: called with the number of snapshots written since the last call.

    Returns:
        The path of the new store. Its provenance names the source and holds the provenance of that.

    Raises:
        ValueError: layouts that no conversion connects, fields that have none, solids or walls with ``cell_spectral``,
            or an existing path without `overwrite`.
    """
    out, before = Path(out), store.attributes.get("layout", "face_flux")
    if out.resolve() == store.path.resolve():
        raise ValueError(f"Expected another path than the store's own, got {out}.")
    if store.attributes.get("channels") is not None or {before, layout} - set(LAYOUTS):
        raise ValueError(f"Expected layouts of {' | '.join(LAYOUTS)}, got {before!r} in {store.path} and {layout!r}.")
    if (before == "face_flux") == (layout == "face_flux"):
        raise ValueError(f"Expected face_flux on one side, got {before!r} to {layout!r}; go by way of face_flux.")
    solid = store.array("solid")[...] if "solid" in store.attributes["checksums"] else None
    if "cell_spectral" in (before, layout) and (solid is not None or not all(store.grid.periodic)):
        raise ValueError(
            f"Expected a periodic box without solids for cell_spectral, got {store.path}; use cell_centred."
        )
    specs = {name: converted_spec(spec, to_faces=layout == "face_flux") for name, spec in store.specs.items()}
    converted = [name for name, spec in specs.items() if spec != store.specs[name]]
    if not converted:
        raise ValueError(f"Expected a velocity in {store.path}, got only {[str(s) for s in store.specs.values()]}.")
    dtype = dtype or str(store.array(converted[0]).dtype)
    source = {"path": str(store.path.resolve()), "layout": before, "provenance": store.attributes.get("provenance")}
    writer = create_store(
        out,
        grid=store.grid,
        specs=specs,
        family=store.family,
        num_trajectories=len(store),
        times=store.times,
        parameters=store.parameters,
        parameter_units=store.attributes["parameter_units"],
        solid=None if solid is None else torch.from_numpy(solid),
        dtype=dtype,
        layout=layout,
        provenance={"exact": layout == "face_flux" and dtype == "float64", "converted": source},
        attributes={name: value for name, value in store.attributes.items() if name not in COMPUTED},
        extras=_extras(store),
        overwrite=overwrite,
    )
    to_layout = partial(convert, before=before, after=layout)
    with writer:
        for trajectory in range(len(store)):
            geometry = store.geometry(trajectory).to(device)
            for time in range(store.num_times):
                for name in store.attributes["snapshots"]:
                    values = store.read(name, trajectory, time)
                    if name in converted:
                        values = to_layout(values.to(device, torch.float64), geometry)
                    writer.write(name, trajectory, time, values)
                progress(1)
    return out


def convert(values: Tensor, geometry: Geometry, before: str, after: str) -> Tensor:
    """One snapshot of a velocity from one layout to another, in FP64."""
    grid = geometry.grid
    if after == "cell_centred":
        return operators.cell_velocity(values, grid)
    if after == "cell_spectral":
        return conversions.spectral_velocity(values, grid)
    if before == "cell_centred":
        return conversions.flux_from_cells(values, geometry, exact=True)
    return conserve(
        flux=conversions.spectral_flux(conversions.spectral_solenoidal(values, grid), grid), geometry=geometry
    )


def converted_spec(spec: FieldSpec, to_faces: bool) -> FieldSpec:
    """What a field becomes: velocities and magnetic fields change, everything else stays what it is."""
    if to_faces:
        is_vector = spec.kind == "vector" and spec.unit in FLUX_UNIT
        return FieldSpec(spec.name, "flux", FLUX_UNIT[spec.unit], "solenoidal") if is_vector else spec
    if spec.kind != "flux":
        return spec
    density = {flux: unit for unit, flux in FLUX_UNIT.items()}.get(spec.unit)
    if density is None or spec.constraint != "solenoidal":
        raise ValueError(
            f"Expected solenoidal fluxes in {' | '.join(FLUX_UNIT.values())}, got {spec.name!r}, {spec.constraint} in "
            f"{spec.unit}."
        )
    return FieldSpec(spec.name, "vector", density)


def _extras(store: Store) -> Mapping[str, tuple[tuple[int, ...], str, tuple[str, ...]]]:
    """Arrays per snapshot that are no fields, such as the routing of a rollout."""
    extras = {}
    for name in set(store.attributes["snapshots"]) - set(store.specs):
        array = store.array(name)
        metadata: Any = array.metadata
        extras[name] = (array.shape, str(array.dtype), tuple(metadata.dimension_names))
    return extras
