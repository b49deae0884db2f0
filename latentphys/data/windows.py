"""Windows of consecutive snapshots for training, drawn as a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from latentphys.data.order import Turns, permutation
from latentphys.data.store import Store


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of one store, hence of one family and grid.

    Args:
        values: the field in FP32, ``(batch, length, [axis,] nx, ny, nz)``, in the unit of the store, or packed fields,
            ``(batch, length, components, nx, ny, nz)``.
        store: which store of the `Windows`.
        trajectories: trajectory of each window, ``(batch,)``.
        starts: its first snapshot, ``(batch,)``.
    """

    values: Float[Tensor, "batch length ..."]
    store: int
    trajectories: Int64[Tensor, " batch"]
    starts: Int64[Tensor, " batch"]

    def to(self, device: torch.device | str) -> Batch:
        """The same windows with their values on another device."""
        return replace(self, values=self.values.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same windows with values that a GPU fetches by itself."""
        return replace(self, values=self.values.pin_memory())

    def parts(self, number: int) -> list[Batch]:
        """The windows divided into so many batches of equal size, which must divide them."""
        parts = (x.chunk(number) for x in (self.values, self.trajectories, self.starts))
        return [Batch(values, self.store, which, starts) for values, which, starts in zip(*parts, strict=True)]


class Drawn(NamedTuple):
    """Which windows a training step takes: store, trajectories and first snapshots."""

    store: int
    trajectories: Int64[Tensor, " batch"]
    starts: Int64[Tensor, " batch"]


class Windows:
    """All windows of ``length`` snapshots, ``stride`` apart, in some trajectories of some stores.

    Args:
        stores: one per family.
        fields: the field to read; or family → the fields to read packed, their components one after another.
        length: snapshots per window, ≥ 1.
        stride: distance of neighbouring snapshots in a window, in snapshots of the store. Default 1.
        trajectories: per store the trajectories to draw from. Default: all.
        cache: `hold` these trajectories in memory in FP32. Default: read each window when it is drawn.
        weights: family → how often its store is drawn from, relative to the 1 of families that are not named; 0 for
            never. Default: every store equally often, however large it is.

    Attributes:
        trajectories: of each store those that windows come from.

    Raises:
        ValueError: no stores, a store without the field or the trajectories, trajectories shorter than a window, or
            weights that no order of the stores has.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        fields: str | Mapping[str, Sequence[str]],
        length: int,
        stride: int = 1,
        trajectories: Sequence[Sequence[int]] | None = None,
        cache: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if not stores:
            raise ValueError("Expected at least one store, got none.")
        if length < 1 or stride < 1:
            raise ValueError(f"Expected length ≥ 1 and stride ≥ 1, got {length} and {stride}.")
        self.stores, self.length, self.stride = list(stores), length, stride
        self._packed = not isinstance(fields, str)
        self._fields = [[fields] if isinstance(fields, str) else list(fields[store.family]) for store in stores]
        if trajectories is None:
            trajectories = [range(len(store)) for store in stores]
        self.trajectories = [list(chosen) for chosen in trajectories]
        if len(self.trajectories) != len(self.stores):
            raise ValueError(f"Expected trajectories for {len(self.stores)} stores, got {len(self.trajectories)}.")
        for store, names, chosen in zip(self.stores, self._fields, self.trajectories, strict=True):
            for field in names:
                if field not in store.specs:
                    raise ValueError(f"Expected a field {field!r} in {store.path}, got {sorted(store.specs)}.")
            if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(len(store))):
                raise ValueError(f"Expected different trajectories from 0 to {len(store) - 1}, got {chosen}.")
            if self._num_starts(store) < 1:
                span = (length - 1) * stride + 1
                raise ValueError(
                    f"Expected trajectories of at least {span} snapshots for windows of {length} with stride {stride}, "
                    f"got {store.num_times} in {store.path}; choose a smaller length or stride."
                )
        self._turns = Turns(_weights([store.family for store in self.stores], {} if weights is None else weights))
        self._cache: list[dict[int, Tensor]] = [{} for _ in self.stores]
        if cache:
            self.hold()

    def hold(self) -> None:
        """Read the trajectories into memory, where windows come from then on."""
        for store, (chosen, held) in enumerate(zip(self.trajectories, self._cache, strict=True)):
            held.update({i: self._read(store, i, slice(None)) for i in chosen})

    def _num_starts(self, store: Store) -> int:
        return store.num_times - (self.length - 1) * self.stride

    def num_windows(self, store: int) -> int:
        """Number of windows in one store."""
        return len(self.trajectories[store]) * self._num_starts(self.stores[store])

    def __len__(self) -> int:
        return sum(self.num_windows(store) for store in range(len(self.stores)))

    def read(self, store: int, trajectory: int, start: int, out: Tensor | None = None) -> Float[Tensor, "length ..."]:
        """One window in FP32, written to `out` where that is given."""
        frames = slice(start, start + (self.length - 1) * self.stride + 1, self.stride)
        if not self._cache[store]:
            return self._read(store, trajectory, frames, out)
        window = self._cache[store][trajectory][frames]
        return window if out is None else out.copy_(window)

    def _read(self, store: int, trajectory: int, frames: slice, out: Tensor | None = None) -> Tensor:
        source, names = self.stores[store], self._fields[store]
        if out is None:
            out = _room((len(range(source.num_times)[frames]), *self._shape(store)))
        if len(names) == 1 and not (self._packed and source.specs[names[0]].kind == "scalar"):
            return source.read(names[0], trajectory, frames, out)
        start = 0
        for name in names:
            values = source.read(name, trajectory, frames)
            values = values.unsqueeze(1) if source.specs[name].kind == "scalar" else values
            out[:, start : start + values.shape[1]] = values
            start += values.shape[1]
        return out

    def _shape(self, store: int) -> tuple[int, ...]:
        """Shape of one snapshot of the field, or of the packed fields."""
        source, names = self.stores[store], self._fields[store]
        shapes = [source.array(name).shape[2:] for name in names]
        if not self._packed:
            return tuple(shapes[0])
        kinds = [source.specs[name].kind for name in names]
        channels = sum(1 if kind == "scalar" else shape[0] for kind, shape in zip(kinds, shapes, strict=True))
        return (channels, *source.domain.shape)

    def sample(self, step: int, batch: int, seed: int, rank: int = 0, world: int = 1) -> Batch:
        """The windows of one training step, the same whenever and wherever it is asked for.

        Stores take turns as their weights say, in an order shuffled anew each round: with equal weights, every
        ``len(stores)`` steps visit every store once. Within a store the windows are drawn without replacement; an
        epoch ends when fewer than ``batch`` are left.

        Args:
            step: the training step, from 0.
            batch: windows per step over all ranks.
            seed: of the shuffling.
            rank, world: which of how many equal slices of the batch to read. Default: all of it.

        Raises:
            ValueError: a batch that the ranks cannot share equally or that has more windows than the store.
        """
        drawn = self.draw(step, batch, seed, rank, world)
        store = drawn.store
        values = _room((batch // world, self.length, *self._shape(store)))
        for i, start, out in zip(drawn.trajectories.tolist(), drawn.starts.tolist(), values, strict=True):
            self.read(store, i, start, out)
        return Batch(values, *drawn)

    def draw(self, step: int, batch: int, seed: int, rank: int = 0, world: int = 1) -> Drawn:
        """Which windows `sample` reads, without reading them."""
        if step < 0 or batch < 1 or batch % world or not 0 <= rank < world:
            raise ValueError(
                f"Expected step ≥ 0, a batch that is a multiple of world and rank < world, "
                f"got step {step}, batch {batch}, world {world}, rank {rank}."
            )
        store, visit = self._turns.at(step, seed)
        epoch, offset = self._epoch(store, visit, batch)
        order = permutation(self.num_windows(store), seed, 1 + store, epoch)
        share = batch // world
        first = offset * batch + rank * share
        which, starts = np.divmod(order[first : first + share], self._num_starts(self.stores[store]))
        trajectories = [self.trajectories[store][i] for i in which]
        return Drawn(store, torch.tensor(trajectories), torch.from_numpy(starts))

    def is_drawn(self, store: int) -> bool:
        """Whether windows of a store are ever drawn, which a weight of 0 rules out."""
        return self._turns.counts[store] > 0

    def check_batch(self, batch: int) -> None:
        """Refuse a batch that has more windows than one of the stores it is drawn from, with a ValueError."""
        for store in range(len(self.stores)):
            if self.is_drawn(store):
                self._epoch(store, 0, batch)

    def _epoch(self, store: int, visit: int, batch: int) -> tuple[int, int]:
        """Epoch of a store's ``visit``-th batch, and the number of the batch within it."""
        batches = self.num_windows(store) // batch
        if not batches:
            raise ValueError(
                f"Expected a batch of at most {self.num_windows(store)}, the windows of {self.stores[store].path}, "
                f"got {batch}; choose a smaller batch or length."
            )
        return divmod(visit, batches)


def _room(shape: tuple[int, ...]) -> Tensor:
    """An FP32 tensor yet to be filled; NumPy asks for huge pages, which torch does not."""
    return torch.from_numpy(np.empty(shape, np.float32))


def _weights(families: Sequence[str], weights: Mapping[str, float]) -> list[float]:
    """The weight of each store, from those of families."""
    if not isinstance(weights, Mapping):
        raise ValueError(f"Expected weights by family, such as {{{families[0]}: 2}}, got {weights!r}.")
    unknown = sorted(set(weights) - set(families))
    if unknown:
        raise ValueError(f"Expected weights of the families {sorted(set(families))}, got one of {unknown[0]!r}.")
    return [weights.get(family, 1.0) for family in families]


def split(num_trajectories: int, held_out: float | int) -> tuple[list[int], list[int]]:
    """Divide trajectories into training and test sets: the last ones are held out.

    Args:
        num_trajectories: how many there are.
        held_out: number of test trajectories, or, as a float below 1, their share; at least one is held out.

    Returns:
        Indices for training, indices for testing.

    Raises:
        ValueError: nothing left to train on, or nothing held out.
    """
    number = max(1, round(held_out * num_trajectories)) if isinstance(held_out, float) else held_out
    if held_out <= 0 or number >= num_trajectories or (isinstance(held_out, float) and held_out >= 1):
        raise ValueError(
            f"Expected held_out to be a share between 0 and 1 or a number from 1 to {num_trajectories - 1}, "
            f"got {held_out} of {num_trajectories} trajectories."
        )
    return list(range(num_trajectories - number)), list(range(num_trajectories - number, num_trajectories))
