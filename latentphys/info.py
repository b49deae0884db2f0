"""What a store or a checkpoint holds, in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from latentphys.data import Store, open_store
from latentphys.fields import Domain
from latentphys.sphere import Sphere
from latentphys.training import load_autoencoder, load_dynamics, open_checkpoint


def describe(path: str | Path) -> dict[str, Any]:
    """Name → value of what is worth knowing of a store, a checkpoint or a run directory.

    Raises:
        ValueError: neither of these.
    """
    folder = Path(path)
    if not folder.exists():
        raise ValueError(f"Expected a store, a checkpoint or a run directory, got {folder}, which does not exist.")
    return _store(folder) if (folder / "zarr.json").is_file() else _checkpoint(folder)


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


def _checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    about = {"checkpoint": str(checkpoint.path), "kind": checkpoint.kind, "step": checkpoint.step}
    if checkpoint.kind == "autoencoder":
        autoencoder = load_autoencoder(path)
        ratio = 3 * autoencoder.compression**3 / autoencoder.latent_channels
        return about | {
            "families": ", ".join(sorted(autoencoder.scales)),
            "parameters": sum(p.numel() for p in autoencoder.parameters()),
            "cells per latent cell": f"{autoencoder.compression}³",
            "latent channels": autoencoder.latent_channels,
            "compression of numbers": f"{ratio:g}×",
            "head": type(autoencoder.head).__name__,
        }
    dynamics, autoencoder = load_dynamics(path)
    total = sum(p.numel() for p in dynamics.parameters())
    return about | {
        "families": ", ".join(f"{name} (Δt = {dt:g} s)" for name, dt in sorted(dynamics.intervals.items())),
        "parameters total": total,
        "parameters active per token": total - _idle(dynamics),
        "router": type(dynamics.transformer.routers()[0]).__name__,
        "experts per layer": dynamics.transformer.routers()[0].num_experts,
        "layers": len(dynamics.transformer.routers()),
        "autoencoder parameters": sum(p.numel() for p in autoencoder.parameters()),
        "cells per latent cell": f"{autoencoder.compression}³",
    }


def _idle(dynamics: Any) -> int:
    """Parameters of routed experts that a token does not visit."""
    idle = 0
    for block in dynamics.transformer.blocks:
        moe = block.feed_forward
        experts = sum(p.numel() for p in moe.experts.parameters())
        idle += experts * (moe.router.num_experts - moe.router.top_k) // moe.router.num_experts
    return idle
