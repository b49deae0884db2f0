"""What a model costs, counted while it runs: parameters that are stored, active and idle; FLOPs of each part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from latentphys.autoencoders import Autoencoder
from latentphys.flops import ROUTING, count_flops
from latentphys.grid import Geometry
from latentphys.routers import LazyExperts, MoEFeedForward, Router
from latentphys.transformer import LatentTransformer
from latentphys.transformer.attention import SelfAttention
from latentphys.transformer.dynamics import Dynamics
from latentphys.transformer.fourier import FourierMixer


@dataclass(frozen=True)
class Parts:
    """One amount, parameters or FLOPs, by part of a latent transformer.

    Args:
        experts: routed experts.
        shared: shared experts.
        mixing: attention or Fourier mixers.
        routing: routers.
        rest: embedding, conditioning, head.
    """

    experts: int = 0
    shared: int = 0
    mixing: int = 0
    routing: int = 0
    rest: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @property
    def always_on(self) -> int:
        """What every token takes, wherever it is sent: all but the routed experts."""
        return self.total - self.experts


@dataclass(frozen=True)
class Cost:
    """What one step of one sample costs.

    Args:
        num_tokens: latent cells.
        stored: parameters.
        active: parameters that one token meets, on average over tokens: those that are always on and, of the routed
            experts, those that its counted FLOPs are worth at 2 per weight.
        flops: FLOPs of the step.
        every_expert: FLOPs of the step if every token went through every expert.
        routing_buffers: numbers that routers keep beside their parameters: centroids, fixed projections, biases.
    """

    num_tokens: int
    stored: Parts
    active: Parts
    flops: Parts
    every_expert: int
    routing_buffers: int


@dataclass(frozen=True)
class AutoencoderCost:
    """FLOPs of one snapshot through an autoencoder.

    Args:
        encode: the encoder.
        decode: the decoder up to its head.
        head: all else, which is the work of the heads, in the empty box, in FP32; voxels add iterations.
    """

    encode: int
    decode: int
    head: int


def count(model: Dynamics | LatentTransformer, latent_shape: tuple[int, int, int]) -> Cost:
    """Take one step of one sample, and count.

    It runs where the weights are and in their precision, in evaluation mode, on fixed random inputs; modes and random
    state stay as they were. Routers decide as always, and rows are counted where they arrive; but the products of
    experts and mixers are not worked out, so that this is quick. Under torch's `FakeTensorMode` models without memory
    of their own can be counted too.

    Args:
        latent_shape: latent cells per axis.

    Raises:
        ValueError: latent cells that the model cannot take, or experts that were left in their file.
    """
    if len(latent_shape) != 3 or min(latent_shape) < 1:
        raise ValueError(f"Expected three numbers of latent cells ≥ 1, got {tuple(latent_shape)}.")
    transformer = model.transformer if isinstance(model, Dynamics) else model
    if any(isinstance(module, LazyExperts) for module in transformer.modules()):
        raise ValueError("Expected experts in memory, got some that were left in their file; load the whole model.")
    stored = Parts(**_parameters(transformer))
    inputs = _inputs(transformer, latent_shape)
    # With gradients, as in training: without them a CPU fills up the rows of experts that run side by side.
    with _evaluation(transformer), torch.enable_grad():
        flops = Parts(
            **count_flops(
                lambda: transformer(*inputs, (True, True, True)), _parts(transformer), ("experts", "shared", "mixing")
            )
        )
    num_tokens = math.prod(latent_shape)
    return Cost(
        num_tokens=num_tokens,
        stored=stored,
        active=replace(stored, experts=round(flops.experts / (2 * num_tokens))),
        flops=flops,
        every_expert=flops.always_on + 2 * num_tokens * stored.experts,
        routing_buffers=sum(buffer.numel() for router in transformer.routers() for buffer in router.buffers()),
    )


def count_autoencoder(autoencoder: Autoencoder, family: str) -> AutoencoderCost:
    """Encode and decode one snapshot on a family's grid, and count; as quick as `count`.

    Raises:
        ValueError: a family that the autoencoder was not trained on.
    """
    geometry = Geometry(autoencoder.scale(family).grid)
    device = next(autoencoder.parameters()).device
    packed = torch.zeros(1, autoencoder.scale(family).num_components, *geometry.grid.shape, device=device)
    parts: dict[nn.Module, str] = {
        autoencoder.encoder: "encode",
        autoencoder.decoder: "decode",
    }
    with _evaluation(autoencoder):
        # Heads are worked out: what they may keep for later solves has to be true.
        flops = count_flops(lambda: autoencoder(packed, geometry, family), parts, ("encode", "decode"))
    return AutoencoderCost(encode=flops["encode"], decode=flops["decode"], head=flops["rest"])


def _parts(transformer: LatentTransformer) -> dict[nn.Module, str]:
    """Modules that stand for a part.

    All that a sparse layer does outside its router and shared experts is the work of its routed experts, so that
    nothing that a dispatch computes can hide.
    """
    parts: dict[nn.Module, str] = {}
    for module in transformer.modules():
        if isinstance(module, MoEFeedForward):
            parts[module] = "experts"
            if module.shared is not None:
                parts[module.shared] = "shared"
        elif isinstance(module, (SelfAttention, FourierMixer)):
            parts[module] = "mixing"
        elif isinstance(module, Router):
            parts[module] = ROUTING
    return parts


def _parameters(transformer: LatentTransformer) -> Counter[str]:
    """Parameters of each part."""
    parts, sizes, seen = _parts(transformer), Counter[str](), set[nn.Parameter]()

    def visit(module: nn.Module, part: str) -> None:
        part = parts.get(module, part)
        new = set(module.parameters(recurse=False)) - seen
        seen.update(new)
        sizes[part] += sum(parameter.numel() for parameter in new)
        for child in module.children():
            visit(child, part)

    visit(transformer, "rest")
    return sizes


def _inputs(transformer: LatentTransformer, shape: tuple[int, int, int]) -> list[Tensor]:
    """Latents, condition and geometry of one sample."""
    weight, generator = transformer.head.weight, torch.Generator().manual_seed(0)
    shapes: Sequence[tuple[int, ...]] = (
        (1, transformer.num_frames, transformer.latent_channels, *shape),
        (1, transformer.condition_channels),
        (1, transformer.geometry_channels, *shape),
    )
    return [torch.randn(size, generator=generator).to(weight) for size in shapes]


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and any attention kernel: they differ in speed, not in products."""
    modes = {module: module.training for module in model.modules()}
    kernels = {layer: layer.backend for layer in model.modules() if isinstance(layer, SelfAttention)}
    model.eval()
    for layer in kernels:
        layer.backend = "auto"
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, kernel in kernels.items():
            layer.backend = kernel
