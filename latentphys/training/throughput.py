"""How fast training goes: samples, tokens and arithmetic per second, and the share of time spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from latentphys.ranks import in_group


class Throughput:
    """Rates of the steps since they were last asked for, over all processes.

        with throughput.waiting():
            batch = next(batches)
        ...                                     # one step
        throughput.step(len(batch.values))      # this process's samples
        with throughput.paused():
            ...                                 # tests and checkpoints
        throughput.rates()

    A GPU works behind the host's back: ask where the host has waited for it, as logging a loss does.

    Args:
        tokens_per_sample: latent cells that the model works out for a sample.
        flops_per_sample: FLOPs of forward and backward pass for a sample, recomputation left out, see
            `latentphys.training.estimate.Estimate.flops_per_sample`.
        peak_flops: peak rate of one process's processor [FLOP/s], see `latentphys.training.hardware.peak_flops`. None
            where it is not known: there is no MFU then.
        device: where processes exchange their sums.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        tokens_per_sample: float,
        flops_per_sample: float,
        peak_flops: float | None = None,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"Expected a positive peak rate [FLOP/s], or none, got {peak_flops}.")
        self.tokens_per_sample, self.flops_per_sample, self.peak_flops = tokens_per_sample, flops_per_sample, peak_flops
        self.device, self.clock = device, clock
        self._start_over()

    def _start_over(self) -> None:
        self._start = self.clock()
        self._samples = self._tokens = self._flops = self._idle = self._waited = 0.0

    def step(self, samples: int, tokens: float | None = None, flops: float | None = None) -> None:
        """One step of this process.

        Args:
            tokens, flops: of all these samples, where they are of another size than most.
        """
        self._samples += samples
        self._tokens += samples * self.tokens_per_sample if tokens is None else tokens
        self._flops += samples * self.flops_per_sample if flops is None else flops

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in this block is spent waiting for data."""
        start, idle = self.clock(), self._idle
        try:
            yield
        finally:
            self._waited += self.clock() - start - (self._idle - idle)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block does not count."""
        start = self.clock()
        try:
            yield
        finally:
            self._idle += self.clock() - start

    def rates(self) -> dict[str, float]:
        """What the steps since the last call come to; every process calls it, and gets the same: it is one collective.

        Returns:
            ``samples_per_s`` and ``tokens_per_s`` of all processes together; ``mfu``, the FLOPs of the model as a share
            of what the processors could do in that time, where their peak is known; ``data_wait``, the share of the
            time spent waiting for data. Empty where there was no step.
        """
        seconds = self.clock() - self._start - self._idle
        sums = torch.tensor(
            [self._samples, self._tokens, self._flops, self._waited, seconds, 1.0],
            dtype=torch.float64,
            device=self.device,
        )
        self._start_over()
        if in_group():
            dist.all_reduce(sums)
        samples, tokens, flops, waited, seconds, world = sums.tolist()
        if not samples or seconds <= 0:
            return {}
        rates = {"samples_per_s": samples * world / seconds, "tokens_per_s": tokens * world / seconds}
        if self.peak_flops is not None:
            rates["mfu"] = flops / (seconds * self.peak_flops)
        return {**rates, "data_wait": waited / seconds}
