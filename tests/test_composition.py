"""Composed checkpoints are like any other, whatever they are made of; what is no relative is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import Three, endpoint, rewrite, same
from safetensors import safe_open
from safetensors.torch import load_file
from small import Road, configuration

from latentphys.composition import Choice, CompositeModel, compose
from latentphys.composition.sources import fixed_names
from latentphys.data import open_store
from latentphys.info import describe
from latentphys.rollout import rollout_store
from latentphys.surrogate import Surrogate
from latentphys.training import checkpoint, load_autoencoder, load_dynamics, manifest, open_checkpoint
from latentphys.training.models import new_dynamics
from latentphys.transformer.conditioning import Conditioning
from latentphys.transformer.dynamics import Dynamics
from latentphys.validators import exit_status, validate

KINDS = {
    "moe": [],
    "dense": ["router=dense"],
    "fourier": ["dynamics.mixer=fourier"],
    "tree": ["router=tree", "dynamics.routing=function"],
}


def weights(dynamics: Dynamics) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in dynamics.state_dict().items()}


def test_a_composite_is_a_checkpoint_like_any_other(road: Road, three: Three, tmp_path: Path) -> None:
    out = compose(*three, tmp_path / "c", 0.4)
    checkpoint.verify(out)
    dynamics, autoencoder = load_dynamics(out)
    low, high = (load_dynamics(path)[0].state_dict() for path in (three.low, three.high))
    for name, tensor in dynamics.state_dict().items():
        assert torch.allclose(tensor.double(), 0.3 * low[name].double() + 0.7 * high[name].double(), rtol=6e-8, atol=0)
    assert same(autoencoder.state_dict(), load_dynamics(three.anchor)[1].state_dict())
    store = road.store("porous")
    rolled = open_store(rollout_store(autoencoder, dynamics, store, tmp_path / "r", num_steps=3, trajectories=[3]))
    found = validate(rolled)
    assert exit_status(found.checks) == 0 and found["net_flux_max"].value == 0.0
    surrogate = Surrogate.load(out)
    assert torch.isfinite(surrogate.step(surrogate.init(store[0, 0])).velocity).all()
    assert describe(out)["kind"] == "dynamics"
    load_dynamics(out, max_resident_experts=1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_composes_and_keeps_its_endpoints_and_routers(road: Road, tmp_path: Path, kind: str) -> None:
    path = road.dynamics
    found, config = open_checkpoint(path), configuration("dynamics", road.inputs("dynamics"), tmp_path, *KINDS[kind])
    _, autoencoder = load_dynamics(path)
    conditioning = Conditioning.from_dict(found.extra["conditioning"])
    channels, intervals = found.extra["latent_channels"], found.extra["intervals"]
    dynamics = new_dynamics(config["dynamics"], channels, conditioning, intervals)
    anchor = tmp_path / "anchor"
    save(anchor, found, dynamics, autoencoder, config["dynamics"])
    low, high = endpoint(anchor, tmp_path / "low", 1), endpoint(anchor, tmp_path / "high", 2)
    before = weights(dynamics)
    live = CompositeModel(anchor, low, high)
    for alpha, end in ((-1.0, low), (0.3, None)):
        out = compose(anchor, low, high, tmp_path / f"c{alpha}", alpha)
        composed = weights(load_dynamics(out)[0])
        assert same(composed, weights(live.set(alpha).dynamics))
        if end is not None:
            assert same(composed, weights(load_dynamics(end)[0]))
        moved = {name for name in before if not torch.equal(before[name], composed[name])}
        assert fixed_names(open_checkpoint(anchor)).isdisjoint(moved)
        assert moved == {name for name, _ in dynamics.named_parameters() if ".router." not in name}


def save(path: Path, found: Any, dynamics: Dynamics, autoencoder: Any, config: Any, **more: Any) -> None:
    """Save a dynamics model with the autoencoder of another checkpoint."""
    checkpoint.save(
        path,
        kind="dynamics",
        model=dynamics,
        config=config,
        extra={**dynamics.to_dict(), "latent_channels": found.extra["latent_channels"]},
        step=1,
        parts=lambda folder: None if shutil.copytree(found.path / "autoencoder", folder / "autoencoder") else None,
        **more,
    )


def test_averaged_weights_are_used_where_there_are_any(road: Road, three: Three, tmp_path: Path) -> None:
    found = open_checkpoint(three.anchor)
    dynamics, autoencoder = load_dynamics(three.anchor)
    average = {name: p.detach() * 1.01 for name, p in dynamics.named_parameters() if ".router." not in name}
    save(tmp_path / "low", found, dynamics, autoencoder, found.config, ema=average)
    rewrite_as(tmp_path / "low", found)
    out = compose(three.anchor, tmp_path / "low", three.high, tmp_path / "c", -1.0)
    assert same(load_file(out / "model.safetensors"), load_file(tmp_path / "low" / "ema.safetensors"))
    assert not open_checkpoint(out).has_ema
    about, sealed = json.loads((out / "composition.json").read_text())["low"], manifest.read(tmp_path / "low")["files"]
    assert about["averaged"] is True and about["sha256"] == sealed["ema.safetensors"]["sha256"]


def rewrite_as(folder: Path, found: Any) -> None:
    """Give a checkpoint the extra of another one."""
    about = {k: v for k, v in manifest.read(folder).items() if k not in ("files", "sha256")}
    manifest.seal(folder, {**about, "extra": found.extra})


def test_autoencoders_compose_as_well(road: Road, tmp_path: Path) -> None:
    anchor = open_checkpoint(road.autoencoder).path
    low, high = endpoint(anchor, tmp_path / "low", 1), endpoint(anchor, tmp_path / "high", 2)
    out = compose(anchor, low, high, tmp_path / "c", 1.0)
    assert same(load_autoencoder(out).state_dict(), load_autoencoder(high).state_dict())
    with pytest.raises(ValueError, match="Expected dynamics models to roll out, got one of kind 'autoencoder'"):
        CompositeModel(anchor, low, high)


def test_a_composite_says_where_it_comes_from(three: Three, tmp_path: Path) -> None:
    choice = Choice(1.5, "metadata", {"parameter": "viscosity"})
    out = compose(*three, tmp_path / "c", choice)
    about = json.loads((out / "composition.json").read_text())
    with safe_open(out / "model.safetensors", "pt") as file:
        header = json.loads(file.metadata()["composition"])
    assert about == open_checkpoint(out).extra["composition"]
    assert {name: value for name, value in about.items() if name != "relation"} == header
    for role in ("anchor", "low", "high"):
        folder = getattr(three, role)
        assert about[role]["path"] == str((folder / "model.safetensors").resolve())
        assert about[role]["sha256"] == manifest.read(folder)["files"]["model.safetensors"]["sha256"]
    assert about["alpha"] == 1.5 and set(about["versions"]) == {"python", "latentphys", "torch", "safetensors"}
    assert about["found"] == {
        "how": "metadata",
        "range": "extrapolation, 1.5 × as far as the endpoints",
        "parameter": "viscosity",
    }
    assert 0.9 < about["relation"]["cosine_low"] < 1 and about["relation"]["minus"] > 0
    assert "regimes" not in open_checkpoint(out).extra  # it was trained in none


def test_what_is_no_relative_is_refused(road: Road, three: Three, tmp_path: Path) -> None:
    anchor, low, high = three

    def other(name: str, **changed: Any) -> Path:
        path = tmp_path / name
        shutil.copytree(low, path)
        return rewrite(path, **changed)

    def refused(match: str, anchor: Path, low: Path, high: Path) -> None:
        with pytest.raises(ValueError, match=match):
            compose(anchor, low, high, tmp_path / "composite", 0.5)
        assert not list(tmp_path.glob("*composite*"))

    found, tensors = open_checkpoint(low), load_file(low / "model.safetensors")
    config, extra = found.config, found.extra
    kinds = "Expected a checkpoint of kind 'dynamics', as .*, got one of kind 'autoencoder' .*; give an anchor and"
    refused(kinds, anchor, low, road.autoencoder)
    deeper = other("deeper", config={**config, "depth": 3})
    refused("another configuration in .*deeper: depth is 3 and not 2", anchor, deeper, high)
    slower = other("slower", extra={"intervals": {**extra["intervals"], "porous": 1.0}})
    refused(r"another description in .*slower: intervals.porous is 1.0 and not", anchor, low, slower)
    families = other("families", extra={"intervals": {"porous": extra["intervals"]["porous"]}})
    refused(r"families: intervals.open_channel is '\(none\)' and not", anchor, low, families)
    name = "transformer.blocks.0.feed_forward.router.bias_E"
    router = other("router", tensors={**tensors, name: tensors[name] + 1})
    refused("bias_E' equal in .*: the router moved; fine-tune with finetune.freeze_router=true", anchor, router, high)
    scales = other("scales", tensors={**tensors, "latent_std": tensors["latent_std"] * 1.1})
    refused("Expected 'latent_std' equal in .*: buffers and scales do not compose", anchor, low, scales)
    renamed = other("renamed", tensors={("x" if n == "latent_std" else n): v for n, v in tensors.items()})
    refused("got 'latent_std' in .* and not in .*renamed", anchor, renamed, high)
    lora = other("lora", extra={"adaptation": {"adapt": "lora", "rank": 4, "alpha": None}})
    refused(
        r"plain weights in .*lora, got fine-tuned ones .*\(lora\); merge .*finetune.merge_checkpoint", anchor, low, lora
    )
    refused("two endpoints that differ", anchor, low, low)
    shutil.copytree(low, tmp_path / "coded")
    codes = load_file(tmp_path / "coded" / "autoencoder" / "model.safetensors")
    rewrite(tmp_path / "coded" / "autoencoder", {n: v * 1.01 if v.is_floating_point() else v for n, v in codes.items()})
    rewrite(tmp_path / "coded")
    refused("Expected the autoencoder of .* in .*coded, got another one", anchor, tmp_path / "coded", high)
    torch.manual_seed(1)
    strangers = {
        n: torch.randn_like(v) if v.ndim > 1 and v.shape[1] > 1 and ".router." not in n else v
        for n, v in tensors.items()
    }
    refused("stranger.* to be fine-tuned from .*below 0.25", anchor, low, other("stranger", tensors=strangers))


def test_a_path_that_is_taken_is_refused_or_replaced(three: Three, tmp_path: Path) -> None:
    out = compose(*three, tmp_path / "c", 0.5)
    with pytest.raises(ValueError, match="Expected a path that is free, got .*c, which exists; pass --overwrite"):
        compose(*three, out, 0.6)
    assert json.loads((out / "composition.json").read_text())["alpha"] == 0.5
    compose(*three, out, 0.6, overwrite=True)
    assert open_checkpoint(out).extra["composition"]["alpha"] == 0.6
    (tmp_path / "letters").mkdir()
    with pytest.raises(ValueError, match="Expected a checkpoint to replace, got .*letters, which is none"):
        compose(*three, tmp_path / "letters", 0.5, overwrite=True)
    for taken in (three.low, three.low.parent):
        with pytest.raises(ValueError, match="Expected another path than that of .*low"):
            compose(*three, taken, 0.5, overwrite=True)


def test_nothing_is_left_of_a_composition_that_fails(
    three: Three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = compose(*three, tmp_path / "c", 0.5)

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "seal", fails)
    for path in (tmp_path / "new", out):
        with pytest.raises(KeyboardInterrupt):
            compose(*three, path, 0.6, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert open_checkpoint(out).extra["composition"]["alpha"] == 0.5
