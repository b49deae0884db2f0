"""What a store really holds: conservation, errors and statistics, measured in FP64, and the report of it."""

from latentphys.validators.check import Check, exit_status
from latentphys.validators.latents import measure_latents
from latentphys.validators.pointwise import vrmse, vrmse_well
from latentphys.validators.report import write_report
from latentphys.validators.routing import ModelRouting, measure_routing
from latentphys.validators.series import Curve, Series
from latentphys.validators.statistics import energy_spectra
from latentphys.validators.validation import Validation, validate

__all__ = [
    "Check",
    "Curve",
    "ModelRouting",
    "Series",
    "Validation",
    "energy_spectra",
    "exit_status",
    "measure_latents",
    "measure_routing",
    "validate",
    "vrmse",
    "vrmse_well",
    "write_report",
]
