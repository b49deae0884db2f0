"""Every verb on small stores; bad input ends with status 2, one line that says what to do, and nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import torch
import zarr
from small import NUM_TRAJECTORIES, Road, arguments, train

from latentphys import operators
from latentphys.accounting import count, count_autoencoder
from latentphys.autoencoders.tiles import decode_in_tiles
from latentphys.cli import main
from latentphys.data import open_store
from latentphys.info import describe
from latentphys.training import load_autoencoder, load_dynamics
from latentphys.validators import measure_latents

VERBS = (
    "simulate",
    "import",
    "export-data",
    "train",
    "encode",
    "compose",
    "rollout",
    "validate",
    "render",
    "info",
    "export",
    "demo",
)
TINY = ["size=tiny", "grid.shape=[8,8,8]", "frames=2", "family.spin_up=0.0"]
Refusal = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Run a verb that must fail; the one line that it prints."""

    def run(*command: object) -> str:
        capsys.readouterr()
        assert main([str(part) for part in command]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"latentphys {command[0]}: ") and err.count("\n") == 1
        return err.strip()

    return run


@pytest.fixture
def rolled(road: Road, tmp_path: Path) -> Path:
    path = tmp_path / "rollout.zarr"
    assert (
        main(["rollout", str(road.dynamics), str(road.fields["porous"]), str(path), "--steps=2", "--held-out=1"]) == 0
    )
    return path


def test_help_of_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for command in [[], *([verb] for verb in VERBS)]:
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith("usage: latentphys") and (command or all(verb in text for verb in VERBS))


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["fly"],
        ["train", "router"],
        ["info"],
        ["rollout", "a", "b", "c", "--held-out", "x"],
        ["demo", "--size", "big"],
    ],
)
def test_a_wrong_command_line_has_status_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("family", ["open_channel", "porous"])
def test_simulate(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made.zarr"
    command = ["simulate", f"family={family}", *TINY, f"out={out}"]
    assert main([*command, "seed=3"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    store = open_store(out)
    assert (store.family, store.grid.shape, len(store), store.num_times) == (family, (8, 8, 8), 2, 2)
    provenance = store.attributes["provenance"]
    assert (provenance["seed"], provenance["config"]["grid"]["shape"]) == (3, [8, 8, 8])
    assert main([*command, "overwrite=true", "seed=4"]) == 0
    assert open_store(out).attributes["provenance"]["seed"] == 4


def test_train_encode_rollout(road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one step each; what they write is what the functions of the library write."""
    autoencoder, latent, dynamics = tmp_path / "autoencoder", tmp_path / "latent.zarr", tmp_path / "dynamics"
    fields = road.fields["porous"]
    one = "trainer.num_steps=1"
    assert main(["train", *arguments("autoencoder", [fields], autoencoder, one)]) == 0
    assert main(["encode", str(autoencoder), str(fields), str(latent)]) == 0
    assert main(["train", *arguments("dynamics", [latent], dynamics, one)]) == 0
    rollout = tmp_path / "rollout.zarr"
    command = ["rollout", str(dynamics), str(fields), str(rollout), "--steps", "2", "--start", "1"]
    assert main([*command, "--trajectories", "2", "0"]) == 0
    checkpoint = str(dynamics / "step-000001")
    assert capsys.readouterr().out.split() == [str(autoencoder / "step-000001"), str(latent), checkpoint, str(rollout)]
    made = open_store(rollout).attributes["rollout"]
    assert (made["trajectories"], made["start"], made["checkpoint"]) == ([2, 0], 1, checkpoint)
    assert main([*command, "--held-out", "0.3", "--overwrite"]) == 0
    assert open_store(rollout).attributes["rollout"]["trajectories"] == [3]


def test_validate_passes_ground_truth_and_fails_a_worthless_model(
    road: Road, rolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, out = road.fields["porous"], tmp_path / "report"
    capsys.readouterr()
    assert main(["validate", str(truth), "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert "net_flux_max" in table and "fail" not in table
    checkpoint = ["--checkpoint", str(road.dynamics)]
    command = ["validate", str(rolled), "--reference", str(truth), *checkpoint, "--out", str(out), "--json"]
    assert main(command) == 1
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    text = json.dumps(report)
    assert (
        '"fail"' in text
        and "net_flux_max" in text
        and (out / "report.html").is_file()
        and (out / "junit.xml").is_file()
    )


def test_the_latents_of_a_checkpoint_are_measured_on_the_flows_of_a_rollout(
    road: Road, rolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    command = ["validate", str(rolled), "--reference", str(road.fields["porous"]), "--latents"]
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert "Expected --checkpoint beside --latents" in capsys.readouterr().err
    main([*command, "--checkpoint", str(road.dynamics), "--out", str(tmp_path), "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    expected = measure_latents(
        load_autoencoder(road.autoencoder), open_store(road.fields["porous"]), [NUM_TRAJECTORIES - 1]
    )
    assert {f"latents/{name}": value for name, value in expected.items()} == {
        name: check["value"] for name, check in checks.items() if name.startswith("latents/")
    }
    assert {check["verdict"] for name, check in checks.items() if name.startswith("latents/")} == {"info"}


def test_tiles_change_how_a_rollout_is_worked_out_and_not_what_comes_out(
    road: Road, rolled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles: list[int] = []

    def watched(*args: Any) -> Any:
        tiles.append(args[-1])
        return decode_in_tiles(*args)

    monkeypatch.setattr("latentphys.autoencoders.autoencoder.decode_in_tiles", watched)
    out = tmp_path / "tiles.zarr"
    command = ["rollout", str(road.dynamics), str(road.fields["porous"]), str(out), "--steps=2", "--held-out=1"]
    assert main([*command, "--tile", "2"]) == 0
    assert tiles == [2, 2, 2]
    whole, parts = (open_store(path).read("velocity", 0, slice(None)) for path in (rolled, out))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))
    assert float(operators.div(parts, open_store(out).grid).abs().max()) == 0.0


def test_render(
    rolled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from latentphys import views

    given: list[object] = []

    def draw(store: object, *options: object) -> list[views.Picture]:
        given.extend(options)
        return [views.Picture(tmp_path / "a.png", "", "")]

    monkeypatch.setattr(views, "render", draw)
    capsys.readouterr()
    assert main(["render", str(rolled), "--out", "pictures", "--trajectory", "2", "--layer", "0", "--no-movie"]) == 0
    assert given == ["pictures", None, 2, 0, False]
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}\n"


def test_info(road: Road, rolled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected: dict[Path, dict[str, Any]] = {
        road.fields["open_channel"]: {
            "kind": "fields",
            "family": "open_channel",
            "trajectories": 4,
            "grid": "16 × 16 × 16",
        },
        road.latents["porous"]: {"kind": "latent", "grid": "4 × 4 × 4", "parameters": "none"},
        rolled: {"kind": "rollout", "layout": "face_flux", "exact": "net flux 0.0 claimed"},
        road.autoencoder: {"kind": "autoencoder", "step": 6, "latent channels": 8},
        road.dynamics: {"kind": "dynamics", "router": "SemanticTop1", "experts per layer": 4, "layers": 2},
    }
    capsys.readouterr()
    for path, lines in expected.items():
        assert main(["info", str(path), "--json"]) == 0
        described = json.loads(capsys.readouterr().out)
        assert lines.items() <= described.items()
        assert main(["info", str(path)]) == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in described)
    assert describe(road.autoencoder)["fields"]["porous"] == "velocity (ProjectionHead): 24× fewer numbers"
    channel = describe(road.fields["open_channel"])
    assert (
        channel["fields"]["velocity"]["is"] == "flux [m3/s], solenoidal"
        and len(channel["fields"]["velocity"]["std"]) == 3
    )
    assert channel["parameters"]["viscosity"] == "0.005556 … 0.005556 m2/s, one a trajectory"
    assert channel["snapshots"] == "6, t = 0 … 0.06 s, every 0.012 s"
    assert describe(road.fields["porous"])["solids"].startswith("voxels, 0.")


def test_info_says_what_is_counted(road: Road, capsys: pytest.CaptureFixture[str]) -> None:
    dynamics, autoencoder = load_dynamics(road.dynamics)
    cost = count(dynamics, (4, 4, 4))
    about = describe(road.dynamics)
    parameters, flops = about["parameters"], about["FLOPs per step"]["open_channel, porous"]
    # three of four routed experts of each layer, 3 · 32 · 32 numbers each, are idle
    assert parameters["stored"] - parameters["active per token"] == 2 * 3 * 3 * 32 * 32
    assert parameters["stored"] == cost.stored.total == sum(p.numel() for p in dynamics.parameters())
    assert parameters["active per token"] == cost.active.total
    assert parameters["routed experts"] == 4 * parameters["routed experts of a token"] == cost.stored.experts
    assert parameters["always on"] == cost.stored.always_on and parameters["routing"] == cost.stored.routing
    assert flops["latent cells"] == "4 × 4 × 4" and flops["total"] == cost.flops.total
    assert flops["routed experts"] == cost.flops.experts and flops["routing"] == cost.flops.routing
    assert flops["running every expert would cost [×]"] == round(cost.every_expert / cost.flops.total, 2) > 1.2
    assert about["experts per token"] == 1 and about["routing"] == "in each layer per token"
    assert about["mixer"] == "attention"
    assert float(about["router temperature"].split()[0]) == pytest.approx(0.2, abs=0.01)

    snapshots = describe(road.autoencoder)["FLOPs per snapshot"]
    for family in ("open_channel", "porous"):  # their heads cost differently, between walls and in a periodic box
        part = count_autoencoder(autoencoder, family)
        assert snapshots[family]["encode"] == part.encode and snapshots[family]["decode"] == part.decode + part.head
    assert sum(p.numel() for p in autoencoder.parameters()) == about["autoencoder parameters"]

    capsys.readouterr()
    assert main(["info", str(road.dynamics)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"    total                                {flops['total']}" in printed
    assert str(flops["total"]).endswith(" MFLOP") and str(parameters["stored"]).endswith(" k")


ROUTINGS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "function": (
        ["experiment=mono", "router.num_experts=4"],
        {"router": "TreeRouter", "routing": "once per function for all layers", "experts per token": 1, "layers": 2},
    ),
    "nested": (
        ["router=nested", "router.num_experts=6", "router.num_groups=3", "router.top_groups=2", "router.top_k=1"],
        {"routing": "in each layer, groups per sample and experts per token", "experts per token": 2},
    ),
    "block": (
        ["router=top1", "router.num_experts=4", "router.per=[2,2,1]", "dynamics.mixer=fourier"],
        {"routing": "in each layer per block of 2 × 2 × 1 latent cells", "mixer": "Fourier modes"},
    ),
}


@pytest.mark.parametrize("kind", ROUTINGS)
def test_info_of_other_routings(kind: str, road: Road, tmp_path: Path) -> None:
    overrides, expected = ROUTINGS[kind]
    run = train("dynamics", list(road.latents.values()), tmp_path / "run", *overrides, "trainer.num_steps=1")
    about = describe(run)
    assert expected.items() <= about.items()
    idle = 2 * (about["experts per layer"] - about["experts per token"])
    weights = about["parameters"]["routed experts"] // (2 * about["experts per layer"])
    assert about["parameters"]["stored"] - about["parameters"]["active per token"] == idle * weights > 0
    assert ("router temperature" in about) == (kind == "block")
    assert about["FLOPs per step"]["open_channel, porous"]["routing"] > 0


def test_missing_and_foreign_stores(road: Road, refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    other = Path(shutil.copytree(road.fields["open_channel"], tmp_path / "other.zarr"))
    zarr.open_group(str(other), mode="r+").attrs["schema"] = "latentphys.store/9"
    out = tmp_path / "out"
    for store, message in (
        (tmp_path / "nowhere.zarr", "nowhere.zarr, got nothing there; check the path"),
        (tmp_path / "notes", "Expected a Zarr v3 group at"),
        (other, "Expected schema 'latentphys.store/1', the one this version reads, got 'latentphys.store/9'"),
    ):
        for command in (
            ["encode", road.autoencoder, store, out],
            ["rollout", road.dynamics, store, out],
            ["validate", store, "--out", out],
            ["render", store, "--out", out],
            ["train", *arguments("autoencoder", [store], out)],
        ):
            assert message in refusal(*command)
    assert "which does not exist" in refusal("info", tmp_path / "nowhere.zarr")
    assert "got 'latentphys.store/9'" in refusal("info", other)
    assert not out.exists()


def test_wrong_checkpoints(road: Road, refusal: Refusal, tmp_path: Path) -> None:
    field, out = road.fields["open_channel"], tmp_path / "out"
    assert "kind 'autoencoder', got one of kind 'dynamics'" in refusal("encode", road.dynamics, field, out)
    assert "kind 'dynamics', got one of kind 'autoencoder'" in refusal("rollout", road.autoencoder, field, out)
    assert "which does not exist" in refusal("rollout", tmp_path / "none", field, out)
    assert "without a readable checkpoint.json" in refusal("encode", tmp_path, field, out)
    damaged = Path(shutil.copytree(road.autoencoder, tmp_path / "damaged"))
    for file in damaged.glob("step-*/model.safetensors"):
        file.write_bytes(b"torn")
    assert "model.safetensors, got 4; copy it again" in refusal("encode", damaged, field, out)
    assert "model.safetensors, got 4; copy it again" in refusal("info", damaged / "step-000006")
    wider = arguments("autoencoder", road.inputs("autoencoder"), damaged, "autoencoder.widths=[16,16]")
    assert "None of the 3 there is whole, and nothing was removed" in refusal("train", *wider)
    shutil.copytree(road.autoencoder, damaged, dirs_exist_ok=True)
    assert "Expected the model of the checkpoints in" in refusal("train", *wider)
    assert not out.exists()


def test_wrong_data(road: Road, refusal: Refusal, tmp_path: Path) -> None:
    odd, flat, broken, out = (tmp_path / name for name in ("odd.zarr", "flat.zarr", "broken.zarr", "out"))
    assert main(["simulate", "family=porous", *TINY, "grid.shape=[10,8,8]", f"out={odd}"]) == 0
    message = "Expected a grid divisible by the compression of 4 per axis, got (10, 8, 8); choose multiples of 4."
    assert message in refusal("train", *arguments("autoencoder", [odd], out))
    assert "Expected the spacing this model knows" in refusal("encode", road.autoencoder, odd, out)
    shutil.copytree(road.fields["porous"], flat)
    zarr.open_group(str(flat), mode="r+").create_array("velocity", shape=(4, 6, 16, 16, 16), dtype="f8", overwrite=True)
    message = "Expected array 'velocity' of shape (4, 6, 3, 16, 16, 16) in"
    for command in (["encode", road.autoencoder, flat, out], ["info", flat], ["validate", flat, "--out", out]):
        assert message in refusal(*command)
    shutil.copytree(road.fields["porous"], broken)
    zarr.open_array(str(broken / "velocity"), mode="r+")[0, :, 0, 0] = np.nan
    assert "NaN or Inf in 'latent' at trajectory 0, time 0" in refusal("encode", road.autoencoder, broken, out)
    command = ["rollout", road.dynamics, broken, out, "--steps=1", "--trajectories", "0"]
    assert "Expected a finite flux" in refusal(*command)
    assert "Expected finite numbers of 'velocity'" in refusal("train", *arguments("autoencoder", [broken], out))
    assert main(["validate", str(broken), "--out", str(tmp_path / "report")]) == 1
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_wrong_options(road: Road, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Could not override 'familly'" in refusal("simulate", "familly=open_channel")
    assert "Could not find 'family/pipe'" in refusal("simulate", "family=pipe")
    assert "Expected a value for 'run', got none" in refusal("train", "autoencoder", "stores=[a.zarr]")
    assert "Expected a whole number for 'trajectories'" in refusal("simulate", "trajectories=all")
    assert "Expected a device of auto | c" in refusal("simulate", "device=gpu")
    assert "≥ 2 frames" in refusal("simulate", "frames=1")
    assert "a shape of three axes" in refusal("simulate", "grid.shape=[16,16]")
    assert "Expected a range of porosities" in refusal("simulate", "family=porous", "family.medium.porosity=[0.1,0.2]")
    field = road.fields["porous"]
    assert "Expected num_steps ≥ 1" in refusal(
        "train", *arguments("autoencoder", [field], tmp_path, "trainer.num_steps=0")
    )
    assert "one --reference per store" in refusal("validate", field, field, "--reference", field, "--out", "report")
    command = ["rollout", road.dynamics, field, "out", "--held-out=1"]
    assert "got 9 steps of 1 snapshots from snapshot 0" in refusal(*command, "--steps=9")
    assert "trajectories from 0 to 3" in refusal(*command, "--steps=1", "--trajectories", "7")
    assert "held_out to be a share between 0 and 1" in refusal(*command[:-1], "--held-out=4")
    assert "Expected a trajectory from 0 to 3, got 7" in refusal("render", field, "--out=pictures", "--trajectory=7")
    assert not [path.name for path in tmp_path.iterdir() if path.name != "pictures"]


def test_existing_targets_are_kept(road: Road, rolled: Path, refusal: Refusal) -> None:
    field = road.fields["porous"]
    before = open_store(rolled).attributes["checksums"]
    for command in (
        ["simulate", "family=porous", *TINY, f"out={rolled}"],
        ["encode", road.autoencoder, field, rolled],
        ["rollout", road.dynamics, field, rolled, "--steps=1", "--held-out=1"],
    ):
        assert "which exists; choose another name or overwrite=True" in refusal(*command)
    for command in (["encode", road.autoencoder], ["rollout", road.dynamics]):
        assert "another path than the store's own" in refusal(*command, field, field, "--overwrite")
    store = open_store(rolled)
    assert store.attributes["checksums"] == before
    store.verify()
    open_store(field).verify()


def test_an_interrupt_has_status_130(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from latentphys.training.guards import Guard

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Guard, "verdict", interrupted)
    assert main(["train", *arguments("dynamics", road.inputs("dynamics"), tmp_path / "run")]) == 130
    assert "latentphys train: interrupted" in capsys.readouterr().err


def test_import_and_export_data(tmp_path: Path, refusal: Refusal, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of The Well becomes a store with exact fluxes, which goes out in both layouts and comes back."""
    source, store = foreign.well(tmp_path / "anything", shape=(6, 4, 5)), tmp_path / "in.zarr"
    capsys.readouterr()
    assert main(["import", str(source), str(store), "--flux", "velocity", "--family", "mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(store) and any("velocity: h |div u| / rms(u) rms" in line for line in lines[1:])
    assert open_store(store).family == "mine" and "velocity" in describe(store)["solenoidal floor"]
    assert main(["validate", str(store), "--out", str(tmp_path / "report")]) == 0
    for layout, out in (("well", tmp_path / "well"), ("vtkhdf", tmp_path / "vtk")):
        assert main(["export-data", str(store), str(out), "--to", layout]) == 0
        again = tmp_path / f"{layout}.zarr"
        files = out if layout == "well" else sorted(out.iterdir())[0]
        assert main(["import", str(files), str(again)]) == 0
        assert open_store(again).grid.shape == (6, 4, 5)
    assert "Expected a new path" in refusal("export-data", store, tmp_path / "well", "--to", "well")
    assert "leave it out" in refusal("export-data", store, tmp_path / "w2", "--to", "well", "--trajectory", 0)
    for inside in (store, store / "vtk"):
        assert "a path outside the store" in refusal("export-data", store, inside, "--to", "vtkhdf", "--overwrite")
    assert "got nothing there" in refusal("import", tmp_path / "nowhere", tmp_path / "out.zarr")
    (tmp_path / "text").write_text("no data")
    assert "none of them recognises" in refusal("import", tmp_path / "text", tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("wrong", ["periodic", "periodic,periodic,wall", "no_slip:no_slip:no_slip,periodic,periodic"])
def test_boundaries_that_are_none(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["import", "a", "b", "--boundaries", wrong])
    assert "Expected the sides of three axes out of periodic | no_slip" in capsys.readouterr().err


def test_info_of_an_import_without_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing to measure a floor of."""
    store = tmp_path / "in.zarr"
    assert main(["import", str(foreign.pdebench_scalar(tmp_path / "file")), str(store)]) == 0
    capsys.readouterr()
    assert main(["info", str(store)]) == 0
    said = capsys.readouterr().out
    assert "checksums" in said and "solenoidal floor" not in said
