"""How latents move beside the flow they stand for, and which scales of the flow pass through them.

Latents count in standard units, each channel by its standard deviation over all snapshots. That is known only at the
end, so inner products are kept channel by channel, and weights applied to them.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.grid import Geometry
from latentphys.validators.pointwise import vrmse
from latentphys.validators.statistics import band, energy_spectra

ROUNDING = 1e-24
"""Share of a flow's energy below which a band holds nothing but rounding."""


class LatentQuality:
    """Smoothness in time and retained scales, from trajectories in order: `begin` each, then `update` in pieces."""

    def __init__(self) -> None:
        self._paths = {name: Path() for name in ("latent", "field", "reconstruction")}
        self._means: list[Tensor] = []
        self._variances: list[Tensor] = []
        self._errors: list[Tensor] = []
        self._energies: dict[str, list[float]] = {}

    def begin(self) -> None:
        """The next snapshots are of another trajectory."""
        for path in self._paths.values():
            path.begin()

    def update(
        self,
        latent: Float[Tensor, "t c x y z"],
        flux: Float[Tensor, "t 3 nx ny nz"],
        reconstruction: Float[Tensor, "t 3 nx ny nz"],
        geometry: Geometry,
    ) -> None:
        """Take in successive snapshots, on the CPU in FP64: latents, the flux [m³/s], and what they decode to."""
        self._means.append(latent.mean((-3, -2, -1)))
        self._variances.append(latent.var((-3, -2, -1), correction=0))
        self._errors.append(vrmse(reconstruction, flux, geometry))
        self._paths["latent"].update(latent)
        for name, value in (("field", flux), ("reconstruction", reconstruction)):
            self._paths[name].update(operators.velocity(geometry.mask(value), geometry.grid))
        for u, v in zip(reconstruction, flux, strict=True):
            for name, energy in _band_energies(u, v, geometry).items():
                sums = self._energies.setdefault(name, [0.0, 0.0, 0.0])
                self._energies[name] = [a + b for a, b in zip(sums, energy, strict=True)]

    def scale(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Mean and standard deviation of each latent channel, over all snapshots and latent cells.

        A deviation of the mean's rounding counts as zero.
        """
        means, variances = torch.cat(self._means), torch.cat(self._variances)
        mean, size = means.mean(0), (variances.mean(0) + means.var(0, correction=0)).sqrt()
        return mean, torch.where(size > 1e-12 * mean.abs(), size, 0.0)

    def summary(self) -> dict[str, float]:
        """The numbers of the first pass, see `measure_latents`; NaN where there is nothing to measure."""
        _, size = self.scale()
        weights = {"latent": inverse(size).square(), "field": torch.ones(3), "reconstruction": torch.ones(3)}
        result = {"vrmse": float(torch.cat(self._errors).mean())}
        for measure in ("curvature", "roughness"):
            for name, path in self._paths.items():
                result[f"{name}_{measure}"] = getattr(path, measure)(weights[name].double())
            latent, flow = result[f"latent_{measure}"], result[f"field_{measure}"]
            result[f"{measure}_ratio"] = latent / flow if flow else math.nan
        of_latents, of_fields = (self._paths[name].distances(weights[name].double()) for name in ("latent", "field"))
        ratios = (of_latents / of_fields)[of_fields > 0]
        result["distance_ratio_spread"] = float(ratios.std(correction=0) / ratios.mean()) if len(ratios) else math.nan
        tiny = ROUNDING * sum(theirs for _, theirs, _ in self._energies.values())
        for name, (ours, theirs, common) in self._energies.items():
            result[f"energy_retained_{name}"] = ours / theirs if theirs > tiny else math.nan
            has_both = min(ours, theirs) > tiny
            result[f"coherence_{name}"] = common / math.sqrt(ours * theirs) if has_both else math.nan
        return result


class Path:
    """Inner products of a trajectory's increments, channel by channel, so that weights can wait for the end."""

    def __init__(self) -> None:
        self._turns: list[Float[Tensor, "t 3 c"]] = []
        self._distances: list[Float[Tensor, "t c"]] = []
        self.begin()

    def begin(self) -> None:
        self._first: Tensor | None = None
        self._recent: Tensor | None = None

    def update(self, x: Float[Tensor, "t c x y z"]) -> None:
        x = x.flatten(2)
        seen = 0 if self._recent is None else len(self._recent)
        x = x if self._recent is None else torch.cat([self._recent, x])
        if self._first is None:
            self._first = x[:1]
        steps = x.diff(dim=0)
        before, after = steps[:-1], steps[1:]
        self._turns.append(
            torch.stack([(a * b).sum(-1) for a, b in ((before, before), (before, after), (after, after))], 1)
        )
        self._distances.append(steps[max(seen - 1, 0) :].square().sum(-1))
        # the second snapshot's distance from the first is a step already
        self._distances.append((x[max(seen, 2) :] - self._first).square().sum(-1))
        self._recent = x[-2:]

    def curvature(self, weights: Float[Tensor, " c"]) -> float:
        """Mean angle between successive increments [rad], of those that are not zero."""
        before, product, after = (torch.cat(self._turns) @ weights).unbind(-1)
        is_moving = (before > 0) & (after > 0)
        cosine = product[is_moving] / (before[is_moving] * after[is_moving]).sqrt()
        return float(cosine.clamp(-1.0, 1.0).acos().mean())

    def roughness(self, weights: Float[Tensor, " c"]) -> float:
        """rms |z₊ − 2z + z₋| / rms |z₊ − z₋|, each mean taken over all snapshots."""
        before, product, after = (torch.cat(self._turns) @ weights).sum(0).tolist()
        second, first = before - 2 * product + after, before + 2 * product + after
        return math.sqrt(max(second, 0.0) / first) if first > 0 else math.nan

    def distances(self, weights: Float[Tensor, " c"]) -> Float[Tensor, " pairs"]:
        return (torch.cat(self._distances) @ weights).sqrt()


def _band_energies(u: Tensor, v: Tensor, geometry: Geometry) -> dict[str, tuple[float, float, float]]:
    """Per band the energies of two fluxes [m²/s²] and what they have in common, (E_u + E_v − E_{u−v}) / 2."""
    result: dict[str, tuple[float, float, float]] = {}
    for a, b, d in zip(*(energy_spectra(flux, geometry) for flux in (u, v, u - v)), strict=True):
        for shell in range(1, a.resolved + 1):
            name = band(shell, a.resolved)
            ours, theirs, error = (float(s.energy[shell]) for s in (a, b, d))
            so_far = result.get(name, (0.0, 0.0, 0.0))
            result[name] = (so_far[0] + ours, so_far[1] + theirs, so_far[2] + (ours + theirs - error) / 2)
    return result


def inverse(size: Tensor) -> Tensor:
    """1 / size, and 0 for channels that never change."""
    return torch.where(size > 0, 1 / size, 0.0)
