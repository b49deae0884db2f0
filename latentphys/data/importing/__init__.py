"""Stores from files that other codes wrote: data sets for learning, solvers' output, images of porous media."""

from latentphys.data.importing.detect import FORMATS, detect
from latentphys.data.importing.floor import report, solenoidal_floor
from latentphys.data.importing.source import ImportOptions, Reader, Source
from latentphys.data.importing.write import import_files

__all__ = [
    "FORMATS",
    "ImportOptions",
    "Reader",
    "Source",
    "detect",
    "import_files",
    "report",
    "solenoidal_floor",
]
