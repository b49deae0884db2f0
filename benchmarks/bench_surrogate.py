"""What a step of the surrogate costs in every form, and its error against its time beside the numerical solver.

    latentphys demo
    python benchmarks/bench_surrogate.py --run runs/demo
    python benchmarks/bench_surrogate.py --run runs/demo --json surrogate.jsonl --plot docs/images/surrogate_pareto.png

`speed`: per family a step in latent space, and one decoded with net flux 0.0, in Python (`eager`, `compiled`) and from
artefacts (`pt2`, `onnx`, `torchscript`), one flow and a batch of them. `over_eager` is the ratio of step times, taken
in turns so that what else the machine does meets all alike.

`pareto`: held-out flows of the demo, from the same first state to a decoded or recorded state n intervals later. The
truth is the store: the solver at full resolution, where the models were trained. Contestants, all on the same cores:

    surrogate   encode, n steps, one exact decode, in each of the forms above
    solver_1    the solver again from the recorded FP64 frame, fused by `torch.compile`: not 0, for its Δt is its own,
                where the store's was that of a batch
    solver_f    the flux restricted to cells f times as wide, the solver there, then prolonged, masked and projected
                back, the strong baseline
    persistence the first state

What is set up once per geometry (compilation, multigrid, trees) is warmed up before the clock starts, for all of them.
The finish of a state that the solver made runs on the CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from machine import Results, elapsed, parser, timed
from plot_surrogate import draw
from torch import Tensor

from latentphys import exact, operators
from latentphys.cli import main as latentphys
from latentphys.configuration import compose
from latentphys.data import Store, open_store
from latentphys.demo import FAMILIES, HELD_OUT, SIZES, run
from latentphys.families.family import DrivenFlow
from latentphys.families.jobs import stack
from latentphys.grid import Geometry
from latentphys.resolution import coarsen, prolong, restrict
from latentphys.surrogate import Models
from latentphys.surrogate.export import open_artefact
from latentphys.surrogate.models import checkpoint_digest
from latentphys.surrogate.protocol import Factory, Stepper
from latentphys.training.models import build
from latentphys.transformer.conditioning import store_parameters
from latentphys.validators import vrmse

ARTEFACTS = ("pt2", "onnx", "torchscript")
FORMS = ("eager", "compiled", *ARTEFACTS)


@dataclass(frozen=True)
class Flow:
    """One held-out flow of a store: its truth, and its parameters at every frame."""

    store: Store
    trajectory: int

    @property
    def geometry(self) -> Geometry:
        return self.store.geometry(self.trajectory)

    def flux(self, frame: int) -> Tensor:
        return self.store.read("velocity", self.trajectory, frame)

    def parameters(self, frame: int) -> list[dict[str, Any]]:
        return [store_parameters(self.store, self.trajectory, frame)]

    def error(self, flux: Tensor, frame: int) -> float:
        return float(vrmse(flux, self.flux(frame), self.geometry))


def compiled(path: Path, device: str) -> Models:
    """The models with their networks fused by `torch.compile`."""
    models = Models.load(path, device)
    for network in (models.dynamics.transformer, models.autoencoder.encoder, models.autoencoder.decoder):
        network.compile()
    return models


def exported(checkpoint: Path, flow: Flow, form: str, work: Path, device: str) -> Factory:
    """The artefact of a flow's geometry, made where it is not there yet."""
    out = work / f"{form}-{flow.store.family}-{0 if flow.geometry.is_empty else flow.trajectory}"
    if not (out.is_dir() and open_artefact(out, device).digest == checkpoint_digest(checkpoint)):
        source = ["--store", str(flow.store.path), "--trajectory", str(flow.trajectory)]
        if latentphys(["export", str(checkpoint), str(out), "--to", form, "--device", device, "--overwrite", *source]):
            raise ValueError(f"Expected the export of {checkpoint} to {form} to succeed, got an error; see above.")
    return open_artefact(out, device)


def steppers(forms: Sequence[str], run: Path, flow: Flow, work: Path, device: str) -> dict[str, Stepper]:
    """Each form of the surrogate for a flow."""
    checkpoint = run / "dynamics"
    make: dict[str, Callable[[], Factory]] = {
        "eager": partial(Models.load, checkpoint, device),
        "compiled": partial(compiled, checkpoint, device),
        **{form: partial(exported, checkpoint, flow, form, work, device) for form in ARTEFACTS},
    }
    return {form: make[form]().stepper(flow.geometry, flow.store.family) for form in forms}


def in_turns(works: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Median time of each of some works [s], after one round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for n in range(rounds + 1):
        for name, work in works.items():
            seconds = elapsed(work, device)
            if n:
                times[name].append(seconds)
    return {name: median(values) for name, values in times.items()}


def speed(flow: Flow, forms: Mapping[str, Stepper], rounds: int, batch: int, results: Results) -> None:
    """Times of a step alone and of a step with its exact decode."""
    for flows in (1, batch):
        now, then = flow.parameters(0) * flows, flow.parameters(1) * flows
        packed = flow.flux(0)[None].expand(flows, *[-1] * 4)
        latents = {form: stepper.encode(packed)[:, None] for form, stepper in forms.items()}
        step = in_turns({f: partial(s.step, latents[f], now, then) for f, s in forms.items()}, rounds, results.device)
        decode = in_turns(
            {f: partial(s.decode, latents[f][:, 0]) for f, s in forms.items()}, max(2, rounds // 4), results.device
        )
        for form, stepper in forms.items():
            flux = stepper.decode(stepper.step(latents[form], now, then).latent)
            figures = {
                "step_ms": 1e3 * step[form],
                "step_and_decode_ms": 1e3 * (step[form] + decode[form]),
                "steps_per_s": flows / step[form],
                "over_eager": step[form] / step["eager"],
                "net_flux_max": float(operators.div(flux, flow.geometry.grid).abs().amax()),
            }
            settings = {"part": "speed", "family": flow.store.family, "form": form, "flows": flows}
            results.add(f"speed_{flow.store.family}_{form}_{flows}", figures, settings)


class Numerical:
    """The solver of a flow on cells ``factor`` times as wide as those of its store."""

    def __init__(self, family: DrivenFlow, seed: int, flow: Flow, factor: int, device: str) -> None:
        self.flow, self.factor, self.interval = flow, factor, family.interval
        self.geometry = coarsen(flow.geometry, factor) if factor > 1 else flow.geometry
        drawn = stack([family.draw(seed, flow.trajectory)])
        self._solver = family.solver(self.geometry, drawn, device=device, compiled=True)
        self.run(1, 1e-3)

    def run(self, num_intervals: int, share: float = 1.0) -> Tensor:
        """The flux on the store's cells after some intervals, or a share of each, from the first frame [m³/s]."""
        solver, flux, grid = self._solver, self.flow.flux(0), self.flow.geometry.grid
        fields = solver.working({"velocity": (restrict(flux, grid, self.factor) if self.factor > 1 else flux)[None]})
        solver.remember({})
        for n in range(num_intervals):
            fields = solver.advance(fields, n * self.interval, share * self.interval)
        flux = exact.conserve(flux=fields["velocity"][0].cpu(), geometry=self.geometry)
        if self.factor == 1:
            return flux
        fine = prolong(flux, self.geometry.grid, self.factor, self.flow.geometry)
        return exact.conserve(flux=fine, geometry=self.flow.geometry)


def advanced(stepper: Stepper, flow: Flow, num_intervals: int) -> Tensor:
    """The surrogate's flux after some intervals, from the first frame [m³/s]."""
    latent = stepper.encode(flow.flux(0)[None])
    for n in range(num_intervals):
        latent = stepper.step(latent[:, None], flow.parameters(n), flow.parameters(n + 1)).latent
    return stepper.decode(latent)[0].cpu()


def pareto(
    flows: Sequence[Flow],
    forms: Sequence[Mapping[str, Stepper]],
    family: DrivenFlow,
    seed: int,
    factors: Sequence[int],
    horizons: Sequence[int],
    results: Results,
) -> list[dict[str, Any]]:
    """Error and time of every contestant at every horizon, means over flows; the lines that were printed."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for flow, own in zip(flows, forms, strict=True):
        contestants: dict[str, Callable[[int], Tensor]] = {f: partial(advanced, s, flow) for f, s in own.items()}
        contestants |= {f"solver_{f}": Numerical(family, seed, flow, f, results.device).run for f in factors}
        for name, work in contestants.items():
            work(1)
            for n in horizons:
                flux, seconds = timed(partial(work, n), results.device, repeats=0)
                found.setdefault((name, n), []).append((seconds, flow.error(flux, n)))
        for n in horizons:
            found.setdefault(("persistence", n), []).append((0.0, flow.error(flow.flux(0), n)))
    lines = []
    for (name, n), values in found.items():
        spent, errors = zip(*values, strict=True)
        figures = {"seconds": mean(spent), "vrmse": mean(errors), "vrmse_low": min(errors), "vrmse_high": max(errors)}
        settings = {"part": "pareto", "family": flows[0].store.family, "contestant": name, "intervals": n}
        lines.append({**figures, **settings})
        results.add(f"pareto_{flows[0].store.family}_{name}_{n}", figures, {**settings, "flows": len(flows)})
    return lines


def arguments() -> argparse.Namespace:
    result = parser(str(__doc__).partition("\n")[0])
    result.add_argument("--run", type=Path, default=Path("runs/demo"), help="a demo's folder; made where it is not")
    result.add_argument("--size", choices=tuple(SIZES), default="demo", help="of the demo (default %(default)s)")
    result.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="(default: both)")
    result.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="beside eager (default: all)")
    result.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4], help="cell widths (default %(default)s)")
    result.add_argument("--flows", type=int, default=HELD_OUT, help="held-out flows (default %(default)s)")
    result.add_argument("--rounds", type=int, default=20, help="repetitions of a step (default %(default)s)")
    result.add_argument("--batch", type=int, default=8, help="flows that step together (default %(default)s)")
    result.add_argument("--work", type=Path, help="where artefacts are kept (default: RUN/artefacts)")
    result.add_argument("--plot", type=Path, metavar="PNG", help="draw error against time")
    return result.parse_args()


def main() -> None:
    options = arguments()
    results = Results("surrogate", options)
    if not (options.run / "dynamics").is_dir():
        run(options.run, options.size)
    work, lines = options.work or options.run / "artefacts", []
    chosen = dict.fromkeys(["eager", *options.forms])
    for name in options.families:
        store = open_store(options.run / f"{name}.zarr")
        flows = [Flow(store, len(store) - 1 - i) for i in range(options.flows)]
        forms = [steppers(list(chosen), options.run, flow, work, options.device) for flow in flows]
        speed(flows[0], forms[0], options.rounds, options.batch, results)
        config = compose("simulate", [f"family={name}", *SIZES[options.size].simulate[name]])
        family, last = build(config["family"]), store.num_times - 1
        horizons = [n for n in (1, 2, 4, 8, 16) if n <= last]
        lines += pareto(flows, forms, family, config["seed"], options.factors, horizons, results)
    if options.plot:
        draw(lines, options.plot)


if __name__ == "__main__":
    main()
