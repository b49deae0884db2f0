"""Autoencoders whose every decode is solenoidal."""

from latentphys.autoencoders.autoencoder import Autoencoder
from latentphys.autoencoders.helmholtz import Head, PotentialHead, ProjectionHead
from latentphys.autoencoders.losses import VelocityLoss, VorticityLoss, WeightedSum
from latentphys.autoencoders.normaliser import FamilyScale

__all__ = [
    "Autoencoder",
    "FamilyScale",
    "Head",
    "PotentialHead",
    "ProjectionHead",
    "VelocityLoss",
    "VorticityLoss",
    "WeightedSum",
]
