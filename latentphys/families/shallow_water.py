"""A rotating layer of shallow water on a sphere, and the family of its jets and vortices.

    ∂ζ/∂t = −∇·((ζ + f) u)
    ∂δ/∂t = r̂·∇×((ζ + f) u) − ∇²(½|u|² + g h)
    ∂h/∂t = −∇·(h u),            u = r̂ × ∇ψ + ∇χ,   ζ = ∇²ψ,   δ = ∇²χ,   f = 2Ω cos θ

in spherical harmonics of the degrees l ≤ T = (2 nlat − 1)/3, which no product of two of them aliases (the ⅔ rule).
Third-order Runge–Kutta in time, explicit, so that gravity waves are as accurate as the rest. Vorticity, divergence and
depth lose what is at the last degree T with the time constant τ, by −K (∇² + 2/a²)²; the rotation of the sphere as a
whole and the mean depth lose nothing. The mean depth H, the coefficient of l = 0, stays the same bit for bit.

References: Williamson et al., J. Comput. Phys. 102 (1992); Hack & Jakob, NCAR/TN-343+STR (1992), the spectral transform
method; Lorenz, Tellus 12 (1960) and Charney, Tellus 7 (1955) for balance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentphys import sphere as harmonics
from latentphys.families.family import Family, Parameters, check_number, check_range, generator, uniform
from latentphys.families.solver import Fields, RungeKutta
from latentphys.fields import FieldSpec
from latentphys.grid import Geometry
from latentphys.sphere import Sphere

CFL = 1.4
"""Δt times the largest frequency; the scheme is stable to √3 along the imaginary axis."""

DAMPING_LIMIT = 2.5
"""Δt times the largest rate of damping; the scheme is stable to 2.51 along the real axis."""

SHALLOWEST = 0.2
"""Least depth of a first state, in mean depths."""


def truncation(sphere: Sphere) -> int:
    """The last degree T that products of two fields do not alias into: 3T < 2 nlat, and 3T < nlon."""
    return min((2 * sphere.nlat - 1) // 3, (sphere.nlon - 1) // 3)


class ShallowWater(RungeKutta):
    """A batch of layers on one sphere. Its stored fields are ``height``, the depth h [m], and ``velocity`` [m/s].

    The working state has the real and imaginary parts of the coefficients of ``vorticity``, ``divergence`` [1/s] and
    ``height`` [m], each (B, lmax, lmax, 2).

    Args:
        sphere: the sphere and its grid, Legendre–Gauss.
        rotation: Ω [rad/s], a number or one per trajectory (B,); f = 2Ω cos θ.
        gravity: g [m/s²], > 0, the same.
        mean_depth: H [m], > 0, the same. Only the stable step is worked out from it: the state has its own.
        damping_time: τ [s] of the last degree; infinite for none.
        axis: colatitude and longitude [rad] of the pole that the sphere rotates about. Default: that of the grid.
        dtype: FP32 or FP64. Good value: FP32 for data.
        compiled: fuse the products on the grid with `torch.compile`.

    Raises:
        ValueError: an equiangular grid, or parameters that are not positive.
        ImportError: torch-harmonics is missing.
    """

    def __init__(
        self,
        sphere: Sphere,
        rotation: float | Float[Tensor, " batch"],
        gravity: float | Float[Tensor, " batch"],
        mean_depth: float | Float[Tensor, " batch"],
        *,
        damping_time: float = math.inf,
        axis: tuple[float, float] = (0.0, 0.0),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> None:
        super().__init__(dtype, device)  # of a stage only the products below are fused: transforms cannot be
        if sphere.quadrature != "legendre-gauss":
            raise ValueError(f"Expected a Legendre–Gauss grid, got {sphere.quadrature}; its degrees are too few.")
        if not damping_time > 0:
            raise ValueError(f"Expected a positive damping time [s], got {damping_time}.")
        self.sphere, self.damping_time = sphere, damping_time
        self.gravity = self._per_sample("gravity [m/s²]", gravity)
        self.mean_depth = self._per_sample("mean depth [m]", mean_depth)
        theta, phi = sphere.colatitudes[:, None], sphere.longitudes
        along_axis = theta.cos() * math.cos(axis[0]) + theta.sin() * math.sin(axis[0]) * (phi - axis[1]).cos()
        omega = torch.as_tensor(rotation, dtype=torch.float64).reshape(-1, 1, 1).cpu()
        self.coriolis = (2 * omega * along_axis).to(self.device, dtype)
        self.last = truncation(sphere)
        eigenvalues = harmonics.eigenvalues(sphere, theta).reshape(-1, 1, 1)
        self.minus_laplacian = (eigenvalues / sphere.radius**2).to(self.device, dtype)
        """l(l + 1)/a² [1/m²], (lmax, 1, 1)."""
        self.inverse_laplacian = torch.where(eigenvalues > 0, -(sphere.radius**2) / eigenvalues, 0.0).to(
            self.device, dtype
        )
        self.kept = (torch.arange(sphere.lmax, device=self.device) <= self.last).to(dtype)[:, None, None]
        damping = ((eigenvalues - 2).clamp(min=0) / max(self.last * (self.last + 1) - 2, 1)) ** 2 / damping_time
        self.damping = damping.to(self.device, dtype) * self.kept
        self._products = torch.compile(_products, dynamic=False) if compiled else _products

    def _per_sample(self, name: str, value: float | Tensor) -> Float[Tensor, "batch 1 1"]:
        tensor = torch.as_tensor(value, dtype=self.dtype, device=self.device).reshape(-1, 1, 1)
        if not bool((tensor > 0).all()):
            raise ValueError(f"Expected a positive {name}, got {value}.")
        return tensor

    def working(self, fields: Fields) -> Fields:
        """Coefficients of the state, in FP64 first; degrees beyond T are dropped."""
        height, velocity = (fields[name].to(self.device).double() for name in ("height", "velocity"))
        psi, chi = (torch.view_as_real(x) for x in harmonics.analyse_flow(velocity, self.sphere))
        minus = self.minus_laplacian.double()
        depth = torch.view_as_real(harmonics.analyse(height, self.sphere))
        state = {"vorticity": -minus * psi, "divergence": -minus * chi, "height": depth}
        return super().working({name: value * self.kept for name, value in state.items()})

    def recorded(self, fields: Fields) -> Fields:
        """Depth and velocity at the grid's points, FP64.

        Raises:
            FloatingPointError: a depth that is not positive.
        """
        height, velocity = self.on_grid({name: value.double() for name, value in fields.items()})
        if not bool((height > 0).all()):
            raise FloatingPointError(
                f"Expected a positive depth, got {float(height.amin()):.4g} m; damp more or begin with weaker winds."
            )
        return super().recorded({"height": height, "velocity": velocity})

    def on_grid(self, fields: Fields) -> tuple[Float[Tensor, "batch nlat nlon"], Float[Tensor, "batch 2 nlat nlon"]]:
        """h [m] and u [m/s] of a working state, in its dtype."""
        inverse = self.inverse_laplacian.to(fields["height"])
        psi, chi = (torch.view_as_complex(inverse * fields[name]) for name in ("vorticity", "divergence"))
        height = harmonics.synthesise(torch.view_as_complex(fields["height"]), self.sphere)
        return height, harmonics.synthesise_flow(psi, chi, self.sphere)

    def stable_step(self, fields: Fields) -> float:
        """The largest stable Δt [s]: gravity waves ride on the fastest wind, while the last degree is damped."""
        height, velocity = self.on_grid(fields)
        wave = (self.gravity * height.clamp(min=0.0)).sqrt()
        speed = (velocity.square().sum(-3).sqrt() + wave).amax((-2, -1))
        frequency = speed * math.sqrt(self.last * (self.last + 1)) / self.sphere.radius
        inertial = self.coriolis.abs().amax((-2, -1))
        fastest = float((frequency.square() + inertial.square()).sqrt().amax())
        return 1 / math.hypot(fastest / CFL, 1 / (self.damping_time * DAMPING_LIMIT))

    def rates(self, fields: Fields, drive: Fields) -> Fields:
        mean, varying = fields["height"][..., :1, :, :], fields["height"].clone()
        varying[..., :1, :, :] = 0.0
        vorticity, height = harmonics.synthesise(
            torch.view_as_complex(torch.stack([fields["vorticity"], varying], dim=1)), self.sphere
        ).unbind(1)
        velocity = self.on_grid(fields)[1]
        vectors, energy = self._products(vorticity, self.coriolis, velocity, height, self.gravity)
        psi, chi = (torch.view_as_real(x) for x in harmonics.analyse_flow(vectors, self.sphere))
        head = torch.view_as_real(harmonics.analyse(energy, self.sphere))
        minus = self.minus_laplacian * self.kept
        # of a flux V = r̂ × ∇ψ + ∇χ: r̂·∇×V = ∇²ψ and ∇·V = ∇²χ
        turned, spread = psi.unbind(1), chi.unbind(1)
        depth = mean[..., :1, :1, :1] * (0.5 / math.sqrt(math.pi))  # H, of Y_00 = 1/√4π
        return {
            "vorticity": minus * spread[0] - self.damping * fields["vorticity"],
            "divergence": minus * (head - turned[0]) - self.damping * fields["divergence"],
            "height": minus * spread[1] - depth * fields["divergence"] - self.damping * varying,
        }

    def balance(self, fields: Fields) -> Fields:
        """The state without divergence, in the depth that leaves its divergence without a tendency (Charney balance).

        ∇²(g h) = r̂·∇×((ζ + f) u) − ∇²½|u|², about the mean depth of the state.
        """
        depth = fields["height"].clone()
        depth[..., 1:, :, :] = 0.0
        state = {"vorticity": fields["vorticity"], "divergence": 0 * fields["divergence"], "height": depth}
        tendency = self.rates(state, {})["divergence"]
        return state | {"height": depth + self.inverse_laplacian * tendency / self.gravity[..., None]}

    def invariants(self, fields: Fields) -> dict[str, Float[Tensor, " batch"]]:
        """What the equations conserve without damping, per unit area and density, FP64.

        ``mass`` ⟨h⟩ [m], ``energy`` ½⟨h|u|² + g h²⟩ [m³/s²], ``enstrophy`` ½⟨(ζ + f)²/h⟩ [1/(m s²)].
        """
        state = {name: value.double() for name, value in fields.items()}
        height, velocity = self.on_grid(state)
        vorticity = harmonics.synthesise(torch.view_as_complex(state["vorticity"]), self.sphere)
        share = self.sphere.areas.to(height) / (4 * math.pi * self.sphere.radius**2)

        def mean(values: Tensor) -> Tensor:
            return (values * share).sum((-2, -1))

        kinetic = height * velocity.square().sum(-3)
        enstrophy = (vorticity + self.coriolis.double()).square() / height
        return {
            "mass": mean(height),
            "energy": 0.5 * mean(kinetic + self.gravity.double() * height.square()),
            "enstrophy": 0.5 * mean(enstrophy),
        }


def _products(
    vorticity: Tensor, coriolis: Tensor, velocity: Tensor, height: Tensor, gravity: Tensor
) -> tuple[Tensor, Tensor]:
    """(ζ + f) u and h u, (B, 2, 2, nlat, nlon), and ½|u|² + g h, of the depth h about its mean."""
    carried = torch.stack([vorticity + coriolis, height], dim=1)[:, :, None] * velocity[:, None]
    return carried, 0.5 * velocity.square().sum(-3) + gravity * height


@dataclass(frozen=True)
class ShallowWaterSphere(Family):
    """A family of balanced zonal jets and vortices on a planet about the size of the Earth.

    Args:
        rotation: range of Ω [rad/s].
        mean_depth: range of the mean depth H [m].
        wind: range of the root-mean-square velocity of the first state [m/s].
        eddies: range of the share of its kinetic energy that is not zonal.
        gravity: g [m/s²].
        radius: a [m].
        damping_time: τ [s] of the last degree T.
        interval: time between frames [s].
        spin_up: time before the first frame [s].
    """

    name: ClassVar[str] = "shallow_water_sphere"
    specs: ClassVar[Mapping[str, FieldSpec]] = {
        "height": FieldSpec("height", "scalar", "m", "conserved"),
        "velocity": FieldSpec("velocity", "vector", "m/s"),
    }
    parameter_units: ClassVar[Mapping[str, str]] = {"rotation": "rad/s", "gravity": "m/s2", "mean_depth": "m"}

    rotation: Sequence[float] = (4e-5, 1e-4)
    mean_depth: Sequence[float] = (4e3, 1e4)
    wind: Sequence[float] = (15.0, 40.0)
    eddies: Sequence[float] = (0.3, 0.7)
    gravity: float = 9.80616
    radius: float = 6.37122e6
    damping_time: float = 14400.0
    interval: float = 43200.0
    spin_up: float = 172800.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("rotation rates", self.rotation, 0, np.inf)
        check_range("mean depths", self.mean_depth, 0, np.inf)
        check_range("winds", self.wind, 0, np.inf)
        check_range("shares of eddies", self.eddies, 0, 1)
        check_number("gravity [m/s²]", self.gravity, 0)
        check_number("radius [m]", self.radius, 0)
        if not self.damping_time > 0:
            raise ValueError(f"Expected a positive damping time [s], got {self.damping_time}.")

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse what is neither (nlat, nlon) nor three equal numbers."""
        if len(shape) != 2 and not (len(shape) == 3 and len(set(shape)) == 1):
            raise ValueError(f"Expected (nlat, nlon) or three equal numbers n for (n, 2n), got {list(shape)}.")

    def grid(self, shape: Sequence[int]) -> Sphere:
        """The sphere with (nlat, nlon) points; three equal numbers n, as presets for boxes have them, mean (n, 2n).

        Raises:
            ValueError: another shape.
        """
        self.check_shape(shape)
        if len(shape) == 3:
            return Sphere(shape[0], 2 * shape[0], self.radius)
        return Sphere(shape[0], shape[1], self.radius)

    def draw(self, seed: int, trajectory: int) -> dict[str, Any]:
        rng = generator(seed, trajectory, 0)
        return {
            "rotation": uniform(self.rotation, rng),
            "gravity": self.gravity,
            "mean_depth": uniform(self.mean_depth, rng),
            "wind": uniform(self.wind, rng),
            "eddies": uniform(self.eddies, rng),
        }

    def initial(self, geometry: Geometry | Sphere, parameters: Mapping[str, Any], seed: int, trajectory: int) -> Fields:
        """Random zonal and other harmonics of the stream function, with a kinetic energy ∝ l⁻²
        from l = 4 on, in balance. Where the balanced layer would nearly run dry, the winds are weaker.
        """
        assert isinstance(geometry, Sphere)
        solver = self._solver(geometry, {name: np.array([p]) for name, p in parameters.items()}, dtype=torch.float64)
        psi = self._stream_function(geometry, solver.last, parameters["eddies"], generator(seed, trajectory, 1))
        flow = harmonics.synthesise_flow(psi, torch.zeros_like(psi), geometry)
        share = geometry.areas / (4 * math.pi * geometry.radius**2)
        rms = float((flow.square().sum(0) * share).sum().sqrt())
        level = torch.full(geometry.shape, float(parameters["mean_depth"]), dtype=torch.float64)
        wind = float(parameters["wind"])
        while True:
            given = {"height": level[None], "velocity": (flow * (wind / rms))[None]}
            balanced = solver.balance(solver.working(given))
            height, velocity = solver.on_grid(balanced)
            if float(height.amin()) > SHALLOWEST * parameters["mean_depth"]:
                return {"height": height[0], "velocity": velocity[0]}
            wind *= 0.8

    def _stream_function(self, sphere: Sphere, last: int, eddies: float, rng: np.random.Generator) -> Tensor:
        """Coefficients of a random ψ, of which `eddies` is the share of kinetic energy that is not zonal."""
        shape = (sphere.lmax, sphere.lmax)
        noise = torch.from_numpy(rng.standard_normal(shape) + 1j * rng.standard_normal(shape))
        l, m = torch.arange(sphere.lmax)[:, None], torch.arange(sphere.lmax)  # noqa: E741
        # a degree has 2l + 1 orders, each with the energy ½ l(l + 1)|ψ|²: so E(l) ∝ l⁻² from l = 4 on
        envelope = torch.where(l < 4, l / 4, (4.0 / l.clamp(min=1)) ** 2.5).double()
        noise = torch.where((m <= l) & (l >= 1) & (l <= last), noise * envelope, 0.0)
        zonal, rest = torch.where(m == 0, noise.real + 0j, 0.0), torch.where(m > 0, noise, 0.0)

        def energy(psi: Tensor) -> float:
            return float((l * (l + 1) * psi.abs().square() * torch.where(m > 0, 2, 1)).sum())

        return zonal * math.sqrt((1 - eddies) / energy(zonal)) + rest * math.sqrt(eddies / energy(rest))

    def solver(
        self,
        geometry: Geometry | Sphere,
        parameters: Parameters,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> ShallowWater:
        assert isinstance(geometry, Sphere)
        return self._solver(geometry, parameters, dtype=dtype, device=device, compiled=compiled)

    def _solver(self, sphere: Sphere, parameters: Parameters, **options: Any) -> ShallowWater:
        rotation, gravity, depth = (torch.from_numpy(parameters[name]) for name in self.parameter_units)
        return ShallowWater(sphere, rotation, gravity, depth, damping_time=self.damping_time, **options)

    def recorded(self, parameters: Parameters, times: np.ndarray) -> dict[str, np.ndarray]:
        """Rotation rate, gravity and mean depth."""
        return {name: parameters[name] for name in self.parameter_units}
