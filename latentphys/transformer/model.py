"""The latent transformer: from K latent frames to the increment of the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from latentphys.routers import Layout, Router, Routing, TreeRouter
from latentphys.routers.routing import RouterFactory, build_router
from latentphys.transformer.block import Modulation, TransformerBlock, normalise
from latentphys.transformer.rotary import rotary


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one step of the transformer says.

    Args:
        increment: next latent minus last latent, ``(b, c, x, y, z)``.
        routings: what each router said, first block to last, tokens sample after sample in C order; one for all blocks
            where whole functions are routed.
    """

    increment: Float[Tensor, "b c x y z"]
    routings: list[Routing]


class LatentTransformer(nn.Module):
    """Full spatial attention and sparse mixtures of experts over latents of any shape, one token per latent cell.

    The last layer is zero at the start: an untrained model is persistence, exactly.

    Args:
        latent_channels: channels c of a latent.
        num_frames: latent frames K that the model sees, the last one newest.
        condition_channels: numbers per sample that condition every block, such as Δt and physical parameters, scaled to
            order 1; ≥ 1.
        geometry_channels: geometry fields per latent cell, such as porosity and wall distance; may be 0.
        dim: model width, a multiple of 8 and of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads, or diagonal blocks of the Fourier mixer.
        hidden: hidden width of each expert, a multiple of 8.
        router: makes a router from the width of what it looks at, ``functools.partial(SemanticTop1, num_experts=4)``.
        routing: ``block``, where every block has a router for its own tokens; or ``function``, where one router looks
            at the features of each whole input function (`function_features`) and decides for all blocks.
        num_shared: experts that take every token.
        mixer: ``attention | fourier``.
        activation: of the experts, ``swiglu | gelu``.
        attention: ``auto | math | flash | cudnn | flash_attn``.
        dispatch: ``auto | grouped | loop | dense_static``.

    Raises:
        ValueError: sizes that do not fit together, unknown or missing backends, or inputs of other shapes.
    """

    def __init__(
        self,
        latent_channels: int,
        num_frames: int,
        condition_channels: int,
        geometry_channels: int,
        dim: int,
        depth: int,
        num_heads: int,
        hidden: int,
        router: RouterFactory,
        routing: str = "block",
        num_shared: int = 1,
        mixer: str = "attention",
        activation: str = "swiglu",
        attention: str = "auto",
        dispatch: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (
            ("latent_channels", latent_channels),
            ("num_frames", num_frames),
            ("condition_channels", condition_channels),
            ("depth", depth),
        ):
            if value < 1:
                raise ValueError(f"Expected {name} ≥ 1, got {value}.")
        if geometry_channels < 0:
            raise ValueError(f"Expected geometry_channels ≥ 0, got {geometry_channels}.")
        if routing not in ("block", "function"):
            raise ValueError(f"Expected routing = block | function, got {routing!r}.")
        self.latent_channels = latent_channels
        self.num_frames = num_frames
        self.condition_channels = condition_channels
        self.geometry_channels = geometry_channels
        self.head_dim = dim // num_heads
        condition_dim = min(dim, 256)
        self.embed = nn.Linear(num_frames * latent_channels + geometry_channels, dim)
        self.embed_condition = nn.Sequential(
            nn.Linear(condition_channels, condition_dim), nn.SiLU(), nn.Linear(condition_dim, condition_dim)
        )
        num_features = 2 * latent_channels + geometry_channels + condition_channels
        self.router = build_router(router, num_features) if routing == "function" else None
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                condition_dim,
                num_heads,
                hidden,
                build_router(router, dim) if self.router is None else self.router.num_experts,
                num_shared,
                mixer,
                attention,
                activation,
                dispatch,
            )
            for _ in range(depth)
        )
        if routing == "block" and any(isinstance(router, TreeRouter) for router in self.routers()):
            raise ValueError(
                "Expected routing = function for a TreeRouter, whose centroids are fitted to whole input functions, "
                "got 'block'; blocks route their own tokens, which change while the model is trained."
            )
        self.modulation = Modulation(condition_dim, dim, 2)
        self.head = nn.Linear(dim, latent_channels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def routers(self) -> list[Router]:
        """Every router, first block to last, for balance, telemetry and freezing."""
        return [module for module in self.modules() if isinstance(module, Router)]

    @staticmethod
    def function_features(
        latents: Float[Tensor, "b k c x y z"], condition: Float[Tensor, "b p"], geometry: Float[Tensor, "b g x y z"]
    ) -> Float[Tensor, "b f"]:
        """What a router of whole functions looks at: mean and spread of every channel of the last frame, mean geometry,
        and the condition."""
        last = latents[:, -1].flatten(2)
        return torch.cat([last.mean(-1), last.std(-1, correction=0), geometry.flatten(2).mean(-1), condition], dim=-1)

    def forward(
        self,
        latents: Float[Tensor, "b k c x y z"],
        condition: Float[Tensor, "b p"],
        geometry: Float[Tensor, "b g x y z"],
        periodic: tuple[bool, bool, bool],
        num_experts: int | None = None,
    ) -> Prediction:
        """Predict the increment from the last of the K frames to the next one.

        Input, conditioning and output layers run outside any autocast: eight bits of Δt or of a latent are too few.

        Args:
            latents: K frames, oldest first.
            condition: conditioning numbers of each sample.
            geometry: geometry channels on the latent cells.
            periodic: whether each axis wraps around.
            num_experts: how many experts of each layer, the first ones, the samples may choose. Default: all.
        """
        self._check(latents, condition, geometry)
        # Sizes are tensors under torch.jit.trace, and the rotary table must be a constant there.
        px, py, pz = (int(n) for n in latents.shape[-3:])
        table = rotary((px, py, pz), periodic, self.head_dim, latents.device, latents.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            cells = torch.cat([latents.flatten(1, 2), geometry], dim=1)
            x = self.embed(rearrange(cells, "b c x y z -> b (x y z) c"))
            context = self.embed_condition(condition)
        layout = Layout(int(latents.shape[0]), (px, py, pz), num_experts)
        routings, decided = [], None
        if self.router is not None:
            functions = Layout(layout.num_samples, (1, 1, 1), num_experts)
            whole = self.router(self.function_features(latents, condition, geometry), functions)
            decided = whole.spread(layout, layout.shape)
            routings.append(decided)
        for block in self.blocks:
            x, routing = block(x, context, table, layout, decided)
            if decided is None:
                routings.append(routing)
        with torch.autocast(latents.device.type, enabled=False):
            out = self.head(normalise(x, *self.modulation(context)))
        return Prediction(rearrange(out, "b (x y z) c -> b c x y z", x=px, y=py, z=pz), routings)

    def _check(self, latents: Tensor, condition: Tensor, geometry: Tensor) -> None:
        b, cells = latents.shape[0], tuple(latents.shape[-3:])
        if latents.ndim != 6 or tuple(latents.shape[1:3]) != (self.num_frames, self.latent_channels):
            raise ValueError(
                f"Expected latents of shape (b, {self.num_frames}, {self.latent_channels}, x, y, z), "
                f"got {tuple(latents.shape)}."
            )
        if tuple(condition.shape) != (b, self.condition_channels):
            raise ValueError(
                f"Expected a condition of shape {(b, self.condition_channels)}, got {tuple(condition.shape)}."
            )
        if tuple(geometry.shape) != (b, self.geometry_channels, *cells):
            raise ValueError(
                f"Expected geometry of shape {(b, self.geometry_channels, *cells)}, got {tuple(geometry.shape)}."
            )
