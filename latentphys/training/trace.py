"""What one training step does to the memory and to the arithmetic units, found without doing it.

Every operation of forward and backward pass goes by; what it allocates is added, and taken off when the last tensor
that needs it is gone, as autograd keeps and frees it. Under torch's `FakeTensorMode` there is no memory behind it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentphys.flops import counting
from latentphys.routers import Experts

FORWARD, BACKWARD = "forward", "backward"
_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Trace:
    """One optimiser step of one process, up to the optimiser. Bytes, and FLOPs of one microbatch.

    Args:
        weights: parameters and buffers.
        inputs: the batch.
        gradients: gradients of the parameters at the fullest moment; less than all of them where that comes before the
            end of the backward pass.
        activations: at the fullest moment, what the forward pass has made, without `expert_copies`.
        expert_copies: likewise, experts' weights in 16 bits.
        temporary: at the fullest moment, what the backward pass has made and will drop.
        kept: what the forward pass leaves behind for the backward pass.
        forward, backward: FLOPs; the backward pass works out again what it was not left.
    """

    weights: int
    inputs: int
    gradients: int
    activations: int
    expert_copies: int
    temporary: int
    kept: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment of forward and backward pass."""
        return self.weights + self.inputs + self.gradients + self.activations + self.expert_copies + self.temporary


def trace(
    model: nn.Module, loss: Callable[[Any], Tensor], batch: Callable[[], Any], accumulate: int = 1, bf16: bool = False
) -> Trace:
    """Follow forward and backward pass of a model without memory.

    Args:
        model: its weights are on device ``meta``.
        loss: batch → loss, by way of the model; anything that it returns stays alive through the backward pass.
        batch: makes one microbatch, whose tensors are what was allocated for it.
        accumulate: microbatches per optimiser step; of more than two, two are followed.
        bf16: run the forward pass under bfloat16 autocast.
    """
    phase = [FORWARD]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        one = batch()
        recorder = Recorder(phase, model)
        with recorder, counting(phase) as flops:
            for n in range(min(accumulate, 2)):
                phase[-1] = FORWARD
                with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                    out = loss(one)
                if not n:
                    kept = recorder.live(FORWARD)
                phase[-1] = BACKWARD
                out.backward()
                del out
                if not n:
                    counted = dict(flops)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        fullest = recorder.fullest(gradients)
        model.zero_grad()
    return Trace(
        weights=_size([*model.parameters(), *model.buffers()]),
        inputs=_size(value for value in vars(one).values() if isinstance(value, Tensor)),
        gradients=fullest["gradients"],
        activations=fullest[FORWARD],
        expert_copies=fullest["expert copies"],
        temporary=fullest[BACKWARD],
        kept=kept,
        forward=counted.get(FORWARD, 0),
        backward=counted.get(BACKWARD, 0),
    )


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes behind some tensors, those of shared memory once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


class Recorder(TorchDispatchMode):
    """Every allocation and what becomes of it, in the order in which they come.

    Args:
        phase: says last what runs now; the caller changes it on the way.
        model: whose experts are told from other weights.
    """

    def __init__(self, phase: list[str], model: nn.Module) -> None:
        super().__init__()
        self.phase = phase
        self.events: list[tuple[int, int]] = []
        self.kinds: list[str] = []
        self.numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        experts = [module for module in model.modules() if isinstance(module, Experts)]
        self.of_experts = {id(weight) for layer in experts for weight in layer.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is _ATEN._grouped_mm and isinstance(args[0], FakeTensor):
            out = _grouped_mm(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        kind = self.phase[-1]
        if func.overloadpacket is _ATEN._to_copy and id(args[0]) in self.of_experts:
            kind = "expert copies"
        made_before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in made_before:
                self._made(tensor.untyped_storage(), kind)
        return out

    def _made(self, storage: Any, kind: str) -> None:
        if storage in self.numbers:
            return
        number, size = len(self.kinds), storage.nbytes()
        self.numbers[storage] = number
        self.kinds.append(kind)
        self.events.append((number, size))
        weakref.finalize(storage, self.events.append, (number, -size)).atexit = False

    def live(self, kind: str) -> int:
        """Bytes of one kind that are there now."""
        return sum(size for number, size in self.events if self.kinds[number] == kind)

    def fullest(self, gradients: Iterable[Tensor]) -> Counter[str]:
        """Bytes by kind at the moment when they were most."""
        kinds = list(self.kinds)
        for gradient in gradients:
            kinds[self.numbers[gradient.untyped_storage()]] = "gradients"
        now, best, most = Counter[str](), Counter[str](), 0
        total = 0
        for number, size in self.events:
            total += size
            now[kinds[number]] += size
            if total > most:
                most, best = total, now.copy()
        return best


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """The result's shape, which torch 2.13 knows in bfloat16 only."""
    return a.new_empty(len(offs), a.shape[0], b.shape[1]) if b.ndim == 2 else a.new_empty(a.shape[0], b.shape[-1])
