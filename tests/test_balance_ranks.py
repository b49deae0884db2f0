"""Balance on two ranks is balance in one process that has the whole batch."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import run_forked
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentphys.routers import (
    AuxiliaryLosses,
    BiasBalance,
    Layout,
    Nested,
    Router,
    Routing,
    SemanticTop1,
    TopK,
    counts_over_ranks,
    telemetry,
)

SWITCH = [0.3, 0.1]
"""Weights of the first and the second level."""


def counts(routing: Routing) -> Tensor:
    return telemetry.expert_counts(routing.ids, routing.num_experts)


class Routers(nn.Module):
    """Routers one after the other over two steps, in FP64; the output is their auxiliary loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.routers = nn.ModuleList(self.made()).double()

    def made(self) -> list[Router]:
        return [SemanticTop1(16, 4), TopK(16, 8, top_k=2)]

    def forward(self, x_BND: Tensor) -> tuple[Tensor, list[list[Routing]]]:
        tokens, layout = x_BND.flatten(0, 1), Layout(len(x_BND), (2, 2, 2))
        steps = [[router(tokens * scale, layout) for router in self.routers] for scale in (1.0, 0.5)]
        return AuxiliaryLosses({"switch": SWITCH[: self.num_levels], "importance": 0.2, "z": 1e-3})(steps)[0], steps

    num_levels = 1


class NestedRouters(Routers):
    num_levels = 2

    def made(self) -> list[Router]:
        return [Nested(16, 8, num_groups=2, top_groups=1, top_k=1), Nested(16, 6, num_groups=3, top_groups=2, top_k=2)]


MODELS: list[type[Routers]] = [Routers, NestedRouters]
NUM_SAMPLES = 7
"""Of the whole batch: 5 for rank 0 and 2 for rank 1."""


def batch() -> Tensor:
    """Samples around another centre for each rank, so that the ranks use other experts."""
    generator = torch.Generator().manual_seed(1)
    centres = 4 * torch.randn(2, 16, generator=generator, dtype=torch.float64)
    noise = torch.randn(NUM_SAMPLES, 8, 16, generator=generator, dtype=torch.float64)
    return noise + centres[[0, 0, 0, 0, 0, 1, 1], None]


def biases(steps: list[list[Routing]]) -> list[Tensor]:
    """Where one update moves biases that were zero."""
    totals = [counts(first) + counts(second) for first, second in zip(*steps, strict=True)]
    return [BiasBalance(0.1).update(torch.zeros(len(total)), total) for total in counts_over_ranks(totals)]


def figures(model: Routers, loss: Tensor, steps: list[list[Routing]]) -> dict[str, Tensor]:
    """Everything that must not depend on the number of ranks."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return {"loss": loss.detach()[None], **gradients, **{f"bias_{n}": b for n, b in enumerate(biases(steps))}}


def on_rank(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, calls, reduce = dist.get_rank(), [], dist.all_reduce
    dist.all_reduce = lambda *given: calls.append(len(given[0])) or reduce(*given)  # type: ignore[func-returns-value]
    for make in MODELS:
        model = nn.parallel.DistributedDataParallel(make(), broadcast_buffers=False)
        loss, steps = model(batch()[:5] if rank == 0 else batch()[5:])
        loss.backward()
        save_file(figures(model.module, loss, steps), folder / f"{make.__name__}-{rank}.safetensors")
        shares = [telemetry.load(counts(routing)).tolist() for routing in steps[0]]
        (folder / f"{make.__name__}-{rank}.json").write_text(json.dumps(shares))
        # Its reducer must not be the last to hold the group: that joins gloo's threads, which may wait for the GIL.
        del model, loss, steps
    (folder / f"calls-{rank}.json").write_text(json.dumps(len(calls)))
    dist.destroy_process_group()


def test_two_ranks_are_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    """Unequal numbers of tokens on other experts: loss, gradient under DDP's mean, and bias, with two all-reduces."""
    run_forked(on_rank, tmp_path, tmp_path, world=2)
    for make in MODELS:
        model = make()
        loss, steps = model(batch())
        loss.backward()
        expected = figures(model, loss, steps)
        shares = [json.loads((tmp_path / f"{make.__name__}-{rank}.json").read_text()) for rank in (0, 1)]
        for first, second in zip(*shares, strict=True):
            assert sum(abs(a - b) for a, b in zip(first, second, strict=True)) > 0.5
        for rank in (0, 1):
            found = load_file(tmp_path / f"{make.__name__}-{rank}.safetensors")
            assert set(found) == set(expected)
            for name, value in expected.items():
                if name.startswith("bias"):
                    assert torch.equal(found[name], value) and value.any()
                else:
                    assert value.norm() > 1e-3
                    torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    assert [json.loads((tmp_path / f"calls-{rank}.json").read_text()) for rank in (0, 1)] == [2 * len(MODELS)] * 2
