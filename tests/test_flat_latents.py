"""Boxes of two dimensions through models of three: as boxes in which nothing changes along one axis."""

from pathlib import Path

import pytest
import torch
from reference import box, random_flux, velocity_scale
from small import Road
from torch import Tensor

from latentphys import operators
from latentphys.autoencoders import Autoencoder, fit_linear_code
from latentphys.autoencoders.layers import ResidualBlock
from latentphys.data import open_store
from latentphys.fields import State
from latentphys.grid import Geometry, Grid
from latentphys.rollout import rollout_store
from latentphys.surrogate import Surrogate
from latentphys.training import load_dynamics
from latentphys.transformer.conditioning import latent_geometry

COMPRESSION = 4


def flat_and_thick(thin: int) -> tuple[Grid, Grid]:
    """A box with one cell along an axis, and the same box with a patch of cells there."""

    def cells(along_thin: int) -> tuple[int, int, int]:
        x, y, z = (along_thin if axis == thin else 8 for axis in range(3))
        return x, y, z

    flat = box("periodic", cells(1))
    x, y, z = (length / n for length, n in zip(flat.lengths, cells(COMPRESSION), strict=True))
    return flat, box("periodic", cells(COMPRESSION), (x, y, z))


def model(grid: Grid) -> Autoencoder:
    """Random weights everywhere, the same for every grid of a test."""
    torch.manual_seed(1)
    scale = velocity_scale(grid, size=0.7)
    made = Autoencoder({"f": scale}, latent_channels=6, widths=[8, 16], num_blocks=[1, 1])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
        for block in made.modules():
            if isinstance(block, ResidualBlock):
                block.film.weight.zero_()  # of the box as a whole, which is another one
    return made.eval()


def thicken(velocity: Tensor, grid: Grid) -> Tensor:
    return velocity.expand(*velocity.shape[:-3], *grid.shape)


@pytest.mark.parametrize("thin", [0, 1, 2])
def test_a_flat_box_is_a_thick_one_in_which_nothing_changes(thin: int) -> None:
    flat, thick = flat_and_thick(thin)
    flux = random_flux(flat)[None]
    twin = operators.flux_of(thicken(operators.velocity(flux, flat), thick), thick)
    latents = model(flat).encode(flux, Geometry(flat), "f"), model(thick).encode(twin, Geometry(thick), "f")
    assert latents[0].shape == (1, 6, *(1 if axis == thin else 2 for axis in range(3)))
    torch.testing.assert_close(*latents, rtol=1e-5, atol=1e-6)
    decoded = operators.velocity(model(flat).decode(latents[0], Geometry(flat), "f"), flat)
    twin = operators.velocity(model(thick).decode(latents[1], Geometry(thick), "f"), thick)
    torch.testing.assert_close(decoded, twin.mean(thin - 3, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("thin", [0, 1, 2])
def test_any_latent_of_a_flat_box_decodes_to_a_net_of_zero(thin: int) -> None:
    grid, _ = flat_and_thick(thin)
    autoencoder = model(grid)
    latent = 3 * torch.randn(2, 6, *autoencoder.latent_shape(grid))
    flux = autoencoder.decode(latent, Geometry(grid), "f", exact=True)
    assert flux.dtype == torch.float64 and bool(flux.any())
    assert not bool(operators.div(flux, grid).any())


def test_geometry_of_a_flat_box_keeps_its_shares() -> None:
    flat, thick = flat_and_thick(2)
    solid = torch.rand(8, 8, 1) < 0.4
    a = latent_geometry(Geometry(flat, solid), COMPRESSION)
    assert a.shape == (1, 16, 2, 2, 1)
    torch.testing.assert_close(a[:, :8].mean((1, 4)), _shares(solid))
    b = latent_geometry(Geometry(thick, solid.expand(8, 8, COMPRESSION)), COMPRESSION)
    torch.testing.assert_close(a[:, :8], b[:, :8])


def _shares(solid: Tensor) -> Tensor:
    return 1 - solid[..., 0].float().reshape(1, 2, 4, 2, 4).mean((2, 4))


def test_principal_components_of_flat_boxes_reconstruct(flat_road: Road) -> None:
    """As many channels as numbers in a thick patch: the linear path alone loses next to nothing."""
    store = flat_road.store("mhd")
    flux = store.read("velocity", 0, slice(None))
    grid = store.grid
    spread = float(operators.velocity(flux, grid).std())
    scale = velocity_scale(grid, size=1e3 * spread)
    full = Autoencoder({"mhd": scale}, 3 * COMPRESSION**3, widths=[8, 16], num_blocks=[1, 1])
    fit_linear_code(full, {"mhd": [(Geometry(grid), one) for one in flux]})
    back = full(flux, Geometry(grid), "mhd").fields
    error = (back - flux.float()).norm() / flux.norm()
    assert error < 1e-2


def test_the_whole_road_in_two_dimensions(flat_road: Road, tmp_path: Path) -> None:
    dynamics, autoencoder = load_dynamics(flat_road.dynamics)
    for family in flat_road.fields:
        out = rollout_store(
            autoencoder, dynamics, flat_road.store(family), tmp_path / family, num_steps=2, trajectories=[3]
        )
        rolled = open_store(out)
        flux = rolled.read("velocity", 0, slice(None))
        assert not bool(operators.div(flux, rolled.grid).any())
        routing = rolled.read("routing", 0, slice(1, None))
        assert routing.shape[2:] == autoencoder.latent_shape(rolled.grid) and int(routing.min()) >= 0


def test_the_surrogate_steps_a_flat_flow(flat_road: Road) -> None:
    surrogate = Surrogate.load(flat_road.dynamics)
    state = surrogate.init(flat_road.store("convection")[3, 0])
    stepped = surrogate.step(state, num_steps=2)
    assert isinstance(stepped, State) and not bool(operators.div(stepped.velocity, stepped.grid).any())
