"""What an experiment would need, in a few lines, before it is launched and without its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from latentphys.accounting import count
from latentphys.configuration import compose
from latentphys.data import open_store
from latentphys.info import Amount, _named, _parameters
from latentphys.training.estimate import Estimate, Memory, Settings, check_fit, estimate, gigabytes, remedies
from latentphys.training.hardware import GPUS, available_memory
from latentphys.training.planned import Planned, plan, plan_autoencoder, plan_dynamics
from latentphys.transformer.dynamics import Dynamics

Shape = tuple[int, int, int]
_OWN = {"shape": None, "latent_shape": None, "processes": 1, "memory": None, "mfu": 0.25}
"""Settings that ``train.yaml`` does not have, and their defaults."""


def describe_experiment(model: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Name → value of what training a model would take.

    Args:
        model: ``autoencoder | dynamics``.
        overrides: of ``train.yaml``, as for training; the run directory and the stores may be left out. Besides:
            ``processes=8``; ``shape=[128,128,128]``, cells of an autoencoder's boxes, and ``latent_shape=[16,16,16]``,
            latent cells of a dynamics model, where no stores are given (default: those that the presets are meant
            for); ``memory=80e9``, bytes of a process that must be enough; ``mfu=0.25``, the share of the peak rate
            that steps are taken to reach.

    Raises:
        ValueError: unknown options, settings that do not fit together, or a run that does not fit the memory.
    """
    if model not in ("autoencoder", "dynamics"):
        raise ValueError(f"Expected autoencoder or dynamics, got {model!r}.")
    own, config = _compose(model, overrides)
    make = _planner(model, own, config, overrides)
    settings = Settings.of(config["trainer"], own["processes"])
    needs = estimate(make, settings)
    if own["memory"] is not None:
        check_fit(needs.memory(), int(own["memory"]), lambda: remedies(make, settings))
    planned = make()
    cells = planned.sample_shape[-3:]
    return {
        "experiment": model,
        "latent cells" if model == "dynamics" else "cells": " × ".join(map(str, cells)),
        "parameters": _weights(planned),
        "training": _training(config, settings),
        "tokens per step": Amount(settings.batch_size * needs.tokens_per_sample),
        "FLOPs per step of a process": {
            "forward": Amount(settings.accumulate * needs.trace.forward, "FLOP"),
            "backward": Amount(settings.accumulate * needs.trace.backward, "FLOP"),
            "of which worked out again": Amount(
                needs.flops_per_step - settings.accumulate * settings.microbatch * needs.flops_per_sample, "FLOP"
            ),
        },
        "memory of a process at its fullest": _memory(needs.memory()),
        "memory under each strategy": {
            name: Amount(memory.total, "B") for name, memory in _strategies(needs, make).items()
        },
        "memory here": _here(needs.memory().total),
        "checkpoint": Amount(needs.checkpoint, "B"),
        f"time per step at {own['mfu']:.0%} of the peak": _times(needs, own["mfu"]),
    }


def _compose(model: str, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that only this has, and the configuration."""
    from omegaconf import OmegaConf

    mine = [text for text in overrides if text.partition("=")[0] in _OWN]
    own = {**_OWN, **{str(k): v for k, v in dict(OmegaConf.to_container(OmegaConf.from_dotlist(mine))).items()}}  # type: ignore[arg-type]
    for name, kinds, wanted in (
        ("processes", int, "a whole number ≥ 1"),
        ("memory", int | float | None, "a number of bytes such as 80e9"),
        ("mfu", int | float, "a share above 0, at most 1"),
    ):
        value = own[name]
        if not isinstance(value, kinds) or isinstance(value, bool) or (value is not None and not value > 0):
            raise ValueError(f"Expected {wanted} for {name!r}, got {value!r}.")
    if own["mfu"] > 1:
        raise ValueError(f"Expected a share above 0, at most 1 for 'mfu', got {own['mfu']!r}.")
    rest = [text for text in overrides if text.partition("=")[0] not in _OWN]
    given = {text.partition("=")[0] for text in rest}
    missing = [text for name, text in (("run", "run=unused"), ("stores", "stores=[]")) if name not in given]
    return own, compose("train", [f"trainer={model}", *rest, *missing])


def _planner(
    model: str, own: Mapping[str, Any], config: Mapping[str, Any], overrides: Sequence[str]
) -> Callable[[], Planned]:
    """Makes the task, on the largest of the stores or on boxes of a shape."""
    paths = config["stores"]
    stores = [open_store(path) for path in ([paths] if isinstance(paths, str) else paths)]
    for store in stores:
        if ("latent" in store.specs) != (model == "dynamics"):
            wanted = "latent stores" if model == "dynamics" else "field stores"
            raise ValueError(f"Expected {wanted} for {model}, got {store.path}, which has {sorted(store.specs)}.")
    if stores:
        largest = max(stores, key=lambda store: store.grid.num_cells)
        return lambda: plan(config, largest)
    if model == "dynamics":
        size = [text.partition("=")[2] for text in ["dynamics=tiny", *overrides] if text.startswith("dynamics=")][-1]
        latent_shape = own["latent_shape"] or (8 if size == "tiny" else 16,) * 3
        return lambda: plan_dynamics(config, latent_shape, config["autoencoder"]["latent_channels"])
    compression = config["autoencoder"]["stem"] * 2 ** (len(config["autoencoder"]["widths"]) - 1)
    shape = own["shape"] or (compression * (16 if compression >= 8 else 8),) * 3
    return lambda: plan_autoencoder(config, shape)


def _weights(planned: Planned) -> dict[str, Any]:
    model = planned.task.model()
    if not isinstance(model, Dynamics):
        parts = {
            name: _parameters(part) for name, part in model.named_children() if any(True for _ in part.parameters())
        }
        return {"stored": _parameters(model), **parts}
    shape: Any = planned.sample_shape[-3:]
    with FakeTensorMode(allow_non_fake_inputs=True):
        cost = count(model.to_empty(device="cpu"), shape)
    return {
        "stored": Amount(cost.stored.total),
        **{name: Amount(value) for name, value in _named(cost.stored).items()},
        "active per token": Amount(cost.active.total),
        "share active [%]": round(100 * cost.active.total / cost.stored.total, 1),
    }


def _training(config: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    return {
        "optimiser steps": config["trainer"]["num_steps"],
        "samples per step": settings.batch_size,
        "processes": settings.num_processes,
        "strategy": settings.strategy,
        "microbatches of a process": f"{settings.accumulate} of {settings.microbatch} samples",
        "optimiser": settings.optimizer,
        "moving average": "yes" if settings.ema else "no",
        "precision": "bfloat16 autocast" if settings.bf16 else "FP32",
        "recomputation": "yes" if settings.recompute else "no",
    }


def _memory(memory: Memory) -> dict[str, Amount]:
    parts = {name.replace("_", " "): Amount(size, "B") for name, size in vars(memory).items()}
    return {**parts, "total": Amount(memory.total, "B")}


def _strategies(needs: Estimate, make: Callable[[], Planned]) -> dict[str, Memory]:
    """Data parallel, sharded, and sharded with the experts over as many processes as may hold them."""
    n = needs.settings.num_processes
    result = {"ddp": needs.memory("ddp")}
    if n == 1 or needs.settings.optimizer != "adamw":
        return result
    result["fsdp"] = needs.memory("fsdp", 1)
    model = make().task.model()
    if isinstance(model, Dynamics):
        num_experts = model.transformer.routers()[0].num_experts
        for ep in range(2, n + 1):
            if n % ep == 0 and num_experts % ep == 0:
                result[f"fsdp, expert_parallel={ep}"] = needs.memory("fsdp", ep)
    return result


def _here(needed: int) -> str:
    kind = "GPU" if torch.cuda.is_available() else "main"
    size = available_memory()
    return f"{gigabytes(size)} of {kind} memory: {'enough' if needed <= size else 'too little'} for a process"


def _times(needs: Estimate, mfu: float) -> dict[str, str]:
    """Seconds per step on known GPUs, of those that have a rate for the precision."""
    dtype = torch.bfloat16 if needs.settings.bf16 else torch.float32
    needed, work = needs.memory().total, needs.flops_per_step
    return {
        gpu.name: f"{work / (mfu * peak):.3g} s" + ("" if needed <= gpu.memory else ", too little memory")
        for gpu in GPUS
        if (peak := gpu.peak(dtype)) is not None
    }
