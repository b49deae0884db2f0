"""Every family by its name, as a user makes it: simulated, described, validated and drawn."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from latentphys.cli import main
from latentphys.configuration import compose
from latentphys.data import open_store
from latentphys.families import Family
from latentphys.info import describe
from latentphys.training.models import build

FAMILIES = (
    "open_channel",
    "porous",
    "convection",
    "passive_scalar",
    "mhd",
    "turbulence",
    "reaction_diffusion",
    "acoustics",
    "shallow_water_sphere",
)
SOLENOIDAL = {"open_channel", "porous", "convection", "passive_scalar", "mhd", "turbulence"}


@pytest.fixture(scope="module", params=FAMILIES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("families") / f"{request.param}.zarr"
    assert main(["simulate", f"family={request.param}", "size=tiny", f"out={path}", "frames=3"]) == 0
    return path


def test_the_name_is_the_name(store: Path) -> None:
    family = build(compose("simulate", [f"family={store.stem}"])["family"])
    assert isinstance(family, Family) and family.name == open_store(store).family == store.stem
    assert set(family.specs) == set(open_store(store).specs)


def test_ground_truth_is_valid(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Net flux 0.0 where the flow is incompressible, div B 0.0, totals and signs as the fields promise."""
    capsys.readouterr()
    assert main(["validate", str(store), "--out", str(tmp_path), "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["finite"]["value"] == 0.0
    if store.stem in SOLENOIDAL:
        assert checks["net_flux_max"]["value"] == 0.0 == checks["net_flux_max"]["threshold"]
        assert checks["solid_flux_max"]["value"] == 0.0
    if store.stem == "mhd":
        assert checks["magnetic_net_flux_max"]["value"] == 0.0 == checks["magnetic_net_flux_max"]["threshold"]
    if store.stem in ("passive_scalar", "shallow_water_sphere"):
        assert any(name.endswith("_total_drift") for name in checks)


def test_something_happens(store: Path) -> None:
    """Neither at rest, nor the same in every frame or trajectory."""
    opened = open_store(store)
    for name in opened.specs:
        first, later, other = opened.read(name, 0, 0), opened.read(name, 0, -1), opened.read(name, 1, 0)
        is_material = (store.stem, name) == ("acoustics", "sound_speed")
        assert float(first.std()) > 0 and bool((first == later).all()) == is_material
        assert not bool((first == other).all())


def test_info_tells_a_newcomer_everything(store: Path) -> None:
    about = describe(store)
    assert about["family"] == store.stem and len(about["physics"]) > 100
    assert set(about["fields"]) == set(open_store(store).specs)
    assert all(set(field) >= {"is", "stored", "mean", "std", "min", "max"} for field in about["fields"].values())
    assert set(about["parameters"]) == set(open_store(store).parameters) != set()


def test_it_can_be_drawn(store: Path, tmp_path: Path) -> None:
    """Flows alone are drawn elsewhere."""
    if store.stem in ("open_channel", "porous", "turbulence"):
        return
    assert main(["render", str(store), "--out", str(tmp_path), "--no-movie"]) == 0
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert any(name.endswith("slices.png") for name in pictures)
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("*.png"))


@pytest.mark.parametrize("name", FAMILIES)
def test_times_that_cannot_be_are_refused(name: str) -> None:
    settings = compose("simulate", [f"family={name}"])["family"]
    for interval in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"Expected a finite interval between frames \[s\] > 0, got"):
            build({**settings, "interval": interval})
    for spin_up in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"Expected a finite spin-up \[s\] ≥ 0, got"):
            build({**settings, "spin_up": spin_up})
    assert build({**settings, "spin_up": 0.0}).spin_up == 0.0


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("open_channel", "disturbance", -1.0),
        ("porous", "pulsation", math.nan),
        ("porous", "period", 0.0),
        ("porous", "disturbance", math.inf),
        ("convection", "disturbance", math.nan),
        ("turbulence", "modes", 0),
        ("turbulence", "power", math.inf),
        ("turbulence", "disturbance", 0.0),
        ("passive_scalar", "gradient", math.nan),
        ("passive_scalar", "scalar_rms", -1.0),
        ("mhd", "slope", math.inf),
        ("reaction_diffusion", "ratio", math.nan),
        ("acoustics", "pressure", math.nan),
        ("shallow_water_sphere", "radius", math.inf),
    ],
)
def test_settings_out_of_range_are_refused(name: str, setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Expected a finite .*, got {value}"):
        build({**compose("simulate", [f"family={name}"])["family"], setting: value})


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"turbulence", "passive_scalar", "shallow_water_sphere"}))
@pytest.mark.parametrize("shape", [(0, 1, 2), (1, 1, 1), (-4, 8, 8), (16,)])
def test_shapes_that_cannot_be_are_refused(name: str, shape: tuple[int, ...]) -> None:
    family = build(compose("simulate", [f"family={name}"])["family"])
    with pytest.raises(ValueError, match=r"Expected (a shape of three axes|more than a single cell).*, got \["):
        family.check_shape(shape)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("batch_size=0", "in batches of ≥ 1, got 2 of 2 in batches of 0"),
        ("workers=abc", "at least one worker, or the address of a dask cluster such as tcp://host:8786, got 'abc'"),
        ("workers=null", "at least one worker, .*, got None"),
        ("workers=1.5", "at least one worker, .*, got 1.5"),
        ("workers=true", "at least one worker, .*, got True"),
        ("workers=tcp://nowhere", "Expected dask.distributed for 'tcp://nowhere', got none; pip install distributed"),
        ("seed=-1", "Expected a seed ≥ 0, got -1"),
        ("compile=3", "Expected auto, true or false for 'compile', got 3"),
        ("family.interval=true", "Expected a number for 'family.interval', got True"),
        ("grid.shape=[0,1,2]", r"Expected a shape of three axes, .*, got \[0, 1, 2\]"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["latentphys.workers"], "find_spec", lambda name: None)
    command = ["family=acoustics", "size=tiny", "grid.shape=[4,4,4]", "frames=2", option]
    assert main(["simulate", *command, f"out={tmp_path / 'a.zarr'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(message, said)
    assert not list(tmp_path.iterdir())
