"""What training costs: the trainer over a bare loop, waiting for data, MFU, memory, two processes, and each option.

    python benchmarks/bench_training.py --json training.jsonl
    python benchmarks/bench_training.py --device cuda --size base --dtype bf16 --json gpu.jsonl
    python benchmarks/bench_training.py --parts overhead rates --rounds 9

A dynamics model is trained on random latents by `Trainer.fit`, in rounds: each runs one thing and then the other, in
one process, and their order changes from round to round. A ratio is the median over the rounds of the quotient of
neighbours; `ms` and `reference_ms` are medians. Steps are timed from one's beginning to the next one's, with a log line
in every ten and without start-up, tests and checkpoints.

    overhead   trainer_overhead: over a loop of forward, backward, clip, step and zero_grad of the same model, whose
               inputs all lie ready on the device. The trainer reads ahead, draws noise, guards, balances, counts, logs.
    data       data_wait: share of ten steps spent waiting for batches, latents held in memory or read from the store.
    rates      steps, samples, tokens and FLOPs per second, with one expert that takes every token (`dense`) and with
               the size's experts (`top1`). `mfu`: FLOPs of the model over the peak of the GPU's data sheet;
               `mfu_of_measured_gemm`: over one large matrix product in this process, where no data sheet is known.
    memory     peak of a run, with activations kept and worked out again; on a CPU each in a process of its own.
    scaling    two processes over one, each with one thread (or GPU): the same batch for each, or for both together.
    experts    top-1 of E experts over the dense model of the same active size.
    options    trainer.recompute, trainer.ema, trainer.optimizer=soap, trainer.compile over the model without.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import Results, parser
from training_case import DTYPES, SIZES, Case, bare, fit, make_stores, to_json

from latentphys.training.hardware import measured_peak, peak_flops

HERE = Path(__file__).parent
LAUNCH = HERE.parent / "configs" / "accelerate" / "cpu_2proc.yaml"
DENSE = ("router=dense", "router.num_experts=1")
TARGETS = {"trainer_overhead": ("≤", 1.03), "data_wait": ("≤", 0.02), "mfu_dense": ("≥", 0.4), "mfu_top1": ("≥", 0.4)}
"""Of the waiting: with latents in memory. MFU: of the base size in bfloat16."""
OPTIONS = {
    "recompute": "trainer.recompute=true",
    "ema": "trainer.ema=0.999",
    "soap": "trainer.optimizer=soap",
    "compile": "trainer.compile=true",
}
TIME_LIMIT_S = 1800


class Bench:
    """Everything that one run shares: the case without options, its data, and the results."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.results = Results("training", arguments)
        self.arguments, self.device, self.folder = arguments, arguments.device, folder
        self.is_cuda = self.device.startswith("cuda")
        self.case = Case(arguments.size, arguments.dtype, arguments.steps)
        self.dense = self.case.but(*DENSE)
        make_stores(folder, arguments.size)

    def add(self, name: str, figures: dict[str, Any]) -> None:
        """One result, with its target where there is one."""
        is_mfu = name.startswith("mfu")
        holds = not is_mfu or (self.case.size, self.case.dtype) == ("base", "bf16")
        if name in TARGETS and holds and self.case.size != "micro":
            sense, bound = TARGETS[name]
            met = figures["value"] <= bound if sense == "≤" else figures["value"] >= bound
            figures = figures | {"target": f"{sense} {bound:g}", "met": met}
        about = {"size": self.case.size, "dtype": self.case.dtype, "batch": self.case.batch_size}
        self.results.add(name, figures, about)

    def skip(self, name: str, why: str) -> None:
        """A result that cannot be had here."""
        self.add(name, {"value": None, "skipped": why})

    def trained(self, case: Case) -> float:
        """Seconds per step under the trainer."""
        gc.collect()
        torch.compiler.reset()
        return fit(case, self.folder)[0]

    def against(self, name: str, reference: Callable[[], float], own: Callable[[], float]) -> None:
        """One thing beside another, in turns, as a quotient of their seconds per step."""
        pairs = []
        try:
            for number in range(self.arguments.rounds):
                if number % 2:
                    mine, theirs = own(), reference()
                else:
                    theirs, mine = reference(), own()
                pairs.append((mine, theirs))
        except torch.OutOfMemoryError as error:
            self.skip(name, f"out of memory: {str(error).partition('.')[0]}")
            return
        finally:
            gc.collect()
            if self.is_cuda:
                torch.cuda.empty_cache()
        quotients = [mine / theirs for mine, theirs in pairs]
        figures = {
            "value": statistics.median(quotients),
            "lowest": min(quotients),
            "highest": max(quotients),
            "ms": 1e3 * statistics.median(mine for mine, _ in pairs),
            "reference_ms": 1e3 * statistics.median(theirs for _, theirs in pairs),
        }
        self.add(name, figures | {"more_ms": figures["ms"] - figures["reference_ms"]})

    def overhead(self) -> None:
        loop = partial(bare, self.case, self.folder, self.device)
        self.against("trainer_overhead", loop, partial(self.trained, self.case))

    def data(self) -> None:
        for name, cached in (("data_wait", True), ("data_wait_uncached", False)):
            seconds, lines = fit(self.case.but(cached=cached, steps=20), self.folder)
            (share,) = (line["data_wait"] for line in lines if line["step"] == 20 and "data_wait" in line)
            self.add(name, {"value": share, "step_ms": 1e3 * seconds})

    def rates(self) -> None:
        for kind, case in (("dense", self.dense), ("top1", self.case)):
            measured = [self.peak()]
            times = []
            for _ in range(self.arguments.rounds):
                times.append(self.trained(case))
                measured.append(self.peak())
            seconds, flops = statistics.median(times), case.flops_per_step()
            figures = {
                "value": 1 / seconds,
                "samples_per_s": case.batch_size / seconds,
                "tokens_per_s": case.tokens / seconds,
                "flops_per_step": flops,
                "flops_per_s": flops / seconds,
                "step_ms": 1e3 * seconds,
            }
            self.add(f"steps_per_s_{kind}", figures)
            sheet = peak_flops(DTYPES[case.dtype]) if self.is_cuda else None
            peak, name = (max(measured), "mfu_of_measured_gemm") if sheet is None else (sheet, "mfu")
            self.add(f"{name}_{kind}", {"value": flops / seconds / peak, "peak_flops": peak})

    def peak(self) -> float:
        """FLOP/s of one large matrix product."""
        return measured_peak(self.device, DTYPES[self.case.dtype], size=None if self.is_cuda else 1024)

    def memory(self) -> None:
        for name, case in (("kept", self.case), ("recompute", self.case.but(OPTIONS["recompute"]))):
            if self.is_cuda:
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                fit(case.but(steps=1), self.folder)
                figures = {"value": torch.cuda.max_memory_allocated() / 2**20}
            else:
                told = self.process(case.but(steps=1), 1)
                figures = {"value": told["peak_mib"] - told["before_mib"], "with_libraries_mib": told["peak_mib"]}
            self.add(f"peak_memory_mib_{name}", figures)

    def process(self, case: Case, processes: int) -> dict[str, Any]:
        """What a run says of itself in processes of its own, each with one thread."""
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH)] if processes > 1 else []
        with tempfile.TemporaryDirectory(dir=self.folder) as run:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TRAINING_CASE_RUN": run}
            command = [sys.executable, *launcher, str(HERE / "training_case.py"), str(self.folder), to_json(case)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S)
        if done.returncode:
            raise RuntimeError(f"Expected a run of {processes} processes to end, got {done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def scaling(self) -> None:
        available = torch.cuda.device_count() if self.is_cuda else len(os.sched_getaffinity(0))
        if available < 2:
            for name in ("weak_scaling_2", "strong_scaling_2"):
                self.skip(name, f"{available} processor")
            return
        batch = self.case.batch_size
        one, weak, strong = (self.case.but(batch=n) for n in (batch, 2 * batch, batch))
        times: dict[str, list[float]] = {"one": [], "weak": [], "strong": []}
        for _ in range(self.arguments.rounds):
            for name, case, processes in (("one", one, 1), ("weak", weak, 2), ("strong", strong, 2)):
                times[name].append(self.process(case, processes)["step_s"])
        for name, work in (("weak", 2.0), ("strong", 1.0)):
            speedups = [work * a / b for a, b in zip(times["one"], times[name], strict=True)]
            figures = {"value": statistics.median(speedups) / 2, "speedup": statistics.median(speedups)}
            milliseconds = {"ms": 1e3 * statistics.median(times[name]), "one_ms": 1e3 * statistics.median(times["one"])}
            self.add(f"{name}_scaling_2", figures | milliseconds)

    def experts(self) -> None:
        for number in self.arguments.experts:
            case = self.case.but("router=top1", f"router.num_experts={number}")
            self.against(f"top1_e{number}_over_dense", partial(self.trained, self.dense), partial(self.trained, case))

    def options(self) -> None:
        for name, override in OPTIONS.items():
            if name == "compile" and (why := no_compiler(self.is_cuda)):
                self.skip("compile_over_eager", why)
                continue
            case = self.case.but(override)
            ending = {"compile": "eager", "soap": "adamw"}.get(name, "none")
            self.against(f"{name}_over_{ending}", partial(self.trained, self.case), partial(self.trained, case))


def no_compiler(is_cuda: bool) -> str | None:
    """Why nothing can be compiled here, if so."""
    if shutil.which("g++") is None:
        return "no C++ compiler"
    if not is_cuda and not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "no Python.h"
    return None


PARTS = ("overhead", "data", "rates", "memory", "scaling", "experts", "options")


def run(arguments: argparse.Namespace) -> None:
    if arguments.device == "cpu":  # before anything asks what there is
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        bench = Bench(arguments, Path(name))
        for part in arguments.parts:
            getattr(bench, part)()


def main() -> None:
    options = parser(str(__doc__).partition("\n")[0])
    options.add_argument("--size", choices=SIZES, default="tiny", help="of the dynamics model (default %(default)s)")
    options.add_argument("--dtype", choices=DTYPES, default="fp32", help="(default %(default)s)")
    options.add_argument("--steps", type=int, default=10, help="timed steps of each run (default %(default)s)")
    options.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    options.add_argument("--experts", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers E")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options.add_argument("--folder", type=Path, help="where runs go for a while (default: temporary)")
    run(options.parse_args())


if __name__ == "__main__":
    main()
