"""The load of all experts as one inline SVG: a row for each family of each layer, a column for each expert."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass

from latentphys.validators.numbers import percent
from latentphys.validators.plots import WIDTH, blend
from latentphys.validators.routing import LayerRouting, ModelRouting

RAMP = ((247, 250, 252), (0, 114, 178), (0, 38, 64))
"""From nothing to the largest share: the blue of the model's curves, darker for more, in grey print too."""
MOST_WRITTEN = 16
"""Shares of more experts do not fit into the cells."""
MOST_ROWS = 24
"""More rows than these are drawn closer together."""
LETTER = 6.2
TOP, GAP, WIDEST_CELL = 44.0, 7.0, 44.0


@dataclass(frozen=True)
class _Cells:
    """Where the cells begin, their width and height, and the share of the darkest colour."""

    left: float
    width: float
    height: float
    largest: float


def heat_map(model: ModelRouting) -> str:
    """The share of each family's tokens that each expert took [%], as an ``<svg>`` element to put into a page."""
    families = [family.family.replace("_", " ") for family in model.layers[0].families]
    num_columns, num_rows = max(layer.num_experts for layer in model.layers), len(model.layers) * len(families)
    largest = max(share for layer in model.layers for family in layer.families for share in family.load)
    left = LETTER * (max(len(layer.name) for layer in model.layers) + max(map(len, families))) + 16
    cells = _Cells(
        left, min(WIDEST_CELL, (WIDTH - left - 1) / num_columns), 19.0 if num_rows <= MOST_ROWS else 13.0, largest
    )
    height = TOP + num_rows * cells.height + len(model.layers) * GAP
    root = ET.Element("svg", viewBox=f"0 0 {WIDTH:g} {height:g}", role="img")
    ET.SubElement(root, "title").text = "Load of the experts, per layer and family"
    _scale(root, cells)
    _text(root, left - 8, TOP - 6, "expert", "end")
    stride = max(1, round(22 / cells.width + 0.4)) if num_columns > MOST_WRITTEN else 1
    for expert in range(0, num_columns, stride):
        _text(root, left + (expert + 0.5) * cells.width, TOP - 6, str(expert), "middle")
    y = TOP
    for layer in model.layers:
        _text(root, 0, y + cells.height / 2 + 4, layer.name, "start")
        _draw_layer(root, layer, families, y, cells)
        y += len(families) * cells.height + GAP
    return ET.tostring(root, encoding="unicode")


def _draw_layer(root: ET.Element, layer: LayerRouting, families: list[str], top: float, cells: _Cells) -> None:
    for row, (name, family) in enumerate(zip(families, layer.families, strict=True)):
        y = top + row * cells.height
        _text(root, cells.left - 8, y + cells.height / 2 + 4, name, "end")
        for expert, share in enumerate(family.load):
            x = cells.left + expert * cells.width
            _rectangle(root, x, y, cells.width, cells.height, blend(RAMP, share / cells.largest))
            middle = x + cells.width / 2, y + cells.height / 2
            if layer.num_experts <= MOST_WRITTEN:
                written = _text(root, middle[0], middle[1] + 4, percent(share) if share else "–", "middle")
                written.set("style", f"fill: {'#fff' if share > 0.4 * cells.largest else '#1a1a1a'}")
            elif share == 0:
                centre = {"cx": f"{middle[0]:.2f}", "cy": f"{middle[1]:.2f}", "r": "0.9"}
                ET.SubElement(root, "circle", {**centre, "fill": "#808080"})


def _scale(root: ET.Element, cells: _Cells) -> None:
    """What the colours mean."""
    num_steps, width = 40, 110.0
    text = f"{percent(cells.largest)} % of the family’s tokens"
    left = min(cells.left, WIDTH - width - 18 - LETTER * len(text))
    _text(root, left, 13, "0", "start")
    for step in range(num_steps):
        fill = blend(RAMP, (step + 0.5) / num_steps)
        _rectangle(root, left + 10 + step * width / num_steps, 3, width / num_steps + 0.3, 10, fill, "none")
    _text(root, left + 10 + width + 4, 13, text, "start")


def _rectangle(
    root: ET.Element, x: float, y: float, width: float, height: float, fill: str, stroke: str = "#fff"
) -> None:
    box = {"x": x, "y": y, "width": width, "height": height}
    ET.SubElement(root, "rect", {key: f"{value:.2f}" for key, value in box.items()} | {"fill": fill, "stroke": stroke})


def _text(root: ET.Element, x: float, y: float, text: str, anchor: str) -> ET.Element:
    element = ET.SubElement(root, "text", {"x": f"{x:.2f}", "y": f"{y:.2f}", "text-anchor": anchor})
    element.text = text
    return element
