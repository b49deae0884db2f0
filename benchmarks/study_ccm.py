"""Does composing weights along a physical direction work? Anchor, endpoints and α on three families, over seeds.

    python benchmarks/study_ccm.py --work runs/ccm --json ccm.jsonl --image docs/images/ccm.png
    python benchmarks/study_ccm.py --work runs/ccm-quick --quick

Reaction–diffusion (diffusivity, Fourier mixer), decaying vortices in the plane (viscosity, attention) and flow through
porous media in 3D (body force, attention and routed experts). Of each family an anchor is trained on trajectories
between the coordinates x = ∓1, fine-tuned in both of these regimes, and composed to θ(α) = θ₀ + Δ₊ + α Δ₋. No model is
told the regime but one, the anchor ``told``, for comparison: conditioning is what one would do otherwise.

Forecasts of 8 steps begin at frame 8 of trajectories that no training has seen. Errors are the VRMSE of latents over
all steps and, ``decoded``, that of the fields in the last frame: the mean over the trajectories of a target. Latents
have unit variance in each channel, so fine scales weigh as much as coarse ones; whatever chooses α looks at latents.
Targets lie between the endpoints (``in``) and beyond (``out``).

    persistence          nothing moves
    anchor, told         θ₀ without and with the physical parameter
    low, high, average   α = −1, +1, 0
    coordinate           α from the parameter, on the scale on which x is linear; ``other scale``: its logarithm, or not
    wrong sign           the opposite of the coordinate
    scale                α on a straight line in x through the best α of the other targets' calibration trajectories
    prefix               α of the bank with the smallest error over 4 observed steps before the forecast
    best fixed           one α for all targets, by their calibration trajectories
    oracle               the best α for each target, by the very errors that it is judged by
    tuned on prefix      θ₀ fine-tuned on the observed steps of the test trajectories
    tuned on target      θ₀ fine-tuned on other trajectories of the target, as long as an endpoint

The scales that give α are held within the bank, −3…3.

Seeds change trajectories, initial weights and the order of batches. Endpoints are also trained by other learning rates,
numbers of steps, order of batches and optimiser: the cosine of their Δ₋ with the default one's, and their errors. What
is already in ``--work`` is not made again: with other constants, take another folder. At the end one composite
checkpoint is written, rolled out and validated.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from ccm_compare import Comparison, point
from ccm_models import RATE, TUNINGS, Models, direction
from ccm_problems import PROBLEMS
from ccm_report import draw, report
from ccm_stores import START, STEPS, TARGETS, make_autoencoder
from machine import Results, parser
from safetensors.torch import save_file

from latentphys.composition import compose
from latentphys.data import open_store
from latentphys.rollout import rollout_store
from latentphys.training import load_dynamics
from latentphys.training.checkpoint import write_json
from latentphys.validators import validate

BUDGETS = (1, 2, 3, 4, 6, 8)
BUDGET_PROBLEM = "navier_stokes"


def study(name: str, seed: int, steps: tuple[int, int], work: Path, is_varied: bool) -> dict[str, Any]:
    """All figures of one problem and seed; what training says on the way goes to a file."""
    with quiet(work / name / f"seed-{seed}.log"):
        return _study(name, seed, steps, work, is_varied)


def _study(name: str, seed: int, steps: tuple[int, int], work: Path, is_varied: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="alpha =")
    models = Models(name, seed, steps, work)
    kept = models.runs / f"result-{'varied' if is_varied else 'plain'}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    begin = time.perf_counter()
    composite = models.composite()
    compared = Comparison(models, composite)
    compared.run()
    delta, path = direction(composite), models.runs / "direction.safetensors"
    save_file({"direction": delta}, path)
    figures: dict[str, Any] = {
        "errors": compared.errors,
        "alphas": compared.alphas,
        "decoded": compared.decoded,
        "curves": compared.curves(),
        "budgets": {str(n): compared.by_prefix(n) for n in (BUDGETS if name == BUDGET_PROBLEM else ())},
        "relation": composite.relation.to_dict(),
        "direction": str(path),
        "variations": {},
    }
    for tuning in TUNINGS if is_varied else ():
        other = models.composite(tuning)
        errors = {point(x): compared.error(other, x, x)[0] for x in TARGETS}
        cosine = float(torch.nn.functional.cosine_similarity(direction(other), delta, dim=0))
        figures["variations"][tuning] = {"cosine": cosine, "errors": errors}
    figures["seconds"] = time.perf_counter() - begin
    write_json(kept, figures)
    return figures


def compressed(name: str, work: Path) -> None:
    """Have a problem's autoencoder."""
    torch.set_num_threads(1)
    with quiet(work / name / "autoencoder.log"):
        make_autoencoder(name, work)


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Let everything that is printed go to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        yield


def validated(name: str, steps: tuple[int, int], work: Path) -> dict[str, Any]:
    """A composite checkpoint of a problem on disk, rolled out and validated."""
    torch.set_num_threads(1)
    models, x = Models(name, 0, steps, work), 1.5
    path, out = models.runs / "composite", models.runs / "composite.rollout.zarr"
    compose(models.anchor(), models.endpoint("low"), models.endpoint("high"), path, x, overwrite=True)
    dynamics, autoencoder = load_dynamics(path)
    source = open_store(open_store(models.excerpt(f"test{point(x)}")).attributes["source"])
    rollout_store(
        autoencoder,
        dynamics,
        source,
        out,
        num_steps=STEPS,
        trajectories=range(len(source)),
        start=START,
        checkpoint=str(path),
        overwrite=True,
    )
    found = validate(open_store(out), source)
    names = ("net_flux_max", "solid_flux_max", "vrmse_1_step", "vrmse_rollout")
    return {n: found[n].value for n in names} | {"verdict": found["net_flux_max"].verdict, "alpha": x}


def main() -> None:
    options = _options()
    results = Results("study_ccm", options)
    steps, work = tuple(options.steps), options.work
    found: dict[tuple[str, int], dict[str, Any]] = {}
    # the longest first
    jobs = [(name, seed) for seed in range(options.seeds) for name in reversed(options.problems)]
    with ProcessPoolExecutor(options.threads, mp_context=get_context("spawn")) as pool:
        list(pool.map(compressed, options.problems, [work] * len(options.problems)))
        waiting = {pool.submit(study, *job, steps, work, job[1] < options.varied): job for job in jobs}
        for done in as_completed(waiting):
            name, seed = waiting[done]
            found[name, seed] = done.result()
            results.say(f"{len(found)}/{len(jobs)}  {name}, seed {seed}: {found[name, seed]['seconds']:.0f} s")
    together = {name: [found[name, seed] for seed in range(options.seeds)] for name in options.problems}
    about = {"seeds": options.seeds, "steps": steps, "learning_rate": RATE}
    for name in options.problems:
        report(name, together[name], results, about)
    if "porous" in options.problems:
        results.add("porous composite checkpoint", validated("porous", steps, work), about)
    draw(together, options.image or work / "ccm.png")


def _options() -> argparse.Namespace:
    arguments = parser(str(__doc__).partition("\n")[0])
    arguments.add_argument("--work", type=Path, default=Path("runs/ccm"), help="data and runs (default %(default)s)")
    arguments.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    arguments.add_argument("--seeds", type=int, default=5, help="(default %(default)s)")
    arguments.add_argument("--varied", type=int, default=2, help="seeds with other fine-tunings (default %(default)s)")
    arguments.add_argument(
        "--steps", type=int, nargs=2, default=(400, 100), metavar=("ANCHOR", "TUNING"), help="(default %(default)s)"
    )
    arguments.add_argument("--image", type=Path, help="where the figure goes (default: ccm.png in --work)")
    arguments.add_argument("--quick", action="store_true", help="one seed and few steps: does it run?")
    options = arguments.parse_args()
    if options.quick:
        options.seeds, options.varied, options.steps = 1, 1, (40, 10)
    return options


if __name__ == "__main__":
    main()
