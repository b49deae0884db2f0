"""Memory for time: activations worked out again for the gradient instead of kept."""

from __future__ import annotations

from torch import nn

from latentphys.autoencoders.layers import Level
from latentphys.transformer.block import TransformerBlock


def set_recompute(model: nn.Module, on: bool) -> None:
    """Whether a model in training works out the activations inside its blocks a second time, for the gradient.

    Of each transformer block the tokens before, between and after its two parts are kept, and what the router said; of
    each residual block of an autoencoder its input. Losses and gradients stay as they are, to the bit where kernels
    give the same bits twice. The setting is no part of the model: checkpoints do not know it. It may be made before or
    after the model is sharded, wrapped or compiled.

    Args:
        model: an autoencoder, a dynamics model, or a task that trains one.

    Raises:
        ValueError: a model without such blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, (TransformerBlock, Level))]
    if not blocks:
        raise ValueError(
            f"Expected a model with transformer blocks or levels of residual blocks, got {type(model).__name__}."
        )
    for block in blocks:
        block.recompute = on
