"""Networks tile by tile: the same numbers as all at once, in every kind of box; and what a halo is for."""

from unittest.mock import patch as patched

import pytest
import torch
from reference import BOUNDARIES, OPEN
from torch import Tensor, nn

from latentphys.autoencoders.decoder import Decoder
from latentphys.autoencoders.encoder import Encoder
from latentphys.autoencoders.place import Place, describe, num_conditions
from latentphys.autoencoders.tiles import decode_in_tiles, encode_in_tiles, halo
from latentphys.grid import Geometry, Grid

FIELDS = {"velocity": 3, "heat": 1}
SIDES = BOUNDARIES | OPEN


def randomise(network: nn.Module) -> None:
    """Random weights everywhere, in FP64, so that what depends on what is not a matter of rounding."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)
    network.double().eval()


def new_networks(num_blocks: tuple[int, ...] = (1, 0), stem: int = 2) -> tuple[Encoder, Decoder]:
    widths = [4, 8, 8][: len(num_blocks)]
    encoder = Encoder(FIELDS, 3, widths, num_blocks, stem, "patch", num_conditions(2))
    decoder = Decoder(FIELDS, 3, widths, num_blocks, stem, "patch", num_conditions(2))
    randomise(encoder)
    randomise(decoder)
    return encoder, decoder


def new_place(sides: str, latent_shape: tuple[int, int, int], patch: int, solid: float = 0.0) -> Place:
    boundaries = SIDES[sides]
    x, y, z = (1 if n == 0 else n * patch for n in latent_shape)
    voxels = (torch.rand(2, x, y, z) < solid) if solid else None
    return describe(Geometry(Grid((x, y, z), (0.1, 0.2, 0.1), boundaries), voxels), [True, True], patch).to(
        torch.float64
    )


def new_fields(place: Place) -> dict[str, Tensor]:
    return {name: torch.randn(2, n, *place.features.shape[-3:], dtype=torch.float64) for name, n in FIELDS.items()}


@pytest.mark.parametrize(
    ("sides", "latent_shape", "solid", "tile"),
    [
        ("periodic", (7, 3, 6), 0.0, 2),
        ("channel", (6, 2, 7), 0.4, 3),
        ("closed", (5, 3, 7), 0.0, 2),
        ("duct", (7, 4, 3), 0.3, 3),
        ("bend", (5, 6, 2), 0.0, 2),
        ("through", (4, 3, 5), 0.0, 2),
        ("periodic", (11, 0, 6), 0.3, 4),
        ("periodic", (0, 0, 9), 0.0, 1),
        ("channel", (0, 0, 6), 0.3, 1),
    ],
)
def test_tiles_are_the_whole(sides: str, latent_shape: tuple[int, int, int], solid: float, tile: int) -> None:
    encoder, decoder = new_networks()
    place = new_place(sides, latent_shape, encoder.patch, solid)
    fields = new_fields(place)
    z = encode_in_tiles(encoder, fields, place, tile)
    torch.testing.assert_close(z, encoder(fields, place), rtol=0, atol=1e-12)
    names = ["heat", "velocity"]
    parts = decode_in_tiles(decoder, z, place, names, tile)
    whole = decoder(z, place, names)
    assert list(parts) == names
    for name in names:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("sides", "length", "expected"),
    [("periodic", 9, [7, 7, 7, 5]), ("periodic", 6, [6]), ("closed", 9, [5, 7, 5, 3]), ("closed", 5, [5])],
)
def test_tiles_bound_what_the_networks_see(sides: str, length: int, expected: list[int]) -> None:
    """Tiles of four cells of the finest level, two of the next, with a halo of two of those (three finest cells)."""
    encoder, decoder = new_networks()
    place = new_place(sides, (length, 2, 2), encoder.patch)
    fields = new_fields(place)
    seen: list[int] = []
    encoder.levels[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    decoder.levels[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    z = encode_in_tiles(encoder, fields, place, 4)
    decode_in_tiles(decoder, z, place, ["heat"], 4)
    assert halo(encoder, 0) == halo(decoder, 0) == 3
    windows = {
        9: {"periodic": [6, 6, 6, 6, 5], "closed": [4, 6, 6, 5, 3]},
        6: {"periodic": [6]},
        5: {"closed": [4, 5, 3]},
    }
    assert seen == 2 * [2 * n for n in windows[length][sides]]


@pytest.mark.parametrize("num_blocks", [(1, 2), (2, 1), (0, 1, 0), (1,), (2, 0)])
@pytest.mark.parametrize("sides", ["periodic", "closed"])
def test_a_halo_is_as_wide_as_it_must_be(sides: str, num_blocks: tuple[int, ...]) -> None:
    """By two cells of its level less, and tiles are not the whole any more."""
    encoder, decoder = new_networks(num_blocks)
    place = new_place(sides, (24, 1, 1), encoder.patch)
    fields = new_fields(place)
    z, whole = encoder(fields, place), decoder(z := encoder(fields, place), place, ["velocity"])["velocity"]
    level = max(range(len(num_blocks)), key=lambda i: num_blocks[i])
    for less, same in ((0, True), (2, False)):

        def narrower(network: Encoder | Decoder, i: int, less: int = less) -> int:
            return halo(network, i) - (less if i == level else 0)

        with patched("latentphys.autoencoders.tiles.halo", narrower):
            one = encode_in_tiles(encoder, fields, place, 4)
            other = decode_in_tiles(decoder, z, place, ["velocity"], 4)["velocity"]
        assert (float((one - z).abs().max()) < 1e-11) == (float((other - whole).abs().max()) < 1e-11) == same


def test_tiles_that_are_none() -> None:
    encoder, _ = new_networks()
    place = new_place("periodic", (2, 2, 2), encoder.patch)
    with pytest.raises(ValueError, match="Expected tiles of at least 1 cell, got 0"):
        encode_in_tiles(encoder, new_fields(place), place, 0)
