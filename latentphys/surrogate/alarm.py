"""An alarm: what a surrogate steps conserves mass exactly, and may still be far from any flow it was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.grid import Geometry
from latentphys.surrogate.contract import Contract
from latentphys.surrogate.measures import energy, latent_moments, main_field, main_scale, roughness
from latentphys.surrogate.protocol import Factory, Stepper
from latentphys.surrogate.reading import Limits, Reading

if TYPE_CHECKING:
    from latentphys.data import Store

SCHEMA = "latentphys.alarm/1"
QUANTITIES = ("energy", "energy_change", "spectrum", "latent", "parameters")
Range = tuple[list[float], list[float]]
"""Centre and half width of several numbers."""


@dataclass(frozen=True)
class Alarm:
    """Limits of some quantities of a family's flows; those without limits are not measured.

    energy          ½⟨c²⟩ of the velocity [m²/s²], or of the first field where there is none
    energy_change   |ln| of its ratio over one interval; 0 for a state that comes from outside
    spectrum        share of the energy at the scale of the grid: Σ w E / Σ E with w(k) the mean of sin⁴(k h/2) over the
                    axes: 0 for the largest scales, 1 for a chequerboard, 3/8 for white noise
    latent          mean square of (m − μ)/σ over the channels' means and logarithmic spreads m in space
    parameters      largest distance of a parameter from its centre, in half widths of its range

    Args:
        family: the kind of flow.
        limits: quantity → (lowest, highest) value that is quiet.
        latent: μ and σ. Default: mean and spread of each channel in training, σ = 1 for logarithms.
        parameters: name → centre and half width, in the model's scaled units. Default: centre 0, half width 1, which is
            one standard deviation in training.
        digest: of the model that it is for, `Factory.digest`. Default: of any.
        source: where the limits come from.

    Raises:
        ValueError: an unknown quantity, no limits, or limits that leave nothing between them.
    """

    family: str
    limits: Limits
    latent: Range | None = None
    parameters: Mapping[str, Range] = field(default_factory=dict)
    digest: str | None = None
    source: str = "given"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.limits) - set(QUANTITIES))
        if unknown or not self.limits:
            raise ValueError(f"Expected limits of some of {' | '.join(QUANTITIES)}, got {unknown or 'none'}.")
        for name, (low, high) in self.limits.items():
            if not low <= high:
                raise ValueError(f"Expected limits of {name} with lowest ≤ highest, got {low} and {high}.")

    @classmethod
    def default(cls, factory: Factory, family: str, geometry: Geometry) -> Alarm:
        """Limits without a calibration, as far as the model's own scales allow: for gross errors only.

        The energy within a factor of 100 of the training's, latents within 3 of its spreads, in the root mean square
        over the channels, and parameters within 4. Models record nothing that could limit the spectrum or the change
        of the energy in an interval.
        """
        stepper = factory.stepper(geometry, family)
        scale = main_scale(stepper)
        mean = scale.profile.double()
        mean = operators.velocity(mean, geometry.grid) if scale.spec.kind == "flux" else mean
        typical = 0.5 * float((mean.square().mean((-3, -2, -1)) + scale.size**2).sum())
        limits = {"energy": (typical / 100, typical * 100), "latent": (0.0, 9.0), "parameters": (0.0, 4.0)}
        return cls(family, limits, digest=factory.digest, source="the model's own scales")

    @classmethod
    def fit(
        cls,
        factory: Factory,
        store: Store,
        trajectories: Sequence[int] | None = None,
        quantile: float = 1.0,
        margin: float = 2.0,
    ) -> Alarm:
        """Limits from a store's own flows; see `latentphys.surrogate.calibration.calibrate`."""
        from latentphys.surrogate.calibration import calibrate

        return calibrate(factory, store, trajectories, quantile, margin)

    def check(self, factory: Factory) -> None:
        """Refuse a model that it was not calibrated with, with a ValueError."""
        if self.digest not in (None, factory.digest):
            raise ValueError(
                f"Expected an alarm for the model with the SHA-256 {factory.digest[:12]}…, got one for "
                f"{str(self.digest)[:12]}…; calibrate one with Alarm.fit."
            )

    def read(
        self,
        stepper: Stepper,
        contract: Contract,
        packed: Float[Tensor, "b f nx ny nz"],
        latents: Float[Tensor, "b c x y z"],
        parameters: Sequence[Mapping[str, Any]],
        time: float,
        before: Reading | None = None,
    ) -> Reading:
        """Measure flows.

        Args:
            packed: their fields, FP64.
            latents: their latents.
            parameters: of each flow.
            time: t [s].
            before: the reading an interval earlier. Default: the flows come from outside.
        """
        values: dict[str, Tensor] = {}
        if "energy" in self.limits or "energy_change" in self.limits:
            values["energy"] = energy(main_field(packed, stepper)).cpu()
        if "energy_change" in self.limits:
            now = values["energy"]
            earlier = None if before is None else torch.tensor(before.values["energy"], dtype=now.dtype)
            values["energy_change"] = torch.zeros_like(now) if earlier is None else (now / earlier).log().abs()
        if "spectrum" in self.limits:
            values["spectrum"] = roughness(main_field(packed, stepper), stepper.geometry.grid)
        if "latent" in self.limits:
            centre, half = self._latent_range(stepper)
            values["latent"] = ((latent_moments(latents) - centre) / half).square().mean(1)
        if "parameters" in self.limits:
            distances = [self._distance(contract, flow) for flow in parameters]
            values["parameters"] = torch.tensor(distances, dtype=torch.float64)
        limits = {name: self.limits.get(name, (-math.inf, math.inf)) for name in values}
        return Reading(time, {name: tuple(map(float, value)) for name, value in values.items()}, limits)

    def _latent_range(self, stepper: Stepper) -> tuple[Tensor, Tensor]:
        if self.latent is not None:
            centre, half = (torch.tensor(numbers, dtype=torch.float64) for numbers in self.latent)
            return centre, half
        mean, std = (x.double().flatten().cpu() for x in (stepper.latent_mean, stepper.latent_std))
        return torch.cat([mean, std.log()]), torch.cat([std, torch.ones_like(std)])

    def _distance(self, contract: Contract, parameters: Mapping[str, Any]) -> float:
        """How far the farthest parameter is from its centre."""
        distances = [0.0]
        for quantity in contract.parameters:
            if quantity.name in parameters:
                z = torch.as_tensor(quantity.scaled(parameters[quantity.name]))
                said = self.parameters.get(quantity.name, ([0.0], [1.0]))
                centre, half = (torch.tensor(numbers, dtype=torch.float64) for numbers in said)
                distances += ((z - centre) / half).abs().tolist()
        return math.nan if any(map(math.isnan, distances)) else max(distances)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, under a temporary name that is then changed."""
        from latentphys.training.durable import write_json

        write_json(Path(path), {"schema": SCHEMA, **{name: getattr(self, name) for name in self.__dataclass_fields__}})

    @classmethod
    def load(cls, path: str | Path) -> Alarm:
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, or one of another schema.
        """
        from latentphys.training.manifest import read_json

        file = Path(path)
        data = read_json(file) if file.is_file() else {}
        if data.pop("schema", None) != SCHEMA:
            raise ValueError(f"Expected an alarm of schema {SCHEMA} in {path}, got none.")
        limits = {name: (low, high) for name, (low, high) in data.pop("limits").items()}
        latent = data.pop("latent")
        ranges = {name: (centre, half) for name, (centre, half) in data.pop("parameters").items()}
        return cls(limits=limits, latent=None if latent is None else tuple(latent), parameters=ranges, **data)
