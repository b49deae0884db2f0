"""What a store or a checkpoint holds, in a few lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from latentphys import info_run
from latentphys.accounting import Cost, Parts, count, count_autoencoder
from latentphys.autoencoders import Autoencoder
from latentphys.data import Store, open_store
from latentphys.fields import Domain
from latentphys.routers import Nested, Router
from latentphys.sphere import Sphere
from latentphys.training import load_autoencoder, load_dynamics, open_checkpoint
from latentphys.training.checkpoint import has_checkpoints
from latentphys.transformer.dynamics import Dynamics


def describe(path: str | Path) -> dict[str, Any]:
    """Name → value of what is worth knowing of a store, a checkpoint, a run directory or an artefact.

    Raises:
        ValueError: neither of these.
    """
    folder = Path(path)
    if not folder.exists():
        raise ValueError(
            f"Expected a store, a checkpoint, a run directory or an artefact, got {folder}, which does not exist."
        )
    if (folder / "zarr.json").is_file():
        return _store(folder)
    if (folder / "artefact.json").is_file():
        from latentphys.surrogate.export.info import describe as artefact

        return artefact(folder)
    return _run(folder) if info_run.is_run(folder) else _checkpoint(folder)


def _store(path: Path) -> dict[str, Any]:
    store = open_store(path)
    provenance = store.attributes.get("provenance", {})
    about = {
        "store": str(path),
        "kind": store.attributes["kind"],
        "schema": store.attributes["schema"],
        "family": store.family,
        "trajectories": len(store),
        "snapshots": _times(store.times),
        **_domain(store.domain),
        "solids": _solids(store),
        "layout": store.attributes.get("layout", "face_flux"),
        "exact": "net flux 0.0 claimed" if provenance.get("exact") is True else "not claimed",
        "fields": {name: _field(store, name) for name in store.specs},
        "parameters": {name: _parameter(store, name) for name in sorted(store.parameters)} or "none",
    }
    if store.attributes.get("floor"):
        about["solenoidal floor"] = store.attributes["floor"]
    known = {key: provenance[key] for key in ("version", "time", "command", "seed") if key in provenance}
    return about | {
        "made by": known or "unknown",
        "checksums": f"CRC-32 of {len(store.attributes['checksums'])} arrays",
        "size on disk [MB]": round(sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6, 1),
        **({"physics": store.attributes["about"]} if store.attributes.get("about") else {}),
    }


def _times(times: np.ndarray) -> str:
    span = f"{len(times)}, t = {times[0]:g} … {times[-1]:g} s"
    steps = np.diff(times)
    if not steps.size:
        return span
    even = np.ptp(steps) <= 1e-9 * steps.max()
    return f"{span}, every {steps.mean():g} s" if even else f"{span}, unevenly"


def _domain(domain: Domain) -> dict[str, str]:
    size = {"grid": " × ".join(map(str, domain.shape))}
    if isinstance(domain, Sphere):
        return size | {"sphere": f"radius {domain.radius:g} m, {domain.quadrature}, degrees below {domain.lmax}"}
    return size | {
        "spacing [m]": " × ".join(f"{h:.4g}" for h in domain.spacing),
        "box [m]": " × ".join(f"{length:.4g}" for length in domain.lengths),
        "boundaries": " | ".join(
            f"{a}: {low}, {high}" for a, (low, high) in zip("xyz", domain.boundaries, strict=True)
        ),
    }


def _solids(store: Store) -> str:
    if "solid" not in store.attributes["checksums"]:
        return "none"
    solid = store.array("solid")
    shares = [float(np.asarray(solid[i]).mean()) for i in range(len(store))]
    return f"voxels, {min(shares):.3f} … {max(shares):.3f} of the box"


def _field(store: Store, name: str) -> dict[str, Any]:
    """What one field is, and how large: per component where it has several."""
    spec, array, summary = store.specs[name], store.array(name), store.attributes["statistics"].get(name, {})
    sizes = {key: _rounded(summary[key]) for key in ("mean", "std", "min", "max") if key in summary}
    dimensions = ", ".join(getattr(array.metadata, "dimension_names", None) or ())
    what = (
        f"{spec.kind} [{spec.unit}], {spec.constraint}" if spec.constraint != "none" else f"{spec.kind} [{spec.unit}]"
    )
    return {"is": what, "stored": f"{array.dtype} {array.shape} ({dimensions})", **sizes}


def _rounded(values: Any) -> Any:
    numbers = [float(f"{x:.4g}") for x in np.atleast_1d(values)]
    return numbers[0] if len(numbers) == 1 else numbers


def _parameter(store: Store, name: str) -> str:
    values, unit = store.parameters[name], store.attributes["parameter_units"][name]
    per = {1: "one a trajectory", 2: f"{values.shape[-1]} a trajectory", 3: f"{values.shape[-1]} a snapshot"}[
        values.ndim
    ]
    low, high = float(values.min()), float(values.max())
    return f"{low:.4g} … {high:.4g} {'' if unit == '1' else unit}".rstrip() + f", {per}"


def _run(path: Path) -> dict[str, Any]:
    """A run, and the checkpoint that it would be used with where there is one."""
    about = info_run.describe(path)
    return about | _checkpoint(path) if has_checkpoints(path) else about


def _checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    about = {"checkpoint": str(checkpoint.path), "kind": checkpoint.kind, "step": checkpoint.step}
    if checkpoint.kind == "autoencoder":
        return about | _autoencoder(load_autoencoder(path))
    return about | _dynamics(*load_dynamics(path))


def _autoencoder(autoencoder: Autoencoder) -> dict[str, Any]:
    costs = {family: _snapshot(autoencoder, family) for family in sorted(autoencoder.scales)}
    return {
        "families": ", ".join(sorted(autoencoder.scales)),
        "cells per latent cell": f"{autoencoder.compression}³",
        "latent channels": autoencoder.latent_channels,
        "fields": {name: _fields(autoencoder, name) for name in sorted(autoencoder.scales)},
        "parameters": {
            "stored": _parameters(autoencoder),
            "encoder": _parameters(autoencoder.encoder),
            "decoder": _parameters(autoencoder.decoder),
        },
        "FLOPs per snapshot": _together(costs),
    }


def _fields(autoencoder: Autoencoder, family: str) -> str:
    """The fields of a family, what keeps their constraints, and how much smaller the latent is."""
    scale = autoencoder.scale(family)
    heads = ", ".join(f"{name} ({type(autoencoder.heads.head(spec)).__name__})" for name, spec in scale.specs.items())
    ratio = scale.num_components * math.prod(scale.grid.shape) / autoencoder.latent_channels
    return f"{heads}: {ratio / math.prod(autoencoder.latent_shape(scale.grid)):g}× fewer numbers"


def _snapshot(autoencoder: Autoencoder, family: str) -> dict[str, Any]:
    cost = count_autoencoder(autoencoder, family)
    return {
        "grid": " × ".join(map(str, autoencoder.scale(family).grid.shape)),
        "encode": Amount(cost.encode, "FLOP"),
        "decode": Amount(cost.decode + cost.head, "FLOP"),
        "of which head, empty box": Amount(cost.head, "FLOP"),
    }


def _dynamics(dynamics: Dynamics, autoencoder: Autoencoder) -> dict[str, Any]:
    transformer = dynamics.transformer
    router = transformer.routers()[0]
    shapes = {name: autoencoder.latent_shape(autoencoder.scale(name).grid) for name in sorted(dynamics.intervals)}
    costs = {shape: count(transformer, shape) for shape in set(shapes.values())}
    any_cost = next(iter(costs.values()))
    stored, active, buffers = any_cost.stored, any_cost.active, any_cost.routing_buffers
    temperatures = [
        p.exp().item() for name, p in transformer.named_parameters() if name.endswith("router.log_temperature")
    ]
    return {
        "families": ", ".join(f"{name} (Δt = {dt:g} s)" for name, dt in sorted(dynamics.intervals.items())),
        "cells per latent cell": f"{autoencoder.compression}³",
        "layers": len(transformer.blocks),
        "mixer": "Fourier modes" if transformer.blocks[0].fourier is not None else "attention",
        "router": type(router).__name__,
        "routing": "once per function for all layers" if transformer.router is not None else _decision(router),
        **({"router temperature": _span(temperatures)} if temperatures else {}),
        "experts per layer": router.num_experts,
        "experts per token": router.top_k,
        "parameters": {
            "stored": Amount(stored.total),
            **{name: Amount(value) for name, value in _named(stored).items()},
            "always on": Amount(stored.always_on),
            "routing, beside parameters": Amount(buffers),
            "routed experts of a token": Amount(active.experts),
            "active per token": Amount(active.total),
            "share active [%]": round(100 * active.total / stored.total, 1),
        },
        "FLOPs per step": _together({name: _step(costs[shape], shape) for name, shape in shapes.items()}),
        "autoencoder parameters": _parameters(autoencoder),
    }


def _decision(router: Router) -> str:
    """What one decision of each layer's router holds for."""
    if isinstance(router, Nested):
        return "in each layer, groups per sample and experts per token"
    if isinstance(router.per, str):
        return f"in each layer per {router.per}"
    return f"in each layer per block of {' × '.join(map(str, router.per))} latent cells"


def _span(values: Sequence[float]) -> str:
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} … {high}"


def _step(cost: Cost, shape: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "latent cells": " × ".join(map(str, shape)),
        "total": Amount(cost.flops.total, "FLOP"),
        **{name: Amount(value, "FLOP") for name, value in _named(cost.flops).items()},
        "running every expert would cost [×]": round(cost.every_expert / cost.flops.total, 2),
    }


def _named(parts: Parts) -> dict[str, int]:
    """The parts under the names by which people know them."""
    return {
        "routed experts": parts.experts,
        "shared experts": parts.shared,
        "mixing": parts.mixing,
        "routing": parts.routing,
        "embedding, conditioning, head": parts.rest,
    }


def _parameters(model: nn.Module) -> Amount:
    return Amount(sum(p.numel() for p in model.parameters()))


def _together(costs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Families of one cost under one name, ``a, b``."""
    groups: list[tuple[list[str], dict[str, Any]]] = []
    for family, cost in costs.items():
        same = next((families for families, other in groups if other == cost), None)
        if same is None:
            groups.append(([family], cost))
        else:
            same.append(family)
    return {", ".join(families): cost for families, cost in groups}


class Amount(int):
    """A whole number that prints with three digits and a prefix, 1.23 M or 3.4 GFLOP; JSON has all of it."""

    unit: str

    def __new__(cls, value: int, unit: str = "") -> Amount:
        self = super().__new__(cls, value)
        self.unit = unit
        return self

    def __str__(self) -> str:
        value, prefix = float(self), 0
        while value >= 999.5:
            value, prefix = value / 1000, prefix + 1
        return f"{value:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][prefix]}{self.unit}".strip()
