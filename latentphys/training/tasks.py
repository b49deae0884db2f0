"""What the trainer trains: a module whose forward gives a loss, the batches it is fed, and what is measured of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentphys.autoencoders import Autoencoder, WeightedSum
from latentphys.data import Batch, Store, Windows
from latentphys.data.regimes import measure
from latentphys.grid import Geometry
from latentphys.routers import (
    AuxiliaryLosses,
    BiasBalance,
    Router,
    TreeRouter,
    counts_over_ranks,
)
from latentphys.training import checkpoint
from latentphys.training.models import autoencoder_extra
from latentphys.training.routing_log import RoutingLog, Usage
from latentphys.transformer.conditioning import latent_geometry, store_parameters
from latentphys.transformer.dynamics import Dynamics


@dataclass
class Output:
    """What one forward pass says: the loss, figures to log, and, in training, how the experts of a choice were used."""

    loss: Tensor
    figures: dict[str, Tensor]
    usage: Usage | None = None

    @staticmethod
    def join(outputs: Sequence[Output]) -> Output:
        """Of the passes of one step, which have equally many samples of one store."""
        if len(outputs) == 1:
            return outputs[0]
        loss = torch.stack([output.loss.detach() for output in outputs]).mean()
        figures = {name: torch.stack([o.figures[name] for o in outputs]).mean() for name in outputs[0].figures}
        usages = [output.usage for output in outputs if output.usage is not None]
        return Output(loss, figures, Usage.join(usages) if usages else None)

    @property
    def expert_counts(self) -> list[Tensor]:
        """Tokens per expert of every layer; none where there was no choice."""
        return [] if self.usage is None else list(self.usage.counts_LBE.sum(1))


class Task(nn.Module, ABC):
    """One thing to train. `forward` takes a batch and returns an `Output`; the trainer does the rest.

    Attributes:
        kind: of the checkpoints it writes.
        figure: the one by which models are compared, one per family, the smaller the better.
        train_windows, test_windows: training data, and data that training never sees.
        loss_weights: family → how much its loss counts; 1 where it is not named.
    """

    kind: str
    figure: str
    train_windows: Windows
    test_windows: Windows
    loss_weights: Mapping[str, float]

    def stores(self) -> list[Store]:
        return self.train_windows.stores

    def score(self, figures: Mapping[str, float]) -> float:
        """The mean over families of the figure by which models are compared."""
        values = [value for name, value in figures.items() if name.endswith(f"/{self.figure}")]
        return sum(values) / len(values)

    @abstractmethod
    def tokens(self, batch: Batch) -> int:
        """Latent cells that a training pass works out for a batch."""

    def prefetch(self, batch: Batch) -> None:  # noqa: B027
        """Read whatever a batch needs beside its windows; called ahead of its step, in another thread."""

    @abstractmethod
    def save(
        self,
        path: Path,
        step: int,
        optimizer: torch.optim.Optimizer,
        average: Mapping[str, Tensor] | None,
        state: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint folder, as `latentphys.training.checkpoint.save` describes it."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The module whose weights a checkpoint holds."""

    def after_step(self, output: Output) -> None:  # noqa: B027
        """Called once per optimiser step, in training only."""

    def telemetry(self) -> dict[str, Any]:
        """What a log line says beside the figures, of the steps since the line before; every process asks for it."""
        return {}


class AutoencoderTask(Task):
    """Reconstruct single snapshots.

    Args:
        autoencoder: the model.
        loss: weighted losses on fields and latents.
        config: the model's configuration, for its checkpoint.
        loss_weights: see `Task`.
    """

    kind, figure = "autoencoder", "vrmse"

    def __init__(
        self,
        autoencoder: Autoencoder,
        loss: WeightedSum,
        train_windows: Windows,
        test_windows: Windows,
        config: Mapping[str, Any],
        loss_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder, self.loss, self.config = autoencoder, loss, config
        self.train_windows, self.test_windows = train_windows, test_windows
        self.loss_weights = _loss_weights(loss_weights, self.stores())

    def forward(self, batch: Batch) -> Output:
        store = self.stores()[batch.store]
        packed = batch.values[:, 0]
        geometry = Geometry.stack([_geometry(store, int(i)) for i in batch.trajectories])
        reconstruction = self.autoencoder(packed, geometry, store.family)
        loss, parts = self.loss(reconstruction, packed, geometry, self.autoencoder.scale(store.family))
        figures = {f"{store.family}/{name}": value for name, value in parts.items()}
        return Output(self.loss_weights.get(store.family, 1.0) * loss, figures)

    def tokens(self, batch: Batch) -> int:
        cells = self.autoencoder.latent_shape(self.stores()[batch.store].grid)
        return len(batch.values) * math.prod(cells)

    def prefetch(self, batch: Batch) -> None:
        for trajectory in batch.trajectories.tolist():
            _geometry(self.stores()[batch.store], trajectory)

    def model(self) -> nn.Module:
        return self.autoencoder

    def save(
        self,
        path: Path,
        step: int,
        optimizer: torch.optim.Optimizer,
        average: Mapping[str, Tensor] | None,
        state: Mapping[str, Any],
    ) -> None:
        checkpoint.save(
            path,
            kind=self.kind,
            model=self.autoencoder,
            config=self.config,
            extra={**autoencoder_extra(self.autoencoder), "regimes": _regimes(self.train_windows, self.stores())},
            step=step,
            optimizer=optimizer,
            ema=average,
            state=state,
        )


class DynamicsTask(Task):
    """Predict the next latents from cached ones.

    The loss of a family is the mean squared error of the increments in units of their spread: 1 is persistence.

    Args:
        dynamics: the model.
        autoencoder: the model that made the latents; only copied into checkpoints.
        sources: the field store that each latent store was encoded from, for geometry and parameters.
        unroll: steps predicted from each window, each from the one before. Default 1.
        input_noise: size of the noise on the input latents, in units of their increments' spread: white noise, and an
            offset of each channel as a whole, which is how rollouts drift. Good values: as large as the model's own
            one-step error, 0.2…0.5.
        balance: moves the routers' biases after every training step.
        balance_losses: auxiliary losses, added in training only. Default none: the bias alone balances.
        config: the model's configuration, for its checkpoint.
        loss_weights: see `Task`.
    """

    kind, figure = "dynamics", "latent_mse"

    def __init__(
        self,
        dynamics: Dynamics,
        autoencoder: Autoencoder,
        train_windows: Windows,
        test_windows: Windows,
        sources: Sequence[Store],
        config: Mapping[str, Any],
        autoencoder_config: Mapping[str, Any],
        unroll: int = 1,
        input_noise: float = 0.0,
        balance: BiasBalance | None = None,
        balance_losses: AuxiliaryLosses | None = None,
        loss_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        expected = dynamics.num_frames + unroll
        if train_windows.length != expected:
            raise ValueError(
                f"Expected windows of {expected} frames for {unroll} steps from {dynamics.num_frames}, "
                f"got {train_windows.length}."
            )
        self.dynamics = dynamics
        self._autoencoder = [autoencoder]  # in a list: not a submodule, so neither trained nor synchronised
        self.train_windows, self.test_windows, self.sources = train_windows, test_windows, list(sources)
        self.config, self.autoencoder_config = config, autoencoder_config
        self.input_noise, self.balance = input_noise, balance or BiasBalance()
        self.balance_losses = balance_losses or AuxiliaryLosses()
        self.loss_weights = _loss_weights(loss_weights, self.stores())
        self.routing_log = RoutingLog(len(train_windows.stores))
        self._fit_tree()

    def tokens(self, batch: Batch) -> int:
        steps = self.train_windows.length - self.dynamics.num_frames
        return len(batch.values) * steps * math.prod(batch.values.shape[-3:])

    def prefetch(self, batch: Batch) -> None:
        for trajectory in batch.trajectories.tolist():
            _latent_geometry(self.sources[batch.store], trajectory, self.autoencoder.compression)

    def forward(self, batch: Batch) -> Output:
        source, family = self.sources[batch.store], self.stores()[batch.store].family
        window, stride, k = self.train_windows, self.train_windows.stride, self.dynamics.num_frames
        geometry = self._geometry(source, batch)
        frames = list(batch.values[:, :k].unbind(1))
        if self.training and self.input_noise:
            frames = [f + self.input_noise * self.dynamics.increment_std * _noise(f) for f in frames]
        errors, routings, box = [], [], None
        if self.autoencoder.num_coarse:
            box = Geometry.stack([_geometry(source, int(i)) for i in batch.trajectories])
        for n in range(window.length - k):
            condition = self._condition(source, batch, (k - 1 + n) * stride, stride).to(frames[0])
            step = self.dynamics(
                torch.stack(frames[-k:], 1), condition, geometry.to(frames[0]), source.grid.periodic, family
            )
            latent = step.latent if box is None else self.autoencoder.admit(step.latent, box, family)
            frames.append(latent)
            routings.append(step.routings)
            errors.append(((latent - batch.values[:, k + n]) / self.dynamics.increment_std).square().mean())
        loss = torch.stack(errors).mean()
        figures = {f"{family}/latent_mse": loss.detach()}
        loss = self.loss_weights.get(family, 1.0) * loss
        if self.training and self.balance_losses:
            auxiliary, parts = self.balance_losses(routings)
            loss = loss + auxiliary.to(loss.dtype)
            figures |= {f"{family}/balance/{name}": value for name, value in parts.items()}
        usage = Usage.of(routings, len(batch.values), batch.store) if self.training else None
        return Output(loss, figures, usage)

    @property
    def autoencoder(self) -> Autoencoder:
        """The model that made the latents."""
        return self._autoencoder[0]

    @torch.no_grad()
    def _fit_tree(self, most: int = 1024) -> None:
        """Fit a tree over whole functions that is new, to training windows without noise, as often as training draws
        from each family: at most `most` windows of each on average. Every process draws, and fits, the same."""
        tree = self.dynamics.transformer.router
        if not isinstance(tree, TreeRouter) or tree.fitted:
            return
        windows, k, rows = self.train_windows, self.dynamics.num_frames, []
        sizes = [windows.num_windows(store) for store in range(len(windows.stores))]
        batch_size = min(64, *sizes)
        for step in range(len(sizes) * -(-min(most, max(sizes)) // batch_size)):
            batch = windows.sample(step, batch_size, seed=0)
            source = self.sources[batch.store]
            geometry = self._geometry(source, batch)
            condition = self._condition(source, batch, (k - 1) * windows.stride, windows.stride)
            rows.append(self.dynamics.function_features(batch.values[:, :k], condition, geometry.to(condition)))
        tree.fit(torch.cat(rows))

    def _geometry(self, source: Store, batch: Batch) -> Tensor:
        return torch.cat([_latent_geometry(source, int(i), self.autoencoder.compression) for i in batch.trajectories])

    def _condition(self, source: Store, batch: Batch, offset: int, stride: int) -> Tensor:
        rows = []
        for trajectory, start in zip(batch.trajectories.tolist(), batch.starts.tolist(), strict=True):
            now = start + offset
            rows.append(
                self.dynamics.conditioning.vector(
                    store_parameters(source, trajectory, now),
                    store_parameters(source, trajectory, now + stride),
                    self.dynamics.interval(source.family),
                )
            )
        return torch.stack(rows)

    def routers(self) -> list[Router]:
        return self.dynamics.transformer.routers()

    def after_step(self, output: Output) -> None:
        if output.usage is None:
            return
        if self.balance.rate:
            for router, counts in zip(self.routers(), counts_over_ranks(output.expert_counts), strict=True):
                if not isinstance(router, TreeRouter):
                    router.even_out(self.balance, counts)
        self.routing_log.add(output.usage)

    def telemetry(self) -> dict[str, Any]:
        lines = self.routing_log.lines()
        return {"routing": lines} if lines else {}

    def model(self) -> nn.Module:
        return self.dynamics

    def save(
        self,
        path: Path,
        step: int,
        optimizer: torch.optim.Optimizer,
        average: Mapping[str, Tensor] | None,
        state: Mapping[str, Any],
    ) -> None:
        autoencoder = self.autoencoder
        checkpoint.save(
            path,
            kind=self.kind,
            model=self.dynamics,
            config=self.config,
            extra={
                **self.dynamics.to_dict(),
                "latent_channels": autoencoder.latent_channels,
                "regimes": _regimes(self.train_windows, self.sources),
            },
            step=step,
            optimizer=optimizer,
            ema=average,
            state=state,
            parts=lambda folder: checkpoint.save(
                folder / "autoencoder",
                kind="autoencoder",
                model=autoencoder,
                config=self.autoencoder_config,
                extra=autoencoder_extra(autoencoder),
                step=0,
            ),
        )


def _loss_weights(weights: Mapping[str, float] | None, stores: Sequence[Store]) -> Mapping[str, float]:
    """The weights, checked to be positive numbers for families that are trained on."""
    families = sorted(store.family for store in stores)
    for family, weight in (weights or {}).items():
        if family not in families or not 0 < weight < math.inf:
            raise ValueError(f"Expected positive loss weights of {', '.join(families)}, got {family}: {weight}.")
    return weights or {}


def _regimes(windows: Windows, sources: Sequence[Store]) -> dict[str, Any]:
    """Family → what `measure` says of the trajectories that training draws from."""
    pairs = enumerate(zip(sources, windows.trajectories, strict=True))
    return {source.family: measure(source, some) for n, (source, some) in pairs if windows.is_drawn(n)}


def _noise(latent: Tensor) -> Tensor:
    """Unit white noise plus a unit offset for each sample and channel."""
    return torch.randn_like(latent) + torch.randn_like(latent[..., :1, :1, :1])


@lru_cache(maxsize=4096)
def _geometry(store: Store, trajectory: int) -> Geometry:
    geometry = store.geometry(trajectory)
    _ = geometry.open_faces, geometry.wall_distance
    return geometry


@lru_cache(maxsize=4096)
def _latent_geometry(store: Store, trajectory: int, compression: int) -> Tensor:
    return latent_geometry(_geometry(store, trajectory), compression)
