"""ONNX graphs, one file for each function, for ONNX Runtime and others."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OPSET = 20
OUTPUT = {"encode": "latent", "step": "next", "decode": "fields"}
_LARGEST = 2**30
"""Bytes of weights from which they stand in a file beside the graph, which cannot hold 2 GiB."""


def write(
    modules: Mapping[str, nn.Module],
    examples: Mapping[str, tuple[Tensor, ...]],
    folder: Path,
    progress: Callable[[str], None],
) -> None:
    """Write ``encode.onnx``, ``step.onnx`` and ``decode.onnx`` with the inputs' names of the functions.

    Raises:
        ValueError: the packages that write ONNX are missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("Expected onnx and onnxscript to write ONNX, got none; install latentphys[export].") from error
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)  # they tell of packages that are not used, and of what is not folded
    try:
        for name, module in modules.items():
            progress(f"convert {name}")
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                exported = torch.export.export(module, examples[name], strict=False)
                program: Any = torch.onnx.export(
                    exported, dynamo=True, opset_version=OPSET, output_names=[OUTPUT[name]], verbose=False
                )
            for node in program.model.graph:
                node.metadata_props.clear()  # where in the source it came from
            weights = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
            program.save(folder / f"{name}.onnx", external_data=weights > _LARGEST)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load(folder: Path, names: tuple[str, ...], device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """The functions in ONNX Runtime, with as many threads as torch has.

    Raises:
        ValueError: no ONNX Runtime, or none for the device.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("Expected onnxruntime to run ONNX, got none; install latentphys[export].") from error
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(f"Expected an onnxruntime with {provider}, got {onnxruntime.get_available_providers()}.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = {
        name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=[provider])
        for name in names
    }
    return {name: _function(session, device) for name, session in sessions.items()}


def _function(session: Any, device: torch.device) -> Callable[..., Tensor]:
    inputs = [entry.name for entry in session.get_inputs()]

    def run(*tensors: Tensor) -> Tensor:
        feeds = {name: x.detach().cpu().numpy() for name, x in zip(inputs, tensors, strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0]).to(device)

    return run
