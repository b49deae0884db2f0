"""The whole road, small: two families simulated, compressed, advanced on flows never seen, validated and drawn."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

FAMILIES = ("open_channel", "porous")
HELD_OUT = 3


@dataclass(frozen=True)
class _Size:
    """How much of everything."""

    simulate: dict[str, list[str]]
    autoencoder: list[str]
    dynamics: list[str]
    steps: int


SIZES = {
    "demo": _Size(
        simulate={
            "open_channel": ["size=small", "trajectories=12", "frames=24", "batch_size=12", "family.spin_up=1.5"],
            "porous": ["size=small", "trajectories=22", "frames=17", "batch_size=22"],
        },
        autoencoder=["trainer.num_steps=240"],
        dynamics=["trainer.num_steps=650"],
        steps=16,
    ),
    "tiny": _Size(
        simulate={
            "open_channel": ["size=tiny", "trajectories=5", "frames=8"],
            "porous": ["size=tiny", "trajectories=5", "frames=8"],
        },
        autoencoder=["trainer.num_steps=4", "trainer.batch_size=2"],
        dynamics=["trainer.num_steps=4", "trainer.batch_size=2"],
        steps=4,
    ),
}


def run(out: Path, size: str = "demo") -> int:
    """Run every station in ``out``; what an earlier run left there is replaced.

    Returns:
        The exit status of `latentphys validate`: 0 where every check passed, 1 where one failed.
    """
    from latentphys.cli import main

    chosen, begin = SIZES[size], time.perf_counter()
    if out.exists():
        if not (out / "demo.txt").is_file():
            raise ValueError(f"Expected a new folder or one that a demo made, got {out}; choose another --out.")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / "demo.txt").write_text(f"made by `latentphys demo --size {size}`\n")
    compress(out, size)
    _station("train", "dynamics", latents(out), f"run={out / 'dynamics'}", f"held_out={HELD_OUT}", *chosen.dynamics)
    rollouts = [_store(out, family, ".rollout") for family in FAMILIES]
    for family, rollout in zip(FAMILIES, rollouts, strict=True):
        road = str(out / "dynamics"), _store(out, family), rollout
        _station("rollout", *road, "--steps", str(chosen.steps), "--held-out", str(HELD_OUT))
    references = [_store(out, family) for family in FAMILIES]
    report = ["--checkpoint", str(out / "dynamics"), "--pictures", "--out", str(out / "report")]
    arguments = ["validate", *rollouts, "--reference", *references, *report]
    print(f"\n$ latentphys {' '.join(arguments)}", flush=True)
    status = main(arguments)
    print(f"\nThe whole road took {time.perf_counter() - begin:.0f} s. Report: {out / 'report' / 'report.html'}")
    return status


def compress(out: Path, size: str = "demo") -> None:
    """The road up to the latents: both families simulated, an autoencoder trained on them, every snapshot encoded."""
    chosen = SIZES[size]
    for family in FAMILIES:
        _station("simulate", f"family={family}", *chosen.simulate[family], f"out={_store(out, family)}")
    stores, run = f"stores=[{','.join(_store(out, f) for f in FAMILIES)}]", str(out / "autoencoder")
    _station("train", "autoencoder", stores, f"run={run}", f"held_out={HELD_OUT}", *chosen.autoencoder)
    for family in FAMILIES:
        _station("encode", run, _store(out, family), _store(out, family, ".latent"))


def latents(out: Path) -> str:
    """The override that names the latents of both families."""
    return f"stores=[{','.join(_store(out, family, '.latent') for family in FAMILIES)}]"


def _store(out: Path, family: str, suffix: str = "") -> str:
    return str(out / f"{family}{suffix}.zarr")


def _station(*arguments: str) -> None:
    from latentphys.cli import main

    print(f"\n$ latentphys {' '.join(arguments)}", flush=True)
    status = main(arguments)
    if status:
        raise ValueError(f"Expected this station to succeed, got exit status {status}: {arguments[0]}.")
