"""Write an artefact: one family, one geometry, three functions of fixed shapes and what is needed to trust them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentphys.autoencoders.scalar_heads import usual_load
from latentphys.fields import State
from latentphys.rollout import LatentStepper
from latentphys.surrogate.exchange import same_geometry
from latentphys.surrogate.export import onnx, pt2, torchscript
from latentphys.surrogate.export.finish import finish
from latentphys.surrogate.export.folder import ABOUT, ARRAYS, seal, write_flat
from latentphys.surrogate.export.functions import NAMES, functions
from latentphys.surrogate.export.vectors import difference, differences, expected, inputs, make, said
from latentphys.surrogate.models import Models
from latentphys.training.durable import whole_folder
from latentphys.training.provenance import environment
from latentphys.training.provenance import provenance as origin

Format = Literal["pt2", "onnx", "torchscript"]
FORMATS: dict[Format, ModuleType] = {"pt2": pt2, "onnx": onnx, "torchscript": torchscript}

SMALLEST_TOLERANCE, MARGIN, LARGEST_DIFFERENCE = 1e-5, 10.0, 1e-3
"""Tolerances are the difference measured where the artefact is made times the margin, for machines that add up in
another order, and no less than the smallest. A graph that differs by more than the largest is not the model."""


def export(
    models: Models,
    states: Sequence[State],
    out: str | Path,
    *,
    to: Format,
    then: Sequence[Mapping[str, Any]] | None = None,
    units: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Path:
    """Export trained models for one family and one geometry; the folder appears whole or not at all.

    Args:
        models: on the device that the artefact is to run on.
        states: one for each flow of the fixed batch, all of one family and geometry, with the parameters that a step
            is to take. They become the test vectors.
        to: ``pt2``, an AOTInductor package; ``onnx``; or ``torchscript``.
        then: each flow's parameters one Δt later, for the test vectors. Default: those of the states.
        units: name → unit of parameters, as far as they are known.
        provenance: recorded beside the code's version and the time.
        overwrite: replace what is there.
        progress: called with what is being done.

    Raises:
        ValueError: models, states or a format that cannot be exported, states that do not go together, a folder that is
            there, or a graph that does not say what the model says.
    """
    out = Path(out)
    if to not in get_args(Format):
        raise ValueError(f"Expected a format of {' | '.join(get_args(Format))}, got {to!r}.")
    if out.exists() and not (overwrite and (out / ABOUT).is_file()):
        remedy = "choose another path" if overwrite else "pass overwrite (--overwrite) to replace it, or another path"
        kind = "what is no artefact" if overwrite else "one that exists"
        raise ValueError(f"Expected a new folder, got {kind}: {out}; {remedy}.")
    first = _checked(states, then)
    family, geometry = first.family, first.geometry
    if family is None:
        raise ValueError("Expected states of a family to export, got one without.")
    models.dynamics.interval(family)
    stepper = models.stepper(geometry, family)
    quantities = [
        replace(q, unit=(units or {}).get(q.name), required=True)
        for q in models.contract(family).parameters
        if q.name in first.parameters
    ]
    names = [q.name for q in quantities]
    modules = functions(models.dynamics, models.autoencoder, geometry, family, names)
    progress("work out the test vectors")
    vectors = make(stepper, states, then or [state.parameters for state in states], quantities)
    with torch.no_grad():
        vectors["test.decoded"] = modules["decode"](vectors["test.latent"])
    totals = stepper.totals(vectors["test.fields"])
    vectors["test.finished"] = stepper.decode(vectors["test.latent"], totals)
    finished = finish(vectors["test.decoded"], geometry, stepper.scale, totals)
    off = difference(finished, vectors["test.finished"], list(stepper.scale.channels.values()))
    if off > LARGEST_DIFFERENCE:
        raise ValueError(
            f"Expected a finished decode within {LARGEST_DIFFERENCE:g} of the model's, got {off:.1e}; this model "
            "cannot be exported."
        )
    with whole_folder(out) as temporary:
        FORMATS[to].write(modules, inputs(vectors), temporary, progress)
        progress("compare with the models")
        results = said(FORMATS[to].load(temporary, NAMES, stepper.device), vectors)
        measured = differences(results, vectors, stepper.scale)
        if max(measured.values()) > LARGEST_DIFFERENCE:
            raise ValueError(
                f"Expected exported functions within {LARGEST_DIFFERENCE:g} of the models, got {measured}; choose "
                "another format."
            )
        contract = replace(
            models.contract(family), grid=geometry.grid, parameters=tuple(quantities), fixed=(True, True, True)
        )
        about = {
            "format": to,
            **contract.to_dict(),
            "batch": len(states),
            "device": stepper.device.type,
            "latent_shape": list(vectors["test.latent"].shape[1:]),
            "channels": {name: [s.start, s.stop - s.start] for name, s in stepper.scale.channels.items()},
            "conserved": _loads(stepper),
            "functions": _signatures(vectors),
            **({"opset": onnx.OPSET} if to == "onnx" else {}),
            "measured": measured,
            "tolerances": {name: max(SMALLEST_TOLERANCE, MARGIN * x) for name, x in measured.items()},
            "digest": models.digest,
            "provenance": {**origin([]), "made_on": environment(), **(provenance or {})},
        }
        save_file(_arrays(stepper, vectors), temporary / ARRAYS)
        write_flat(temporary, about, geometry.grid, stepper.scale.specs)
        seal(temporary, about)
    return out


def _checked(states: Sequence[State], then: Sequence[Mapping[str, Any]] | None) -> State:
    """The first of states that go together."""
    if not states:
        raise ValueError("Expected at least one state to export with, got none.")
    first, names = states[0], sorted(states[0].parameters)
    for state in states:
        if state.family != first.family or sorted(state.parameters) != names:
            raise ValueError(
                f"Expected states of one family and parameters, {first.family!r} and {names}, got {state.family!r} and "
                f"{sorted(state.parameters)}."
            )
        if not same_geometry(state.geometry, first.geometry):
            raise ValueError("Expected states in one geometry, got several; export an artefact for each.")
    if then is not None and len(then) != len(states):
        raise ValueError(f"Expected parameters Δt later of each of {len(states)} states, got {len(then)}.")
    return first


def _loads(stepper: LatentStepper) -> dict[str, float]:
    """`usual_load` of each conserved scalar."""
    return {
        name: usual_load(field, stepper.geometry.grid)
        for name, field in stepper.scale.fields.items()
        if field.spec.constraint == "conserved"
    }


def _signatures(vectors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Shapes and dtypes of what each function takes and says."""
    said = expected(vectors)
    return {
        name: {"inputs": [_kind(x) for x in given], "output": _kind(said[name])}
        for name, given in inputs(vectors).items()
    }


def _kind(x: Tensor) -> dict[str, Any]:
    return {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)}


def _arrays(stepper: LatentStepper, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is not one number."""
    arrays = {**vectors, "latent_mean": stepper.latent_mean, "latent_std": stepper.latent_std}
    for name, field in stepper.scale.fields.items():
        arrays[f"profile.{name}"] = field.profile.double()
        arrays[f"size.{name}"] = torch.tensor(field.size, dtype=torch.float64)
    arrays["solid"] = (~stepper.geometry.fluid).to(torch.uint8)
    return {name: array.detach().cpu().contiguous().clone() for name, array in arrays.items()}
