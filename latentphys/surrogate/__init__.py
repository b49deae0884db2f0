"""Trained models inside a solver's time loop."""

from latentphys.surrogate.stepper import Snapshot, Surrogate

__all__ = ["Snapshot", "Surrogate"]
