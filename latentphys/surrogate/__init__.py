"""Trained models inside a solver's time loop."""

from latentphys.surrogate.alarm import Alarm
from latentphys.surrogate.contract import Contract, Quantity
from latentphys.surrogate.exchange import stack
from latentphys.surrogate.flight import Flight
from latentphys.surrogate.models import Models
from latentphys.surrogate.native import include_dir
from latentphys.surrogate.reading import AlarmError, AlarmWarning, Intervention, Reading
from latentphys.surrogate.stepper import Surrogate
from latentphys.surrogate.window import Window

__all__ = [
    "Alarm",
    "AlarmError",
    "AlarmWarning",
    "Contract",
    "Flight",
    "Intervention",
    "Models",
    "Quantity",
    "Reading",
    "Surrogate",
    "Window",
    "include_dir",
    "stack",
]
