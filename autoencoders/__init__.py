"""Autoencoders of which every decode obeys the constraints of its fields."""

from latentphys.autoencoders.autoencoder import Autoencoder
from latentphys.autoencoders.bottleneck import Bottleneck, Reconstruction
from latentphys.autoencoders.conservative import ConservativeAutoencoder
from latentphys.autoencoders.head import Head
from latentphys.autoencoders.heads import Heads
from latentphys.autoencoders.helmholtz import (
    GeneralHead,
    IrrotationalHead,
    PotentialHead,
    ProjectionHead,
    RieszHead,
    SolenoidalHead,
)
from latentphys.autoencoders.linear_code import fit_linear_code
from latentphys.autoencoders.losses import CellVelocityLoss, FieldLoss, GradientLoss, LatentKL, WeightedSum
from latentphys.autoencoders.normaliser import FamilyScale, FieldScale
from latentphys.autoencoders.scalar_heads import ConservedHead, PlainHead, PositiveHead
from latentphys.autoencoders.spectral_loss import SpectrumLoss
from latentphys.autoencoders.spherical import ShellHead, SphereHead
from latentphys.autoencoders.wall_loss import WallShearLoss

__all__ = [
    "Autoencoder",
    "Bottleneck",
    "CellVelocityLoss",
    "ConservativeAutoencoder",
    "ConservedHead",
    "FamilyScale",
    "FieldLoss",
    "FieldScale",
    "GeneralHead",
    "GradientLoss",
    "Head",
    "Heads",
    "IrrotationalHead",
    "LatentKL",
    "PlainHead",
    "PositiveHead",
    "PotentialHead",
    "ProjectionHead",
    "Reconstruction",
    "RieszHead",
    "ShellHead",
    "SolenoidalHead",
    "SpectrumLoss",
    "SphereHead",
    "WallShearLoss",
    "WeightedSum",
    "fit_linear_code",
]
