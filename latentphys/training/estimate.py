"""What a training run needs, before it is launched: memory of each process, FLOPs of each step, size of a checkpoint.

Forward and backward pass are followed through one process that has the whole model (`trace`). What strategies make of
that is arithmetic: who keeps which part, and what is gathered for the time being. Not counted are what libraries and
allocators take for themselves (a CUDA context, fragmentation, work space of convolutions), batches read ahead, the
solves round voxels, which keep a few more fields, and SOAP turning its basis in every tenth step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from latentphys.data import Store
from latentphys.routers import Experts
from latentphys.training.planned import Planned, plan
from latentphys.training.trace import Recorder, Trace, trace
from latentphys.transformer.block import TransformerBlock


@dataclass(frozen=True)
class Settings:
    """What of a trainer's settings decides on memory and time.

    Args:
        batch_size: samples per optimiser step over all processes.
        num_processes: processes N.
        accumulate: microbatches of each process and step.
        optimizer: ``adamw | soap``.
        ema: whether there is a moving average of the weights.
        bf16: whether it runs under bfloat16 autocast.
        recompute: whether blocks are worked out again in the backward pass.
        strategy: ``ddp | fsdp``.
        expert_parallel: processes that share the experts; ``fsdp`` only.

    Raises:
        ValueError: a batch that does not split, an unknown strategy, or processes that do not.
    """

    batch_size: int
    num_processes: int = 1
    accumulate: int = 1
    optimizer: str = "adamw"
    ema: bool = False
    bf16: bool = False
    recompute: bool = False
    strategy: str = "ddp"
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        parts = self.num_processes * self.accumulate
        if min(self.num_processes, self.accumulate, self.batch_size) < 1 or self.batch_size % parts:
            raise ValueError(
                f"Expected a batch size that is a multiple of {self.num_processes} processes × {self.accumulate} "
                f"microbatches, got {self.batch_size}; choose {max(1, self.batch_size // max(parts, 1)) * parts}."
            )
        if self.strategy not in ("ddp", "fsdp"):
            raise ValueError(f"Expected a strategy of ddp | fsdp, got {self.strategy!r}.")
        if self.strategy == "fsdp" and self.optimizer != "adamw":
            raise ValueError(f"Expected optimizer=adamw for strategy=fsdp, got {self.optimizer!r}; or choose ddp.")
        if self.expert_parallel < 1 or self.num_processes % self.expert_parallel:
            raise ValueError(
                f"Expected expert_parallel to divide the {self.num_processes} processes, got {self.expert_parallel}."
            )

    @classmethod
    def of(cls, trainer: Mapping[str, Any], num_processes: int = 1) -> Settings:
        """From the ``trainer`` part of a configuration; precision None counts as FP32."""
        return cls(
            batch_size=trainer["batch_size"],
            num_processes=num_processes,
            accumulate=trainer.get("accumulate", 1),
            optimizer=trainer.get("optimizer", "adamw"),
            ema=trainer.get("ema") is not None,
            bf16=trainer.get("mixed_precision") == "bf16",
            recompute=bool(trainer.get("recompute", False)),
            strategy=trainer.get("strategy", "ddp"),
            expert_parallel=trainer.get("expert_parallel", 1),
        )

    @property
    def microbatch(self) -> int:
        """Samples of one pass of one process."""
        return self.batch_size // (self.num_processes * self.accumulate)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the fullest moment of a step.

    Args:
        weights: parameters and buffers, as far as this process keeps them.
        gradients: likewise, as far as they are there at that moment.
        optimizer: moments of Adam, preconditioners of SOAP.
        ema: the moving average.
        activations: the batch, and what the forward pass has left for the backward pass.
        temporary: what the backward pass is working on.
        communication: buffers of gradients (ddp); weights gathered, and gradients before they are shared out (fsdp).
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    temporary: int
    communication: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts in FP32.

    Args:
        parameters, buffers: of the whole model.
        optimizer: what the optimiser keeps from step to step.
        optimizer_work: what it takes for itself in a step.
        experts: parameters of all stacks of routed experts.
        largest_stack, largest_rest: of a block's routed experts, and of all else in it; each is gathered at once.
        root: parameters outside all blocks, which stay gathered.
    """

    parameters: int
    buffers: int
    optimizer: int
    optimizer_work: int
    experts: int
    largest_stack: int
    largest_rest: int
    root: int


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Args:
        settings: what it was worked out for.
        tokens_per_sample: latent cells that the model works out for a sample.
        flops_per_sample: FLOPs of forward and backward pass, without what `recompute` does twice.
        trace: one step of one process that has the whole model.
        sizes: of the model and its optimiser.
    """

    settings: Settings
    tokens_per_sample: int
    flops_per_sample: int
    trace: Trace
    sizes: Sizes

    @property
    def flops_per_step(self) -> int:
        """FLOPs of one optimiser step of one process, with what is worked out twice."""
        return self.settings.accumulate * (self.trace.forward + self.trace.backward)

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint's tensors."""
        ema = self.sizes.parameters if self.settings.ema else 0
        return self.sizes.parameters + self.sizes.buffers + self.sizes.optimizer + ema

    def memory(self, strategy: str | None = None, expert_parallel: int | None = None) -> Memory:
        """Of one process, under the settings' strategy or another one."""
        strategy, settings = strategy or self.settings.strategy, self.settings
        ep = settings.expert_parallel if expert_parallel is None else expert_parallel
        build = self._whole if strategy == "ddp" else lambda **moment: self._sharded(ep, **moment)
        t = self.trace
        moments = (
            build(gradients=t.gradients, activations=t.inputs + t.activations, copies=t.expert_copies,
                  temporary=t.temporary),
            build(gradients=self.sizes.parameters, activations=t.inputs, copies=0, temporary=self.sizes.optimizer_work),
        )  # fmt: skip
        return max(moments, key=lambda memory: memory.total)

    def _whole(self, gradients: int, activations: int, copies: int, temporary: int) -> Memory:
        sizes = self.sizes
        return Memory(
            weights=sizes.parameters + sizes.buffers,
            gradients=gradients,
            optimizer=sizes.optimizer,
            ema=sizes.parameters if self.settings.ema else 0,
            activations=activations + copies,
            temporary=temporary,
            communication=sizes.parameters if self.settings.num_processes > 1 else 0,
        )

    def _sharded(self, ep: int, gradients: int, activations: int, copies: int, temporary: int) -> Memory:
        """With FSDP2 experts are gathered in the precision of their products: there are no copies beside them."""
        sizes, n = self.sizes, self.settings.num_processes
        if self.settings.accumulate > 1:
            # Gradients travel with the last microbatch only, and are whole until then.
            gradients = sizes.parameters - sizes.experts + sizes.experts // ep
        else:
            gradients = -(-gradients // n)
        stack = sizes.largest_stack // ep
        gathered = stack // 2 if self.settings.bf16 else stack
        return Memory(
            weights=-(-sizes.parameters // n) + sizes.buffers,
            gradients=gradients,
            optimizer=-(-sizes.optimizer // n),
            ema=-(-sizes.parameters // n) if self.settings.ema else 0,
            activations=activations,
            temporary=temporary,
            # The group at work and the next one, and the gradients of one as they are and on their way.
            communication=sizes.root + gathered + sizes.largest_rest + 2 * max(stack, sizes.largest_rest),
        )


def estimate(make: Callable[[], Planned], settings: Settings) -> Estimate:
    """Work out what a run needs, without memory and arithmetic of its size.

    Args:
        make: plans the task anew, see `latentphys.training.planned`.

    Raises:
        ValueError: an optimiser that is unknown or not installed, or expert parallelism that experts do not allow.
    """
    planned = make()
    model = planned.task.model()
    for layer in model.modules():
        if isinstance(layer, Experts) and layer.num_experts % settings.expert_parallel:
            raise ValueError(
                f"Expected expert_parallel to divide the {layer.num_experts} experts, got {settings.expert_parallel}."
            )
    sizes = _sizes(model, settings.optimizer)
    planned = make()
    seen = plain = _trace(planned, settings)
    if settings.recompute:
        from latentphys.training.recompute import set_recompute

        planned = make()
        set_recompute(planned.task.model(), True)
        seen = _trace(planned, settings)
    flops = (plain.forward + plain.backward) // settings.microbatch
    return Estimate(settings, planned.tokens, flops, seen, sizes)


def sample_cost(config: Mapping[str, Any], store: Store) -> tuple[int, int]:
    """Tokens of one sample of a store, and FLOPs of training on it, without what is worked out twice.

    Args:
        config: the composed ``train.yaml``.
        store: latents for a dynamics model, fields for an autoencoder.
    """
    planned = plan(config, store)
    one = _trace(planned, Settings(batch_size=1))
    return planned.tokens, one.forward + one.backward


def _trace(planned: Planned, settings: Settings) -> Trace:
    task = planned.task.train()

    def loss(batch: Any) -> Tensor:
        return task(batch).loss

    return trace(task, loss, lambda: planned.batch(settings.microbatch), settings.accumulate, settings.bf16)


def _sizes(model: nn.Module, optimizer: str) -> Sizes:
    stacks = [_bytes(layer) for layer in model.modules() if isinstance(layer, Experts)]
    blocks = [block for block in model.modules() if isinstance(block, TransformerBlock)]
    rests = [_bytes(block) - _bytes(block.feed_forward.experts) for block in blocks]
    parameters, buffers = _bytes(model), sum(buffer.nbytes for buffer in model.buffers())
    state, work = _optimizer(model, optimizer)
    return Sizes(
        parameters=parameters,
        buffers=buffers,
        optimizer=state,
        optimizer_work=work,
        experts=sum(stacks),
        largest_stack=max(stacks, default=0),
        largest_rest=max(rests, default=0),
        root=parameters - sum(stacks) - sum(rests),
    )


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _optimizer(model: nn.Module, name: str) -> tuple[int, int]:
    """Bytes that an optimiser keeps once it has taken a step, and those that it takes for itself in the next one."""
    from latentphys.training.optimizers import new_optimizer

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        optimizer = new_optimizer(name, model, 1e-3, 1e-2)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        with Recorder(["step"], model) as recorder:
            optimizer.step()
        work = recorder.fullest([])["step"]
    state = [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in state}.values()), work


def remedies(make: Callable[[], Planned], settings: Settings) -> dict[str, int]:
    """What a process would need with other settings: a change, as it would be typed, → bytes."""
    changes: dict[str, dict[str, Any]] = {}
    if settings.microbatch > 1:
        accumulate = settings.accumulate * settings.microbatch
        changes[f"trainer.accumulate={accumulate}"] = {"accumulate": accumulate}
    if not settings.recompute:
        changes["trainer.recompute=true"] = {"recompute": True}
        if settings.microbatch > 1:
            changes["both of these"] = {"accumulate": accumulate, "recompute": True}
    if settings.strategy == "ddp" and settings.num_processes > 1 and settings.optimizer == "adamw":
        changes[f"trainer.strategy=fsdp on {settings.num_processes} processes"] = {"strategy": "fsdp"}
    return {name: estimate(make, replace(settings, **change)).memory().total for name, change in changes.items()}


def check_fit(needed: Memory, available: int, others: Callable[[], Mapping[str, int]]) -> None:
    """Refuse a run that does not fit.

    Args:
        available: bytes of a process.
        others: see `remedies`; asked only if the run is refused.

    Raises:
        ValueError: more bytes needed than available.
    """
    if needed.total <= available:
        return
    advice = ", ".join(f"{change} needs {gigabytes(size)}" for change, size in others().items())
    raise ValueError(
        f"Expected at most {gigabytes(available)} for each process, got a need of {gigabytes(needed.total)} "
        f"(weights {gigabytes(needed.weights)}, gradients {gigabytes(needed.gradients)}, "
        f"optimiser {gigabytes(needed.optimizer)}, activations {gigabytes(needed.activations)}); "
        + (advice or "choose a smaller model, or a smaller batch")
        + "."
    )


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
