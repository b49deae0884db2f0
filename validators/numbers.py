"""Numbers as people read them: in plain text, and as a printed page sets them."""

from __future__ import annotations

import re

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
UNITS = {"m3/s": "m³/s", "m2/s2": "m²/s²"}
SIGNS = {" x ": "\u00a0×\u00a0", " - ": " − ", ">=": "≥", "<=": "≤", "^2": "²"}
FORMULAS = {"sum |": "Σ |", "1/2 <u.u>": "½\u00a0⟨u·u⟩"}


def number(value: float) -> str:
    """Four significant digits; 0.0 where the value is exactly zero, bit for bit."""
    if value == 0:
        return "0.0"
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def printed(value: float) -> str:
    """`number` with its power of ten written out: 2.8 × 10⁻¹⁰."""
    mantissa, _, exponent = number(value).partition("e")
    if not exponent:
        return mantissa.replace("-", "−")
    power = f"10{exponent.translate(SUPERSCRIPT)}"
    return power if mantissa == "1" else f"{mantissa}\u00a0×\u00a0{power}".replace("-", "−")


def percent(share: float, decimals: int = 0) -> str:
    """A share 0 … 1 in per cent; 0 and 100 only where it is exactly that, up to rounding errors."""
    if min(share, 1 - share) < 1e-12:
        return "0" if share < 0.5 else "100"
    smallest = 10.0**-decimals
    least = f"{smallest:.{decimals}f}"
    if 100 * share < smallest / 2:
        return f"< {least}"
    return f"> {100 - smallest:.{decimals}f}" if 100 * (1 - share) < smallest / 2 else f"{100 * share:.{decimals}f}"


def typeset(text: str) -> str:
    """A phrase with its units, numbers, comparisons and averages as a printed page has them: <u> becomes ⟨u⟩."""
    for plain, sign in (UNITS | SIGNS | FORMULAS).items():
        text = text.replace(plain, sign)
    text = re.sub(r"\b\d[\d.]*e[+-]?\d+\b", lambda found: printed(float(found[0])), text)
    return re.sub(r"<([^<>= ]{1,5})>", r"⟨\1⟩", text)
