"""DPOT and MoE-POT: one array `data` per file, (x y t c) for a sample or (b x y t c) for several.

Reference: Hao et al., DPOT, ICML (2024).
"""

from __future__ import annotations

from pathlib import Path

from latentphys.data.importing.blocks import gather
from latentphys.data.importing.h5 import H5File, hdf5_files
from latentphys.data.importing.hdf5 import parts_of
from latentphys.data.importing.source import ImportOptions, Source

AXES = {4: "xytc", 5: "bxytc"}


def recognises(path: Path) -> bool:
    """Whether the first HDF5 file has one array `data` of four or five axes and nothing else."""
    for first in hdf5_files(path)[:1]:
        file = H5File(first)
        return file.names() == ["data"] and file.is_array("data") and len(file.array("data").shape or ()) in AXES
    return False


def sources(path: Path, options: ImportOptions) -> list[Source]:
    """A file, or a folder with a file for each sample; `axes` says of 3D data what theirs are.

    The files know neither lengths nor times: cubic cells, the longest edge 1 m, and frames a second apart, unless the
    user says otherwise. Components are scalars ``data_0``, ``data_1`` … unless `fields` names them.

    Raises:
        ValueError: files that are damaged or of another layout.
    """
    parts = []
    for name in hdf5_files(path):
        file = H5File(name)
        if not file.is_array("data"):
            raise ValueError(f"Expected an array 'data' in {name}, got {file.names()[:8]}.")
        axes = options.axes or AXES.get(len(file.array("data").shape or ()))
        if axes is None:
            raise ValueError(
                f"Expected 'data' with four or five axes in {name}, got {file.array('data').shape}; say axes."
            )
        parts += parts_of(file, ["data"], axes, options)
    if not parts:
        raise ValueError(f"Expected files of DPOT at {path}, got no HDF5 file.")
    assumed = {
        "axes": options.axes or "(b) x y t c",
        "boundaries": "periodic" if options.boundaries is None else "as said",
    }
    return gather("dpot", options.family or "dpot", parts, about=assumed)
