"""Stores written in the layouts of others."""

from latentphys.data.exporting.vtk import export_vtkhdf
from latentphys.data.exporting.well import export_well

__all__ = ["export_vtkhdf", "export_well"]
