"""Ground truth: kinds of flow, simulated on the library's own complex."""

from latentphys.families.channel import OpenChannel
from latentphys.families.family import Family
from latentphys.families.navier_stokes import NavierStokes
from latentphys.families.porous import Porous
from latentphys.families.simulate import simulate

__all__ = ["Family", "NavierStokes", "OpenChannel", "Porous", "simulate"]
