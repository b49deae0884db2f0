"""Ground truth: kinds of physics, simulated on the library's own complex."""

from latentphys.families.acoustics import Acoustics, AcousticScattering
from latentphys.families.convection import Convection
from latentphys.families.family import DrivenFlow, Family
from latentphys.families.mhd import MHD, Magnetohydrodynamics
from latentphys.families.navier_stokes import NavierStokes
from latentphys.families.open_channel import OpenChannel
from latentphys.families.passive_scalar import PassiveScalar
from latentphys.families.porous import Porous
from latentphys.families.reaction_diffusion import GrayScottPatterns, ReactionDiffusion
from latentphys.families.shallow_water import ShallowWater, ShallowWaterSphere
from latentphys.families.simulate import simulate
from latentphys.families.solver import Fields, RungeKutta, Solver
from latentphys.families.turbulence import Turbulence

__all__ = [
    "MHD",
    "AcousticScattering",
    "Acoustics",
    "Convection",
    "DrivenFlow",
    "Family",
    "Fields",
    "GrayScottPatterns",
    "Magnetohydrodynamics",
    "NavierStokes",
    "OpenChannel",
    "PassiveScalar",
    "Porous",
    "ReactionDiffusion",
    "RungeKutta",
    "ShallowWater",
    "ShallowWaterSphere",
    "Solver",
    "Turbulence",
    "simulate",
]
