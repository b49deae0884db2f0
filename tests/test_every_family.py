"""Every family by its name, as a user makes it: simulated, described, validated and drawn."""

import json
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
