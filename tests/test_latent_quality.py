"""Measures of a latent space, on coders whose every number is known."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentphys import operators
from latentphys.data import Store, create_store, open_store
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Boundaries, Boundary, Geometry, Grid
from latentphys.validators.latents import measure_latents
from latentphys.validators.pointwise import vrmse

PERIODIC: tuple[Boundary, Boundary] = ("periodic", "periodic")
WALLS: tuple[Boundary, Boundary] = ("no_slip", "no_slip")
CUBE = Grid((8, 8, 8), (0.5, 0.5, 0.5))
CHANNEL: Boundaries = (PERIODIC, PERIODIC, ("no_slip", "free_slip"))
THROUGH: Boundaries = (("inflow", "outflow"), PERIODIC, ("outflow", "outflow"))
ANGLE = 0.3
"""Phase that the waves below advance per snapshot."""
TEMPERATURE = FieldSpec("temperature", "scalar", "K")


def save(
    path: Path,
    fields: dict[str, Tensor],
    grid: Grid,
    *,
    specs: Sequence[FieldSpec] = (VELOCITY,),
    solid: Tensor | None = None,
) -> Store:
    """A store of fields (trajectory, time, …)."""
    num_trajectories, num_times = next(iter(fields.values())).shape[:2]
    with create_store(
        path,
        grid=grid,
        specs={spec.name: spec for spec in specs},
        family="waves",
        num_trajectories=num_trajectories,
        times=range(num_times),
        solid=None if solid is None else solid.expand(num_trajectories, *grid.shape),
    ) as writer:
        for name, values in fields.items():
            for trajectory in range(num_trajectories):
                writer.write(name, trajectory, slice(None), values[trajectory])
    return open_store(path)


def wave(grid: Grid, component: int, along: int, mode: int, num_times: int = 6) -> Tensor:
    """A travelling wave in one component of the flux, two trajectories of another phase: a circle in phase space."""
    n = grid.shape[along]
    i = torch.arange(n, dtype=torch.float64).reshape([n if a == along else 1 for a in range(3)])
    u = torch.zeros(2, num_times, 3, *grid.shape, dtype=torch.float64)
    for trajectory in range(2):
        for time in range(num_times):
            u[trajectory, time, component] = (2 * math.pi * mode * i / n - ANGLE * time + trajectory).sin()
    return operators.flux_of(u, grid)


def turbulence(grid: Grid, num_times: int = 4) -> Tensor:
    potential = torch.randn(2, num_times, 3, *grid.shape, dtype=torch.float64)
    return operators.curl(potential, grid)


class Identity:
    compression = 1

    def encode(self, packed: Tensor, geometry: Geometry, family: str) -> Tensor:
        assert family == "waves" and packed.dtype == torch.float64
        return packed

    def decode(self, latent: Tensor, geometry: Geometry, family: str, exact: bool) -> Tensor:
        return latent


class BoxAverage(Identity):
    """Means over 2³ cells and back: an orthogonal projection P."""

    compression = 2

    def encode(self, packed: Tensor, geometry: Geometry, family: str) -> Tensor:
        return torch.nn.functional.avg_pool3d(packed, 2)

    def decode(self, latent: Tensor, geometry: Geometry, family: str, exact: bool) -> Tensor:
        for dim in (-3, -2, -1):
            latent = latent.repeat_interleave(2, dim)
        return latent


class Jitter(Identity):
    """Adds to the latents what has nothing to do with the flow, anew each time."""

    def __init__(self, size: float) -> None:
        self.size = size

    def encode(self, packed: Tensor, geometry: Geometry, family: str) -> Tensor:
        return packed + self.size * torch.randn(packed.shape, dtype=torch.float64)


class Units(Identity):
    """Channels of very different sizes, far from zero, and one that never changes."""

    factors = torch.tensor([1e-3, 1.0, 1e4], dtype=torch.float64).reshape(3, 1, 1, 1)

    def encode(self, packed: Tensor, geometry: Geometry, family: str) -> Tensor:
        z = (packed + 0.5) * self.factors
        return torch.cat([z, torch.full_like(z[:, :1], 0.1)], 1)

    def decode(self, latent: Tensor, geometry: Geometry, family: str, exact: bool) -> Tensor:
        return latent[:, :3] / self.factors - 0.5


def test_a_perfect_coder_is_found_perfect(tmp_path: Path) -> None:
    store = save(tmp_path / "s.zarr", {"velocity": turbulence(CUBE)}, CUBE)
    result = measure_latents(Identity(), store, [0, 1])
    json.dumps(result, allow_nan=False)
    zero = {
        "vrmse",
        "idempotence",
        "latent_drift",
        "random_latent_drift",
        "shift_x_error",
        "shift_y_error",
        "shift_z_error",
    }
    zero |= {
        f"{move}_{what}" for move in ("reflection_y", "reflection_z", "rotation_yz") for what in ("error", "vrmse")
    }
    one = {"curvature_ratio", "roughness_ratio"}
    one |= {f"{what}_{band}" for what in ("energy_retained", "coherence") for band in ("low", "mid", "high")}
    size = {f"{what}_{how}" for what in ("latent", "field", "reconstruction") for how in ("curvature", "roughness")}
    gain = {f"noise_gain_{sigma}" for sigma in (0.01, 0.03, 0.1)}
    assert set(result) == zero | one | size | gain | {"distance_ratio_spread"}
    assert {name: result[name] for name in zero} == dict.fromkeys(zero, 0.0)
    for name in one:
        assert result[name] == pytest.approx(1.0, abs=0.02)
    for name in one - {"curvature_ratio", "roughness_ratio"}:
        assert result[name] == pytest.approx(1.0, abs=1e-12)
    # three components of one size: a noise of σ standard deviations is an error of σ times the fluctuations
    for name in gain:
        assert result[name] == pytest.approx(1.0, abs=0.03)
    # snapshots that know nothing of each other
    assert result["field_curvature"] == pytest.approx(2 * math.pi / 3, abs=0.1)
    assert result["field_roughness"] == pytest.approx(math.sqrt(3), abs=0.1)
    assert result["distance_ratio_spread"] < 0.01


def test_a_circle_has_the_curvature_of_its_arcs(tmp_path: Path) -> None:
    store = save(tmp_path / "s.zarr", {"velocity": wave(CUBE, 1, 0, 1)}, CUBE)
    for batch_size in (1, 2, 3, 6):
        result = measure_latents(Identity(), store, [0, 1], batch_size=batch_size, num_probes=1)
        for name in ("latent", "field", "reconstruction"):
            assert result[f"{name}_curvature"] == pytest.approx(ANGLE, rel=1e-9)
            assert result[f"{name}_roughness"] == pytest.approx(math.tan(ANGLE / 2), rel=1e-9)
        assert result["distance_ratio_spread"] < 1e-9


@pytest.mark.parametrize("mode", [1, 2])
def test_box_averages_retain_what_the_transfer_function_says(tmp_path: Path, mode: int) -> None:
    """P e_k = c² e_k + an alias of size c s, with c, s = cos, sin of kh/2; a cell's shift turns the alias' sign."""
    grid = Grid((16, 4, 4), (0.5, 0.5, 0.5))
    store = save(tmp_path / "s.zarr", {"velocity": wave(grid, 1, 0, mode)}, grid)
    result = measure_latents(BoxAverage(), store, [0, 1], reflections=(0, 1, 2))
    s = math.sin(math.pi * mode / 16)
    assert result["vrmse"] == pytest.approx(s, rel=1e-9)
    assert result["half_shift_x_error"] == pytest.approx(2 * s, rel=1e-9)
    for name in ("shift_x_error", "shift_y_error", "half_shift_y_error", "reflection_x_error", "reflection_y_error"):
        assert result[name] < 1e-12
    for name in ("idempotence", "latent_drift", "random_latent_drift"):
        assert result[name] < 1e-12
    assert result["reflection_x_vrmse"] == pytest.approx(s, rel=1e-9)
    assert result["reflection_z_vrmse"] == pytest.approx(s, rel=1e-9)


def test_energy_and_coherence_by_band(tmp_path: Path) -> None:
    """Of 16 cells the bands hold the modes 1, 2 … 3 and 4 … 8; the alias of mode m, 8 − m, is in the last."""
    grid = Grid((16, 4, 4), (0.5, 0.5, 0.5), (PERIODIC, WALLS, WALLS))
    for mode, band in ((1, "low"), (2, "mid"), (3, "mid")):
        store = save(tmp_path / f"{mode}.zarr", {"velocity": wave(grid, 0, 0, mode)}, grid)
        c = math.cos(math.pi * mode / 16)
        result = measure_latents(BoxAverage(), store, [1], num_probes=1)
        assert result[f"energy_retained_{band}"] == pytest.approx(c**4, rel=1e-9)
        assert result[f"coherence_{band}"] == pytest.approx(1.0, rel=1e-9)
        # in the other bands the flow has nothing
        assert {name for name in result if name.startswith(("energy", "coherence"))} == {
            f"energy_retained_{band}",
            f"coherence_{band}",
        }

    class Flip(Identity):
        def decode(self, latent: Tensor, geometry: Geometry, family: str, exact: bool) -> Tensor:
            return -0.5 * latent

    result = measure_latents(Flip(), store, [0], num_probes=1)
    assert result["energy_retained_mid"] == pytest.approx(0.25) and result["coherence_mid"] == pytest.approx(-1.0)


def test_jitter_makes_a_trajectory_rough(tmp_path: Path) -> None:
    store = save(tmp_path / "s.zarr", {"velocity": wave(CUBE, 1, 0, 1)}, CUBE)
    calm, shaken, noise = (measure_latents(Jitter(size), store, [0, 1]) for size in (0.0, 0.02, 10.0))
    for name in ("curvature", "roughness"):
        assert calm[f"{name}_ratio"] == pytest.approx(1.0) and shaken[f"{name}_ratio"] > 1.5
        assert calm[f"field_{name}"] == shaken[f"field_{name}"]
    assert noise["latent_curvature"] == pytest.approx(2 * math.pi / 3, abs=0.05)
    assert noise["latent_roughness"] == pytest.approx(math.sqrt(3), abs=0.05)
    assert noise["distance_ratio_spread"] > shaken["distance_ratio_spread"] > 1e-3
    assert noise["latent_drift"] > shaken["latent_drift"] > 0.05 and shaken["idempotence"] > 0.05


def test_the_spread_of_distances_is_that_of_all_pairs_measured(tmp_path: Path) -> None:
    """Latents that see one phase of a wave only: distances by hand."""
    flux = wave(CUBE, 1, 0, 1)
    store = save(tmp_path / "s.zarr", {"velocity": flux}, CUBE)

    class OnePhase(Identity):
        def encode(self, packed: Tensor, geometry: Geometry, family: str) -> Tensor:
            return packed[:, 1:2, :1, :1, :1]

        def decode(self, latent: Tensor, geometry: Geometry, family: str, exact: bool) -> Tensor:
            return latent.expand(-1, 3, 8, 8, 8) * torch.linspace(-1.0, 1.0, 8).double()

    result = measure_latents(OnePhase(), store, [0, 1], batch_size=4, num_probes=1)
    pairs = [(t - 1, t) for t in range(1, 6)] + [(0, t) for t in range(2, 6)]
    ratios = [
        float((flux[k, a, 1, 0, 0, 0] - flux[k, b, 1, 0, 0, 0]).abs() / (flux[k, a] - flux[k, b]).norm())
        for k in range(2)
        for a, b in pairs
    ]
    r = torch.tensor(ratios, dtype=torch.float64)
    assert result["distance_ratio_spread"] == pytest.approx(float(r.std(correction=0) / r.mean()), rel=1e-9)


def test_units_of_the_channels_do_not_matter(tmp_path: Path) -> None:
    store = save(tmp_path / "s.zarr", {"velocity": turbulence(CUBE)}, CUBE)
    plain, scaled = (measure_latents(coder, store, [0, 1], batch_size=2) for coder in (Identity(), Units()))
    assert set(plain) == set(scaled)
    for name in ("latent_curvature", "latent_roughness", "distance_ratio_spread"):
        assert scaled[name] == pytest.approx(plain[name], rel=1e-6)
    for sigma in (0.01, 0.03, 0.1):
        assert scaled[f"noise_gain_{sigma}"] == pytest.approx(1.0, abs=0.03)
    assert max(scaled[name] for name in ("idempotence", "latent_drift", "random_latent_drift")) < 1e-9


def test_the_gain_of_noise_is_the_decoder_s(tmp_path: Path) -> None:
    """Of a decoder that amplifies what is large, the gain grows with σ; the noise is the same in every run."""
    store = save(tmp_path / "s.zarr", {"velocity": turbulence(CUBE)}, CUBE)

    class Threshold(Identity):
        """Decodes the latents, and ten times what is beyond 3.5 standard deviations."""

        def decode(self, latent: Tensor, geometry: Geometry, family: str, exact: bool) -> Tensor:
            size = latent.std()
            return latent + 9 * torch.sign(latent) * (latent.abs() - 3.5 * size).clamp(min=0.0)

    result = measure_latents(Threshold(), store, [0, 1])
    again = measure_latents(Threshold(), store, [0, 1])
    assert result == again
    assert measure_latents(Threshold(), store, [0, 1], seed=1)["noise_gain_0.1"] != result["noise_gain_0.1"]
    assert result["noise_gain_0.1"] > result["noise_gain_0.01"] > 0.99


def test_a_coder_that_knows_where_it_is_is_found_out(tmp_path: Path) -> None:
    store = save(tmp_path / "s.zarr", {"velocity": turbulence(CUBE)}, CUBE)

    class Here(Identity):
        """Halves the flow in the half of small x."""

        def decode(self, latent: Tensor, geometry: Geometry, family: str, exact: bool) -> Tensor:
            return latent * torch.linspace(0.5, 1.0, 8).double().reshape(8, 1, 1)

    result = measure_latents(Here(), store, [0, 1], reflections=(0, 1, 2), rotations=((0, 1), (1, 2)))
    assert min(result[name] for name in ("shift_x_error", "reflection_x_error", "rotation_xy_error")) > 0.05
    for name in ("shift_y_error", "shift_z_error", "reflection_y_error", "reflection_z_error", "rotation_yz_error"):
        assert result[name] == 0.0
    assert result["idempotence"] > 0.05 and result["reflection_y_vrmse"] == pytest.approx(result["vrmse"], rel=0.1)


def test_errors_of_equivariance_and_of_images_are_different_things(tmp_path: Path) -> None:
    """A coder that knows flows by heart, and gives the same for all others."""
    flux = turbulence(CUBE, 2)
    store = save(tmp_path / "s.zarr", {"velocity": flux}, CUBE)

    class ByHeart(Identity):
        def encode(self, packed: Tensor, geometry: Geometry, family: str) -> Tensor:
            known = [bool((x == flux).flatten(2).all(-1).any()) for x in packed]
            return torch.stack([x if k else 0.5 * x for x, k in zip(packed, known, strict=True)])

    result = measure_latents(ByHeart(), store, [0, 1], num_probes=2)
    assert result["vrmse"] == 0.0
    for name in ("reflection_y", "reflection_z", "rotation_yz"):
        assert result[f"{name}_error"] == pytest.approx(0.5) and result[f"{name}_vrmse"] == pytest.approx(0.5)
    geometry = Geometry(CUBE)
    assert float(vrmse(0.5 * flux[0, 0], flux[0, 0], geometry)) == pytest.approx(0.5)


def test_solids_move_with_the_flow(tmp_path: Path) -> None:
    solid = torch.zeros(8, 8, 8, dtype=torch.bool)
    solid[1:4, 2:6, 3], solid[6, 5, 1:5] = True, True
    geometry = Geometry(CUBE, solid)
    store = save(tmp_path / "s.zarr", {"velocity": geometry.mask(turbulence(CUBE))}, CUBE, solid=solid)

    class Masked(Identity):
        """What it decodes depends on the solids."""

        compression = 2

        def decode(self, latent: Tensor, geometry: Geometry, family: str, exact: bool) -> Tensor:
            return geometry.mask(latent)

    result = measure_latents(Masked(), store, [0, 1], reflections=(0, 1, 2), rotations=((0, 1), (1, 2), (2, 0)))
    moves = [f"reflection_{axis}" for axis in "xyz"] + ["rotation_xy", "rotation_yz", "rotation_zx"]
    for name in [f"{move}_{what}" for move in moves for what in ("error", "vrmse")]:
        assert result[name] == 0.0
    assert all(result[f"{half}shift_{axis}_error"] == 0.0 for half in ("", "half_") for axis in "xyz")


def test_fields_beside_the_velocity_go_along(tmp_path: Path) -> None:
    """Temperature first in the store; what z-velocity is decoded to depends on it."""
    temperature = torch.rand(2, 4, 8, 8, 8, dtype=torch.float64)
    fields = {"temperature": temperature, "velocity": turbulence(CUBE)}
    store = save(tmp_path / "s.zarr", fields, CUBE, specs=(TEMPERATURE, VELOCITY))

    class Coupled(Identity):
        def __init__(self, order: tuple[int, ...]) -> None:
            self.order = order

        def decode(self, latent: Tensor, geometry: Geometry, family: str, exact: bool) -> Tensor:
            temperature, x, y, z = latent[:, list(self.order)].unbind(1)
            out = torch.stack([temperature, x, y, z * (1 + temperature)], 1)
            return out[:, [self.order.index(i) for i in range(4)]]

    result = measure_latents(Coupled((0, 1, 2, 3)), store, [0, 1])
    assert result["reflection_y_error"] == result["shift_x_error"] == 0.0 < result["vrmse"]
    assert result["reflection_z_error"] > 0.01  # temperatures in cells, z-velocities on the faces between them
    other = measure_latents(Coupled((3, 0, 1, 2)), store, [0, 1], fields=["velocity", "temperature"])
    assert other["vrmse"] == result["vrmse"] and other["reflection_y_error"] == 0.0
    alone = measure_latents(Identity(), store, [0, 1], fields=["velocity"])
    assert alone["vrmse"] == 0.0 and alone["rotation_yz_error"] == 0.0


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Grid((8, 6, 6), (1.0, 1.0, 1.0), CHANNEL), {"shift_x", "shift_y", "reflection_y"}),
        (
            Grid((8, 6, 6), (1.0, 1.0, 1.0), (PERIODIC, PERIODIC, WALLS)),
            {"shift_x", "shift_y", "reflection_y", "reflection_z"},
        ),
        (
            Grid((8, 6, 6), (1.0, 1.0, 1.0), (PERIODIC, WALLS, WALLS)),
            {"shift_x", "reflection_y", "reflection_z", "rotation_yz"},
        ),
        (Grid((8, 6, 4), (1.0, 1.0, 1.0)), {"shift_x", "shift_y", "shift_z", "reflection_y", "reflection_z"}),
        (Grid((8, 6, 6), (1.0, 1.0, 0.5)), {"shift_x", "shift_y", "shift_z", "reflection_y", "reflection_z"}),
        (Grid((8, 8, 1), (1.0, 1.0, 1.0)), {"shift_x", "shift_y", "reflection_y"}),
        (Grid((8, 4, 4), (1.0, 1.0, 1.0), THROUGH), {"shift_y", "reflection_y"}),
    ],
)  # fmt: skip
def test_symmetries_that_a_box_does_not_have_are_left_out(tmp_path: Path, grid: Grid, expected: set[str]) -> None:
    store = save(tmp_path / "s.zarr", {"velocity": turbulence(grid, 1)}, grid)
    result = measure_latents(Identity(), store, [0])
    assert {name.removesuffix("_error") for name in result if name.endswith("_error")} == expected
    # of one snapshot there is no motion
    assert not [name for name in result if "curvature" in name or "roughness" in name or "distance" in name]
    assert all(math.isfinite(value) for value in result.values())


def test_axes_of_one_latent_cell_are_not_shifted(tmp_path: Path) -> None:
    grid = Grid((8, 4, 2), (1.0, 1.0, 1.0))
    store = save(tmp_path / "s.zarr", {"velocity": turbulence(grid, 3)}, grid)
    names = set(measure_latents(BoxAverage(), store, [0]))
    assert {"shift_x_error", "half_shift_x_error", "shift_y_error"} <= names
    assert not {"shift_z_error", "half_shift_z_error"} & names


def test_how_it_decodes_and_how_far_it_is(tmp_path: Path) -> None:
    store = save(tmp_path / "s.zarr", {"velocity": turbulence(CUBE, 5)}, CUBE)
    asked: set[bool] = set()
    batches: set[int] = set()

    class Listening(Identity):
        def decode(self, latent: Tensor, geometry: Geometry, family: str, exact: bool) -> Tensor:
            asked.add(exact)
            batches.add(len(latent))
            return latent

    seen: list[tuple[int, int]] = []
    measure_latents(Listening(), store, [1], batch_size=2, num_probes=3, progress=lambda *at: seen.append(at))
    assert asked == {True} and batches == {1, 2}
    assert seen == [(2, 8), (4, 8), (5, 8), (7, 8), (8, 8)]
    measure_latents(Listening(), store, [1], exact=False)
    assert asked == {True, False}


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    store = save(tmp_path / "s.zarr", {"velocity": turbulence(CUBE)}, CUBE)
    for trajectories, batch_size, num_probes in (([], 4, 4), ([0], 0, 4), ([0], 4, 0)):
        with pytest.raises(ValueError, match="Expected at least one of each, got"):
            measure_latents(Identity(), store, trajectories, batch_size=batch_size, num_probes=num_probes)
    with pytest.raises(ValueError, match="Expected a trajectory from 0 to 1, got 2"):
        measure_latents(Identity(), store, [2])
    with pytest.raises(ValueError, match="Expected fields of velocity, got 'pressure'"):
        measure_latents(Identity(), store, [0], fields=["pressure"])

    class Broken(Identity):
        where = "encode"

        def encode(self, packed: Tensor, geometry: Geometry, family: str) -> Tensor:
            return packed * math.nan if self.where == "encode" else packed

        def decode(self, latent: Tensor, geometry: Geometry, family: str, exact: bool) -> Tensor:
            return latent * math.inf

    broken = Broken()
    with pytest.raises(ValueError, match="Expected finite latents from the encoder, got NaN or infinity"):
        measure_latents(broken, store, [0])
    broken.where = "decode"
    with pytest.raises(ValueError, match="Expected finite fields from the decoder, got NaN or infinity"):
        measure_latents(broken, store, [0])
    scalars = save(tmp_path / "t.zarr", {"temperature": torch.rand(1, 2, 8, 8, 8)}, CUBE, specs=(TEMPERATURE,))
    with pytest.raises(ValueError, match="Expected a flux among the fields of .*, got temperature"):
        measure_latents(Identity(), scalars, [0])
    with create_store(
        tmp_path / "z.zarr",
        grid=CUBE,
        specs={"latent": FieldSpec("latent", "vector", "1")},
        family="waves",
        num_trajectories=1,
        times=[0.0],
        channels=5,
    ) as writer:
        writer.write("latent", 0, 0, torch.rand(5, 8, 8, 8))
    with pytest.raises(ValueError, match="Expected a store of fields, got one of latents at .*z.zarr"):
        measure_latents(Identity(), open_store(tmp_path / "z.zarr"), [0])
