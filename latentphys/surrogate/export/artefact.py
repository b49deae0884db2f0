"""Open an artefact: check it, and step with it as with trained models.

An artefact is code. What is checked here finds damage, and functions that say something else than the models did; it
does not make an artefact from somebody else safe to load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from latentphys import operators
from latentphys.autoencoders import FamilyScale, FieldScale
from latentphys.fields import FieldSpec
from latentphys.grid import Geometry
from latentphys.rollout import Frame, Parameters
from latentphys.surrogate.contract import Contract
from latentphys.surrogate.export.finish import finish
from latentphys.surrogate.export.folder import ARRAYS, check
from latentphys.surrogate.export.functions import NAMES
from latentphys.surrogate.export.vectors import Functions, differences, flat, said
from latentphys.surrogate.export.writing import FORMATS
from latentphys.transformer.conditioning import Conditioning


def open_artefact(path: str | Path, device: torch.device | str = "cpu") -> Artefact:
    """An artefact that `latentphys export` wrote, checked: every file by its hash, every function by its test vector.

    Args:
        path: the folder.
        device: where to compute: what it was exported for.

    Raises:
        ValueError: what is missing, damaged or of another schema or device; functions that do not say what the models
            said.
    """
    folder, device = Path(path), torch.device(device)
    about = check(folder)
    if about["format"] not in FORMATS:
        raise ValueError(f"Expected a format of {' | '.join(FORMATS)}, got {about['format']!r} in {folder}.")
    if about["device"] != device.type:
        raise ValueError(
            f"Expected the device that {folder} was exported for, {about['device']!r}, got {device.type!r}; export it "
            f"with --device {device.type}."
        )
    try:
        arrays = load_file(folder / ARRAYS, device=str(device))
        functions = FORMATS[about["format"]].load(folder, NAMES, device)
    except (RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"Expected functions that this machine can load, got {folder} and {why}; export it again here."
        ) from error
    artefact = Artefact(about, arrays, functions, device)
    artefact.self_test(folder)
    return artefact


class Artefact:
    """The functions of one family in one geometry, with what is to be known about them.

    Args:
        about: what artefact.json says.
        arrays: what arrays.safetensors holds.
        functions: by name, see `latentphys.surrogate.export.functions`.
    """

    def __init__(
        self, about: Mapping[str, Any], arrays: Mapping[str, Tensor], functions: Functions, device: torch.device
    ) -> None:
        self.about, self.arrays, self.functions, self.device = about, arrays, functions, device
        self._contract = Contract.from_dict({name: about[name] for name in Contract.__dataclass_fields__})
        grid, solid = self._contract.grid, arrays["solid"].cpu().bool()
        self.geometry = Geometry(grid, solid if bool(solid.any()) else None)
        specs: tuple[FieldSpec, ...] = self._contract.fields
        self.scale = FamilyScale(
            *(FieldScale(grid, arrays[f"profile.{s.name}"], float(arrays[f"size.{s.name}"]), s) for s in specs)
        )

    @property
    def family(self) -> str:
        return self._contract.family

    @property
    def intervals(self) -> Mapping[str, float]:
        """The one family → Δt [s]."""
        return {self.family: self._contract.interval}

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, that of the checkpoint."""
        digest: str = self.about["digest"]
        return digest

    def contract(self, family: str) -> Contract:
        """What a solver has to know; ValueError for another family."""
        if family != self.family:
            raise ValueError(
                f"Expected family {self.family!r}, for which this artefact was exported, got {family!r}; export one "
                "for it."
            )
        return self._contract

    def stepper(self, geometry: Geometry, family: str) -> ArtefactStepper:
        """See `ArtefactStepper`; ValueError for another geometry or family."""
        self.contract(family)
        if geometry.batch_shape or geometry.inflow:
            what = "a batch of geometries" if geometry.batch_shape else "a prescribed inflow"
            raise ValueError(f"Expected the one geometry this artefact was exported for, got {what}.")
        if lines := self._contract.box_mismatches(geometry.grid):
            raise ValueError(f"Expected the grid this artefact was exported for, got another: {' '.join(lines)}")
        if not torch.equal(geometry.fluid.cpu(), self.geometry.fluid):
            different = int((geometry.fluid.cpu() != self.geometry.fluid).sum())
            raise ValueError(
                f"Expected the solids this artefact was exported for, got others in {different} cells; export one for "
                "this geometry."
            )
        return ArtefactStepper(self, geometry)

    def self_test(self, folder: Path) -> None:
        """Whether the functions say on their test vectors what the models said, and mass is conserved after the finish.

        Raises:
            ValueError: what is off, and by how much.
        """
        results = said(self.functions, self.arrays)
        for name, got in differences(results, self.arrays, self.scale).items():
            tolerance = self.about["tolerances"][name]
            if not got <= tolerance:
                raise ValueError(
                    f"Expected {name} of {folder} within {tolerance:.1e} of what the model said, got {got:.1e}; export "
                    "it again on this machine."
                )
        totals = self.scale.totals(self.arrays["test.fields"], self.geometry)
        finished = finish(results["decode"], self.geometry, self.scale, totals)
        for name, x in self.scale.split(finished).items():
            if self.scale[name].spec.constraint != "solenoidal":
                continue
            net = float(operators.div(x, self.geometry.grid).abs().amax())
            if net != 0.0:
                raise ValueError(f"Expected a net of 0.0 of {name} in every cell of {folder}, got {net:.1e}.")


class ArtefactStepper:
    """Flows of the one family and geometry, as `latentphys.rollout.LatentStepper` has them.

    As many flows as were exported for go through a function at a time.
    """

    def __init__(self, artefact: Artefact, geometry: Geometry) -> None:
        self.geometry, self.family = geometry, artefact.family
        self.scale, self.device = artefact.scale, artefact.device
        self.interval = artefact.intervals[self.family]
        self.latent_mean, self.latent_std = artefact.arrays["latent_mean"], artefact.arrays["latent_std"]
        self._functions, self._batch = artefact.functions, int(artefact.about["batch"])
        self._quantities = artefact.contract(self.family).parameters

    def check_parameters(self, parameters: Parameters) -> None:
        """Refuse parameters of one flow that a step does not take, with a ValueError."""
        Conditioning(list(self._quantities)).vector(parameters, parameters, self.interval)

    def encode(self, packed: Float[Tensor, "b f nx ny nz"]) -> Float[Tensor, "b c x y z"]:
        return self._run("encode", packed.to(self.device).double())

    def decode(
        self, latent: Float[Tensor, "b c x y z"], totals: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, "b f nx ny nz"]:
        """Packed FP64 fields with their constraints to the last bit."""
        held = None if totals is None else {name: total.to(self.device) for name, total in totals.items()}
        return finish(self._run("decode", latent), self.geometry, self.scale, held)

    def totals(self, packed: Float[Tensor, "b f nx ny nz"]) -> dict[str, Float[Tensor, " b"]]:
        return self.scale.totals(packed, self.geometry)

    def step(
        self, latents: Float[Tensor, "b k c x y z"], now: Sequence[Parameters], then: Sequence[Parameters]
    ) -> Frame:
        """The frame one interval later; an artefact does not say which expert took which cell."""
        begin, end = (torch.stack([flat(p, self._quantities) for p in ps]).to(self.device) for ps in (now, then))
        return Frame(self._run("step", latents[:, -1], begin, end), None)

    @torch.no_grad()
    def _run(self, name: str, *inputs: Tensor) -> Tensor:
        flows, batch = len(inputs[0]), self._batch
        if flows % batch:
            raise ValueError(
                f"Expected a multiple of {batch} flows, for which this artefact was exported, got {flows}; export it "
                "with another --batch."
            )
        parts = [tuple(x[n : n + batch].contiguous() for x in inputs) for n in range(0, flows, batch)]
        results = [self._functions[name](*part) for part in parts]
        return results[0] if len(results) == 1 else torch.cat(results)
