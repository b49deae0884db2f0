"""The report of a validation: one HTML page that stands alone, its numbers as JSON, its verdicts as JUnit XML."""

from __future__ import annotations

import base64
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from latentphys.validators.check import Check
from latentphys.validators.numbers import number, percent, printed, typeset
from latentphys.validators.routing import ModelRouting
from latentphys.validators.validation import Validation

SCHEMA = "latentphys.report/1"
MEDIA = {".png": "image/png", ".gif": "image/gif", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}
TEMPLATE, JSON_SCHEMA = "report.html.j2", "report.schema.json"


@runtime_checkable
class Picture(Protocol):
    """A picture on disk, such as `latentphys.views.render` makes."""

    @property
    def path(self) -> Path: ...
    @property
    def title(self) -> str: ...
    @property
    def caption(self) -> str: ...


def write_report(
    validations: Sequence[Validation],
    out_dir: str | os.PathLike[str],
    pictures: Iterable[Picture] = (),
    provenance: Mapping[str, Any] | None = None,
    routing: Sequence[ModelRouting] = (),
) -> Path:
    """Write ``report.html``, ``report.json`` and ``junit.xml``.

    Args:
        validations: what `validate` returned, one per store.
        out_dir: the folder; made where it is missing. Files of an earlier report are replaced, each at once.
        pictures: pictures to show below the curves: PNG, GIF, JPEG or SVG.
        provenance: versions, commands, seeds and the like, JSON-ready; shown last.
        routing: what `measure_routing` returned, for a section of its own; it enters no verdict.

    Returns:
        the path of ``report.html``.

    Raises:
        ValueError: no validation, a picture that is missing or of another type, or provenance that JSON cannot hold.
    """
    if not validations:
        raise ValueError("Expected at least one validation to report, got none.")
    shown = [_inline(picture) for picture in pictures]
    content = _content(validations, shown, dict(provenance or {}), routing)
    try:
        numbers = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected provenance of texts, finite numbers, lists and dicts, got: {error}.") from error
    page = _html(validations, shown, content, routing)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "report.json", numbers.encode())
    _write(out / "junit.xml", _junit(validations))
    _write(out / "report.html", page.encode())
    return out / "report.html"


def _write(path: Path, data: bytes) -> None:
    """All of the file or none: a reader never meets half of it."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _inline(picture: Picture) -> dict[str, str]:
    file = picture.path
    media = MEDIA.get(file.suffix.lower())
    if media is None:
        raise ValueError(f"Expected a picture of type {', '.join(MEDIA)}, got {file.name}; leave it out of the report.")
    if not file.is_file():
        raise ValueError(f"Expected a picture at {file}, got nothing there; render it first.")
    source = f"data:{media};base64,{base64.b64encode(file.read_bytes()).decode()}"
    return {"file": file.name, "title": picture.title, "caption": picture.caption, "source": source}


def _all_checks(validations: Sequence[Validation]) -> list[Check]:
    return [check for validation in validations for check in validation.checks]


def _content(
    validations: Sequence[Validation],
    pictures: Sequence[dict[str, str]],
    provenance: dict[str, Any],
    routing: Sequence[ModelRouting],
) -> dict[str, Any]:
    """What ``report.json`` holds; ``report.schema.json`` describes it."""
    checks = _all_checks(validations)
    return {
        "schema": SCHEMA,
        "verdict": "fail" if any(check.verdict == "fail" for check in checks) else "pass",
        "checks": [{"subject": v.subject, **check.to_dict()} for v in validations for check in v.checks],
        "series": [{"subject": v.subject, "family": v.family, **s.to_dict()} for v in validations for s in v.series],
        "routing": [model.to_dict() for model in routing],
        "pictures": [{key: picture[key] for key in ("file", "title", "caption")} for picture in pictures],
        "provenance": provenance,
    }


def _junit(validations: Sequence[Validation]) -> bytes:
    """Each check a test case, each store a suite. Information passes; its number stands in the output."""
    checks = _all_checks(validations)
    root = ET.Element("testsuites", {"name": "latentphys validate", **_counts(checks)})
    for validation in validations:
        name = f"{validation.family}: {validation.subject}"
        suite = ET.SubElement(root, "testsuite", {"name": name, **_counts(validation.checks)})
        for check in validation.checks:
            case = ET.SubElement(suite, "testcase", classname=f"latentphys.{check.family}", name=check.name)
            required = "" if check.threshold is None else f", required {check.criterion} {number(check.threshold)}"
            line = f"{number(check.value)} {check.unit}{required}"
            if check.verdict == "fail":
                failure = ET.SubElement(case, "failure", type="check", message=line)
                failure.text = f"{check.operator}; {check.detail}"
            ET.SubElement(case, "system-out").text = f"{line}; {check.operator}; stored {check.dtype}; {check.detail}"
    ET.indent(root)
    return ET.tostring(root, encoding="utf-8", xml_declaration=True)


def _counts(checks: Sequence[Check]) -> dict[str, str]:
    failures = sum(check.verdict == "fail" for check in checks)
    return {"tests": str(len(checks)), "failures": str(failures), "errors": "0"}


def _html(
    validations: Sequence[Validation],
    pictures: Sequence[dict[str, str]],
    content: dict[str, Any],
    routing: Sequence[ModelRouting],
) -> str:
    import jinja2
    from markupsafe import Markup

    from latentphys.validators.heatmap import heat_map
    from latentphys.validators.plots import svg

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(printed=printed, typeset=typeset, percent=percent)
    template = environment.from_string(resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    checks = _all_checks(validations)
    sections = [
        {
            "validation": validation,
            "by_name": {check.name: check for check in validation.checks},
            "plots": [(series, Markup(svg(series))) for series in validation.series],
        }
        for validation in validations
    ]
    return template.render(
        sections=sections,
        routing=[
            {
                "model": model,
                "load": None if model.one_expert else Markup(heat_map(model)),
                "plots": [] if model.one_expert else [(series, Markup(svg(series))) for series in model.series()],
            }
            for model in routing
        ],
        pictures=pictures,
        provenance=content["provenance"],
        judged=sum(check.verdict != "info" for check in checks),
        failed=[check for check in checks if check.verdict == "fail"],
    )
