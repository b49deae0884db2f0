"""What each part of the autoencoder brings: heads, losses, stems and latents, with all else equal, on both families.

    python benchmarks/study_autoencoders.py --work runs/autoencoders --json autoencoders.jsonl
    python benchmarks/study_autoencoders.py --work runs/autoencoders --studies latents --seeds 3

Data are those of `latentphys demo`, simulated once in ``--work``; every variant is one model on both families, with the
same batches, steps and seed, and is measured on trajectories that training never saw: `reconstructions.Errors` of the
FP64 decode, and `validators.latents.measure_latents`. ``vrmse_equal_time`` is the error of the last test before the
quickest variant of a study was through: equal time instead of equal steps.

    heads      projection | riesz | potential
    losses     the default, less or more one loss each
    stems      patches of cells | Haar coefficients
    latents    free | conservative; also what a dynamics model makes of them: one is trained on each kind, and its
               rollouts of 16 steps are validated as `latentphys validate` does

What is already in ``--work`` is not simulated or trained again.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from flows import simulate
from machine import Results, parser
from reconstructions import Errors

from latentphys.cli import main as latentphys
from latentphys.data import open_store, split
from latentphys.demo import FAMILIES, HELD_OUT
from latentphys.demo import SIZES as DEMO
from latentphys.info_run import read_log
from latentphys.rollout import rollout_store
from latentphys.training import load_autoencoder, load_dynamics
from latentphys.training.checkpoint import write_json
from latentphys.validators import validate
from latentphys.validators.latents import measure_latents

ALL_LOSSES = "autoencoder/loss=all"


DEFAULT = "default"
STUDIES: dict[str, dict[str, list[str]]] = {
    "heads": {DEFAULT: [], "riesz": ["autoencoder/head=riesz"], "potential": ["autoencoder/head=potential"]},
    "losses": {
        DEFAULT: [],
        "vrmse_alone": ["loss.weights.vorticity=0"],
        "cell_velocity": [ALL_LOSSES, "loss.weights.cell_velocity=0.5"],
        "spectrum": [ALL_LOSSES, "loss.weights.spectrum=0.1"],
        "wall_shear": [ALL_LOSSES, "loss.weights.wall_shear=0.1"],
        "kl": [ALL_LOSSES, "loss.weights.latent_kl=1e-3"],
        "no_noise": ["autoencoder.bottleneck.noise=0"],
        "more_noise": ["autoencoder.bottleneck.noise=0.1"],
    },
    "stems": {DEFAULT: [], "haar": ["autoencoder.basis=haar"]},
    "latents": {DEFAULT: [], "conservative": ["autoencoder/latent=conservative"]},
}
KEPT = ("noise_gain_0.03", "idempotence", "latent_drift", "curvature_ratio", "roughness_ratio", "distance_ratio_spread")
JUDGED = ("vrmse_1_step", "vrmse_rollout", "kinetic_energy_ratio", "mean_flow_drift", "net_flux_max")
ROLLOUT = 16


def stores(work: Path) -> str:
    return f"stores=[{','.join(str(work / f'{family}.zarr') for family in FAMILIES)}]"


def run_of(work: Path, variant: str, steps: int, seed: int) -> Path:
    return work / "variants" / f"{variant}-{steps}-{seed}"


def compressed(variant: str, overrides: list[str], steps: int, seed: int, work: Path) -> dict[str, Any]:
    """Train one autoencoder and measure it; by family, and ``curve``: (seconds, error per family) of its tests."""
    torch.set_num_threads(1)
    run = run_of(work, variant, steps, seed)
    result = run / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    settings = [stores(work), f"run={run}", f"held_out={HELD_OUT}", f"trainer.num_steps={steps}"]
    settings += [f"trainer.seed={seed}", f"trainer.test_every={max(1, steps // 12)}", "trainer.test_batches=8"]
    if latentphys(["train", "autoencoder", *settings, *overrides]):
        raise ValueError(f"Expected the training of {variant} to succeed, got an error; see above.")
    lines = read_log(run / "log.jsonl")
    times = {line["step"]: line["seconds"] for line in lines if "seconds" in line}
    tests = [line for line in lines if any(key.startswith("test/") for key in line)]
    figures: dict[str, Any] = {
        "curve": [
            (times[line["step"]], {f: line[f"test/{f}/vrmse"] for f in FAMILIES})
            for line in tests
            if line["step"] in times
        ]
    }
    model = load_autoencoder(run)
    for family in FAMILIES:
        store = open_store(work / f"{family}.zarr")
        chosen, errors = split(len(store), HELD_OUT)[1], Errors(model.scale(family))
        for i in chosen:
            for time in range(0, store.num_times, 4):
                state = store[i, time]
                with torch.no_grad():
                    latent = model.encode(state.velocity[None], state.geometry, family)
                    decoded = model.decode(latent, state.geometry, family, exact=True)[0]
                errors.update(decoded, state.velocity, state.geometry)
        quality = measure_latents(model, store, chosen, num_probes=2)
        figures[family] = errors.figures() | {name: quality[name] for name in KEPT if name in quality}
    write_json(result, figures)
    return figures


def advanced(variant: str, steps: int, dynamics_steps: int, seed: int, work: Path) -> dict[str, dict[str, float]]:
    """Train a dynamics model on the latents of an autoencoder, roll it out and validate; by family."""
    torch.set_num_threads(1)
    autoencoder = run_of(work, variant, steps, seed)
    run = autoencoder / f"dynamics-{dynamics_steps}"
    result = run / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    latents = [autoencoder / f"{family}.latent.zarr" for family in FAMILIES]
    for family, path in zip(FAMILIES, latents, strict=True):
        if not path.is_dir() and latentphys(["encode", str(autoencoder), str(work / f"{family}.zarr"), str(path)]):
            raise ValueError(f"Expected the encoding of {family} to succeed, got an error; see above.")
    settings = [f"stores=[{','.join(map(str, latents))}]", f"run={run}", f"held_out={HELD_OUT}"]
    settings += [f"trainer.num_steps={dynamics_steps}", f"trainer.seed={seed}", f"trainer.test_every={dynamics_steps}"]
    if latentphys(["train", "dynamics", *settings]):
        raise ValueError(f"Expected the dynamics of {variant} latents to be trained, got an error; see above.")
    dynamics, model = load_dynamics(run)
    figures = {}
    for family in FAMILIES:
        store, path = open_store(work / f"{family}.zarr"), run / f"{family}.rollout.zarr"
        chosen = split(len(store), HELD_OUT)[1]
        rollout_store(model, dynamics, store, path, num_steps=ROLLOUT, trajectories=chosen, overwrite=True)
        validation = validate(open_store(path), store)
        figures[family] = {name: validation[name].value for name in JUDGED}
    write_json(result, figures)
    return figures


def at_equal_time(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Variant → family → the error of its last test before the quickest one was through."""
    end = min(figures["curve"][-1][0] for figures in found.values())
    return {
        name: [errors for seconds, errors in figures["curve"] if seconds <= end][-1] for name, figures in found.items()
    }


def main() -> None:
    arguments = parser(str(__doc__).partition("\n")[0])
    arguments.add_argument("--work", type=Path, default=Path("runs/autoencoders"), help="data and runs (%(default)s)")
    arguments.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    arguments.add_argument("--steps", type=int, default=240, help="of each autoencoder (default %(default)s)")
    arguments.add_argument("--dynamics-steps", type=int, default=650, help="of each dynamics model (%(default)s)")
    arguments.add_argument("--seeds", type=int, default=1, help="per variant (default %(default)s)")
    options = arguments.parse_args()
    results = Results("study_autoencoders", options)
    options.work.mkdir(parents=True, exist_ok=True)
    simulate(options.work, DEMO["demo"].simulate)
    variants = {name: settings for study in options.studies for name, settings in STUDIES[study].items()}
    seeds = range(options.seeds)
    with ProcessPoolExecutor(options.threads, mp_context=get_context("spawn")) as pool:
        jobs = {
            (name, seed): pool.submit(compressed, name, settings, options.steps, seed, options.work)
            for seed in seeds
            for name, settings in variants.items()
        }
        found = {key: job.result() for key, job in jobs.items()}
        rolled = {
            (name, seed): pool.submit(advanced, name, options.steps, options.dynamics_steps, seed, options.work)
            for seed in seeds
            for name in (STUDIES["latents"] if "latents" in options.studies else ())
        }
        for (name, seed), job in rolled.items():
            for family, figures in job.result().items():
                found[name, seed][family] |= {f"rollout_{key}": value for key, value in figures.items()}
    for study in options.studies:
        together = [at_equal_time({name: found[name, seed] for name in STUDIES[study]}) for seed in seeds]
        for family in FAMILIES:
            for name in STUDIES[study]:
                values = [found[name, s][family] | {"vrmse_equal_time": together[s][name][family]} for s in seeds]
                values = [v | {"seconds": found[name, s]["curve"][-1][0]} for s, v in zip(seeds, values, strict=True)]
                row = {key: mean(v[key] for v in values) for key in values[0]}
                if len(values) > 1:
                    row |= {f"{key}_spread": stdev(v[key] for v in values) for key in values[0]}
                about = {"study": study, "family": family, "model": name, "steps": options.steps}
                results.add(f"{study}_{family}_{name}", row, about | {"seeds": options.seeds})


if __name__ == "__main__":
    main()
