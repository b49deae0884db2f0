"""Two regimes of a store, two endpoints, one model between them: the commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import Three, endpoint, same
from safetensors.torch import load_file
from small import Road, train

from latentphys.cli import main
from latentphys.composition import Choice, CompositeModel, compose, coordinate
from latentphys.training import checkpoint, open_checkpoint, pictures

Command = Callable[..., Any]


@pytest.fixture
def command(three: Three, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the verb on the three; what it prints, and what it says beside that: one line where it fails."""

    def run(*options: object, out: str = "c", status: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        arguments = ["compose", *map(str, three), f"--out={tmp_path / out}", *map(str, options)]
        assert main(arguments) == status
        printed, said = capsys.readouterr()
        if status:
            assert not printed and said.startswith("latentphys compose: ") and said.count("\n") == 1
            assert not (tmp_path / out).exists()
        return printed, said

    return run


def test_the_command(road: Road, command: Command, tmp_path: Path) -> None:
    assert command("--alpha=0.25")[0].splitlines() == ["alpha = 0.25 (given; interpolation)", str(tmp_path / "c")]
    about = json.loads(command("--metadata=viscosity=0.055", "--json", "--overwrite")[0])
    assert about["alpha"] == pytest.approx(2.0) and about["checkpoint"] == str(tmp_path / "c")
    assert about["found"]["range"].startswith("extrapolation") and about["found"]["high_at"] == 0.04
    _, said = command("--metadata=depth=4", "--low-at=0", "--high-at=2", out="d")
    assert "latentphys compose: alpha = 3 is far beyond the endpoints" in said
    porous = road.fields["porous"]
    command(f"--prefix={porous}", "--frames=3", "--trajectories", 0, "--bank", -1, 0, 1, out="p")
    assert (tmp_path / "p" / "composition.png").read_bytes().startswith(b"\x89PNG")
    about = json.loads((tmp_path / "p" / "composition.json").read_text())["found"]
    assert about["frames"] == 3 and about["trajectories"] == [0] and len(about["curve"]) > 4
    checkpoint.verify(tmp_path / "p")
    options = ["--frames=2", "--trajectories", 0, 1, "--bank", -2, 0, 2]
    command("--scale=viscosity=0.02", "--map=log", "--calibrate", porous, *options, out="s")
    again, _ = command("--scale=viscosity=0.02", f"--calibrate={tmp_path / 's'}", "--json", out="t")
    first = json.loads((tmp_path / "s" / "composition.json").read_text())
    assert json.loads(again)["alpha"] == first["alpha"] and len(first["found"]["points"]) == 2
    assert same(*(load_file(tmp_path / name / "model.safetensors") for name in "st"))
    assert (tmp_path / "t" / "composition.png").is_file()


def test_the_command_refuses(
    road: Road, command: Command, three: Three, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: object) -> str:
        return command(*options, out="no", status=2)[1]

    porous, fit_file = road.fields["porous"], tmp_path / "fit.json"
    assert "Expected --map with --metadata or --scale only, got it with --alpha" in said("--alpha=0", "--map=log")
    assert "--low-at with --metadata only" in said(f"--prefix={porous}", "--low-at=1")
    assert "Expected --calibrate STORE … beside --scale" in said("--scale=viscosity=1")
    assert "pass --low-at" in said("--metadata=salinity=1")
    assert "Expected --frames with --prefix or --scale only, got it with --alpha" in said("--alpha=0", "--frames=4")
    assert "Expected a finite alpha, got nan" in said("--alpha=nan")
    assert "Expected a store at" in said("--prefix=nothing.zarr")
    command("--alpha=0", out="plain")
    told = said("--scale=viscosity=1", f"--calibrate={tmp_path / 'plain'}")
    assert "Expected a composition with --scale, got" in told and "which holds no fit" in told
    fit = {"parameter": "viscosity", "map": "linear", "a": 0.0, "b": 1.0, "r": 1.0, "points": [], "unit": "1"}
    other = {"found": fit, **{role: {"sha256": "0"} for role in ("anchor", "low", "high")}}
    fit_file.write_text(json.dumps(other))
    assert "as anchor, got that of other weights" in said("--scale=viscosity=1", f"--calibrate={fit_file}")
    about = json.loads((tmp_path / "plain" / "composition.json").read_text())
    fit_file.write_text(json.dumps({**about, "found": fit}))
    told = said("--scale=depth=1", f"--calibrate={fit_file}")
    assert "Expected --scale viscosity=…, which the fit is of, got 'depth'" in told
    for option in ("--map=linear", "--frames=4", "--trajectories=0", "--bank=0"):
        told = said("--scale=viscosity=1", f"--calibrate={fit_file}", option)
        assert f"Expected {option.partition('=')[0]} with stores to calibrate with only, got it with the fit of" in told
    told = said("--scale=viscosity=1", "--calibrate", porous, fit_file)
    assert f"Expected a fit alone with --calibrate, got {fit_file} among 2 paths; give the fit, or stores." in told
    for wrong, message in (
        (["--alpha=0", "--prefix=x"], "not allowed with argument"),
        ([], "one of the arguments --alpha --metadata --scale --prefix is required"),
        (["--metadata=viscosity"], "Expected NAME=VALUE such as viscosity=0.03, got 'viscosity'."),
        (["--metadata==0.3"], "Expected NAME=VALUE such as viscosity=0.03, got '=0.3'."),
        (["--scale=viscosity=high"], "Expected NAME=VALUE such as viscosity=0.03, got 'viscosity=high'."),
        (["--alpha=x"], "invalid float value"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["compose", *map(str, three), "--out=x", *wrong])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_what_this_machine_lacks_is_said_at_once(
    road: Road, command: Command, three: Three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    porous = road.fields["porous"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = command(f"--prefix={porous}", "--device=cuda", status=2)[1]
    assert "Expected --device auto | cpu, got 'cuda' on a machine without a GPU." in said
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    monkeypatch.setattr("latentphys.composition.search", lambda *_, **__: pytest.fail("searched for nothing"))
    assert "Expected the package matplotlib for pictures, got none" in command(f"--prefix={porous}", status=2)[1]
    command("--alpha=0")  # draws nothing
    with pytest.raises(ValueError, match="Expected the package matplotlib for pictures"):
        compose(*three, tmp_path / "drawn", Choice(0.0, "prefix", {"bank": [0, 1]}))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_run_that_goes_on_meanwhile_changes_nothing(
    road: Road, three: Three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What α was searched for is what is written, though its run has a newer checkpoint by then."""
    run = tmp_path / "low"
    run.mkdir()
    endpoint(three.anchor, run / "step-000001", 5)
    checkpoint.write_json(run / checkpoint.LAST, {"checkpoint": "step-000001"})

    def search(model: CompositeModel, *_: Any, **__: Any) -> Choice:
        assert model.checkpoints[1].path == run / "step-000001"
        endpoint(three.anchor, run / "step-000002", 6)
        checkpoint.write_json(run / checkpoint.LAST, {"checkpoint": "step-000002"})
        return Choice(-1.0, "prefix")

    monkeypatch.setattr("latentphys.composition.search", search)
    paths = [*map(str, (three.anchor, run, three.high)), f"--out={tmp_path / 'c'}"]
    assert main(["compose", *paths, f"--prefix={road.fields['porous']}"]) == 0
    assert open_checkpoint(run).path.name == "step-000002"
    about = json.loads((tmp_path / "c" / "composition.json").read_text())["low"]
    used = run / "step-000001" / "model.safetensors"
    assert about["path"] == str(used) and same(load_file(tmp_path / "c" / "model.safetensors"), load_file(used))


def test_endpoints_of_two_regimes_are_trained_and_composed(road: Road, tmp_path: Path) -> None:
    """The road of the documentation: two ranges of viscosity of one store, and a model between them."""
    viscosity = road.store("porous").parameters["viscosity"]  # 0.030, 0.011 to train on; 0.012, 0.021 held out
    between, paths = 0.015, {}
    for name, bounds in (("low", f"[null,{between}]"), ("high", f"[{between},null]")):
        paths[name] = train(
            "dynamics",
            [road.latents["porous"]],
            tmp_path / name,
            "experiment=ccm",
            f"finetune.checkpoint={road.dynamics}",
            f"regime={{viscosity: {bounds}}}",
            *("held_out=2", "trainer.num_steps=2", "trainer.learning_rate=1e-3"),
        )
    found = {name: open_checkpoint(path).extra["regimes"]["porous"] for name, path in paths.items()}
    for name, at in (("low", viscosity[1]), ("high", viscosity[0])):
        assert set(found[name]) == {"viscosity", "porosity"}
        expected = {"min": at, "max": at, "mean": at, "geometric_mean": pytest.approx(at, rel=1e-12), "num": 1}
        assert found[name]["viscosity"] == expected
    argv = ["compose", road.dynamics, tmp_path / "low", tmp_path / "high", f"--out={tmp_path / 'c'}"]
    assert main([*map(str, argv), f"--metadata=viscosity={viscosity.mean()}", "--map=log"]) == 0
    about = open_checkpoint(tmp_path / "c").extra["composition"]
    assert about["alpha"] == pytest.approx(coordinate(viscosity.mean(), viscosity[1], viscosity[0], "log"), rel=1e-9)
    assert about["relation"]["cosine_low"] > 0.99
    further = [f"finetune.checkpoint={tmp_path / 'c'}", "trainer.num_steps=1", "weights={open_channel: 0}"]
    more = open_checkpoint(train("dynamics", road.inputs("dynamics"), tmp_path / "further", *further))
    assert more.step == 1 and set(more.extra["regimes"]) == {"porous"}  # what is never drawn is not trained on


@pytest.mark.parametrize(
    ("regime", "match"),
    [
        ("{viscosity: [1, 2]}", r"a training trajectory of .*porous.zarr in the regime .*, got none among .* 0 to 1"),
        ("{viscosity: [0.029, 0.030]}", "a held-out trajectory of .* got none among the trajectories 2 to 3; widen"),
        ("{salinity: [0, 1]}", r"one number for each trajectory of .*, \['porosity', 'viscosity'\], got 'salinity'"),
        ("{force: [0, 1]}", "one number for each trajectory of .* got 'force'"),
        ("{viscosity: 1}", r"\[least, greatest\] of 'viscosity' in the regime, either may be null, got 1"),
        ("{viscosity: [2, 1]}", r"\[least, greatest\] of 'viscosity' .*, got \[2, 1\]"),
        ("{viscosity: [a, b]}", r"\[least, greatest\] of 'viscosity' .*, got \['a', 'b'\]"),
        ("viscosity", "Expected a regime by parameter, such as .*, got 'viscosity'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_regimes_that_are_none(road: Road, tmp_path: Path, regime: str, match: str) -> None:
    for kind, store in (("dynamics", road.latents["porous"]), ("autoencoder", road.fields["porous"])):
        with pytest.raises(ValueError, match=match):
            train(kind, [store], tmp_path / "run", "held_out=2", f"regime={regime}")
        assert not (tmp_path / "run").exists()


def test_an_anchor_that_nobody_named(road: Road, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a checkpoint or a run directory, got runs/anchor"):
        train("dynamics", [road.latents["porous"]], tmp_path / "run", "experiment=ccm")
