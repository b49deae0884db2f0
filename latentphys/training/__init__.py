"""One trainer for every model, and what it trains."""

from latentphys.training.checkpoint import open_checkpoint
from latentphys.training.encode import encode_store
from latentphys.training.models import load_autoencoder, load_dynamics
from latentphys.training.runs import train_autoencoder, train_dynamics
from latentphys.training.trainer import Trainer

__all__ = [
    "Trainer",
    "encode_store",
    "load_autoencoder",
    "load_dynamics",
    "open_checkpoint",
    "train_autoencoder",
    "train_dynamics",
]
