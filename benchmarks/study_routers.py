"""What routing learns and what it buys: six routers of equal active size on two families, with spread over seeds.

    python benchmarks/study_routers.py --out runs/study --json routers.jsonl
    python benchmarks/study_routers.py --out runs/study --steps 2000 --seeds 5

Both families, the autoencoder and the latents are those of `latentphys demo`, made once in ``--out``. Every router
trains a model of the same width, depth and number of steps on the same batches. Experts are as many and as wide as to
make one token visit as many weights in every model; the sparse ones store 8 times that. Measured on trajectories that
training never saw: the error of one step in latents (mean square in units of the increments' own, 1 is persistence),
VRMSE of the decoded velocity after one step and over a rollout, and what the expert of a token tells about its family:
the mutual information as a share of the family's entropy, and the domain purity, each the mean over layers.

Fingerprints, the load of all experts along a rollout, are taken of every trajectory: how often the family is named
rightly with that trajectory left out, and whether porous media of a kind that training never saw (level sets of random
fields; training sees spheres) are further from the training trajectories than held-out ones of the known kinds.

What is already in ``--out`` is not simulated or trained again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch
from machine import Results, parser

from latentphys.autoencoders import Autoencoder
from latentphys.cli import main as latentphys
from latentphys.data import Store, open_store, split
from latentphys.demo import FAMILIES, HELD_OUT, compress, latents
from latentphys.rollout import LatentStepper, rollout, rollout_store
from latentphys.routers import telemetry
from latentphys.routers.fingerprints import FingerprintClassifier, fingerprint
from latentphys.training import load_dynamics
from latentphys.training.checkpoint import write_json
from latentphys.transformer.conditioning import store_parameters
from latentphys.transformer.dynamics import Dynamics
from latentphys.validators import validate

ROLLOUT = 8
UNSEEN = "unseen.zarr"
SIMULATE_UNSEEN = ["family=porous", "family/medium=field", "size=small", "trajectories=8", "frames=9", "seed=1"]
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
    torch.set_num_threads(1)
    run = run_of(out, router, seed)
    result = run / f"result-{steps}.json"
    if result.is_file():
        return json.loads(result.read_text())
    if latentphys(["train", "dynamics", *overrides(router, seed, steps, out)]):
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
    write_json(result, figures)
    return figures


def tell_apart(router: str, seed: int, out: Path) -> dict[str, float]:
    """What fingerprints say of known families, and of a medium that is not known."""
    torch.set_num_threads(1)
    dynamics, autoencoder = load_dynamics(run_of(out, router, seed))
    if dynamics.transformer.routers()[0].num_experts == 1:
        return {}
    prints, labels, held_out = [], [], []
    for family in FAMILIES:
        store = open_store(out / f"{family}.zarr")
        test = split(len(store), HELD_OUT)[1]
        for i in range(len(store)):
            prints.append(_fingerprint(autoencoder, dynamics, store, i))
            labels.append(family)
            held_out.append(i in test)
    known, known_held_out = torch.stack(prints), torch.tensor(held_out)
    unseen = open_store(out / UNSEEN)
    strangers = torch.stack([_fingerprint(autoencoder, dynamics, unseen, i) for i in range(len(unseen))])
    train = [label for label, out_of_it in zip(labels, held_out, strict=True) if not out_of_it]
    classifier = FingerprintClassifier().fit(known[~known_held_out], train)
    usual, strange = classifier.novelty(known[known_held_out]), classifier.novelty(strangers)
    return {
        "fingerprint_accuracy": FingerprintClassifier.cross_validated_accuracy(known, labels).accuracy,
        "novelty_of_held_out": float(usual.mean()),
        "novelty_of_unseen": float(strange.mean()),
        "unseen_beyond_all_held_out": float((strange > usual.max()).double().mean()),
    }


def _fingerprint(autoencoder: Autoencoder, dynamics: Dynamics, store: Store, trajectory: int) -> torch.Tensor:
    stepper = LatentStepper(autoencoder, dynamics, store.geometry(trajectory), store.family)
    first = store.read("velocity", trajectory, slice(0, 1))[None]
    frames = rollout(stepper, first, lambda n: [store_parameters(store, trajectory, n)], ROLLOUT)
    maps = [frame.routing[0] for frame in frames if frame.routing is not None]
    return fingerprint(torch.stack(maps), dynamics.transformer.routers()[0].num_experts)


def errors(path: Path, reference: Store) -> dict[str, float]:
    validation = validate(open_store(path), reference)
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
    if not (options.out / UNSEEN).is_dir() and latentphys(
        ["simulate", *SIMULATE_UNSEEN, f"out={options.out / UNSEEN}"]
    ):
        raise ValueError("Expected the simulation of the unseen medium to succeed, got an error; see above.")
    jobs = [(router, seed) for seed in range(options.seeds) for router in options.routers]
    with ProcessPoolExecutor(options.threads, mp_context=get_context("spawn")) as pool:
        trained = [pool.submit(measure, *job, options.steps, options.out) for job in jobs]
        told = [pool.submit(tell_apart, *job, options.out) for job in jobs]
        results_of = {job: a.result() | b.result() for job, a, b in zip(jobs, trained, told, strict=True)}
    for router in options.routers:
        values = [results_of[router, seed] for seed in range(options.seeds)]
        row: dict[str, float] = {}
        for name in values[0]:
            row[name] = mean(v[name] for v in values)
            row[f"{name}_spread"] = stdev(v[name] for v in values) if len(values) > 1 else 0.0
        results.add(router, {"steps": options.steps, "seeds": options.seeds, **row})


if __name__ == "__main__":
    main()
