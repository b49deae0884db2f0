"""Time of the mixture of experts against E and k, beside a dense layer of the same active width and other people's.

    python benchmarks/bench_moe.py --json moe.jsonl --plot docs/images/moe_time.svg
    python benchmarks/bench_moe.py --device cuda --dtype bf16 --dim 1024 --hidden 2048 --tokens 32768 [--compile]
    PYTHONPATH=<folder with transformers> python benchmarks/bench_moe.py

The layer is router, dispatch and routed experts (SwiGLU), without shared experts; `block` puts it into a transformer
block. For each E and k, in turns and on the same random tokens:

    top1, top2, top4   the layer; `skewed` where expert 0 takes half of the tokens
    loop               a module per expert, masks, one expert after the other
    all_experts        every expert on every token, at E = 16
    mixtral_*          the block of `transformers`, where it can be imported; scattermoe likewise, on a GPU

Each round runs the dense layer of width k·F (`FeedForward`) and then a contestant, once each, so that both meet the
same machine. A result `…_over_dense` is the median over the rounds of the quotient of neighbours; `ms` and `dense_ms`
are medians. What compares two E compares their quotients to the dense layer beside each. Gradients are dropped before
every backward, as an optimiser does. Routers are untrained, which loads the experts almost evenly: `entropy` is the
entropy of the load over log₂ E.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import Results, parser, peak_memory, synchronise
from moe_layers import Block, Dense, EveryExpert, LoopOverExperts, Size, peers, router, skew
from torch import Tensor, nn

from latentphys.routers import MoEFeedForward, expert_counts
from latentphys.routers.telemetry import entropy

GPU_CALLS = 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPARED = (16, 64)
"""Numbers of experts at which the layers of others are measured."""

TARGETS: dict[str, dict[str, tuple[str, float]]] = {
    "cpu": {
        "top1_e16_forward_over_dense": ("≤", 1.25),
        "top1_e16_forward_backward_over_dense": ("≤", 1.5),
        "all_experts_over_top1_e16": ("≥", 8.0),
        "top1_e64_over_e16": ("≤", 1.5),
    },
    "cuda": {"top1_e16_forward_over_dense": ("≤", 1.15), "top1_e64_over_e16": ("≤", 1.5)},
}
DEFAULTS = {"cpu": (4096, 256, 1024), "cuda": (32768, 1024, 2048)}
"""Tokens, width and hidden width, at which the targets hold."""


def forward(module: nn.Module, x_BND: Tensor) -> Tensor:
    """The output alone, without a graph."""
    with torch.no_grad():
        return output(module, x_BND)


def output(module: nn.Module, x_BND: Tensor) -> Tensor:
    """What a layer returns, or the first of it."""
    y = module(x_BND)
    return y[0] if isinstance(y, tuple) else y


def forward_backward(module: nn.Module, x_BND: Tensor, grad_BND: Tensor) -> None:
    """All gradients, those of the tokens included."""
    module.zero_grad(set_to_none=True)
    x_BND.grad = None
    output(module, x_BND).backward(grad_BND)


def seconds(work: Callable[[], Any], device: str) -> float:
    """How long some work takes, by the clock of the device [s].

    A GPU gets several calls in a row, as in training, where the host runs ahead.
    """
    if not device.startswith("cuda"):
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    synchronise(device)
    start.record()
    for _ in range(GPU_CALLS):
        work()
    end.record()
    synchronise(device)
    return 1e-3 * start.elapsed_time(end) / GPU_CALLS


def against(
    dense: Callable[[], Any], works: Mapping[str, Callable[[], Any]], device: str, rounds: int
) -> dict[str, Any]:
    """Each work timed beside the dense layer, or whatever is in its place; the first round is for warming up."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            pairs[name].append((seconds(dense, device), seconds(work, device)))
    result = {}
    for name, timed in pairs.items():
        quotients = sorted(own / reference for reference, own in timed[1:])
        result[name] = {
            "value": statistics.median(quotients),
            "lowest": quotients[0],
            "highest": quotients[-1],
            "ms": 1e3 * statistics.median(own for _, own in timed[1:]),
            "dense_ms": 1e3 * statistics.median(reference for reference, _ in timed[1:]),
        }
    return result


class Bench:
    """Everything that one run shares: tokens, device, and the results so far by name."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.results = Results("moe", arguments)
        self.device, self.rounds, self.compile = arguments.device, arguments.rounds, arguments.compile
        kind = self.device.partition(":")[0]
        tokens, dim, hidden = DEFAULTS[kind]
        self.size = Size(arguments.tokens or tokens, arguments.dim or dim, arguments.hidden or hidden)
        self.dtype = DTYPES[arguments.dtype]
        is_target_size = (self.size.tokens, self.size.dim) == (tokens, dim) and self.size.hidden >= hidden
        self.targets = TARGETS[kind] if is_target_size else {}
        self.lines: dict[str, dict[str, Any]] = {}
        torch.manual_seed(0)
        shape = (self.size.layout.num_samples, self.size.layout.cells, self.size.dim)
        self.x_BND = self.place(torch.randn(shape)).requires_grad_()
        self.grad_BND = self.place(torch.randn(shape))
        self.passes: dict[str, Callable[[nn.Module, Tensor], Any]] = {
            "forward": forward,
            "forward_backward": partial(forward_backward, grad_BND=self.grad_BND),
        }

    def place(self, value: Any) -> Any:
        """A tensor or module on the device and in the dtype of this run."""
        return value.to(self.device, self.dtype)

    def prepare(self, module: nn.Module) -> nn.Module:
        """The layer of ours or the dense one, both compiled or neither."""
        if self.compile:
            module.compile()
        return module

    def add(self, name: str, figures: dict[str, Any], settings: dict[str, Any] | None = None) -> None:
        """One result, with its target where there is one."""
        if name in self.targets:
            sense, bound = self.targets[name]
            met = figures["value"] <= bound if sense == "≤" else figures["value"] >= bound
            figures = figures | {"target": f"{sense} {bound:g}", "met": met}
        self.lines[name] = figures | (settings or {})
        self.results.add(name, figures, settings)

    def layer(self, num_experts: int, top_k: int) -> MoEFeedForward:
        own = router(self.size, num_experts, top_k)
        return self.place(MoEFeedForward(self.size.dim, self.size.hidden, own, num_shared=0))

    def compare(self, dense: nn.Module, contestants: Mapping[str, nn.Module], about: dict[str, Any]) -> None:
        """Both passes of several layers, each beside the dense one."""
        for way, run in self.passes.items():
            works = {name: partial(run, module, self.x_BND) for name, module in contestants.items()}
            timed = against(partial(run, dense, self.x_BND), works, self.device, self.rounds)
            for name, figures in timed.items():
                kind = {"contestant": name, "pass": way, "compiled": self.compile}
                self.add(f"{name}_e{about['experts']}_{way}_over_dense", figures, about | kind)

    def layers(self, num_experts: int, top_k: int) -> None:
        """The layer alone, and everything it is compared with."""
        layer = self.layer(num_experts, top_k)
        dense = Dense(self.size.dim, top_k * self.size.hidden)
        about = self.about(layer, num_experts, top_k)
        suffix = f"top{top_k}"
        contestants = {suffix: self.prepare(layer), f"loop_{suffix}": self.place(LoopOverExperts(layer))}
        if num_experts == min(COMPARED) and top_k == 1:
            contestants["all_experts"] = self.place(EveryExpert(layer))
        self.check(layer, contestants)
        if num_experts in COMPARED:
            published = peers(layer, top_k, eager=num_experts == min(COMPARED))
            contestants |= {f"{name}_{suffix}": peer for name, peer in published.items()}
        self.compare(self.prepare(self.place(dense)), contestants, about)
        if num_experts in COMPARED and top_k == 1:
            self.memory(f"{suffix}_e{num_experts}", layer, self.place(dense))
            self.host_syncs(f"{suffix}_e{num_experts}", layer)
            skew(layer, self.x_BND)
            about = self.about(layer, num_experts, top_k)
            skewed = {f"skewed_{name}": contestants[name] for name in (suffix, f"loop_{suffix}")}
            self.compare(self.prepare(self.place(dense)), skewed, about)

    def about(self, layer: MoEFeedForward, num_experts: int, top_k: int) -> dict[str, Any]:
        """E, k, sizes, and how even the load is: entropy over log₂ E, and the largest share of the tokens."""
        assert layer.router is not None
        ids_Tk = layer.router(self.x_BND.detach().flatten(0, 1)).ids
        counts_E = expert_counts(ids_Tk, num_experts)
        return {
            "experts": num_experts,
            "top_k": top_k,
            "tokens": self.size.tokens,
            "dim": self.size.dim,
            "hidden": self.size.hidden,
            "dtype": str(self.dtype).removeprefix("torch."),
            "entropy": entropy(counts_E) / math.log2(num_experts) if num_experts > 1 else 1.0,
            "largest_share": float(counts_E.max() / counts_E.sum()),
        }

    def check(self, layer: MoEFeedForward, others: Mapping[str, nn.Module]) -> None:
        """What is compared computes the same function."""
        y_BND = forward(layer, self.x_BND)
        tolerance = 1e-4 if self.dtype == torch.float32 else 5e-2
        for name, module in others.items():
            error = float((forward(module, self.x_BND) - y_BND).abs().amax() / y_BND.abs().amax())
            assert error < tolerance, f"{name} differs from the layer by {error:.1e}"

    def memory(self, name: str, layer: nn.Module, dense: nn.Module) -> None:
        """Peak memory of forward and backward beyond the weights [MiB], and that of the dense layer."""
        own, reference = (
            peak_memory(partial(forward_backward, module, self.x_BND, self.grad_BND), self.device)
            for module in (layer, dense)
        )
        self.add(f"{name}_forward_backward_mib", {"value": own, "dense_mib": reference})

    def host_syncs(self, name: str, layer: nn.Module) -> None:
        """Whether a pass makes the host wait for the GPU: 0 or 1 for each."""
        if not self.device.startswith("cuda"):
            return
        for way, run in self.passes.items():
            torch.cuda.set_sync_debug_mode("error")
            try:
                run(layer, self.x_BND)
                waits, why = 0, ""
            except RuntimeError as error:
                waits, why = 1, str(error).partition("\n")[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            self.add(f"{name}_{way}_host_syncs", {"value": waits, "why": why})

    def blocks(self, num_experts: int, top_k: int) -> None:
        """A transformer block with the layer, beside one with the dense layer."""
        layer = self.layer(num_experts, top_k)
        about = self.about(layer, num_experts, top_k)
        dense = self.place(Block(self.size, Dense(self.size.dim, top_k * self.size.hidden)))
        block = self.place(Block(self.size, layer))
        self.compare(self.prepare(dense), {f"block_top{top_k}": self.prepare(block)}, about)

    def between(self) -> None:
        """64 experts, and every one of 16 on every token, each timed beside the layer of 16."""
        few, many = self.layer(16, 1), self.layer(64, 1)
        contestants = {
            "all_experts_over_top1_e16": self.place(EveryExpert(few)),
            "top1_e64_over_e16": self.prepare(many),
        }
        self.prepare(few)
        for way, ending in zip(self.passes, ("", "_forward_backward"), strict=True):
            run = self.passes[way]
            works = {name: partial(run, module, self.x_BND) for name, module in contestants.items()}
            timed = against(partial(run, few, self.x_BND), works, self.device, self.rounds)
            for name, figures in timed.items():
                figures["top1_e16_ms"] = figures.pop("dense_ms")
                self.add(f"{name}{ending}", figures)


def cases(arguments: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """E and k, with k ≤ E."""
    for top_k in arguments.top_k:
        for num_experts in arguments.experts:
            if top_k <= num_experts:
                yield num_experts, top_k


def run(arguments: argparse.Namespace) -> None:
    bench = Bench(arguments)
    if "layer" in arguments.parts and 1 in arguments.top_k and {16, 64} <= set(arguments.experts):
        bench.between()
    for part in arguments.parts:
        for num_experts, top_k in cases(arguments):
            torch.compiler.reset()  # it compiles one function for a few sizes, and then no more
            (bench.layers if part == "layer" else bench.blocks)(num_experts, top_k)
    for name in bench.targets:
        if name in bench.lines:
            line = bench.lines[name]
            verdict = "met" if line["met"] else "MISSED"
            bench.results.say(f"{name:<44}{line['value']:.3f}  target {line['target']}  {verdict}")
    if arguments.plot is not None:
        from plot_moe import draw

        draw(list(bench.lines.values()), arguments.plot)


def main() -> None:
    options = parser(str(__doc__).partition("\n")[0])
    options.add_argument("--tokens", type=int, help="tokens T (default 4096, on a GPU 32768)")
    options.add_argument("--dim", type=int, help="width D (default 256, on a GPU 1024)")
    options.add_argument("--hidden", type=int, help="hidden width F of an expert (default 1024, on a GPU 2048)")
    options.add_argument("--dtype", choices=DTYPES, default="fp32", help="(default %(default)s)")
    options.add_argument("--experts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="numbers E")
    options.add_argument("--top-k", type=int, nargs="+", default=[1, 2, 4], help="experts per token")
    options.add_argument("--parts", nargs="+", choices=("layer", "block"), default=["layer", "block"])
    options.add_argument("--rounds", type=int, default=7, help="timed rounds (default %(default)s)")
    options.add_argument("--compile", action="store_true", help="torch.compile for our layer and the dense one")
    options.add_argument("--plot", type=Path, metavar="PATH", help="draw the time of the layer against E")
    options.add_argument("--quick", action="store_true", help="tiny sizes and one round: does it run?")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.dim, arguments.hidden, arguments.rounds = 96, 16, 32, 1
    run(arguments)


if __name__ == "__main__":
    main()
