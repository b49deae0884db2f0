"""Learning rates over a run, as factors of the peak: pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "wsd", "constant")


def learning_rate_factor(schedule: str, step: int, num_steps: int, warmup: int, cooldown: float = 0.2) -> float:
    """Linear warm-up to 1, and then what the schedule says.

        warm-up    (step + 1) / warmup
        cosine     ½ (1 + cos π s),    s = (step − warmup) / (num_steps − warmup)
        wsd        1 until the last n = cooldown · num_steps steps, then 1 − √((step − (num_steps − n)) / n)
        constant   1

    ``wsd`` (warm-up, stable, decay) has the same factor for every length of run until its decay begins: a checkpoint
    from before can be trained on for longer, or cooled down at once.

    Args:
        schedule: ``cosine | wsd | constant``.
        step: 0…num_steps − 1; at ``num_steps``, which is never run, cosine and wsd would reach 0.
        num_steps: optimiser steps of the run.
        warmup: steps of warm-up; 0 for none.
        cooldown: share of the run's steps in which ``wsd`` decays, rounded to whole steps, in (0, 1]; it begins after
            the warm-up at the earliest. Good values: 0.1…0.2.

    Raises:
        ValueError: an unknown schedule, or a share that is none.

    Reference: 1 − √ decay of Hägele et al. 2024, arXiv 2405.18392.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"Expected a schedule of {' | '.join(SCHEDULES)}, got {schedule!r}.")
    if not 0 < cooldown <= 1:
        raise ValueError(f"Expected a cooldown above 0 and up to 1, as a share of the run, got {cooldown}.")
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
    if schedule == "wsd":
        first = max(warmup, num_steps - max(1, round(cooldown * num_steps)))
        return 1.0 if step < first else 1 - math.sqrt((step - first) / max(1, num_steps - first))
    return 1.0
