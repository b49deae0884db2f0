"""How good a latent space is: how straight its trajectories run, what noise does to it, which scales pass through it.

An autoencoder's error says what it loses; whether a model can advance its latents depends on more. All numbers are
taken in FP64 from one flux of a family, its ``velocity`` or else its first; the other fields go through the coder with
it. Latents are measured in standard units: each channel by its standard deviation over all snapshots.

References: Hénaff, Goris & Simoncelli, Nature Neuroscience 22 (2019), for the curvature; for the spread of distance
ratios compare Lee, Yoon, Son & Park, Regularized autoencoders for isometric representation learning, ICLR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import symmetry
from latentphys.data.store import Store
from latentphys.fields import FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.validators.check import Check
from latentphys.validators.latent_motion import LatentQuality, inverse
from latentphys.validators.pointwise import vrmse

NOISE = (0.01, 0.03, 0.1)
"""Standard deviations of the noise on latents, in those of the channels."""


OPERATOR = "see latentphys.validators.measure_latents"


@runtime_checkable
class Coder(Protocol):
    """What is measured: packed fields ``(b, c, nx, ny, nz)`` to latents ``(b, C, x, y, z)`` and back."""

    @property
    def compression(self) -> int:
        """Cells per latent cell and axis."""
        ...

    def encode(self, packed: Tensor, geometry: Geometry, family: str, /) -> Tensor: ...

    def decode(self, latent: Tensor, geometry: Geometry, family: str, exact: bool, /) -> Tensor: ...


def measure_latents(
    coder: Coder,
    store: Store,
    trajectories: Sequence[int],
    *,
    fields: Sequence[str] | None = None,
    batch_size: int = 4,
    num_probes: int = 4,
    reflections: Sequence[int] = (1, 2),
    rotations: Sequence[tuple[int, int]] = ((1, 2),),
    exact: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Measure a latent space on held-out trajectories, in memory for a few snapshots.

    A first pass encodes and decodes every snapshot:

    - ``vrmse``: of the reconstruction, as `pointwise.vrmse`, which all errors here are.
    - ``latent_curvature``, ``field_curvature``, ``reconstruction_curvature`` [rad]: mean angle between successive
      increments; 0 for a straight trajectory, π/2 for steps of a random walk, 2π/3 for uncorrelated snapshots.
    - ``latent_roughness``, ``field_…``, ``reconstruction_…``: rms |z₊ − 2z + z₋| / rms |z₊ − z₋|; 0 for a steady
      motion, in proportion to Δt for a smooth one, √3 for uncorrelated snapshots.
    - ``curvature_ratio``, ``roughness_ratio``: latent over field; above 1 the latents move less smoothly than the flow.
    - ``distance_ratio_spread``: standard deviation over mean of |z_a − z_b| / |u_a − u_b| over pairs of successive
      snapshots, and of the first and each later one; 0 for a scaled isometry.
    - ``energy_retained_low``, ``…_mid``, ``…_high``: Σ E_rec / Σ E_true over thirds of log k, as `energy_spectra`.
    - ``coherence_low``, …: Re Σ û_rec·û_true* / √(Σ|û_rec|² Σ|û_true|²) over the same bands; 1 is perfect.

    A second pass takes some snapshots z = encode(u) further; means over them:

    - ``noise_gain_0.01``, ``…_0.03``, ``…_0.1``: VRMSE of decode(z + σ s ξ) against decode(z), over σ; s is each
      channel's standard deviation, ξ normal.
    - ``idempotence``: VRMSE of decode(encode(decode(z))) against decode(z). ``latent_drift``: |encode(decode(z)) − z| /
      |z − mean| in standard units; ``random_latent_drift``: the same for normal z of the channels' means and standard
      deviations. Where only some latents are admissible it contains the way to the nearest of them.
    - ``shift_x_error``, …: VRMSE of the reconstruction of u moved by one latent cell along a periodic axis against the
      moved reconstruction: how far the coder is from equivariance. ``half_shift_x_error``, …: by half a latent cell.
    - ``reflection_y_error``, ``rotation_yz_error``, …: the same of mirror images and quarter turns. ``…_vrmse``: VRMSE
      of the reconstruction of the moved flow against the moved flow, to hold against ``vrmse``.

    What a box does not have is left out: symmetries that change the box, axes of a single latent cell, bands without a
    shell or without energy, numbers that do not exist (the curvature of two snapshots, or of a flow at rest).

    By default only y and z are reflected and turned: the mean flows and forcings of the families run along x, so other
    images are flows that the coder was never meant for. So is a mirror image along gravity, of which the scalars would
    have to change sign too. A magnetic field is moved as a velocity; that differs by its sign, which MHD does not know.

    Args:
        coder: an autoencoder, in evaluation mode.
        store: fields in a box.
        trajectories: the held-out ones.
        fields: those that the coder takes, in the order of its channels. Default: all of the store.
        batch_size: snapshots at a time. Default 4.
        num_probes: snapshots of each trajectory for the second pass, evenly spread over it. Default 4.
        reflections: axes to reflect. Default: y and z.
        rotations: planes to turn in. Default: from y to z.
        exact: decode as rollouts do (default) or as in training.
        device: where the coder is.
        seed: of the noise.
        progress: called with (done, total) snapshots.

    Returns:
        name → number, all finite.

    Raises:
        ValueError: no trajectories, no such trajectory, a store of latents, on a sphere or without the fields or
            without a flux, a batch size or number of probes below 1, or a coder that returns NaN or infinity.
    """
    if not trajectories or min(batch_size, num_probes) < 1:
        got = f"{len(trajectories)} trajectories, a batch_size of {batch_size} and {num_probes} probes"
        raise ValueError(f"Expected at least one of each, got {got}.")
    bench = _Bench(coder, store, fields, exact, device)
    quality = LatentQuality()
    probed = sorted({round(i * (store.num_times - 1) / max(num_probes - 1, 1)) for i in range(num_probes)})
    total, done = len(trajectories) * (store.num_times + len(probed)), 0
    for trajectory in trajectories:
        geometry = bench.geometry(trajectory)
        quality.begin()
        for frames in _chunks(range(store.num_times), batch_size):
            packed = bench.read(trajectory, frames)
            latent = bench.encode(packed, geometry)
            quality.update(latent, bench.flux(packed), bench.flux(bench.decode(latent, geometry)), geometry)
            done += len(frames)
            if progress is not None:
                progress(done, total)
    result = quality.summary()
    mean, size = quality.scale()
    probes = _Probes(bench, mean, size, torch.Generator().manual_seed(seed))
    for trajectory in trajectories:
        geometry = bench.geometry(trajectory)
        moves = tuple(_moves(geometry, coder.compression, reflections, rotations))
        for frames in _chunks(probed, batch_size):
            packed = bench.read(trajectory, frames)
            probes.latents(packed, geometry)
            probes.symmetries(packed, geometry, moves)
            done += len(frames)
            if progress is not None:
                progress(done, total)
    return {name: value for name, value in (result | probes.summary()).items() if math.isfinite(value)}


def latent_checks(measured: Mapping[str, float], store: Store) -> tuple[Check, ...]:
    """What `measure_latents` found in a store, to stand in a report; none of it is judged."""
    dtype = ", ".join(sorted({str(store.array(name).dtype) for name in store.specs}))
    return tuple(
        Check.info(f"latents/{name}", value, family=store.family, unit="1", operator=OPERATOR, dtype=dtype)
        for name, value in measured.items()
    )


def _chunks(frames: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(frames), size):
        yield frames[start : start + size]


class _Bench:
    """A coder and a store put together: packed fields in and out, on the CPU in FP64."""

    def __init__(
        self, coder: Coder, store: Store, fields: Sequence[str] | None, exact: bool, device: torch.device | str
    ) -> None:
        names = list(store.specs) if fields is None else list(fields)
        unknown = [name for name in names if name not in store.specs]
        if unknown:
            raise ValueError(f"Expected fields of {', '.join(store.specs)}, got {unknown[0]!r}.")
        if store.attributes.get("channels") is not None:
            raise ValueError(
                f"Expected a store of fields, got one of latents at {store.path}; pass what it was made of."
            )
        self.coder, self.store, self.exact, self.device = coder, store, exact, device
        self.grid: Grid = store.grid
        self.specs: dict[str, FieldSpec] = {name: store.specs[name] for name in names}
        self.channels: dict[str, slice] = {}
        start = 0
        for name, spec in self.specs.items():
            self.channels[name] = slice(start, start + (1 if spec.kind == "scalar" else 3))
            start = self.channels[name].stop
        fluxes = [name for name, spec in self.specs.items() if spec.kind == "flux"]
        if not fluxes:
            raise ValueError(f"Expected a flux among the fields of {store.path}, got {', '.join(names)}.")
        self.measured = self.channels["velocity" if "velocity" in fluxes else fluxes[0]]

    def geometry(self, trajectory: int) -> Geometry:
        """The box of a trajectory, where the coder is; what it works out about itself is then worked out once."""
        return self.store.geometry(trajectory).to(self.device)

    def read(self, trajectory: int, frames: Sequence[int]) -> Float[Tensor, "b c nx ny nz"]:
        parts = []
        for name, spec in self.specs.items():
            values = torch.stack([self.store.read(name, trajectory, frame).double() for frame in frames])
            parts.append(values.unsqueeze(-4) if spec.kind == "scalar" else values)
        return torch.cat(parts, dim=-4)

    def flux(self, packed: Float[Tensor, "b c nx ny nz"]) -> Float[Tensor, "b 3 nx ny nz"]:
        return packed[:, self.measured]

    def move(self, packed: Float[Tensor, "b c nx ny nz"], move: _Move) -> Float[Tensor, "b c nx ny nz"]:
        """All fields moved by a symmetry."""
        parts = [move.apply(packed[:, self.channels[name]], spec.kind) for name, spec in self.specs.items()]
        return torch.cat(parts, dim=-4)

    @torch.no_grad()
    def encode(self, packed: Float[Tensor, "b c nx ny nz"], geometry: Geometry) -> Float[Tensor, "b k x y z"]:
        latent = self.coder.encode(packed.to(self.device), geometry, self.store.family)
        return _finite(latent, "latents from the encoder")

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b k x y z"], geometry: Geometry) -> Float[Tensor, "b c nx ny nz"]:
        packed = self.coder.decode(latent.to(self.device), geometry, self.store.family, self.exact)
        return _finite(packed, "fields from the decoder")


def _finite(x: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"Expected finite {what}, got NaN or infinity; was the coder trained, and on this family?")
    return x.cpu().double()


@dataclass(frozen=True)
class _Move:
    """A symmetry of one box.

    Args:
        name: such as ``reflection_y``.
        image: the box after it.
        apply: what it does to a field of a placement.
        is_image: whether the moved flow is a test of its own, as mirror images are and shifted flows are not.
    """

    name: str
    image: Geometry
    apply: Callable[[Tensor, symmetry.Placement], Tensor]
    is_image: bool


def _moves(
    geometry: Geometry, compression: int, reflections: Sequence[int], rotations: Sequence[tuple[int, int]]
) -> Iterator[_Move]:
    """The symmetries that leave the box as it is, but for its solids."""
    grid = geometry.grid
    for axis, name in enumerate("xyz"):
        if not grid.periodic[axis] or grid.shape[axis] <= compression:
            continue
        for prefix, by in (("shift", compression), ("half_shift", compression // 2)):
            if by:
                cells = [by if a == axis else 0 for a in range(3)]
                apply = partial(_shift, grid=grid, cells=cells)
                yield _Move(f"{prefix}_{name}", symmetry.shift_geometry(geometry, cells), apply, False)
    for axis in reflections:
        image = symmetry.reflect_geometry(geometry, axis)
        if image.grid == grid and grid.shape[axis] > 1 and not any(grid.open_sides[axis]):
            apply = partial(_reflect, geometry=geometry, axis=axis)
            yield _Move(f"reflection_{'xyz'[axis]}", image, apply, True)
    for plane in rotations:
        image, (a, b) = symmetry.rotate_geometry(geometry, plane), plane
        if image.grid == grid and grid.shape[b] > 1 and not any(grid.open_sides[b]):
            apply = partial(_rotate, geometry=geometry, plane=plane)
            yield _Move(f"rotation_{'xyz'[a]}{'xyz'[b]}", image, apply, True)


def _shift(field: Tensor, placement: symmetry.Placement, grid: Grid, cells: Sequence[int]) -> Tensor:
    return symmetry.shift(field, grid, cells)


def _reflect(field: Tensor, placement: symmetry.Placement, geometry: Geometry, axis: int) -> Tensor:
    return symmetry.reflect(field, geometry, axis, placement)


def _rotate(field: Tensor, placement: symmetry.Placement, geometry: Geometry, plane: tuple[int, int]) -> Tensor:
    return symmetry.rotate(field, geometry, plane, placement)


@dataclass
class _Probes:
    """What becomes of single snapshots under noise, repetition and symmetries."""

    bench: _Bench
    mean: Float[Tensor, " k"]
    size: Float[Tensor, " k"]
    generator: torch.Generator
    values: dict[str, list[Tensor]] = field(default_factory=dict)

    def _add(self, name: str, values: Float[Tensor, " b"]) -> None:
        self.values.setdefault(name, []).append(values)

    def _normal(self, like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=self.generator, dtype=torch.float64)
        return self.size[:, None, None, None] * noise

    def _drift(self, latent: Tensor, again: Tensor) -> Float[Tensor, " b"]:
        weights = inverse(self.size)[:, None, None, None]
        distance = ((again - latent) * weights).flatten(1).norm(dim=1)
        return distance / ((latent - self.mean[:, None, None, None]) * weights).flatten(1).norm(dim=1)

    def latents(self, packed: Float[Tensor, "b c nx ny nz"], geometry: Geometry) -> None:
        bench = self.bench
        latent = bench.encode(packed, geometry)
        decoded = bench.decode(latent, geometry)
        once = bench.flux(decoded)
        noise = self._normal(latent)
        for sigma in NOISE:
            noisy = bench.flux(bench.decode(latent + sigma * noise, geometry))
            self._add(f"noise_gain_{sigma}", vrmse(noisy, once, geometry) / sigma)
        again = bench.encode(decoded, geometry)
        self._add("idempotence", vrmse(bench.flux(bench.decode(again, geometry)), once, geometry))
        self._add("latent_drift", self._drift(latent, again))
        random = self.mean[:, None, None, None] + self._normal(latent)
        back = bench.encode(bench.decode(random, geometry), geometry)
        self._add("random_latent_drift", self._drift(random, back))

    def symmetries(self, packed: Float[Tensor, "b c nx ny nz"], geometry: Geometry, moves: Sequence[_Move]) -> None:
        bench = self.bench
        reconstruction = bench.decode(bench.encode(packed, geometry), geometry)
        for move in moves:
            moved = bench.move(packed, move)
            of_moved = bench.flux(bench.decode(bench.encode(moved, move.image), move.image))
            expected = bench.flux(bench.move(reconstruction, move))
            self._add(f"{move.name}_error", vrmse(of_moved, expected, move.image))
            if move.is_image:
                self._add(f"{move.name}_vrmse", vrmse(of_moved, bench.flux(moved), move.image))

    def summary(self) -> dict[str, float]:
        return {name: float(torch.cat(values).mean()) for name, values in self.values.items()}
