"""One judged number: what was measured, with which operator, against what, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail", "info"]
Criterion = Literal["<=", "<"]


@dataclass(frozen=True)
class Check:
    """One judged number. Build it with `at_most`, `below` or `info`, which derive the verdict.

    Args:
        name: what was measured, such as ``net_flux_max``.
        family: the family of flows it was measured on, such as ``open_channel``.
        value: the number, in ``unit``.
        unit: SI unit; "1" for a ratio.
        threshold: what the value was held against; None for information.
        criterion: ``<=`` or ``<``, how it was held against it; None for information.
        operator: how the number was measured, in one phrase.
        dtype: type in which the data were stored. The measurement itself is always FP64.
        verdict: ``pass | fail | info``.
        detail: where, or over how much.
    """

    name: str
    family: str
    value: float
    unit: str
    threshold: float | None
    criterion: Criterion | None
    operator: str
    dtype: str
    verdict: Verdict
    detail: str = ""

    @classmethod
    def at_most(
        cls,
        name: str,
        value: float,
        threshold: float,
        *,
        family: str,
        unit: str,
        operator: str,
        dtype: str,
        detail: str = "",
    ) -> Check:
        """A check that passes where value ≤ threshold. A NaN fails."""
        verdict: Verdict = "pass" if value <= threshold else "fail"
        return cls(name, family, float(value), unit, float(threshold), "<=", operator, dtype, verdict, detail)

    @classmethod
    def below(
        cls,
        name: str,
        value: float,
        threshold: float,
        *,
        family: str,
        unit: str,
        operator: str,
        dtype: str,
        detail: str = "",
    ) -> Check:
        """A check that passes where value < threshold: to equal a baseline is no success. A NaN fails."""
        verdict: Verdict = "pass" if value < threshold else "fail"
        return cls(name, family, float(value), unit, float(threshold), "<", operator, dtype, verdict, detail)

    @classmethod
    def info(
        cls,
        name: str,
        value: float,
        *,
        family: str,
        unit: str,
        operator: str,
        dtype: str,
        detail: str = "",
    ) -> Check:
        """A number that is reported and not judged; only a NaN fails."""
        verdict: Verdict = "fail" if math.isnan(value) else "info"
        return cls(name, family, float(value), unit, None, None, operator, dtype, verdict, detail)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; a value that JSON cannot hold (NaN, infinity) becomes None."""
        described = dict(vars(self))
        for name in ("value", "threshold"):
            described[name] = finite_or_none(described[name])
        return described


def finite_or_none(value: float | None) -> float | None:
    """The number, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


def exit_status(checks: Iterable[Check]) -> int:
    """0 where no check failed, 1 where any did."""
    return int(any(check.verdict == "fail" for check in checks))
