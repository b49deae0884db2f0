"""Artefacts of each format: the models' own numbers within the stated tolerance, exact mass, and refusals of damage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import Road

from latentphys import operators
from latentphys.cli import main
from latentphys.fields import State
from latentphys.grid import Geometry, Grid
from latentphys.info import describe
from latentphys.surrogate import Surrogate
from latentphys.surrogate.export import export, folder, open_artefact, writing
from latentphys.surrogate.export.examples import from_scale
from latentphys.surrogate.export.functions import NAMES, functions
from latentphys.surrogate.export.vectors import inputs
from latentphys.surrogate.models import Models, checkpoint_digest

NUM_STEPS = 4
Artefacts = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(road: Road) -> Models:
    return Models.load(road.dynamics)


@pytest.fixture(scope="module")
def torchscript(road: Road, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store, out = road.store("porous"), tmp_path_factory.mktemp("ts") / "porous.artefact"
    return export(models, [store[0, 0]], out, to="torchscript", units=store.attributes["parameter_units"])


@pytest.fixture(scope="module")
def onnx(road: Road, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="ONNX needs latentphys[export]")
    pytest.importorskip("onnxscript", reason="ONNX needs latentphys[export]")
    return export(
        models, [road.store("open_channel")[0, 0]], tmp_path_factory.mktemp("onnx") / "channel.artefact", to="onnx"
    )


@pytest.fixture
def artefacts(request: pytest.FixtureRequest) -> Artefacts:
    return lambda name: request.getfixturevalue(name)


@pytest.fixture
def copied(torchscript: Path, tmp_path: Path) -> Path:
    """An artefact to damage."""
    return shutil.copytree(torchscript, tmp_path / "copy")


def first(road: Road, family: str) -> State:
    return road.store(family)[0, 0]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().amax() / want.abs().amax())


@pytest.mark.parametrize(
    ("name", "family"), [("torchscript", "porous"), ("onnx", "open_channel"), ("pt2_artefact", "porous")]
)
def test_it_says_what_the_models_say(name: str, family: str, artefacts: Artefacts, road: Road, models: Models) -> None:
    path, state = artefacts(name), road.store(family)[0, 2]
    artefact = open_artefact(path)
    own, model = artefact.stepper(state.geometry, family), models.stepper(state.geometry, family)
    tolerances = artefact.about["tolerances"]
    assert max(tolerances.values()) <= 1e-4
    packed = model.scale.pack(state.fields)[None].double()
    z, expected = own.encode(packed), model.encode(packed)
    assert relative(z, expected) <= tolerances["encode"]
    moved = 0.0
    for n in range(NUM_STEPS):
        now, then = ({**state.parameters, "viscosity": (1 + m / 10) * 1e-2} for m in (n, n + 1))
        z, before = own.step(z[:, None], [now], [then]).latent, expected
        expected = model.step(expected[:, None], [now], [then]).latent
        assert relative(z, expected) <= tolerances["encode"] + (n + 1) * tolerances["step"]
        moved = max(moved, relative(before, expected))
        fields, reference = own.decode(z), model.decode(expected)
        assert fields.dtype == torch.float64
        assert relative(fields, reference) <= 10 * sum(tolerances.values())
        assert float(operators.div(fields, state.grid).abs().amax()) == 0.0
        assert float(fields[0][~state.geometry.open_faces].abs().amax() if name != "onnx" else 0.0) == 0.0
    assert moved > 100 * max(tolerances.values())  # the models do something that could be missed


@pytest.mark.parametrize("name", ["torchscript", "onnx", "pt2_artefact"])
def test_a_surrogate_of_it_repeats_itself(name: str, artefacts: Artefacts, road: Road) -> None:
    surrogate = Surrogate.load(artefacts(name))
    (family,) = surrogate.families
    state = surrogate.step(surrogate.init(first(road, family)))
    token = surrogate.snapshot()
    once = surrogate.step(state, num_steps=2)
    again = surrogate.step(surrogate.restore(token), num_steps=2)
    assert torch.equal(once.velocity, again.velocity) and not torch.equal(once.velocity, state.velocity)
    assert float(operators.div(once.velocity, once.grid).abs().amax()) == 0.0


def test_conditions_reach_a_step(torchscript: Path, road: Road) -> None:
    state = first(road, "porous")
    stepper = open_artefact(torchscript).stepper(state.geometry, "porous")
    z = stepper.encode(stepper.scale.pack(state.fields)[None])
    other = {**state.parameters, "viscosity": 3 * float(state.parameters["viscosity"])}
    a, b = (stepper.step(z[:, None], [p], [p]).latent for p in (state.parameters, other))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("file", ["artefact.json", "artefact.txt", "arrays.safetensors", "step.pt", "decode.pt"])
def test_refuses_a_flipped_bit(file: str, copied: Path) -> None:
    data = bytearray((copied / file).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"Expected (SHA-256 .*{file}|an exported artefact)"):
        open_artefact(copied)


def test_refuses_what_is_incomplete_or_of_another_schema(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected an exported artefact, got .*without a readable artefact.json"):
        open_artefact(tmp_path)
    about = json.loads((copied / "artefact.json").read_text())
    (copied / "artefact.json").write_text(json.dumps({**about, "schema": "latentphys.artefact/9"}))
    with pytest.raises(
        ValueError, match="schema latentphys.artefact/1, got 'latentphys.artefact/9' .* export it again"
    ):
        open_artefact(copied)
    (copied / "artefact.json").write_text(json.dumps(about))
    (copied / "encode.pt").unlink()
    with pytest.raises(ValueError, match="Expected .*encode.pt, got no readable file"):
        open_artefact(copied)


def reseal(path: Path) -> None:
    """Make the hashes fit again, as one who changes an artefact on purpose would."""
    about = folder.read(path)
    folder.seal(path, {key: value for key, value in about.items() if key not in ("schema", "files", "sha256")})


def test_the_self_test_finds_other_weights_and_other_vectors(copied: Path, road: Road) -> None:
    kept = {name: (copied / name).read_bytes() for name in ("step.pt", "arrays.safetensors")}
    models, state = Models.load(road.dynamics), first(road, "porous")
    with torch.no_grad():
        models.dynamics.transformer.head.bias.add_(1e-2)
    names = [p["name"] for p in folder.read(copied)["parameters"]]
    step = functions(models.dynamics, models.autoencoder, state.geometry, "porous", names)["step"]
    arrays = load_file(copied / "arrays.safetensors")
    writing.FORMATS["torchscript"].write({"step": step}, inputs(arrays), copied, print)
    reseal(copied)
    with pytest.raises(ValueError, match="Expected step of .* within 1.0e-05 of what the model said, got"):
        open_artefact(copied)
    (copied / "step.pt").write_bytes(kept["step.pt"])
    for name, function in {"test.latent": "encode", "test.next": "step", "test.decoded": "decode"}.items():
        arrays = load_file(copied / "arrays.safetensors")
        arrays[name][0, 0, 0, 0, 0] += 1e-3 * arrays[name].abs().amax()
        save_file(arrays, copied / "arrays.safetensors")
        reseal(copied)
        with pytest.raises(ValueError, match=f"Expected {function} of .* within"):
            open_artefact(copied)
        (copied / "arrays.safetensors").write_bytes(kept["arrays.safetensors"])
    reseal(copied)
    open_artefact(copied)


def test_refuses_files_that_do_not_load(copied: Path) -> None:
    (copied / "step.pt").write_bytes(b"no archive")
    reseal(copied)
    with pytest.raises(ValueError, match="Expected functions that this machine can load, got"):
        open_artefact(copied)


def test_refuses_another_flow_or_device(torchscript: Path, road: Road) -> None:
    artefact, geometry = open_artefact(torchscript), first(road, "porous").geometry
    with pytest.raises(ValueError, match="Expected family 'porous', .* got 'open_channel'; export one for it"):
        artefact.stepper(geometry, "open_channel")
    with pytest.raises(ValueError, match="Expected the solids this artefact was exported for, got others in"):
        artefact.stepper(road.store("porous").geometry(1), "porous")
    shape, spacing = geometry.grid.shape, geometry.grid.spacing
    with pytest.raises(ValueError, match="the grid this artefact was exported for, .* 16 cells along x, got 32"):
        artefact.stepper(Geometry(Grid((32, 16, 16), spacing)), "porous")
    near, far = (Grid(shape, (spacing[0] * f, spacing[1], spacing[2])) for f in (1 + 1e-6, 1.01))
    assert artefact.stepper(Geometry(near, geometry.solid), "porous").geometry.grid == near
    with pytest.raises(ValueError, match="the grid this artefact was exported for, .* a spacing of .* along x"):
        artefact.stepper(Geometry(far, geometry.solid), "porous")
    with pytest.raises(ValueError, match="Expected the one geometry .* got a batch of geometries"):
        artefact.stepper(Geometry.stack([geometry, geometry]), "porous")
    with pytest.raises(ValueError, match="Expected the device that .* was exported for, 'cpu', got 'cuda'"):
        open_artefact(torchscript, device="cuda")
    with pytest.raises(ValueError, match="Expected parameters among .* got 'gravity'"):
        artefact.stepper(geometry, "porous").check_parameters({"gravity": 9.81})


def test_it_appears_whole_or_not_at_all(
    road: Road, models: Models, torchscript: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, state, format = tmp_path / "out", first(road, "porous"), writing.FORMATS["torchscript"]
    load = format.load

    def write(modules: object, examples: object, target: Path, progress: object) -> None:
        for name in NAMES:
            shutil.copy(torchscript / f"{name}.pt", target)

    def shifted(*arguments: object) -> object:
        loaded = load(*arguments)
        return {**loaded, "step": lambda *x: loaded["step"](*x) * 1.01}

    monkeypatch.setattr(format, "write", write)
    with monkeypatch.context() as patch:
        patch.setattr(format, "load", shifted)
        with pytest.raises(ValueError, match="Expected exported functions within 0.001 of the models, got"):
            export(models, [state], out, to="torchscript")
    assert not list(tmp_path.iterdir())
    shutil.copytree(torchscript, out)
    with pytest.raises(ValueError, match="Expected a new folder, got one that exists"):
        export(models, [state], out, to="torchscript")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="Expected a new folder, got what is no artefact"):
        export(models, [state], tmp_path / "mine", to="torchscript", overwrite=True)
    before = (out / "artefact.json").read_text()
    export(models, [state], out, to="torchscript", overwrite=True)
    assert (out / "artefact.json").read_text() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_the_command(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = ["export", str(road.dynamics), "out", "--to", "torchscript"]
    assert main([*start, "--store", str(road.fields["porous"]), "--trajectory", "1", "--batch", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == "out\n" and "trace step" in err
    about = open_artefact("out").about
    assert about["digest"] == checkpoint_digest(road.dynamics) and about["batch"] == 2
    assert [(p["name"], p["unit"]) for p in about["parameters"]][-1] == ("viscosity", "m2/s")
    assert about["provenance"]["trajectory"] == 1 and "sha256" in about["provenance"]["stores"][0]
    store = road.store("porous")
    stepper, model = (
        a.stepper(store.geometry(1), "porous") for a in (open_artefact("out"), Models.load(road.dynamics))
    )
    packed = torch.stack([store.read("velocity", 1, n) for n in range(4)]).double()
    z, expected = stepper.encode(packed), model.encode(packed)
    assert relative(z, expected) < 1e-6
    each = [{**store[1, 0].parameters, "viscosity": 0.01 * n} for n in range(1, 5)]
    z, expected = (s.step(x[:, None], each, each).latent for s, x in ((stepper, z), (model, expected)))
    assert relative(z, expected) < 1e-5
    with pytest.raises(ValueError, match="Expected a multiple of 2 flows, .* got 3; export it with another --batch"):
        stepper.encode(packed[:3])
    held = describe("out")
    assert held["format"] == "torchscript" and "porous" in held["contract"] and set(held["functions"]) == set(NAMES)
    assert main(["info", "out"]) == 0 and "latentphys.artefact/1" in capsys.readouterr().out
    capsys.readouterr()
    for wrong, said in [
        ([], "Expected --store, for a flow of it, or --family, for an empty box, got neither"),
        (["--store", str(road.fields["porous"]), "--trajectory", "9"], "Expected a trajectory from 0 to 3"),
        (["--store", str(road.fields["porous"]), "--shape", "8", "8", "8"], "Expected --shape beside --family only"),
        (["--family", "sand"], "Expected a family of"),
        (["--family", "porous", "--batch", "0"], "Expected a batch of at least 1 flow, got 0"),
        (["--family", "porous"], "Expected a new folder, got one that exists"),
    ]:
        assert main([*start, *wrong]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_without_a_store_it_is_an_empty_box(road: Road, models: Models) -> None:
    states, then = from_scale(models, "open_channel", (16, 8, 16), batch=2)
    assert [state.grid.shape for state in states] == [(16, 8, 16)] * 2 and states[0].geometry.is_empty
    assert not torch.equal(states[0].velocity, states[1].velocity)
    stepper = models.stepper(states[0].geometry, "open_channel")
    neutral = models.dynamics.conditioning.vector({}, {}, stepper.interval)
    assert torch.allclose(models.dynamics.conditioning.vector(then[0], then[0], stepper.interval), neutral, atol=1e-6)
    assert float(stepper.encode(stepper.scale.pack(states[0].fields)[None]).abs().amax()) > 0.1


def test_the_flat_text_says_the_same(torchscript: Path) -> None:
    about = folder.read(torchscript)
    lines = [line.split(" ") for line in (torchscript / "artefact.txt").read_text().splitlines()]
    said = {key: values for key, *values in lines}
    assert said["format"] == ["torchscript"] and [float(x) for x in said["grid.spacing"]] == about["grid"]["spacing"]
    assert float(said["interval"][0]) == about["interval"] and said["latent.shape"] == ["8", "4", "4", "4"]
    assert said["fields.0"] == ["velocity", "flux", "solenoidal", "m3/s", "0", "3"]
    names = [said[f"parameters.{n}"][0] for n in range(int(said["parameters"][0]))]
    assert names == [p["name"] for p in about["parameters"]]
    assert all(float(said[f"tolerance.{name}"][0]) == about["tolerances"][name] for name in NAMES)
