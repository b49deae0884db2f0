"""What processors can do: peak arithmetic rates and memory of known GPUs, the memory here, and a measured rate."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class GPU:
    """A GPU as its vendor describes it.

    Args:
        name: what people call it.
        pattern: found in what `torch.cuda.get_device_name` says of it, and of no GPU further down in `GPUS`.
        memory: bytes, in the vendor's decimal GB.
        fp32: peak rate of FP32 [FLOP/s], without TF32.
        bf16: peak rate of bfloat16 products summed up in FP32 [FLOP/s], without sparsity; None where there is none.
    """

    name: str
    pattern: str
    memory: int
    fp32: float
    bf16: float | None

    def peak(self, dtype: torch.dtype) -> float | None:
        """Peak rate of a precision [FLOP/s]; None where the GPU or this table has none."""
        return {torch.float32: self.fp32, torch.bfloat16: self.bf16}.get(dtype)


GPUS = (
    GPU("B200", r"\bB200\b", 180_000_000_000, 75e12, 2250e12),
    GPU("GH200", r"\bGH200\b", 96_000_000_000, 67e12, 989e12),
    GPU("H200 NVL", r"\bH200 NVL\b", 141_000_000_000, 60e12, 835e12),
    GPU("H200", r"\bH200\b", 141_000_000_000, 67e12, 989e12),
    GPU("H100 NVL", r"\bH100 NVL\b", 94_000_000_000, 60e12, 835e12),
    GPU("H100 PCIe", r"\bH100 PCIe\b", 80_000_000_000, 51e12, 756e12),
    GPU("H100 SXM", r"\bH100\b", 80_000_000_000, 67e12, 989e12),
    GPU("A100 40 GB", r"\bA100-\S+-40GB", 40_000_000_000, 19.5e12, 312e12),
    GPU("A100 80 GB", r"\bA100\b", 80_000_000_000, 19.5e12, 312e12),
    GPU("L40S", r"\bL40S\b", 48_000_000_000, 91.6e12, 362e12),
    GPU("L4", r"\bL4\b", 24_000_000_000, 30.3e12, 121e12),
    GPU("V100 16 GB", r"\bV100-\S+-16GB", 16_000_000_000, 15.7e12, None),
    GPU("V100 32 GB", r"\bV100\b", 32_000_000_000, 15.7e12, None),
)
"""Dense rates, from NVIDIA's data sheets: HGX B200 (2025, a GPU of eight), GH200 Grace Hopper (2023), H200 (2024), H100
(2022), A100 (2020), L40S (2023), L4 (2023), V100 (2017: tensor cores of FP16 alone, 125 TFLOP/s). Where a data sheet
gives the rate with sparsity this is half of it."""


def known_gpu(name: str) -> GPU | None:
    """The GPU of a device name as torch gives it, such as ``NVIDIA H100 80GB HBM3``; None where it is not known."""
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, name)), None)


def peak_flops(dtype: torch.dtype) -> float | None:
    """Peak rate of the GPU here in a precision [FLOP/s]; None without a GPU, or with one that is not known."""
    gpu = known_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if gpu is None else gpu.peak(dtype)


def available_memory() -> int:
    """Bytes that one process may fill: of the GPU here, or main memory, or as much of it as this container may."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def measured_peak(device: torch.device | str, dtype: torch.dtype, size: int | None = None, repeats: int = 5) -> float:
    """Rate of one large matrix product [FLOP/s], the best of some: what benchmarks take for a peak where none is known.

    Args:
        size: rows of the square matrices. Default: 8192 on a GPU, 2048 on a CPU.
        repeats: how often to time it, after once to warm up.
    """
    device = torch.device(device)
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    out, best = torch.mm(a, b), float("inf")
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
