"""Conservative latents and sparse mixture-of-experts transformers for 3D physics."""

from importlib import import_module
from typing import Any

from latentphys import exact, hodge, operators, projection
from latentphys.fields import FieldSpec, State
from latentphys.grid import Geometry, Grid

_LAZY = {
    "Autoencoder": "latentphys.autoencoders",
    "Dynamics": "latentphys.transformer.dynamics",
    "Surrogate": "latentphys.surrogate",
    "open_store": "latentphys.data",
    "validate": "latentphys.validators",
}
__all__ = ["FieldSpec", "Geometry", "Grid", "State", "exact", "hodge", "operators", "projection", *_LAZY]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import the heavier parts when they are asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'latentphys' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
