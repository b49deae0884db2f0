"""The latent transformer: attention, rotary positions, conditioned blocks."""

from latentphys.transformer.model import LatentTransformer, Prediction

__all__ = ["LatentTransformer", "Prediction"]
