"""Trained models as artefacts for other run times: AOTInductor packages, ONNX, TorchScript."""

from latentphys.surrogate.export.artefact import Artefact, open_artefact
from latentphys.surrogate.export.writing import export

__all__ = ["Artefact", "export", "open_artefact"]
