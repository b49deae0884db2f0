"""What routing did, from rollouts whose routing is known: purity, information, churn, and what is refused."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import zarr
from small import Road

from latentphys.cli import main
from latentphys.data import Store, create_store, open_store
from latentphys.data.routing import num_experts
from latentphys.fields import VELOCITY
from latentphys.grid import Grid
from latentphys.validators import measure_routing, validate, write_report
from latentphys.validators.heatmap import MOST_WRITTEN, heat_map
from latentphys.validators.numbers import percent
from latentphys.validators.plots import MOST_NAMED, ORDERED, STYLES, svg
from latentphys.validators.routing import FEW_TRAJECTORIES, NOT_RECORDED, ONE_EXPERT, ONE_FAMILY, SAME_NAME

GRID = Grid((4, 4, 2), (0.5, 0.25, 1.0))
CELLS = (2, 2, 1)

Save = Callable[..., Store]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a rollout at rest with routing (trajectory, step, layer, px, py, pz), -1 put before it as frame 0."""

    def write(
        family: str,
        steps: np.ndarray,
        experts: list[int] | None,
        checkpoint: str = "model",
        routing: str = "block",
        name: str = "",
    ) -> Store:
        ids = np.concatenate([np.full_like(steps[:, :1], -1), steps], axis=1).astype(np.int16)
        rollout: dict[str, Any] = {"checkpoint": checkpoint, "reference": "truth.zarr", "routing": routing}
        rollout |= {} if experts is None else {"num_experts": experts}
        path = tmp_path / f"{name or family}.zarr"
        with create_store(
            path,
            grid=GRID,
            specs={"velocity": VELOCITY},
            family=family,
            num_trajectories=len(ids),
            times=[1.0 + 0.5 * t for t in range(ids.shape[1])],
            provenance={"exact": True},
            attributes={"rollout": rollout},
            extras={"routing": (ids.shape, "int16", ("trajectory", "time", "layer", "px", "py", "pz"))},
        ) as out:
            for trajectory, own in enumerate(ids):
                out.write("velocity", trajectory, slice(None), torch.zeros(len(own), 3, *GRID.shape).double())
                out.write("routing", trajectory, slice(None), own)
        return open_store(path)

    return write


def constant(expert: int, trajectories: int = 2, steps: int = 3, layers: int = 1) -> np.ndarray:
    return np.full((trajectories, steps, layers, *CELLS), expert)


def report(folder: Path, stores: list[Store]) -> tuple[str, dict[str, Any], ET.Element]:
    """The page's source, the numbers and the verdicts."""
    out = write_report([validate(store) for store in stores], folder, routing=measure_routing(stores)).parent
    content = json.loads((out / "report.json").read_text())
    schema = json.loads(resources.files("latentphys.validators").joinpath("report.schema.json").read_text())
    jsonschema.validate(content, schema)
    return (out / "report.html").read_text(), content, ET.parse(out / "junit.xml").getroot()


def test_families_with_experts_of_their_own(save: Save) -> None:
    [model] = measure_routing([save("a", constant(2), [4]), save("b", constant(0), [4])])
    [layer] = model.layers
    assert (layer.information, layer.normalised, layer.purity) == pytest.approx((1.0, 1.0, 1.0))
    assert (layer.num_experts, layer.dead) == (4, (1, 3))
    assert (model.family_entropy, model.largest_family) == pytest.approx((1.0, 0.5))
    assert [(f.family, f.load, f.dead) for f in layer.families] == [
        ("a", (0.0, 0.0, 1.0, 0.0), (0, 1, 3)),
        ("b", (1.0, 0.0, 0.0, 0.0), (1, 2, 3)),
    ]
    assert [(f.entropy, f.own, f.churn) for f in layer.families] == [(0.0, 1.0, 0.0)] * 2
    found = model.fingerprints
    assert found is not None and (found.accuracy, found.chance, found.num_samples) == (1.0, 0.5, 4)
    assert model.notes == () and [store.family for store in model.stores] == ["a", "b"]


def test_experts_that_tell_nothing_are_as_pure_as_the_largest_family(save: Save) -> None:
    even = np.arange(math.prod(CELLS)).reshape(CELLS)
    shared = [np.broadcast_to(even, (n, 2, 1, *CELLS)).copy() for n in (6, 2)]
    [model] = measure_routing([save("a", shared[0], [4]), save("b", shared[1], [4])])
    [layer] = model.layers
    assert layer.information == pytest.approx(0.0, abs=1e-12) and layer.normalised == pytest.approx(0.0, abs=1e-12)
    assert layer.purity == model.largest_family == pytest.approx(0.75)
    assert model.family_entropy == pytest.approx(-0.75 * math.log2(0.75) - 0.25 * math.log2(0.25))
    assert [f.own for f in layer.families] == [1.0, 0.0]
    assert all(f.entropy == pytest.approx(2.0) and f.dead == () for f in layer.families)
    assert model.fingerprints is not None and model.fingerprints.accuracy <= model.fingerprints.chance


def test_each_layer_is_measured_on_its_own(save: Save) -> None:
    """Layer 0 parts the families, layer 1 sends a quarter of the second to the expert of the first, layer 2 none."""
    a, b = constant(0, layers=3), constant(1, layers=3)
    b[:, :, 1, 0, 0], b[:, :, 2] = 0, 0
    stores = [save("a", a, [2, 3, 4]), save("b", b, [2, 3, 4])]
    [model] = measure_routing(stores)
    binary = -0.75 * math.log2(0.75) - 0.25 * math.log2(0.25)
    share = 1.0 + (5 / 8) * math.log2(5 / 8) * -1 + (3 / 8) * math.log2(3 / 8) * -1 - (1 + 0.5 * binary)
    assert [layer.information for layer in model.layers] == pytest.approx([1.0, share, 0.0], abs=1e-12)
    assert [layer.purity for layer in model.layers] == pytest.approx([1.0, 7 / 8, 0.5])
    assert [layer.dead for layer in model.layers] == [(), (2,), (1, 2, 3)]
    assert [layer.name for layer in model.layers] == ["layer 0", "layer 1", "layer 2"]
    assert [layer.families[1].own for layer in model.layers] == pytest.approx([1.0, 0.75, 0.0])
    for layer in (*model.layers, *measure_routing(stores[::-1])[0].layers):
        assert layer.purity == pytest.approx(sum(0.5 * (family.own or 0.0) for family in layer.families))


def test_stores_of_one_family_count_together(save: Save) -> None:
    stores = [save("a", constant(0), [2]), save("a", constant(1, 4, 3), [2], name="more"), save("b", constant(1), [2])]
    [model] = measure_routing(stores)
    assert [family.family for family in model.layers[0].families] == ["a", "b"]
    assert model.layers[0].families[0].load == pytest.approx((1 / 3, 2 / 3))
    assert model.largest_family == pytest.approx(0.75)
    assert [store.subject for store in model.stores] == ["a.zarr", "more.zarr", "b.zarr"]


def test_churn_is_the_share_of_cells_whose_expert_changed(save: Save) -> None:
    """Of four cells one changes in the second step and two in the third; the other trajectory stands still."""
    ids = constant(0, trajectories=2, steps=4, layers=2)
    ids[0, 1:, 1, 0, 0], ids[0, 2:, 1, 1] = 1, 1
    [model] = measure_routing([save("a", ids, [2, 2])])
    [store] = model.stores
    assert store.churn == ((0.0, 0.0, 0.0), (0.125, 0.25, 0.0))
    assert store.times == pytest.approx((1.0, 1.5, 2.0))
    assert [layer.families[0].churn for layer in model.layers] == pytest.approx([0.0, 0.125])
    [series] = model.series()
    assert [(c.label, c.y) for c in series.curves] == [("layer 0", store.churn[0]), ("layer 1", store.churn[1])]
    assert series.x == store.times


def test_a_single_step_has_no_churn(save: Save) -> None:
    [model] = measure_routing([save("a", constant(0, steps=1), [2])])
    assert model.stores[0].times == () and model.stores[0].churn == ((),)
    assert model.layers[0].families[0].churn is None and model.series() == []


def test_one_store_says_why_it_tells_nothing_of_families(save: Save, tmp_path: Path) -> None:
    page, content, _ = report(tmp_path / "out", [save("a", constant(1), [4])])
    [model] = content["routing"]
    assert model["notes"] == [ONE_FAMILY] and ONE_FAMILY in page
    assert model["family_entropy"] is model["largest_family"] is model["fingerprints"] is None
    layer = model["layers"][0]
    assert layer["information"] is layer["normalised"] is layer["purity"] is layer["families"][0]["own"] is None
    assert layer["families"][0]["load"] == [0.0, 1.0, 0.0, 0.0]
    assert "What an expert tells" not in page and "In own experts" not in page and "Load of the experts" in page


def test_single_trajectories_are_not_classified(save: Save) -> None:
    [model] = measure_routing([save("a", constant(0, 1), [2]), save("b", constant(1, 5), [2])])
    assert model.fingerprints is None and model.notes == (FEW_TRAJECTORIES,)
    assert model.layers[0].purity == 1.0


def test_a_dense_control_is_one_expert_and_nothing_else(save: Save, tmp_path: Path) -> None:
    page, content, _ = report(tmp_path / "out", [save("a", constant(0), [1]), save("b", constant(0), [1])])
    [model] = content["routing"]
    assert model["notes"] == [ONE_EXPERT] and ONE_EXPERT in page
    assert model["layers"][0]["information"] == 0.0 and model["layers"][0]["purity"] == 0.5
    assert model["fingerprints"] is None and "Load of the experts" not in page and "Churn" not in page


def test_a_router_of_whole_functions_decides_for_all_blocks(save: Save) -> None:
    [model] = measure_routing([save("a", constant(0), [4], routing="function")])
    assert [layer.name for layer in model.layers] == ["all blocks"]
    assert model.series()[0].curves[0].label == "all blocks"


def test_experts_are_those_of_the_model_and_not_those_seen(save: Save) -> None:
    [model] = measure_routing([save("a", constant(1), [8])])
    assert model.layers[0].num_experts == 8 and model.layers[0].even == 3.0 and len(model.layers[0].dead) == 7
    old = [save(family, constant(k, layers=2), None, "old") for k, family in enumerate("bc", start=2)]
    assert [num_experts(store) for store in old] == [(3, 3), (4, 4)]
    [model] = measure_routing(old)
    assert [layer.num_experts for layer in model.layers] == [4, 4] and NOT_RECORDED in model.notes


def test_models_are_kept_apart(save: Save, tmp_path: Path) -> None:
    a, b = save("a", constant(0), [2]), save("b", constant(1), [2], "other")
    models = measure_routing([a, b])
    assert [model.model for model in models] == ["model", "other"]
    assert all(ONE_FAMILY in model.notes for model in models)
    deeper = save("b", constant(1, layers=2), [2, 2], name="deeper")
    wider = save("c", constant(1), [4])
    models = measure_routing([a, deeper, wider])
    assert [(m.model, len(m.layers), m.layers[0].num_experts) for m in models] == [
        ("model", 1, 2), ("model", 2, 2), ("model", 1, 4)
    ]  # fmt: skip
    assert all(SAME_NAME in model.notes for model in models)
    old = [save("f", constant(0, layers=depth), None, "old", name=f"old{depth}") for depth in (1, 2)]
    assert [len(m.layers) for m in measure_routing(old)] == [1, 2]
    nameless = [save(family, constant(0), [2], "") for family in ("d", "e")]
    assert [model.model for model in measure_routing(nameless)] == [
        f"the model of {tmp_path / name}.zarr, which the store does not name" for name in "de"
    ]
    page, content, _ = report(tmp_path / "out", [a, b])
    assert len(content["routing"]) == 2 and "<h3>model</h3>" in page and "<h3>other</h3>" in page


def test_stores_without_routing_have_no_section(tmp_path: Path) -> None:
    with create_store(
        tmp_path / "in.zarr", grid=GRID, specs={"velocity": VELOCITY}, family="a", num_trajectories=1, times=[0.0]
    ) as out:
        out.write("velocity", 0, 0, torch.zeros(3, *GRID.shape))
    store = open_store(tmp_path / "in.zarr")
    assert measure_routing([store]) == []
    page, content, _ = report(tmp_path / "out", [store])
    assert content["routing"] == [] and "Routing" not in page


def test_the_report_informs_and_judges_nothing(save: Save, tmp_path: Path) -> None:
    """All tokens of both families in one expert of eight: as bad as routing can be, and no check fails."""
    stores = [save("a", constant(3), [8]), save("b", constant(3), [8])]
    page, content, junit = report(tmp_path / "out", stores)
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page))
    assert content["verdict"] == "pass" and junit.get("failures") == "0"
    assert not any("rout" in (case.get("name") or "") for case in junit.iter("testcase"))
    assert "a trajectory’s load of all experts gives its family away in" in words
    assert "7 (0, 1, 2, 4, 5, 6, 7)" in words and "H(family) = 1.000 bit" in words
    assert content["routing"][0]["layers"][0]["normalised"] == 0.0


def test_a_report_of_routing_that_says_impossible_things_breaks_the_schema(save: Save, tmp_path: Path) -> None:
    _, content, _ = report(tmp_path / "out", [save("a", constant(1), [2]), save("b", constant(0), [2])])
    schema = json.loads(resources.files("latentphys.validators").joinpath("report.schema.json").read_text())
    changes: list[dict[str, Any]] = [
        {"layers": []},
        {"largest_family": 1.5},
        {"purity": 1.0},
        {"fingerprints": {"accuracy": 1.0}},
    ]
    for change in changes:
        broken = {**content, "routing": [{**content["routing"][0], **change}]}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


def test_damaged_routing_is_refused_with_its_place(save: Save, tmp_path: Path) -> None:
    for name, place, value, message in (
        ("unrouted", (1, 2, 1, 0, 0, 0), -1, "0 to 1 in layer 1 of .*, got -1 in trajectory 1, frame 2"),
        ("beyond", (0, 3, 0, 1, 1, 0), 2, "0 to 1 in layer 0 of .*, got 2 in trajectory 0, frame 3"),
    ):
        store = save("a", constant(1, steps=3, layers=2), [2, 2], name=name)
        zarr.open_array(str(store.path / "routing"), mode="r+")[place] = value
        store = open_store(store.path)
        with pytest.raises(ValueError, match=f"Expected experts {message}; make the rollout again"):
            measure_routing([store])

    store = save("a", constant(1), [2], name="half")
    next(path for path in (store.path / "routing" / "c").rglob("*") if path.is_file()).unlink()
    with pytest.raises(ValueError, match="routing"):
        measure_routing([open_store(store.path)])
    store = save("a", constant(1), [2], name="gone")
    shutil.rmtree(store.path / "routing")
    with pytest.raises(ValueError, match="Expected an array 'routing'"):
        measure_routing([open_store(store.path)])
    store = save("a", constant(1, layers=2), [2, 2, 2], name="layers")
    with pytest.raises(ValueError, match="Expected routing of 3 layers in .* got 2"):
        measure_routing([store])


def test_arrays_that_are_no_routing_are_refused(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"grid": GRID, "specs": {"velocity": VELOCITY}, "family": "a", "num_trajectories": 1}
    for name, dtype, shape in (("flat", "int16", (1, 2, 4)), ("float", "float32", (1, 2, 1, *CELLS))):
        names = ("trajectory", "time", "layer", "px", "py", "pz")[: len(shape)]
        with create_store(
            tmp_path / name, times=[0.0, 1.0], extras={"routing": (shape, dtype, names)}, **shared
        ) as out:
            out.write("velocity", 0, slice(None), torch.zeros(2, 3, *GRID.shape))
            out.write("routing", 0, slice(None), np.zeros(shape[1:], dtype))
        with pytest.raises(ValueError, match=rf"whole numbers of shape \(\*\(1, 2\), layer, px, py, pz\), got {dtype}"):
            measure_routing([open_store(tmp_path / name)])


def cells_of(drawing: str) -> tuple[list[tuple[float, float, str]], list[str]]:
    """The cells of a heat map as (x, y, fill), and all texts."""
    root = ET.fromstring(drawing)
    boxes = [r for r in root.iter("rect") if r.get("stroke") != "none"]
    return [(float(r.get("x", "")), float(r.get("y", "")), r.get("fill", "")) for r in boxes], [
        text.text or "" for text in root.iter("text")
    ]


def test_the_heat_map_is_darker_where_the_load_is_higher(save: Save) -> None:
    a = constant(0, layers=2)
    a[:, :, 0, 1], a[:, :, 1, 0, 0] = 1, 2
    [model] = measure_routing([save("a_long", a, [3, 3]), save("b", constant(2, layers=2), [3, 3])])
    cells, texts = cells_of(heat_map(model))
    loads = [share for layer in model.layers for family in layer.families for share in family.load]
    assert loads == pytest.approx([0.5, 0.5, 0, 0, 0, 1, 0.75, 0, 0.25, 0, 0, 1])
    brightness = [sum(int(fill[i : i + 2], 16) for i in (1, 3, 5)) for _, _, fill in cells]
    for i, j in product(range(len(loads)), repeat=2):
        assert (brightness[i] > brightness[j]) == (loads[i] < loads[j])
    assert [x for x, _, _ in cells[:3]] == [x for x, _, _ in cells[3:6]] and cells[0][1] < cells[3][1] < cells[6][1]
    written = [percent(share) if share else "–" for share in loads]
    assert [text for text in texts if text in {"50", "75", "25", "100", "–"}] == written
    assert {"layer 0", "layer 1", "a long", "b", "expert", "100 % of the family’s tokens"} <= set(texts)


def test_many_experts_are_drawn_without_numbers_inside_the_picture(save: Save) -> None:
    number = 4 * MOST_WRITTEN
    [model] = measure_routing([save("shallow_water_sphere", constant(5), [number]), save("b", constant(1), [number])])
    drawing = heat_map(model)
    cells, texts = cells_of(drawing)
    assert len(cells) == 2 * number and "–" not in texts and drawing.count("<circle") == 2 * (number - 1)
    width = float(ET.fromstring(drawing).get("viewBox", "").split()[2])
    assert max(x for x, _, _ in cells) < width


@pytest.mark.parametrize("depth", [1, 2, MOST_NAMED, MOST_NAMED + 1, 24])
def test_layers_have_colours_in_their_order(save: Save, depth: int) -> None:
    [model] = measure_routing([save("a", constant(0, layers=depth), [2] * depth)])
    [series] = model.series()
    root = ET.fromstring(svg(series))
    colours = [line.get("stroke", "") for line in root.iter("polyline")]
    assert len(set(colours)) == depth
    if depth == 1:
        assert colours == [STYLES["model"][0]]
    else:
        ends = ["#" + "".join(f"{channel:02x}" for channel in ORDERED[i]) for i in (0, -1)]
        assert [colours[0], colours[-1]] == ends
    texts = [text.text for text in root.iter("text")]
    named = [f"layer {i}" for i in (range(depth) if depth <= MOST_NAMED else (0, depth - 1))]
    assert [text for text in texts if (text or "").startswith("layer")] == named


def test_per_cent_is_whole_only_where_it_is() -> None:
    assert [percent(x) for x in (0.0, 0.004, 0.126, 0.996, 1.0, 1.0 - 1e-15)] == [
        "0",
        "< 1",
        "13",
        "> 99",
        "100",
        "100",
    ]
    assert [percent(x, 1) for x in (1e-5, 0.5, 0.9997, 1.0)] == ["< 0.1", "50.0", "> 99.9", "100"]


def test_a_trained_model_from_rollout_to_report(road: Road, tmp_path: Path) -> None:
    """The command line: routing of both families in one section, with the number of experts that the model has."""
    rollouts = [str(tmp_path / f"{family}.zarr") for family in road.fields]
    for family, out in zip(road.fields, rollouts, strict=True):
        start = [str(road.dynamics), str(road.fields[family]), out]
        assert main(["rollout", *start, "--steps", "2", "--trajectories", "0", "1"]) == 0
    main(["validate", *rollouts, "--out", str(tmp_path / "report")])
    [model] = json.loads((tmp_path / "report" / "report.json").read_text())["routing"]
    assert [store["family"] for store in model["stores"]] == list(road.fields)
    assert [layer["num_experts"] for layer in model["layers"]] == [4, 4] and model["notes"] == []
    assert model["fingerprints"]["num_samples"] == 4
    for number, layer in enumerate(model["layers"]):
        for family, path in zip(layer["families"], rollouts, strict=True):
            ids = np.asarray(open_store(path).array("routing")[:, 1:, number])
            assert family["load"] == pytest.approx([(ids == expert).mean() for expert in range(4)])
