"""Stores of fields and latents on disk, their statistics, and the windows that training reads from them."""

from latentphys.data.batches import Batches
from latentphys.data.creation import create_store
from latentphys.data.part import Part
from latentphys.data.reduction import compute_statistics
from latentphys.data.statistics import RunningStatistics, homogeneous_axes
from latentphys.data.store import SCHEMA, Store, open_store
from latentphys.data.windows import Batch, Windows, split
from latentphys.data.writer import StoreWriter

__all__ = [
    "SCHEMA",
    "Batch",
    "Part",
    "Batches",
    "RunningStatistics",
    "Store",
    "StoreWriter",
    "Windows",
    "compute_statistics",
    "create_store",
    "homogeneous_axes",
    "open_store",
    "split",
]
