"""The verbs that exchange data with others: ``import`` and ``export-data``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

Add = Callable[..., argparse.ArgumentParser]

IMPORT_EXAMPLES = """examples:
  latentphys import datasets/MHD_64 mhd.zarr --flux magnetic_field
  latentphys import cavity/ cavity.zarr                                # an OpenFOAM case; phi is the flux
  latentphys import sample.raw sample.zarr --shape 400 400 400 --dtype uint8 --pore 0 --lengths 2e-3 2e-3 2e-3
  latentphys import run.h5 run.zarr --dataset u --axes "b t x y z c" --fields velocity velocity velocity"""

EXPORT_EXAMPLES = """examples:
  latentphys export-data porous.zarr wells/porous --to well
  latentphys export-data porous.zarr vtk/ --to vtkhdf --trajectory 3"""


def import_(arguments: argparse.Namespace) -> int:
    from latentphys.data import open_store
    from latentphys.data.importing import ImportOptions, import_files, report
    from latentphys.progress import progress_bar

    options = ImportOptions(
        family=arguments.family,
        lengths=arguments.lengths,
        boundaries=arguments.boundaries,
        axes=arguments.axes,
        shape=arguments.shape,
        dtype=arguments.dtype,
        pore=arguments.pore,
        dataset=arguments.dataset,
        time_step=arguments.time_step,
        units=dict(arguments.units or {}),
        fields=arguments.fields,
    )
    with progress_bar() as bar:
        line = bar.add_task(f"import {Path(arguments.source).name}", total=None)
        stores = import_files(
            arguments.source,
            arguments.out,
            format=arguments.format,
            options=options,
            flux=arguments.flux or (),
            spectral=arguments.spectral,
            dtype=arguments.store_dtype,
            overwrite=arguments.overwrite,
            progress=lambda done, total: bar.update(line, completed=done, total=total),
        )
    for path in stores:
        print(path)
        for text in report(open_store(path).attributes.get("floor", {})):
            print(f"  {text}")
    return 0


def export_data(arguments: argparse.Namespace) -> int:
    from latentphys.data import open_store
    from latentphys.data.exporting import export_vtkhdf, export_well
    from latentphys.progress import progress_bar

    store = open_store(arguments.store)
    out = Path(arguments.out).resolve()
    if store.path.resolve() in (out, *out.parents):
        raise ValueError(f"Expected a path outside the store {store.path}, got {arguments.out}; choose another.")
    if arguments.to == "well" and arguments.trajectory is not None:
        raise ValueError("Expected all trajectories for a data set of The Well, got --trajectory; leave it out.")
    number = len(store) if arguments.trajectory is None else 1
    with progress_bar() as bar:
        line = bar.add_task(f"export {store.family}", total=number * store.num_times)
        common: dict[str, Any] = {"overwrite": arguments.overwrite, "progress": lambda n: bar.advance(line, n)}
        if arguments.to == "well":
            written = [export_well(store, arguments.out, **common)]
        else:
            written = export_vtkhdf(store, arguments.out, arguments.trajectory, **common)
    for path in written:
        print(path)
    return 0


def add_verbs(verb: Add) -> None:
    """Add both verbs to the command line."""
    sub = verb(
        import_, "make a store of other people's files; what they are is found out from their content", IMPORT_EXAMPLES
    )
    sub.add_argument("source", metavar="SRC", help="a file, or a folder of them")
    sub.add_argument("out", metavar="OUT", help="the store to make; OUT-2, OUT-3 … where the files have several grids")
    sub.add_argument(
        "--format",
        choices=("well", "pdebench", "dpot", "vtk", "openfoam", "voxels", "netcdf", "hdf5"),
        help="(default: found out)",
    )
    sub.add_argument("--flux", nargs="+", metavar="NAME", help="turn these velocities into exactly solenoidal fluxes")
    sub.add_argument("--spectral", action="store_true", help="do so as trigonometric polynomials (periodic boxes)")
    sub.add_argument("--store-dtype", choices=("float32", "float64"), help="type of the store (default: of the files)")
    sub.add_argument("--overwrite", action="store_true", help="replace OUT")
    said = sub.add_argument_group("what the files do not say")
    said.add_argument("--family", help="name of the kind of flow")
    said.add_argument("--lengths", nargs="+", type=float, metavar="L", help="edge lengths of the box [m]")
    said.add_argument(
        "--boundaries", type=_boundaries, metavar="X,Y,Z", help="such as periodic,periodic,no_slip:free_slip"
    )
    said.add_argument("--axes", help="meaning of an array's axes, such as 'b t x y z c'")
    said.add_argument("--dataset", metavar="NAME", help="which array to read")
    said.add_argument("--fields", nargs="+", metavar="NAME", help="name of each component; one name thrice is a vector")
    said.add_argument("--units", nargs="+", type=_unit, metavar="NAME=UNIT", help="units of fields")
    said.add_argument("--time-step", type=float, metavar="DT", help="time between frames [s]")
    said.add_argument("--shape", nargs="+", type=int, metavar="N", help="of a raw image, slowest axis first")
    said.add_argument("--dtype", help="of a raw image, such as uint8 or >u2")
    said.add_argument("--pore", type=float, metavar="VALUE", help="which value of an image is pore space")

    sub = verb(export_data, "write a store in the layout of others", EXPORT_EXAMPLES)
    sub.add_argument("store", metavar="STORE", help="a store of fields or a rollout")
    sub.add_argument("out", metavar="OUT", help="the folder to make (or one .vtkhdf file for one trajectory)")
    sub.add_argument("--to", choices=("well", "vtkhdf"), required=True, help="which layout")
    sub.add_argument("--trajectory", type=int, help="which one (default: all)")
    sub.add_argument("--overwrite", action="store_true", help="replace OUT")


def _boundaries(text: str) -> Any:
    """Three sides or pairs of them, such as ``periodic,periodic,no_slip:free_slip``."""
    from latentphys.grid import BOUNDARIES

    pairs = [side.split(":") for side in text.split(",")]
    if len(pairs) != 3 or any(len(pair) > 2 or set(pair) - set(BOUNDARIES) for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"Expected the sides of three axes out of {' | '.join(BOUNDARIES)}, such as "
            f"periodic,periodic,no_slip:free_slip, got {text!r}."
        )
    return tuple((pair[0], pair[-1]) for pair in pairs)


def _unit(text: str) -> tuple[str, str]:
    name, sign, unit = text.partition("=")
    if not (name and sign and unit):
        raise argparse.ArgumentTypeError(f"Expected NAME=UNIT, such as pressure=Pa, got {text!r}.")
    return name, unit
