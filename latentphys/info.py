"""What a store or a checkpoint holds, in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentphys.data import open_store
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
    grid = store.grid
    fields = ", ".join(f"{s.name} ({s.kind}, {s.unit}, {s.constraint})" for s in store.specs.values())
    return {
        "store": str(path),
        "kind": store.attributes["kind"],
        "schema": store.attributes["schema"],
        "family": store.family,
        "fields": fields,
        "trajectories": len(store),
        "snapshots": f"{store.num_times}, t = {store.times[0]:g} … {store.times[-1]:g} s",
        "grid": " × ".join(map(str, grid.shape)),
        "spacing [m]": " × ".join(f"{h:.4g}" for h in grid.spacing),
        "boundaries": " | ".join(
            f"{axis}: {low}, {high}" for axis, (low, high) in zip("xyz", grid.boundaries, strict=True)
        ),
        "parameters": ", ".join(sorted(store.parameters)) or "none",
        "size on disk [MB]": round(sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6, 1),
    }


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
