"""The claim of the library: any latent, any weights, any geometry decode to a net flux of 0.0 in every cell.

64³ here; `pytest -m slow tests/test_random_latents.py` does 128³ as well, and `benchmarks/bench_core.py` with the
autoencoder of size `base`.
"""

import numpy as np
import pytest
import torch
from reference import velocity_scale

from latentphys import operators
from latentphys.autoencoders import Autoencoder, Heads, PotentialHead, ProjectionHead, RieszHead
from latentphys.families.media import sphere_pack
from latentphys.grid import PERIODIC, Boundaries, Geometry, Grid

CHANNEL: Boundaries = (("periodic", "periodic"), ("periodic", "periodic"), ("no_slip", "free_slip"))
DUCT: Boundaries = (("inflow", "outflow"), ("no_slip", "no_slip"), ("periodic", "periodic"))
KINDS = ("empty", "channel", "duct", "grains 0.2", "grains 0.5", "grains 0.8", "voxels 0.5")


def geometry_of(kind: str, size: int) -> Geometry:
    name, _, fraction = kind.partition(" ")
    boundaries = {"channel": CHANNEL, "duct": DUCT}.get(name, PERIODIC)
    grid = Grid((size,) * 3, (1 / size,) * 3, boundaries)
    if name == "grains":
        solid = sphere_pack(grid, 1 - float(fraction), 0.25, np.random.default_rng(0), overlap=1.0)
        return Geometry(grid, torch.from_numpy(solid))
    if name == "voxels":
        return Geometry(grid, torch.rand(grid.shape) < float(fraction))
    return Geometry(grid, inflow={"x-": 1.0} if name == "duct" else {})


def check(kind: str, size: int, head: ProjectionHead | PotentialHead | RieszHead) -> None:
    geometry = geometry_of(kind, size)
    scale = velocity_scale(geometry.grid)
    model = Autoencoder(
        {"any": scale}, latent_channels=4, widths=[8, 8, 8], num_blocks=[1, 1, 1], heads=Heads(head)
    ).eval()
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    flux = model.decode(torch.randn(1, 4, *model.latent_shape(geometry.grid)), geometry, "any", exact=True)
    assert flux.dtype == torch.float64 and float(flux.detach().abs().amax()) > 1e-4 / size**2
    assert float(operators.div(flux, geometry.grid).abs().amax()) == 0.0
    closed = flux[..., ~geometry.open_faces]
    assert closed.numel() == 0 or float(closed.abs().amax()) == 0.0
    assert float(geometry.fluid.double().mean()) == pytest.approx(1 - float(kind.partition(" ")[2] or 0), abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_latent_through_random_weights(kind: str) -> None:
    check(kind, 64, ProjectionHead())


@pytest.mark.parametrize("head", [PotentialHead(), RieszHead()], ids=["potential", "riesz"])
@pytest.mark.parametrize("kind", ["empty", "channel", "grains 0.5"])
def test_through_the_other_heads(kind: str, head: PotentialHead | RieszHead) -> None:
    check(kind, 32, head)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_at_128(kind: str) -> None:
    check(kind, 128, ProjectionHead())
