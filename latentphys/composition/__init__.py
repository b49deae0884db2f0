"""Composition of trained models along a physical direction in weight space: θ(α) = θ₀ + Δ₊ + α Δ₋."""

from latentphys.composition.checkpoints import compose
from latentphys.composition.choices import Choice, coordinate
from latentphys.composition.files import merge_files
from latentphys.composition.live import CompositeModel
from latentphys.composition.prefix import Prefix, score, search
from latentphys.composition.scale import Fit, calibrate, from_metadata

__all__ = [
    "Choice",
    "CompositeModel",
    "Fit",
    "Prefix",
    "calibrate",
    "compose",
    "coordinate",
    "from_metadata",
    "merge_files",
    "score",
    "search",
]
