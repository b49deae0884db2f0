"""What survives when trajectories part: kinetic energy and its spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentphys import operators
from latentphys.grid import Geometry, Grid
from latentphys.validators.check import Check
from latentphys.validators.series import Curve, Series

REFERENCE = "reference"
BANDS = ("low", "mid", "high")
SPECTRUM_ERROR = "rms over the shells of |log10 E_model/E_reference|, E averaged over frames and trajectories"
ENERGY = "1/2 <u.u> on the faces, mean over frames and trajectories"


@dataclass(frozen=True)
class Spectrum:
    """Kinetic energy over wave number: ``energy`` summed over all shells is ½⟨u·u⟩ [m²/s²].

    Args:
        direction: ``shell`` for the shells of |k|, or the axis ``x``, ``y``, ``z`` along which the wave number runs.
        spacing: width Δk of a shell [rad/m]; shell m holds the wave numbers nearest to m Δk.
        resolved: the last shell that is complete (the Nyquist wave number of the coarsest axis).
        energy: energy per shell, shape (num_shells,) [m²/s²].
    """

    direction: str
    spacing: float
    resolved: int
    energy: Float[Tensor, " shells"]

    @property
    def wavenumbers(self) -> tuple[float, ...]:
        """k of the shells 1 … resolved [rad/m]."""
        return tuple(m * self.spacing for m in range(1, self.resolved + 1))

    @property
    def density(self) -> Float[Tensor, " resolved"]:
        """E(k) of the shells 1 … resolved [m³/s²]."""
        return self.energy[1 : self.resolved + 1] / self.spacing


def energy_spectra(flux: Float[Tensor, "3 nx ny nz"], geometry: Geometry) -> tuple[Spectrum, ...]:
    """Energy spectra of one snapshot over the homogeneous directions, in FP64.

    In a triply periodic box one spectrum over the shells of |k|, of the velocity with its closed faces at zero; Δk is
    then 2π over the shortest side, so that no shell is empty. In any other box one spectrum along each periodic axis,
    averaged over the other two. A box without a periodic axis has none.

    Args:
        flux: velocity flux [m³/s].
        geometry: the box and its solids.
    """
    grid = geometry.grid
    u = operators.velocity(geometry.mask(flux.double()), grid)
    if all(grid.periodic):
        shells, weights, spacing = _shells(grid)
        modes = torch.fft.rfftn(u, dim=(-3, -2, -1), norm="forward").abs().square().sum(0)
        energy = torch.bincount(shells.flatten(), (0.5 * weights * modes).flatten())
        nyquist = min((math.pi / h for h, n in zip(grid.spacing, grid.shape, strict=True) if n > 1), default=0.0)
        return (Spectrum("shell", spacing, int(nyquist / spacing + 1e-9), energy),)
    spectra = []
    for axis in (axis for axis in range(3) if grid.periodic[axis] and grid.shape[axis] > 1):
        along = u.movedim(axis + 1, -1)
        modes = torch.fft.rfft(along, dim=-1, norm="forward").abs().square().sum(0).mean((0, 1))
        energy = 0.5 * _mirrored(grid.shape[axis]) * modes
        spectra.append(Spectrum("xyz"[axis], 2 * math.pi / grid.lengths[axis], grid.shape[axis] // 2, energy))
    return tuple(spectra)


def _mirrored(n: int) -> Float[Tensor, " half"]:
    """How many modes of a length-n transform each entry of its real half stands for: 2, but 1 for 0 and Nyquist."""
    weights = torch.full((n // 2 + 1,), 2.0, dtype=torch.float64)
    weights[0] = 1.0
    if n % 2 == 0:
        weights[-1] = 1.0
    return weights


@lru_cache(maxsize=4)
def _shells(grid: Grid) -> tuple[Int[Tensor, "nx ny half"], Float[Tensor, " half"], float]:
    """Shell of each mode, the modes each stands for, and Δk [rad/m]."""
    spacing = 2 * math.pi / grid.shortest_side
    fft, rfft, (nx, ny, nz), (dx, dy, dz) = torch.fft.fftfreq, torch.fft.rfftfreq, grid.shape, grid.spacing
    cycles = [
        transform(n, h, dtype=torch.float64) for transform, n, h in ((fft, nx, dx), (fft, ny, dy), (rfft, nz, dz))
    ]
    kx, ky, kz = torch.meshgrid(*(2 * math.pi * f for f in cycles), indexing="ij")
    k = (kx.square() + ky.square() + kz.square()).sqrt()
    return (k / spacing).round().long(), _mirrored(grid.shape[2]), spacing


def band(shell: int, resolved: int) -> str:
    """The third of log k, of 1 to `resolved` shells, that a shell of the spectrum is in."""
    return BANDS[min(2, int(3 * math.log(shell) / math.log(resolved) + 1e-9)) if resolved > 1 else 0]


def spectrum_errors(model: tuple[Spectrum, ...], reference: tuple[Spectrum, ...]) -> dict[str, float]:
    """Log-spectral error per band: rms of log10(E_model/E_reference) over its shells [decades].

    The bands ``low``, ``mid`` and ``high`` split the resolved wave numbers into three parts, equally wide in log k.
    Energies below rounding (ε² of the total) count as ε². A band without a shell (four cells per axis or fewer) is
    left out.
    """
    squares: dict[str, list[float]] = {name: [] for name in BANDS}
    for u, v in zip(model, reference, strict=True):
        tiny = max(torch.finfo(torch.float64).eps ** 2 * float(v.energy.sum()), torch.finfo(torch.float64).tiny)
        ratio = (u.energy.clamp(min=tiny) / v.energy.clamp(min=tiny)).log10()
        for m in range(1, u.resolved + 1):
            squares[band(m, u.resolved)].append(float(ratio[m]) ** 2)
    return {name: math.sqrt(sum(values) / len(values)) for name, values in squares.items() if values}


class Statistics:
    """Collects energy and spectra of several flows (``model``, ``reference``, …), snapshot by snapshot."""

    def __init__(self) -> None:
        self.energies: dict[str, list[list[float]]] = {}
        self._spectra: dict[str, tuple[Spectrum, ...]] = {}
        self._counts: dict[str, int] = {}

    def update(self, label: str, flux: Float[Tensor, "3 nx ny nz"], geometry: Geometry, frame: int, first: int) -> None:
        """Take in one frame [m³/s]; spectra average the frames from ``first`` on."""
        rows = self.energies.setdefault(label, [])
        if frame == 0:
            rows.append([])
        rows[-1].append(float(operators.kinetic_energy(flux.double(), geometry.grid)))
        if frame < first:
            return
        spectra, sums = energy_spectra(flux, geometry), self._spectra.get(label)
        self._counts[label] = self._counts.get(label, 0) + 1
        self._spectra[label] = spectra if sums is None else _combine(sums, spectra)

    def spectra(self, label: str) -> tuple[Spectrum, ...]:
        """Mean spectra of one flow."""
        count = self._counts[label]
        return tuple(Spectrum(s.direction, s.spacing, s.resolved, s.energy / count) for s in self._spectra[label])

    def checks(self, *, family: str, dtype: str, model: str, reference: str | None) -> list[Check]:
        """Energy of the model, or its ratio to the reference's, and the spectral error per band; for information."""
        about = {"family": family, "dtype": dtype}
        if reference is None:
            return [Check.info("kinetic_energy", _mean(self.energies[model]), unit="m2/s2", operator=ENERGY, **about)]
        ours, theirs = (_mean([row[1:] for row in self.energies[label]]) for label in (model, reference))
        ratio, detail = ours / theirs if theirs else math.inf, f"{ours:.4g} over {theirs:.4g} m2/s2, frames >= 1"
        checks = [Check.info("kinetic_energy_ratio", ratio, unit="1", operator=ENERGY, detail=detail, **about)]
        for band, error in spectrum_errors(self.spectra(model), self.spectra(reference)).items():
            name, detail = f"spectrum_error_{band}", f"{band} third of log k, frames >= 1"
            checks.append(Check.info(name, error, unit="decades", operator=SPECTRUM_ERROR, detail=detail, **about))
        return checks

    def series(self, times: tuple[float, ...]) -> list[Series]:
        """Kinetic energy over time, and the mean spectra."""
        curves = tuple(Curve.over_trajectories(label, rows) for label, rows in self.energies.items())
        caption = "Kinetic energy per unit mass, 1/2 <u.u> on the faces; mean over trajectories, band: their range."
        labels = "time t [s]", "½⟨u·u⟩ [m²/s²]"
        plots = [Series("kinetic_energy", "Kinetic energy", times, *labels, curves, caption=caption)]
        spectra = {label: self.spectra(label) for label in self._spectra}
        for index, first in enumerate(next(iter(spectra.values()))):
            if first.resolved < 2:
                continue
            if first.direction == "shell":
                title, where = "Energy spectrum", "over shells of |k|, closed faces at zero"
            else:
                title = f"Energy spectrum along {first.direction}"
                where = f"along {first.direction}, averaged over the other two axes"
            curves = tuple(Curve(label, tuple(s[index].density.tolist())) for label, s in spectra.items())
            caption = f"Kinetic energy by wave number {where}; mean over frames and trajectories."
            name, labels = f"spectrum_{first.direction}", ("wave number k [rad/m]", "E(k) [m³/s²]")
            plots.append(Series(name, title, first.wavenumbers, *labels, curves, True, caption))
        return plots


def _combine(a: tuple[Spectrum, ...], b: tuple[Spectrum, ...]) -> tuple[Spectrum, ...]:
    return tuple(Spectrum(s.direction, s.spacing, s.resolved, s.energy + t.energy) for s, t in zip(a, b, strict=True))


def _mean(rows: list[list[float]]) -> float:
    return sum(sum(row) / len(row) for row in rows) / len(rows)
