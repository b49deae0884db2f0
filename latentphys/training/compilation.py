"""Compiling a model for training: its repeated blocks, each once, in place."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from torch import nn

from latentphys.autoencoders.layers import ResidualBlock
from latentphys.transformer.block import TransformerBlock

_COMPILERS = ("g++", "clang++")


def compile_model(model: nn.Module) -> None:
    """Have every transformer block and residual block compiled when it is first called.

    Blocks of the same sizes share their graphs, so that the time to compile does not grow with the depth. Another
    latent shape or batch size is compiled anew once, and then for all sizes. Names of weights stay as they are, and so
    do checkpoints. Experts that are spread over ranks, and grouped products in FP32, run as they do without, between
    two graphs.

    Args:
        model: an autoencoder, a dynamics model, or a task that trains one; on the device to train on.

    Raises:
        ValueError: a model without such blocks, or a machine without a C++ compiler or Python's headers.
    """
    blocks = [module for module in model.modules() if isinstance(module, (TransformerBlock, ResidualBlock))]
    if not blocks:
        raise ValueError(f"Expected a model with blocks to compile, got {type(model).__name__}, which has none.")
    _check_compiler()
    for block in blocks:
        block.compile()


def _check_compiler() -> None:
    """Refuse now what would fail in the first step."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else _COMPILERS
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            f"Expected a C++ compiler to compile the model with, got no {' or '.join(names)} on the path; "
            "install g++, or train without compiling."
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise ValueError(
            f"Expected Python's headers to compile the model with, got no Python.h in {headers}; "
            "install them (python3-dev on Debian), or train without compiling."
        )
