"""Encoder and decoder tile by tile, for boxes whose activations do not fit in memory at once.

Level by level, each tile is worked out together with a halo of the cells that reach into it, which is then thrown away:
the tiles are those of the whole box to rounding, for the networks take no statistics over the box. Beyond the box's own
sides the padding is that of the whole; where a tile is cut out of the box, its halo hides the difference. Between the
levels the activations of the whole box are kept at the coarser resolution: an eighth of the numbers at the finest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys.autoencoders.decoder import Decoder
from latentphys.autoencoders.encoder import Encoder
from latentphys.autoencoders.place import Place
from latentphys.grid import Boundaries, Boundary


class Window(NamedTuple):
    """The cells of one tile along one axis: those of the tile, and those with its halo, which may wrap around."""

    start: int
    stop: int
    low: int
    high: int

    def inner(self, cells: int) -> slice:
        """Where the tile stands among the cells with its halo."""
        return slice((self.start - self.low) * cells, (self.stop - self.low) * cells)

    def outer(self, cells: int) -> slice:
        """Where the tile stands in the box."""
        return slice(self.start * cells, self.stop * cells)


def halo(network: Encoder | Decoder, level: int) -> int:
    """How many cells of a level reach into what it makes of one: two for each block, one for the stem or the heads."""
    return 2 * network.num_blocks[level] + (level == 0)


@torch.no_grad()
def encode_in_tiles(
    encoder: Encoder, fields: Mapping[str, Float[Tensor, "b _ nx ny nz"]], place: Place, tile: int
) -> Float[Tensor, "b l x y z"]:
    """`Encoder.forward`, tile by tile; without a gradient.

    Args:
        tile: cells per axis that a tile has of each level.

    Raises:
        ValueError: a tile that is none.
    """
    condition, x = encoder.embed(place.condition), torch.empty(0)
    for level in range(len(encoder.levels)):

        def run(part: _Part, level: int = level, x: Tensor = x) -> dict[str, Tensor]:
            own = {} if level else {name: part.of(u) for name, u in fields.items()}
            given = part.of(x) if level else encoder.begin(own, part.place)
            return {"": encoder.stage(level, given, part.place, condition)}

        x = _in_tiles(run, encoder, level, place, tile)[""]
    return encoder.finish(x, fields, place)


@torch.no_grad()
def decode_in_tiles(
    decoder: Decoder, z: Float[Tensor, "b l x y z"], place: Place, fields: Sequence[str], tile: int
) -> dict[str, Tensor]:
    """`Decoder.forward`, tile by tile; without a gradient. See `encode_in_tiles`."""
    condition, said = decoder.embed(place.condition), {"": decoder.start(z)}
    for level in reversed(range(len(decoder.levels))):

        def run(part: _Part, level: int = level, x: Tensor = said[""]) -> dict[str, Tensor]:
            made = decoder.stage(level, part.of(x), part.place, condition)
            return {"": made} if level else decoder.say(made, part.place, fields)

        said = _in_tiles(run, decoder, level, place, tile)
    return decoder.finish(z, said, place)


class _Part(NamedTuple):
    """A tile with its halo: which cells it has, and the place as its network sees it."""

    windows: Sequence[Window]
    shape: Sequence[int]
    place: Place

    def of(self, x: Float[Tensor, "b c nx ny nz"]) -> Tensor:
        """The tile's cells of a field on the whole box, of any resolution."""
        return _cut(x, self.windows, self.shape)


def _in_tiles(
    run: Callable[[_Part], dict[str, Tensor]], network: Encoder | Decoder, level: int, place: Place, tile: int
) -> dict[str, Tensor]:
    """What `run` says of each tile of a level and its halo, put together.

    Tiles are cut along the cells of the next level, so that both resolutions that a stage joins are cut alike.
    """
    if tile < 1:
        raise ValueError(f"Expected tiles of at least 1 cell, got {tile}.")
    cells = 2 if level + 1 < len(network.levels) else 1
    patch = network.patches.factor * 2**level * cells
    shape = [n // patch for n in place.features.shape[-3:]]
    reach, periodic = -(-halo(network, level) // cells), [sides[0] == "periodic" for sides in place.boundaries]
    axes = [_windows(n, max(1, tile // cells), reach, wraps) for n, wraps in zip(shape, periodic, strict=True)]
    whole: dict[str, Tensor] = {}
    for windows in product(*axes):
        sides = _sides(place.boundaries, windows, shape)
        features = _cut(place.features, windows, shape)
        for name, part in run(_Part(windows, shape, Place(features, place.condition, sides))).items():
            finer = part.shape[-3] // (windows[0].high - windows[0].low)
            if name not in whole:
                whole[name] = part.new_empty(*part.shape[:2], *(n * finer for n in shape))
            x, y, z = (window.outer(finer) for window in windows)
            i, j, k = (window.inner(finer) for window in windows)
            whole[name][..., x, y, z] = part[..., i, j, k]
    return whole


def _windows(n: int, tile: int, halo: int, periodic: bool) -> list[Window]:
    """The tiles of one axis; one alone where the largest would take the whole axis with its halo anyway."""
    if tile + (2 if periodic else 1) * halo >= n:
        return [Window(0, n, 0, n)]
    starts = range(0, n, tile)
    tiles = [(start, min(start + tile, n)) for start in starts]
    if periodic:
        return [Window(start, stop, start - halo, stop + halo) for start, stop in tiles]
    return [Window(start, stop, max(start - halo, 0), min(stop + halo, n)) for start, stop in tiles]


def _sides(boundaries: Boundaries, windows: Sequence[Window], shape: Sequence[int]) -> Boundaries:
    """Boundaries of a tile with its halo: the box's own, and where it is cut out of the box one that repeats cells."""
    cut: Boundary = "outflow"
    x, y, z = (
        sides
        if (window.low, window.high) == (0, n)
        else (
            sides[0] if window.low == 0 and sides[0] != "periodic" else cut,
            sides[1] if window.high == n and sides[1] != "periodic" else cut,
        )
        for sides, window, n in zip(boundaries, windows, shape, strict=True)
    )
    return x, y, z


def _cut(x: Float[Tensor, "b c nx ny nz"], windows: Sequence[Window], shape: Sequence[int]) -> Tensor:
    """The cells of a tile with its halo; the windows are of a box of this shape, which the field's is a multiple of."""
    for axis, (window, cells) in enumerate(zip(windows, shape, strict=True), start=2):
        n = x.shape[axis]
        low, high = window.low * n // cells, window.high * n // cells
        if low >= 0 and high <= n:
            x = x.narrow(axis, low, high - low)
        else:
            x = x.index_select(axis, torch.arange(low, high, device=x.device) % n)
    return x
