"""Autoencoders whose every decode obeys its constraint: by default it is solenoidal."""

from latentphys.autoencoders.autoencoder import Autoencoder
from latentphys.autoencoders.helmholtz import (
    GeneralHead,
    Head,
    IrrotationalHead,
    PotentialHead,
    ProjectionHead,
    RieszHead,
    SolenoidalHead,
)
from latentphys.autoencoders.losses import VelocityLoss, VorticityLoss, WeightedSum
from latentphys.autoencoders.normaliser import FamilyScale
from latentphys.autoencoders.spherical import ShellHead, SphereHead

__all__ = [
    "Autoencoder",
    "FamilyScale",
    "GeneralHead",
    "Head",
    "IrrotationalHead",
    "PotentialHead",
    "ProjectionHead",
    "RieszHead",
    "ShellHead",
    "SolenoidalHead",
    "SphereHead",
    "VelocityLoss",
    "VorticityLoss",
    "WeightedSum",
]
