"""Mass conservation: the net flux of every cell, the flux through everything closed, the drift of the mean flow."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.fields import FieldSpec
from latentphys.grid import Geometry
from latentphys.validators.check import Check

NET_FLUX = "div: sum of the six face fluxes (MAC)"
NET_FLUX_OPEN = f"{NET_FLUX}; before an open high side the outflow is what closes it"
SOLID_FLUX = "|flux| on the closed faces (solids, walls)"
MEAN_FLOW = "|<u>(t) - <u>(0)| / max rms(u), <u> = mean face velocity of the box"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Net flux allowed to a store that claims no exact fluxes, relative to its largest |flux|: what an iterative projection
leaves at its default tolerance, with room. Face fluxes of a finite-volume solver lie near 4e-12 in FP64."""


def net_flux(flux: Float[Tensor, "*batch 3 nx ny nz"], geometry: Geometry) -> Float[Tensor, "*batch nx ny nz"]:
    """|net flux| out of every cell, solids included [m³/s], in FP64."""
    return operators.div(flux.double(), geometry.grid).abs()


def closed_flux(flux: Float[Tensor, "*batch 3 nx ny nz"], geometry: Geometry) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """|flux| through every closed face, zero on the open ones [m³/s], in FP64."""
    return torch.where(geometry.open_faces.to(flux.device), 0.0, flux.double().abs())


class Worst:
    """The largest value seen, and where: trajectory, frame and index in the field."""

    def __init__(self) -> None:
        self.value, self.where = 0.0, "zero everywhere"

    def update(self, values: Tensor, trajectory: int, frame: int) -> None:
        flat = int(values.argmax())
        value = float(values.flatten()[flat])
        if value > self.value:
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), values.shape))
            self.value, self.where = value, f"at {index} of trajectory {trajectory}, frame {frame}"


class Conservation:
    """Collects the conservation checks of one flux field, snapshot by snapshot.

    Args:
        spec: the field. The net flux of cells is judged where it is solenoidal, the flux through closed faces always.
        exact: whether the store claims fluxes that balance bit for bit (FP64). Its threshold for the net flux is then
            0.0; elsewhere the `TOLERANCE` of the stored type times the largest |flux| of the store.
    """

    def __init__(self, spec: FieldSpec, exact: bool) -> None:
        self.spec, self.exact = spec, exact
        self.net, self.closed, self.largest = Worst(), Worst(), 0.0
        self.tolerance, self.operator = 0.0, NET_FLUX
        self._means: list[list[Tensor]] = []
        self._rms: list[list[float]] = []

    def update(self, flux: Float[Tensor, "3 nx ny nz"], geometry: Geometry, trajectory: int, frame: int) -> None:
        """Take in one snapshot; the frames of a trajectory in order, from frame 0."""
        grid = geometry.grid
        self.tolerance = TOLERANCE[flux.dtype]
        self.operator = NET_FLUX_OPEN if any(high for _, high in grid.open_sides) else NET_FLUX
        flux = flux.double()
        if self.spec.constraint == "solenoidal":
            self.net.update(net_flux(flux, geometry), trajectory, frame)
        self.closed.update(closed_flux(flux, geometry), trajectory, frame)
        self.largest = max(self.largest, float(flux.abs().max()))
        if frame == 0:
            self._means.append([])
            self._rms.append([])
        self._means[-1].append(operators.mean_velocity(flux, grid))
        self._rms[-1].append(float((2 * operators.kinetic_energy(flux, grid)).sqrt()))

    @property
    def drift(self) -> float:
        """How far the mean flow leaves that of frame 0, over the largest rms velocity; the worst trajectory's."""
        away = [max(float((mean - means[0]).norm()) for mean in means) for means in self._means]
        return max(a / max(rms) if a else 0.0 for a, rms in zip(away, self._rms, strict=True))

    def checks(self, *, family: str, dtype: str, detail: str) -> list[Check]:
        """``net_flux_max``, ``solid_flux_max`` (judged) and ``mean_flow_drift``; ``detail`` says over how much.

        Those of a field other than the velocity begin with its name: ``magnetic_net_flux_max``.
        """
        about = {"family": family, "dtype": dtype}
        allowed = 0.0 if self.exact else self.tolerance * self.largest
        claim = "exact fluxes claimed" if self.exact else f"{self.tolerance:g} of that allowed to {dtype}"
        net = f"{detail}; {self.net.where}; largest |flux| {self.largest:.3g} {self.spec.unit}, {claim}"
        solid = f"{detail}; {self.closed.where}"
        flux = {"unit": self.spec.unit, **about}
        name = prefix(self.spec)
        checks = []
        if self.spec.constraint == "solenoidal":
            checks.append(
                Check.at_most(
                    f"{name}net_flux_max", self.net.value, allowed, operator=self.operator, detail=net, **flux
                )
            )
        checks += [
            Check.at_most(f"{name}solid_flux_max", self.closed.value, 0.0, operator=SOLID_FLUX, detail=solid, **flux),
            Check.info(f"{name}mean_flow_drift", self.drift, unit="1", operator=MEAN_FLOW, detail=detail, **about),
        ]
        return checks


def prefix(spec: FieldSpec) -> str:
    """What the names of a flux field's checks begin with: nothing for the velocity."""
    return "" if spec.name == "velocity" else f"{spec.name}_"
