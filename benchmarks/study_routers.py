"""What routing learns and what it buys: six routers of equal active size on two families, with spread over seeds.

    python benchmarks/study_routers.py --out runs/study --json routers.jsonl
    python benchmarks/study_routers.py --out runs/study --steps 2000 --seeds 5

Both families, the autoencoder and the latents are those of `latentphys demo`, made once in ``--out``. Every router
trains a model of the same width, depth and number of steps on the same batches. Experts are as many and as wide as to
make one token visit as many weights in every model; the sparse ones store 8 times that. Measured on trajectories that
training never saw: the error of one step in latents (mean square in units of the increments' own, 1 is persistence),
VRMSE of the decoded velocity after one step and over a rollout, and what the expert of a token tells about its family:
the mutual information as a share of the family's entropy, and the domain purity, each the mean over layers. A result
that is already in ``--out`` is not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from machine import Results, parser

from latentphys.data import open_store, split
from latentphys.demo import FAMILIES, HELD_OUT, compress, latents
from latentphys.rollout import rollout_store
from latentphys.routers import telemetry
from latentphys.training import load_dynamics

ROLLOUT = 8
ROUTERS: dict[str, list[str]] = {
    "dense": ["experiment=dense"],
    "top1": ["experiment=shodh_moe", "router.num_experts=8"],
    "random": ["experiment=random", "router.num_experts=8"],
    "top4": ["router=topk", "router.num_experts=32", "dynamics.hidden=48", "dynamics.num_shared=4"],
    "nested": [
        "router=nested",
        "router.num_experts=32",
        "router.num_groups=4",
        "dynamics.hidden=48",
        "dynamics.num_shared=4",
    ],
    "tree": ["router=tree", "router.num_experts=8", "dynamics.routing=function"],
}
"""Every token visits 192 hidden units of routed experts and 192 of shared ones; 1536 are stored, 192 where dense."""


def overrides(router: str, seed: int, steps: int, out: Path) -> list[str]:
    """What follows ``latentphys train dynamics``."""
    return [
        *ROUTERS[router],
        latents(out),
        f"run={run_of(out, router, seed)}",
        f"held_out={HELD_OUT}",
        f"trainer.seed={seed}",
        f"trainer.num_steps={steps}",
        f"trainer.test_every={steps}",
        f"trainer.checkpoint_every={steps}",
        "trainer.test_batches=32",
    ]


def run_of(out: Path, router: str, seed: int) -> Path:
    return out / "runs" / f"{router}-{seed}"


def measure(router: str, seed: int, steps: int, out: Path) -> dict[str, float]:
    """Train one model, roll it out, and say how far it is from the truth and what its experts know."""
    from latentphys.cli import main

    torch.set_num_threads(1)
    run = run_of(out, router, seed)
    result = run / f"result-{steps}.json"
    if result.is_file():
        return json.loads(result.read_text())
    if main(["train", "dynamics", *overrides(router, seed, steps, out)]):
        raise ValueError(f"Expected the training of {router} to succeed, got an error; see above.")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    test = next(line for line in reversed(lines) if any(key.startswith("test/") for key in line))
    figures = {f"{family}_latent_mse": test[f"test/{family}/latent_mse"] for family in FAMILIES}
    dynamics, autoencoder = load_dynamics(run)
    maps = []
    for family in FAMILIES:
        store = open_store(out / f"{family}.zarr")
        chosen = split(len(store), HELD_OUT)[1]
        path = run / f"{family}.rollout.zarr"
        rollout_store(
            autoencoder, dynamics, store, path, num_steps=ROLLOUT, trajectories=chosen, start=0, overwrite=True
        )
        figures |= {f"{family}_{name}": value for name, value in errors(path, store).items()}
        maps.append(torch.stack([open_store(path).read("routing", n, slice(1, None)) for n in range(len(chosen))]))
    figures |= knowledge(maps, dynamics.transformer.routers()[0].num_experts)
    partial = result.with_name(f".{result.name}.partial")
    partial.write_text(json.dumps(figures) + "\n")
    partial.replace(result)
    return figures


def errors(rollout: Path, reference: Any) -> dict[str, float]:
    from latentphys.validators import validate

    validation = validate(open_store(rollout), reference)
    return {name: validation[name].value for name in ("vrmse_1_step", "vrmse_rollout")}


def knowledge(maps: Sequence[torch.Tensor], num_experts: int) -> dict[str, float]:
    """Mutual information and purity, means over layers, of first choices (trajectory, time, layer, x, y, z)."""
    purity, information = [], []
    for layer in range(maps[0].shape[2]):
        ids = [m[:, :, layer].reshape(-1, 1).long() for m in maps]
        families = torch.cat([torch.full((len(i),), n) for n, i in enumerate(ids)])
        joint = telemetry.joint_counts(torch.cat(ids), families, num_experts, len(ids)).double()
        joint = joint / joint.sum(1, keepdim=True)  # both families count alike
        purity.append(telemetry.domain_purity(joint))
        information.append(telemetry.mutual_information(joint).normalised)
    return {"purity": mean(purity), "mutual_information": mean(information)}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--out", type=Path, default=Path("runs/study"), help="data and runs (default %(default)s)")
    arguments.add_argument("--steps", type=int, default=500, help="optimiser steps per model (default %(default)s)")
    arguments.add_argument("--seeds", type=int, default=3, help="seeds per router (default %(default)s)")
    arguments.add_argument("--routers", nargs="+", choices=list(ROUTERS), default=list(ROUTERS))
    options = arguments.parse_args()
    results = Results("routers", options)
    if not all((options.out / f"{family}.latent.zarr").is_dir() for family in FAMILIES):
        options.out.mkdir(parents=True, exist_ok=True)
        compress(options.out)
    jobs = [(router, seed) for seed in range(options.seeds) for router in options.routers]
    with ProcessPoolExecutor(options.threads, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measure, *job, options.steps, options.out) for job in jobs]
        figures = {job: future.result() for job, future in zip(jobs, futures, strict=True)}
    for router in options.routers:
        values = [figures[router, seed] for seed in range(options.seeds)]
        row: dict[str, float] = {}
        for name in values[0]:
            row[name] = mean(v[name] for v in values)
            row[f"{name}_spread"] = stdev(v[name] for v in values) if len(values) > 1 else 0.0
        results.add(router, {"steps": options.steps, "seeds": options.seeds, **row})


if __name__ == "__main__":
    main()
