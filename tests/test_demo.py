"""The whole road runs through from nothing to a report, and only ever replaces what a demo made."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from latentphys import demo, views
from latentphys.cli import main
from latentphys.data import open_store
from latentphys.views import scene


def test_the_whole_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Four steps of training make a worthless model, but its flows conserve mass exactly all the same."""
    monkeypatch.setattr(views, "render", partial(views.render, movie=False))
    monkeypatch.setattr(scene, "DPI", 60)
    out = tmp_path / "demo"
    out.mkdir()
    (out / "demo.txt").touch()
    (out / "old").touch()
    assert main(["demo", "--size", "tiny", "--out", str(out)]) in (0, 1)
    assert not (out / "old").exists()
    report = json.loads((out / "report" / "report.json").read_text())
    by_name = {(check["family"], check["name"]): check for check in report["checks"]}
    for family in demo.FAMILIES:
        for name in ("finite", "net_flux_max", "solid_flux_max"):
            assert (by_name[family, name]["value"], by_name[family, name]["verdict"]) == (0.0, "pass")
        for name in ("vrmse_1_step", "vrmse_rollout", "vrmse_autoencoder_floor", "kinetic_energy_ratio"):
            assert by_name[family, name]["value"] > 0
        rollout, truth = open_store(out / f"{family}.rollout.zarr"), open_store(out / f"{family}.zarr")
        held_out = list(range(len(truth) - demo.HELD_OUT, len(truth)))
        assert rollout.attributes["rollout"]["trajectories"] == held_out
        assert rollout.num_times == demo.SIZES["tiny"].steps + 1
    assert (out / "report" / "junit.xml").is_file()
    page = (out / "report" / "report.html").read_text()
    assert page.count("<img") >= 4 and 'src="data:image/png' in page
    printed = capsys.readouterr().out
    assert printed.count("$ latentphys") == 9 and "The whole road took" in printed


def test_foreign_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        assert main(["demo", "--size", "tiny", "--out", str(path)]) == 2
        assert "Expected a new folder or one that a demo made, got" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_station_that_fails_ends_the_road(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = replace(demo.SIZES["tiny"], simulate={"open_channel": ["size=huge"]})
    monkeypatch.setitem(demo.SIZES, "tiny", tiny)
    assert main(["demo", "--size", "tiny", "--out", str(tmp_path / "demo")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("latentphys simulate: ") and "Could not find 'size/huge'" in errors[0]
    assert errors[1:] == ["latentphys demo: Expected this station to succeed, got exit status 2: simulate."]
