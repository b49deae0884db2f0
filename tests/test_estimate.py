"""What a run needs, before it is launched: against real steps, closed forms, and what sharding must leave each rank."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from latentphys import info_experiment
from latentphys.configuration import compose
from latentphys.flops import count_flops
from latentphys.info_experiment import describe_experiment
from latentphys.training.ema import EMA
from latentphys.training.estimate import Estimate, Memory, Settings, check_fit, estimate, remedies, sample_cost
from latentphys.training.hardware import GPUS, available_memory, known_gpu, measured_peak
from latentphys.training.optimizers import new_optimizer
from latentphys.training.planned import Planned, plan, plan_autoencoder, plan_dynamics
from latentphys.training.recompute import set_recompute
from latentphys.transformer.block import TransformerBlock

if TYPE_CHECKING:
    from small import Road

WIDE = ["dynamics.dim=192", "dynamics.depth=2", "dynamics.hidden=384"]
NARROW = ["dynamics.dim=32", "dynamics.depth=2", "dynamics.num_heads=2", "dynamics.hidden=32"]
CELLS = (8, 8, 4)


def config(kind: str, *overrides: str) -> dict[str, Any]:
    return compose("train", [f"trainer={kind}", "run=unused", "stores=[]", *overrides])


def dynamics(*overrides: str, shape: tuple[int, int, int] = CELLS) -> Callable[[], Planned]:
    return partial(plan_dynamics, config("dynamics", *overrides), shape, 16)


def autoencoder(*overrides: str, shape: tuple[int, int, int] = (32, 32, 32)) -> Callable[[], Planned]:
    return partial(plan_autoencoder, config("autoencoder", *overrides), shape)


def measured(planned: Planned, settings: Settings) -> int:
    """The most bytes that torch's allocator had given out while a model was made and took two real steps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _train(planned, settings)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def _train(planned: Planned, settings: Settings) -> None:
    task = planned.task.to_empty(device="cpu").train()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.normal_(std=0.02)
        for buffer in task.buffers():
            buffer.fill_(1)
    model = task.model()
    set_recompute(model, settings.recompute)
    optimizer = new_optimizer(settings.optimizer, model, 1e-4, 1e-2)
    average = EMA(model, 0.99) if settings.ema else None
    for step in range(2):
        for _ in range(settings.accumulate):
            batch = planned.batch(settings.microbatch)
            batch.values.normal_()
            with torch.autocast("cpu", torch.bfloat16) if settings.bf16 else nullcontext():
                output = task(batch)
            (output.loss / settings.accumulate).backward()
        optimizer.step()
        if average is not None:
            average.update(model, step)
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("make", "settings", "tolerance"),
    [
        pytest.param(dynamics(*WIDE), Settings(4), 0.01, id="top-1"),
        pytest.param(
            dynamics(*WIDE, "dynamics_training.unroll=2"),
            Settings(4, accumulate=2, ema=True),
            0.01,
            id="unrolled, accumulated, averaged",
        ),
        pytest.param(dynamics(*WIDE), Settings(4, bf16=True), 0.01, id="bf16"),
        pytest.param(dynamics(*WIDE), Settings(4, recompute=True), 0.01, id="recomputed"),
        pytest.param(dynamics(*WIDE, "experiment=dense"), Settings(4), 0.01, id="dense"),
        pytest.param(
            dynamics(*WIDE, "experiment=moe_pot", shape=(2, 2, 2)),
            Settings(1, optimizer="soap"),
            0.01,
            id="top-k, few tokens, soap",
            marks=pytest.mark.slow,
        ),
        # The allocator does not see the work space of convolutions.
        pytest.param(autoencoder(), Settings(2), 0.1, id="fields"),
        pytest.param(autoencoder(), Settings(2, recompute=True), 0.1, id="fields, recomputed", marks=pytest.mark.slow),
    ],
)
def test_memory_is_that_of_real_steps(make: Callable[[], Planned], settings: Settings, tolerance: float) -> None:
    if settings.optimizer == "soap":
        pytest.importorskip("pytorch_optimizer")
    expected = measured(make(), settings)
    assert expected > 50e6
    assert estimate(make, settings).memory().total == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("unroll", [1, 2])
def test_training_flops_of_a_dense_model_in_closed_form(unroll: int) -> None:
    """Each product costs as much again for either factor's gradient, but for the inputs', which nobody asks for."""
    dim, depth, hidden, tokens, channels, geometry, samples = 32, 2, 32, 48, 16, 16, 3
    make = dynamics(*NARROW, "experiment=dense", f"dynamics_training.unroll={unroll}", shape=(4, 4, 3))
    one = estimate(make, Settings(samples))
    scores = depth * 4 * tokens**2 * dim
    per_token = depth * (4 * dim**2 + 2 * 3 * dim * hidden) + dim * channels
    first, conditions = (channels + geometry) * dim, 1
    modulations = (6 * depth + 2) * dim * dim + dim * dim
    inner = 2 * tokens * per_token + 2 * modulations
    outer = 2 * tokens * first + 2 * conditions * dim
    # Two products forward; backward works the scores out anew, and has four of its own.
    forward = unroll * (inner + outer + scores)
    backward = unroll * (2 * inner + outer) + unroll * scores * 5 // 2 + (unroll - 1) * 2 * tokens * first
    assert one.trace.forward == samples * forward and one.trace.backward == samples * backward
    assert one.flops_per_sample == forward + backward
    assert one.tokens_per_sample == unroll * tokens


def _gradient(call: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Callable[[], None]:
    """Forward and backward, with a gradient for each operand."""

    def both() -> None:
        out = call(*(torch.ones(shape, requires_grad=True) for shape in shapes))
        out.backward(torch.ones_like(out))

    return both


def _grouped(x: Tensor, w: Tensor) -> Tensor:
    return F.grouped_mm(x, w, offs=torch.tensor([3, len(x)], dtype=torch.int32))


@pytest.mark.parametrize(
    ("call", "flops"),
    [
        (_gradient(_grouped, (8, 16), (2, 16, 24)), 3 * 2 * 8 * 16 * 24),
        (_gradient(F.conv3d, (2, 3, 4, 4, 4), (5, 3, 1, 1, 1)), 3 * 2 * 2 * 64 * 3 * 5),
        (_gradient(F.conv3d, (2, 3, 6, 6, 6), (5, 3, 3, 3, 3)), 3 * 2 * 2 * 64 * 27 * 3 * 5),
        (_gradient(F.scaled_dot_product_attention, *[(3, 2, 10, 8)] * 3), 3 * 2 * (4 + 10) * 10 * 10 * 8),
        (_gradient(lambda x: torch.fft.irfft(torch.fft.rfft(x)), (3, 16)), (2.5 + 2.5 + 2.5 + 5) * 3 * 16 * 4),
        (_gradient(torch.matmul, (6, 5), (5, 7)), 3 * 2 * 6 * 5 * 7),
    ],
    ids=["grouped", "patches", "convolution", "attention", "transforms", "product"],
)  # fmt: skip
def test_backward_passes_count(call: Callable[[], None], flops: float) -> None:
    assert count_flops(call, {}) == {"rest": flops}


def test_recomputation_does_the_blocks_again_for_less_memory() -> None:
    plain, again = (estimate(dynamics(*WIDE), Settings(4, recompute=on)) for on in (False, True))
    assert again.flops_per_sample == plain.flops_per_sample
    more = again.flops_per_step - plain.flops_per_step
    assert 0.5 * plain.trace.forward < more <= plain.trace.forward
    assert again.memory().total < 0.7 * plain.memory().total
    assert plain.trace.peak == plain.memory().total - plain.sizes.optimizer


@lru_cache
def _large(**changes: Any) -> Estimate:
    settings = Settings(**({"batch_size": 16, "num_processes": 4} | changes))
    return estimate(dynamics(*WIDE, "router.num_experts=8"), settings)


def _size(module: nn.Module) -> int:
    return 4 * sum(parameter.numel() for parameter in module.parameters())


def test_what_each_process_keeps() -> None:
    needs = _large(ema=True)
    weights = needs.sizes.parameters
    assert weights == 4 * sum(p.numel() for p in dynamics(*WIDE, "router.num_experts=8")().task.parameters())
    whole, sharded, spread = needs.memory(), needs.memory("fsdp"), needs.memory("fsdp", 4)
    assert (whole.weights - needs.sizes.buffers, whole.ema, whole.communication) == (weights, weights, weights)
    assert sharded.weights - needs.sizes.buffers == sharded.ema == math.ceil(weights / 4)
    assert sharded.optimizer == math.ceil(whole.optimizer / 4) and whole.optimizer == pytest.approx(2 * weights, 1e-3)
    assert sharded.activations == whole.activations and sharded.total < whole.total
    stack = 4 * 8 * 3 * 192 * 384
    assert needs.sizes.largest_stack == stack and needs.sizes.experts == 2 * stack
    assert sharded.communication - spread.communication == pytest.approx(3 * stack * 3 / 4, rel=0.2)
    model = dynamics(*WIDE, "router.num_experts=8")().task.model()
    blocks = [_size(layer) for layer in model.modules() if isinstance(layer, TransformerBlock)]
    group = max(stack, rest := blocks[0] - stack)
    assert sharded.communication == weights - sum(blocks) + stack + rest + 2 * group
    alone = replace(needs, settings=replace(needs.settings, num_processes=1, batch_size=4)).memory()
    assert alone.communication == 0
    assert needs.checkpoint == weights + needs.sizes.buffers + needs.sizes.optimizer + weights


def test_gradients_of_microbatches_are_whole_until_they_travel() -> None:
    once, twice = _large(), _large(accumulate=2)
    assert twice.memory("fsdp", 1).gradients == once.sizes.parameters > 3 * once.memory("fsdp", 1).gradients
    spread = twice.memory("fsdp", 4).gradients
    assert spread == once.sizes.parameters - once.sizes.experts * 3 // 4
    assert twice.memory().activations < 0.7 * once.memory().activations


def test_sharded_experts_are_gathered_in_16_bits() -> None:
    needs = _large(bf16=True, batch_size=8)
    copies = needs.trace.expert_copies
    assert needs.sizes.experts // 4 <= copies <= needs.sizes.experts // 2
    assert needs.memory("ddp").activations - needs.memory("fsdp").activations == copies
    gathered = [case.memory("fsdp").communication for case in (_large(), needs)]
    assert gathered[0] - gathered[1] == needs.sizes.largest_stack // 2


def test_with_few_activations_the_end_of_the_step_is_the_fullest() -> None:
    make = dynamics(*WIDE, "experiment=moe_pot", shape=(2, 2, 2))
    needs = estimate(make, Settings(1))
    assert needs.memory().gradients == needs.sizes.parameters and needs.sizes.optimizer_work == 0


@pytest.mark.parametrize("experiment", ["dense", "moe_pot", "mono", "nestor", "random", "shodh_moe"])
def test_every_experiment_is_counted_like_its_steps(experiment: str) -> None:
    """Twice as many samples: twice the FLOPs, and twice as much is kept for the gradient."""
    make = dynamics(f"experiment={experiment}", *NARROW, shape=(4, 4, 4))
    one, two = estimate(make, Settings(1)), estimate(make, Settings(2))
    assert one.flops_per_sample == two.flops_per_sample > 0
    assert two.trace.kept == pytest.approx(2 * one.trace.kept, rel=0.1)


@pytest.mark.slow
def test_large_models_are_estimated_without_their_memory() -> None:
    make = partial(plan_dynamics, config("dynamics", "experiment=shodh_moe", "dynamics=base"), (16, 16, 16), 32)
    needs = estimate(make, Settings(8, bf16=True))
    assert needs.sizes.parameters > 7e9 and needs.trace.kept > 40e9
    assert needs.trace.backward == pytest.approx(2 * needs.trace.forward, rel=0.1)


def test_nothing_of_a_plan_stays_behind() -> None:
    """What solvers keep for a box that nothing else has met is made of numbers."""
    make = autoencoder("autoencoder.widths=[8,16]", "autoencoder.latent_channels=8", shape=(12, 20, 28))
    estimate(make, Settings(1))
    task: Any = make().task
    model = task.autoencoder
    geometry, scale, head = task.stores()[0].geometry(0), model.scale("planned")["velocity"], model.heads.solenoidal
    flux = head(torch.randn(1, 3, 12, 20, 28), geometry, scale)
    assert not isinstance(flux, FakeTensor)
    assert float(head(flux, geometry, scale).sub(flux).abs().max()) < 1e-5 < float(flux.abs().max())
    with FakeTensorMode():
        assert isinstance(torch.ones(1), FakeTensor)


def test_real_stores_are_planned_with_their_boxes(road: "Road") -> None:
    small = ["autoencoder.widths=[8,16]", "autoencoder.num_blocks=[1,1]", "autoencoder.latent_channels=8"]
    field, latent = road.store("porous"), road.inputs("dynamics")
    planned = plan(config("autoencoder", *small), field)
    assert planned.sample_shape == (1, 3, 16, 16, 16) and planned.tokens == 4**3
    found = describe_experiment("dynamics", [*NARROW, f"stores=[{','.join(map(str, latent))}]"])
    assert found["latent cells"] == "4 × 4 × 4"
    from latentphys.data import open_store

    tokens, flops = sample_cost(config("dynamics", *NARROW), open_store(latent[0]))
    assert tokens == 4**3
    assert flops * 8 == sum(found["FLOPs per step of a process"].values())
    with pytest.raises(ValueError, match="Expected field stores for autoencoder, got"):
        describe_experiment("autoencoder", [f"stores=[{latent[0]}]"])
    with pytest.raises(ValueError, match="Expected latent stores for dynamics, got"):
        describe_experiment("dynamics", [f"stores=[{field.path}]"])


def test_an_experiment_is_described() -> None:
    found = describe_experiment(
        "dynamics", [*NARROW, "experiment=shodh_moe", "processes=4", "latent_shape=[4,4,4]", "trainer.batch_size=8"]
    )
    assert found["tokens per step"] == 8 * 64 and found["latent cells"] == "4 × 4 × 4"
    assert list(found["memory under each strategy"]) == [
        "ddp",
        "fsdp",
        "fsdp, expert_parallel=2",
        "fsdp, expert_parallel=4",
    ]
    memory = found["memory of a process at its fullest"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert memory["total"] == found["memory under each strategy"]["ddp"]
    parts = found["parameters"]
    stored = ("routed experts", "shared experts", "mixing", "routing", "embedding, conditioning, head")
    assert sum(parts[name] for name in stored) == parts["stored"]
    assert parts["active per token"] == parts["stored"] - parts["routed experts"] * 3 // 4
    flops = sum(found["FLOPs per step of a process"].values())
    assert found["time per step at 25% of the peak"]["A100 80 GB"] == f"{flops / (0.25 * 19.5e12):.3g} s"
    assert describe_experiment("dynamics", [])["latent cells"] == "8 × 8 × 8"


def test_autoencoders_are_described_on_the_boxes_that_they_are_for() -> None:
    found = describe_experiment("autoencoder", ["autoencoder.widths=[8,16]", "autoencoder.num_blocks=[1,1]"])
    assert found["cells"] == "32 × 32 × 32" and found["tokens per step"] == 4 * 8**3
    assert found["parameters"]["stored"] == found["parameters"]["encoder"] + found["parameters"]["decoder"]
    assert list(found["memory under each strategy"]) == ["ddp"]


def test_a_run_that_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, advice = [*WIDE, "dynamics.depth=1", "trainer.batch_size=8"], dict[str, int]()

    def noted(*given: Any) -> dict[str, int]:
        advice.update(remedies(*given))
        return advice

    monkeypatch.setattr(info_experiment, "remedies", noted)
    total = estimate(dynamics(*overrides, shape=(8, 8, 8)), Settings(8)).memory().total
    found = describe_experiment("dynamics", [*overrides, f"memory={total}"])
    assert found["memory of a process at its fullest"]["total"] == total and not advice
    with pytest.raises(
        ValueError, match=r"Expected at most .* GB for each process, got a need of .* GB \(weights"
    ) as e:
        describe_experiment("dynamics", [*overrides, f"memory={total - 1}"])
    assert list(advice) == ["trainer.accumulate=8", "trainer.recompute=true", "both of these"]
    assert all(f"{change} needs {size / 1e9:.3g} GB" in str(e.value) for change, size in advice.items())
    assert advice["both of these"] < min(advice["trainer.accumulate=8"], advice["trainer.recompute=true"]) < total
    several = remedies(dynamics(*overrides), Settings(8, num_processes=2, recompute=True))
    assert list(several) == ["trainer.accumulate=4", "trainer.strategy=fsdp on 2 processes"]


def test_settings_are_those_of_the_trainer() -> None:
    given = {"batch_size": 8, "accumulate": 2, "optimizer": "soap", "ema": 0.99, "mixed_precision": "bf16"}
    assert Settings.of({**given, "recompute": True}, 4) == Settings(8, 4, 2, "soap", True, True, True)
    sharded = {"batch_size": 8, "ema": None, "mixed_precision": "no", "strategy": "fsdp", "expert_parallel": 2}
    assert Settings.of(sharded, 2) == Settings(8, 2, strategy="fsdp", expert_parallel=2)


def test_microbatches_change_no_flops_of_a_step() -> None:
    key = "FLOPs per step of a process"
    whole, halves = (
        describe_experiment("dynamics", [*NARROW, "latent_shape=[4,4,4]", "trainer.batch_size=4", *more])[key]
        for more in ([], ["trainer.accumulate=2"])
    )
    assert whole == halves and whole["of which worked out again"] == 0


def test_too_little_memory_is_said() -> None:
    needs = estimate(dynamics(*NARROW), Settings(2))
    assert not any("memory" in text for text in info_experiment._times(needs, 0.25).values())
    vast = replace(needs, sizes=replace(needs.sizes, parameters=10**12))
    assert all(text.endswith(" s, too little memory") for text in info_experiment._times(vast, 0.25).values())
    assert [info_experiment._here(size).rpartition(": ")[2] for size in (1, 10**18)] == [
        "enough for a process",
        "too little for a process",
    ]


def test_a_run_without_remedy() -> None:
    needed = Memory(*[10**9] * 7)
    check_fit(needed, 7 * 10**9, dict)
    with pytest.raises(ValueError, match="choose a smaller model, or a smaller batch"):
        check_fit(needed, 7 * 10**9 - 1, dict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_processes": 3}, r"multiple of 3 processes × 1 microbatches, got 8; choose 6"),
        ({"accumulate": 16}, "got 8; choose 16"),
        ({"strategy": "zero"}, "Expected a strategy of ddp | fsdp"),
        ({"strategy": "fsdp", "optimizer": "soap"}, "Expected optimizer=adamw for strategy=fsdp"),
        ({"num_processes": 2, "expert_parallel": 4}, "Expected expert_parallel to divide the 2 processes, got 4"),
    ],
)
def test_settings_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(8, **changes)


@pytest.mark.parametrize(
    ("model", "override", "message"),
    [
        ("tokeniser", "mfu=0.5", "Expected autoencoder or dynamics"),
        ("dynamics", "processes=0", "Expected a whole number ≥ 1 for 'processes'"),
        ("dynamics", "processes=1.5", "Expected a whole number ≥ 1 for 'processes'"),
        ("dynamics", "memory=much", "Expected a number of bytes such as 80e9 for 'memory'"),
        ("dynamics", "mfu=2", "Expected a share above 0, at most 1 for 'mfu'"),
        ("dynamics", "latent_shape=[4,4]", "Expected three numbers of cells"),
        ("autoencoder", "shape=[30,30,30]", "Expected a grid divisible by the compression"),
        ("dynamics", "dynamics.width=3", "Expected options that train.yaml knows"),
    ],
)
def test_options_that_are_none(model: str, override: str, message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        describe_experiment(model, [override])


def test_experts_that_do_not_spread() -> None:
    settings = Settings(9, num_processes=9, strategy="fsdp", expert_parallel=3)
    with pytest.raises(ValueError, match="Expected expert_parallel to divide the 4 experts, got 3"):
        estimate(dynamics(*NARROW), settings)


@pytest.mark.parametrize(
    ("device", "name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989e12),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", "H100 NVL", 835e12),
        ("NVIDIA H200", "H200", 989e12),
        ("NVIDIA GH200 480GB", "GH200", 989e12),
        ("NVIDIA B200", "B200", 2250e12),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB", 312e12),
        ("NVIDIA A100 80GB PCIe", "A100 80 GB", 312e12),
        ("NVIDIA L40S", "L40S", 362e12),
        ("NVIDIA L4", "L4", 121e12),
        ("Tesla V100-SXM2-16GB", "V100 16 GB", None),
        ("NVIDIA GeForce GTX 1080", None, None),
    ],
)
def test_gpus_are_known_by_their_device_names(device: str, name: str | None, bf16: float | None) -> None:
    gpu = known_gpu(device)
    assert (gpu and gpu.name) == name
    if gpu is not None:
        assert gpu.peak(torch.bfloat16) == bf16 and gpu.peak(torch.float64) is None
        assert gpu.peak(torch.float32) == gpu.fp32 < (bf16 or math.inf)


def test_rates_are_sane() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    assert 1e8 < measured_peak("cpu", torch.float32, size=256, repeats=2) < 1e14
    assert 1e8 < available_memory() < 1e14
