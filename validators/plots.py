"""The report's curves as inline SVG, which needs no plotting package and stays sharp in print."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from latentphys.validators.numbers import printed
from latentphys.validators.pointwise import FLOOR, MODEL, PERSISTENCE
from latentphys.validators.series import Curve, Series
from latentphys.validators.statistics import REFERENCE

STYLES = {
    PERSISTENCE: ("#808080", "6 4", 1.6),
    FLOOR: ("#d55e00", "8 3 2 3", 1.6),
    REFERENCE: ("#1a1a1a", "", 1.3),
    MODEL: ("#0072b2", "", 2.0),
}
"""Colour, dash and width of each curve, bottom layer first: told apart by colour-blind readers and in grey print."""
ORDERED = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98))
"""Curves without a style of their own, such as layers, take these colours in their order: dark to light."""
MOST_NAMED = 4
"""More ordered curves are not named one by one."""
WIDTH, HEIGHT = 460.0, 310.0
LEFT, RIGHT, TOP, BOTTOM = 72.0, 12.0, 30.0, 46.0
_SPAN = (HEIGHT - BOTTOM, TOP)
MOST_MARKERS = 24
"""Longer curves carry no markers."""
DIVERGED = 5.0
"""A VRMSE above this goes on a logarithmic axis, so that the part below 1 can still be read."""
MOST_DECADES = 12
"""A logarithmic axis ends this far below its largest value."""


@dataclass(frozen=True)
class Axis:
    """One axis: its range, whether it is logarithmic, and where it lies on the page."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where a value lies; NaN where the axis has no place for it."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return math.nan
        share = (self._scaled(value) - self._scaled(self.low)) / (self._scaled(self.high) - self._scaled(self.low))
        return self.start + share * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self) -> list[tuple[float, str]]:
        """Labelled ticks: decades of a logarithmic axis (and 2 and 5 of a short one), else five round numbers or so."""
        if not self.log:
            step = _round_step((self.high - self.low) / 5)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [(i * step, _tick(i * step, step)) for i in range(first, last + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        if len(decades) > 4:
            stride = math.ceil(len(decades) / 6)
            candidates = [(10.0**d, _tick(10.0**d)) for d in decades if d % stride == 0]
        else:
            candidates = [(m * 10.0**d, _tick(m * 10.0**d)) for d in decades for m in (1, 2, 5)]
        return [(value, text) for value, text in candidates if self.low * 0.999 <= value <= self.high * 1.001]


def _round_step(step: float) -> float:
    """The next larger of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * step)


def _tick(value: float, step: float = 0.0) -> str:
    """A tick's label, with as many decimals as its neighbours where they are a handy step apart."""
    if 1e-3 <= step < 1e4:
        return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    return printed(value).replace("\u00a0", "") if value else "0"


def svg(series: Series) -> str:
    """One plot as an ``<svg>`` element to put into a page."""
    x, y = _axes(series)
    root = ET.Element("svg", viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", role="img")
    ET.SubElement(root, "title").text = f"{series.title}: {series.y_label} over {series.x_label}"
    _frame(root, x, y, series)
    # An inner svg element clips what it holds, and needs no id that two plots of a page could share.
    box = {"x": x.start - 3, "y": y.end - 3, "width": x.end - x.start + 6, "height": y.start - y.end + 6}
    inner = ET.SubElement(root, "svg", {key: f"{value:g}" for key, value in box.items()})
    inner.set("viewBox", f"{box['x']:g} {box['y']:g} {box['width']:g} {box['height']:g}")
    if series.name == "vrmse":
        _line(inner, x.start, y(1.0), x.end, y(1.0), stroke="#1a1a1a", dash="1.5 3")
    styles = _styles(series.curves)
    order = list(STYLES)
    layers = sorted(series.curves, key=lambda curve: order.index(curve.label) if curve.label in STYLES else len(order))
    for curve in layers:
        _curve(inner, x, y, series.x, curve, styles[curve.label])
    _legend(root, styles)
    return ET.tostring(root, encoding="unicode")


def _styles(curves: Iterable[Curve]) -> dict[str, tuple[str, str, float]]:
    """Colour, dash and width by label; a single curve that has none of its own looks like the model's."""
    labels = [curve.label for curve in curves]
    others = [label for label in labels if label not in STYLES]
    if len(others) == 1:
        return {label: STYLES.get(label, STYLES[MODEL]) for label in labels}
    return {
        label: STYLES.get(label) or (blend(ORDERED, others.index(label) / (len(others) - 1)), "", 1.6)
        for label in labels
    }


def blend(ramp: Sequence[tuple[int, int, int]], share: float) -> str:
    """The colour at a share 0 … 1 of the way along a ramp."""
    place = min(max(share, 0.0), 1.0) * (len(ramp) - 1)
    low = min(int(place), len(ramp) - 2)
    mixed = (round(a + (place - low) * (b - a)) for a, b in zip(ramp[low], ramp[low + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _axes(series: Series) -> tuple[Axis, Axis]:
    """Axes that hold all of the curves: energy and error from zero, spectra over twelve decades at most."""
    values = [v for c in series.curves for v in (*c.y, *(c.low or ()), *(c.high or ())) if math.isfinite(v)]
    diverged = series.name == "vrmse" and max(values, default=0.0) > DIVERGED
    first, last = series.x[0], series.x[-1]
    if last <= first:
        first, last = (first / 2, first * 2) if series.log else (first - 0.5, first + 0.5)
    x = Axis(first, last, series.log, LEFT, WIDTH - RIGHT)
    if not series.log and not diverged:
        largest = max((*values, 1.0) if series.name == "vrmse" else values, default=0.0)
        return x, Axis(0.0, 1.06 * largest or 1.0, False, *_SPAN)
    positive = [value for value in values if value > 0] or [1.0]
    high = max(positive) * 1.5
    return x, Axis(max(min(positive) / 1.5, high * 10.0**-MOST_DECADES), high, True, *_SPAN)


def _frame(root: ET.Element, x: Axis, y: Axis, series: Series) -> None:
    for value, text in x.ticks():
        _line(root, x(value), y.start, x(value), y.end, stroke="#ebebeb")
        _line(root, x(value), y.start, x(value), y.start + 4)
        _text(root, x(value), y.start + 16, text, "middle")
    for value, text in y.ticks():
        _line(root, x.start, y(value), x.end, y(value), stroke="#ebebeb")
        _line(root, x.start, y(value), x.start - 4, y(value))
        _text(root, x.start - 7, y(value) + 4, text, "end")
    _line(root, x.start, y.start, x.end, y.start)
    _line(root, x.start, y.start, x.start, y.end)
    _text(root, (x.start + x.end) / 2, HEIGHT - 8, series.x_label, "middle")
    label = _text(root, 0, 0, series.y_label, "middle")
    label.set("transform", f"translate(13 {(y.start + y.end) / 2:g}) rotate(-90)")


def _curve(
    root: ET.Element, x: Axis, y: Axis, abscissa: tuple[float, ...], curve: Curve, style: tuple[str, str, float]
) -> None:
    colour, dash, width = style
    if curve.low is not None and curve.high is not None:
        upper, lower = _points(x, y, abscissa, curve.high), _points(x, y, abscissa, curve.low)
        for top, bottom in zip(upper, lower, strict=False):
            outline = " ".join(f"{a:.2f},{b:.2f}" for a, b in (*top, *reversed(bottom)))
            ET.SubElement(root, "polygon", {"points": outline, "fill": colour, "fill-opacity": "0.12"})
    for piece in _points(x, y, abscissa, curve.y):
        line = {"points": " ".join(f"{a:.2f},{b:.2f}" for a, b in piece), "fill": "none", "stroke": colour}
        ET.SubElement(root, "polyline", {**line, "stroke-width": f"{width:g}", "stroke-dasharray": dash or "none"})
        for a, b in piece if len(abscissa) <= MOST_MARKERS else []:
            ET.SubElement(root, "circle", cx=f"{a:.2f}", cy=f"{b:.2f}", r="2.2", fill=colour)


def _points(
    x: Axis, y: Axis, abscissa: tuple[float, ...], values: tuple[float, ...]
) -> list[list[tuple[float, float]]]:
    """The pieces of a curve, broken where a value has no place on the axes."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(abscissa, values, strict=True):
        point = (x(a), y(b))
        if math.isnan(point[0]) or math.isnan(point[1]):
            pieces.append([])
        else:
            pieces[-1].append(point)
    return [piece for piece in pieces if piece]


def _legend(root: ET.Element, styles: Mapping[str, tuple[str, str, float]]) -> None:
    left, labels = LEFT, list(styles)
    if len(labels) > MOST_NAMED and not STYLES.keys() & labels:
        _text(root, left, 17, labels[0], "start")
        left += 6 + 6.2 * len(labels[0])
        step = min(14.0, 220.0 / len(labels))
        for number, (colour, _, _) in enumerate(styles.values()):
            _line(root, left + number * step, 13, left + (number + 1) * step, 13, stroke=colour, width=5)
        _text(root, left + len(labels) * step + 6, 17, labels[-1], "start")
        return
    for label, (colour, dash, width) in styles.items():
        _line(root, left, 13, left + 26, 13, stroke=colour, dash=dash, width=width)
        _text(root, left + 32, 17, label, "start")
        left += 52 + 6.2 * len(label)


def _line(
    root: ET.Element,
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    stroke: str = "#1a1a1a",
    dash: str = "",
    width: float = 1.0,
) -> None:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "stroke-width": width}
    shape = {"stroke": stroke, "stroke-dasharray": dash or "none"}
    ET.SubElement(root, "line", {key: f"{value:.2f}" for key, value in ends.items()} | shape)


def _text(root: ET.Element, x: float, y: float, text: str, anchor: str) -> ET.Element:
    element = ET.SubElement(root, "text", {"x": f"{x:.2f}", "y": f"{y:.2f}", "text-anchor": anchor})
    element.text = text
    return element
