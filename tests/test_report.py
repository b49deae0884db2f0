"""The report: numbers that survive JSON, verdicts that a CI reads, a page that needs nothing beside it."""

import base64
import json
import math
import re
import struct
import xml.etree.ElementTree as ET
import zlib
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest

from latentphys.validators import Check, Curve, Series, Validation, exit_status, write_report
from latentphys.validators.numbers import number, printed, typeset
from latentphys.validators.plots import DIVERGED, svg

ABOUT = {"family": "channel", "operator": "div: sum of the six face fluxes (MAC)", "dtype": "float64"}


def validation(net: float = 0.0, model: float = 0.3, detail: str = "", family: str = "channel") -> Validation:
    about = {**ABOUT, "family": family}
    checks = (
        Check.at_most("finite", 0.0, 0.0, unit="values", **about),
        Check.at_most("net_flux_max", net, 0.0, unit="m3/s", detail=detail, **about),
        Check.at_most("solid_flux_max", 0.0, 0.0, unit="m3/s", **about),
        Check.below("vrmse_rollout", model, 0.8, unit="1", **about),
        Check.info("kinetic_energy_ratio", math.inf, unit="1", **about),
    )
    curves = (
        Curve("model", (0.1, model, math.inf), (0.05, 0.2, 0.3), (0.2, 0.4, math.inf)),
        Curve("persistence", (0.0, 0.6, 0.9)),
    )
    growth = Series("vrmse", "Growth of the error", (0.0, 0.5, 1.0), "lead time t [s]", "VRMSE [1]", curves)
    spectrum = Series(
        "spectrum_x", "Spectrum", (1.0, 2.0, 4.0), "k", "E(k)", (Curve("model", (1.0, 0.1, 0.0)),), log=True
    )
    return Validation(
        family, "rollout.zarr", "2 trajectories of 3 frames of 4 x 4 x 4 cells", checks, (growth, spectrum)
    )


class Picture(NamedTuple):
    path: Path
    title: str = "Speed"
    caption: str = "Mid-plane."


def picture(path: Path) -> Path:
    """A white PNG of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, pixel = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0), zlib.compress(b"\x00\xff")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b""))
    return path


class Page(HTMLParser):
    """Everything a page asks a browser to load, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data", "poster"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(folder: Path) -> tuple[Page, dict[str, Any], ET.Element]:
    content = json.loads(
        (folder / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"JSON has {name}")
    )
    return Page((folder / "report.html").read_text()), content, ET.parse(folder / "junit.xml").getroot()


def test_the_json_is_strict_and_follows_its_schema(tmp_path: Path) -> None:
    write_report([validation(net=math.nan), validation(family="porous")], tmp_path, provenance={"seed": 7})
    _, content, _ = read(tmp_path)
    schema = json.loads(resources.files("latentphys.validators").joinpath("report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(content, schema)
    net = content["checks"][1]
    assert (net["value"], net["threshold"], net["verdict"]) == (None, 0.0, "fail")
    assert content["series"][0]["curves"][0]["y"] == [0.1, 0.3, None]
    assert content["verdict"] == "fail" and content["provenance"] == {"seed": 7}
    net["verdict"] = "pass"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


def test_junit_counts_the_failures_and_never_information(tmp_path: Path) -> None:
    shown = [validation(net=1e-3, model=0.9), validation(family="porous")]
    write_report(shown, tmp_path)
    _, _, root = read(tmp_path)
    assert (root.get("tests"), root.get("failures")) == ("10", "2")
    assert [suite.get("failures") for suite in root.iter("testsuite")] == ["2", "0"]
    failed = [case.get("name") for case in root.iter("testcase") if case.find("failure") is not None]
    assert failed == ["net_flux_max", "vrmse_rollout"]
    message = root.findall(".//failure")[0].get("message")
    assert message == "0.001 m3/s, required <= 0.0"
    assert exit_status(check for v in shown for check in v.checks) == 1


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    shown = [Picture(picture(tmp_path / "slice.png"))]
    page, _, _ = read(write_report([validation()], tmp_path / "out", shown).parent)
    assert len(page.loaded) == 1 and page.loaded[0].startswith("data:image/png;base64,")
    assert base64.b64decode(page.loaded[0].partition(",")[2]) == (tmp_path / "slice.png").read_bytes()
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    source = (tmp_path / "out" / "report.html").read_text()
    assert "http" not in source and "@import" not in source and "url(" not in source
    assert page.tags.count("polyline") >= 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["junit.xml", "report.html", "report.json"]


def test_the_page_says_the_verdict_and_the_worst_cell_first(tmp_path: Path) -> None:
    write_report([validation(), validation(family="porous")], tmp_path)
    page, _, _ = read(tmp_path)
    words = re.sub(r"\s+", " ", page.text)
    assert "All 8 checks passed." in words
    assert words.count("Net flux of the worst cell: 0.0 m³/s") == 2
    assert "Measured in FP64 on float64 data" in words
    assert "net flux as div: sum of the six face fluxes (MAC)." in words
    write_report([validation(net=2.5e-7)], tmp_path)
    page, _, _ = read(tmp_path)
    words = re.sub(r"\s+", " ", page.text)
    assert "1 of 4 checks failed: channel net_flux_max." in words
    assert "Net flux of the worst cell: 2.5 × 10⁻⁷ m³/s" in words


def test_what_a_store_is_called_is_shown_and_not_run(tmp_path: Path) -> None:
    write_report([validation(detail="<script>alert(1)</script>")], tmp_path, provenance={"<b>": ["</dd>", 1]})
    page, _, root = read(tmp_path)
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text
    assert "<b>" in page.text
    assert any("<script>" in (element.text or "") for element in root.iter("system-out"))


def test_zero_is_written_as_zero_and_small_numbers_with_their_power() -> None:
    assert [number(x) for x in (0.0, -0.0, 2.84e-10, 0.12345678, 1.0, math.inf, math.nan)] == [
        "0.0", "0.0", "2.84e-10", "0.1235", "1", "inf", "nan",
    ]  # fmt: skip
    assert [printed(x) for x in (0.0, 2.84e-10, 1e-7, -1.5)] == ["0.0", "2.84\u00a0×\u00a010⁻¹⁰", "10⁻⁷", "−1.5"]
    assert (
        typeset("16 x 8 cells, largest 4.69e-11 m3/s") == "16\u00a0×\u00a08 cells, largest 4.69\u00a0×\u00a010⁻¹¹ m³/s"
    )
    assert typeset("sum |v-<v>|^2 >= 1 m3/s, a < b > c") == "Σ |v-⟨v⟩|² ≥ 1 m³/s, a < b > c"


def plotted(series: Series) -> list[list[tuple[float, float]]]:
    lines = ET.fromstring(svg(series)).iter("polyline")
    return [[tuple(map(float, point.split(","))) for point in line.get("points", "").split()] for line in lines]  # type: ignore[misc]


def test_a_curve_is_drawn_where_its_numbers_are() -> None:
    series = Series("kinetic_energy", "E", (0.0, 1.0, 2.0, 3.0), "t", "E", (Curve("model", (0.0, 1.0, math.nan, 4.0)),))
    (first, second) = plotted(series)
    assert len(first) == 2 and len(second) == 1
    left, bottom = first[0]
    assert (second[0][0] - left) == pytest.approx(3 * (first[1][0] - left), abs=0.05)
    assert (bottom - second[0][1]) == pytest.approx(4 * (bottom - first[1][1]), abs=0.05)


def test_a_power_law_is_a_straight_line_on_logarithmic_axes() -> None:
    k = tuple(float(2**i) for i in range(6))
    (line,) = plotted(
        Series("spectrum_x", "E", k, "k", "E", (Curve("model", tuple(x ** (-5 / 3) for x in k)),), log=True)
    )
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(line, line[1:], strict=False)]
    assert slopes == pytest.approx([slopes[0]] * 5, rel=1e-3) and slopes[0] > 0


def test_an_error_that_diverges_goes_on_a_logarithmic_axis() -> None:
    y = (0.1, 1.0, 10.0 * DIVERGED / 5, 100.0 * DIVERGED / 5)
    (line,) = plotted(Series("vrmse", "E", (0.0, 1.0, 2.0, 3.0), "t", "VRMSE", (Curve("model", y),)))
    steps = [a[1] - b[1] for a, b in zip(line, line[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 3, rel=1e-3)


@pytest.mark.parametrize("values", [(0.0,), (0.0, 0.0), (math.nan, math.inf), (1e-9, 2e-9), (1.0, 3e8)])
@pytest.mark.parametrize("name", ["vrmse", "kinetic_energy", "spectrum_x"])
def test_any_numbers_can_be_drawn(values: tuple[float, ...], name: str) -> None:
    x = tuple(float(i + 1) for i in range(len(values)))
    drawn = svg(Series(name, "a", x, "x", "y", (Curve("model", values),), log=name.startswith("spectrum")))
    assert "nan" not in drawn and "inf" not in drawn


def test_reports_that_cannot_be_written_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    out, html = tmp_path / "out", tmp_path / "view.html"
    html.write_text("")
    with pytest.raises(ValueError, match="Expected at least one validation"):
        write_report([], out)
    with pytest.raises(ValueError, match=r"Expected a picture of type .*, got view\.html"):
        write_report([validation()], out, [Picture(html)])
    with pytest.raises(ValueError, match="Expected a picture at .*nothing there"):
        write_report([validation()], out, [Picture(tmp_path / "no.png")])
    with pytest.raises(ValueError, match="Expected provenance of texts"):
        write_report([validation()], out, provenance={"loss": math.nan})
    assert not out.exists()
