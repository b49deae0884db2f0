"""A model of one family learns another: what it knew keeps its bits where it should, and a checkpoint has all of it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from safetensors.torch import load_file
from small import Road, train
from torch import Tensor

from latentphys.autoencoders import Autoencoder
from latentphys.data import Store, open_store
from latentphys.rollout import rollout_store
from latentphys.training import checkpoint, encode_store, load_autoencoder, load_dynamics, open_checkpoint
from latentphys.training.finetune import FineTuning, merge_checkpoint, prepare, prepare_autoencoder, save_autoencoder
from latentphys.training.lora import LowRank
from latentphys.training.models import autoencoder_extra, new_dynamics
from latentphys.transformer.conditioning import (
    Conditioning,
    Parameter,
    WidenedLinear,
    latent_geometry,
    store_parameters,
)
from latentphys.transformer.dynamics import Dynamics

TRAIN = [0, 1, 2]
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapt": "lora", "rank": 4},
    "experts": {"adapt": "experts", "new_experts": 2},
}
ROUTERS = {"top1": [], "top2": ["router=topk", "router.top_k=2"]}


@dataclass
class OneFamily:
    """Models that were trained on the channel alone, and the latents of another family that they never saw."""

    fields: dict[str, Store]
    autoencoder: Path
    extended: Path
    latents: dict[str, Store]
    dynamics: dict[str, Path]

    def prepare(self, way: str = "full", router: str = "top1", **settings: Any) -> tuple[Dynamics, Autoencoder, dict]:
        tuning = FineTuning(self.dynamics[router], **{**WAYS[way], **settings})
        torch.manual_seed(0)
        return self.tuned(tuning, ["porous"])

    def tuned(self, tuning: FineTuning, families: list[str]) -> tuple[Dynamics, Autoencoder, dict]:
        stores, sources = ([group[name] for name in families] for group in (self.latents, self.fields))
        intervals = {store.family: float(store.times[1] - store.times[0]) for store in stores}
        model = load_autoencoder(self.extended)
        return prepare(tuning, model, stores, sources, [TRAIN] * len(stores), intervals)

    def samples(self, dynamics: Dynamics, family: str) -> tuple[list[Tensor], Tensor]:
        """All steps of the training trajectories: what the model is given, and what comes next."""
        latent, source = self.latents[family], self.fields[family]
        frames = torch.stack([latent.read("latent", i, slice(None)) for i in TRAIN]).float()
        steps = range(latent.num_times - 1)
        vector, interval = dynamics.conditioning.vector, dynamics.interval(family)
        conditions = [
            vector(store_parameters(source, i, t), store_parameters(source, i, t + 1), interval)
            for i in TRAIN
            for t in steps
        ]
        geometry = torch.cat([latent_geometry(source.geometry(i), 4).float() for i in TRAIN])
        now, then = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)
        return [now[:, None], torch.stack(conditions), geometry.repeat_interleave(len(steps), 0)], then

    def step(self, dynamics: Dynamics, family: str) -> Tensor:
        given, _ = self.samples(dynamics, family)
        return dynamics(*given, self.fields[family].grid.periodic, family).latent


@pytest.fixture(scope="module")
def one(road: Road, tmp_path_factory: pytest.TempPathFactory) -> OneFamily:
    folder = tmp_path_factory.mktemp("one")
    fields = {name: road.store(name) for name in ("open_channel", "porous")}
    autoencoder = train("autoencoder", [road.fields["open_channel"]], folder / "autoencoder")
    model, config = prepare_autoencoder(FineTuning(autoencoder, "scales"), [fields["porous"]], [TRAIN])
    extended = save_autoencoder(folder / "extended", model, config)
    paths = {name: folder / f"{name}.latent.zarr" for name in fields}
    # The old family's latents are those of before; the new one's are of the extended autoencoder.
    for name, source in (("open_channel", autoencoder), ("porous", extended)):
        encode_store(load_autoencoder(source), fields[name], paths[name], checkpoint=str(source))
    settings = ["trainer.num_steps=10", "trainer.learning_rate=4e-3"]
    dynamics = {
        router: train("dynamics", [paths["open_channel"]], folder / router, *settings, *chosen)
        for router, chosen in ROUTERS.items()
    }
    return OneFamily(fields, autoencoder, extended, {n: open_store(p) for n, p in paths.items()}, dynamics)


def optimise(one: OneFamily, dynamics: Dynamics, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses, periodic = [], one.fields["porous"].grid.periodic
    given, then = one.samples(dynamics, "porous")
    for _ in range(steps):
        step = dynamics(*given, periodic, "porous")
        loss = ((step.latent - then) / dynamics.increment_std).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dynamics.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def new_optimizer(dynamics: Dynamics) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in dynamics.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def save(
    one: OneFamily, path: Path, dynamics: Dynamics, autoencoder: Autoencoder, config: dict, optimizer: Any = None
) -> None:
    """As the training task does."""
    part = open_checkpoint(one.autoencoder).config
    checkpoint.save(
        path,
        kind="dynamics",
        model=dynamics,
        config=config,
        extra={**dynamics.to_dict(), "latent_channels": autoencoder.latent_channels},
        step=1,
        optimizer=optimizer,
        parts=lambda folder: checkpoint.save(
            folder / "autoencoder",
            kind="autoencoder",
            model=autoencoder,
            config=part,
            extra=autoencoder_extra(autoencoder),
            step=0,
        ),
    )


@torch.no_grad()
def same_step(one: OneFamily, dynamics: Dynamics, router: str, family: str = "open_channel") -> bool:
    """Whether a model steps as the pretrained one, with the same weights frozen: that alone can change rounding."""
    before = load_dynamics(one.dynamics[router])[0]
    frozen = {name for name, p in dynamics.named_parameters() if not p.requires_grad}
    for name, parameter in before.named_parameters():
        path, _, key = name.rpartition(".")
        parameter.requires_grad_(not frozen & {name, f"{path}.parametrizations.{key}.original", f"{path}.inner.{key}"})
    return torch.equal(one.step(before, family), one.step(dynamics, family))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("way", WAYS)
def test_before_training_the_old_family_gets_the_same_bits(one: OneFamily, way: str, router: str) -> None:
    before = load_dynamics(one.dynamics[router])[0]
    dynamics, autoencoder, _ = one.prepare(way, router)
    assert dynamics.intervals == {**before.intervals, "porous": one.latents["porous"].times[1]}
    assert set(autoencoder.scales) == {"open_channel", "porous"}
    a, b = (one.samples(model, "open_channel")[0][1] for model in (before, dynamics))
    assert b.shape[1] == a.shape[1] + 1  # the porosity, which the channel does not have
    assert torch.equal(a, b[:, :-1]) and not b[:, -1].any()
    assert one.samples(dynamics, "porous")[0][1][:, -1].any()
    assert same_step(one, dynamics, router)
    for name in ("latent_mean", "latent_std", "increment_std"):
        assert torch.equal(getattr(dynamics, name), getattr(before, name))


@pytest.mark.parametrize("router", ROUTERS)
def test_after_training_new_experts_the_old_family_gets_the_same_bits(
    one: OneFamily, router: str, tmp_path: Path
) -> None:
    """In memory, from the checkpoint, and in a rollout; the new family's outputs are others."""
    dynamics, autoencoder, config = one.prepare("experts", router)
    start = one.step(dynamics, "porous")
    optimise(one, dynamics, new_optimizer(dynamics), 5)
    assert same_step(one, dynamics, router)
    assert not torch.equal(one.step(dynamics, "porous"), start)
    save(one, tmp_path / "tuned", dynamics, autoencoder, config)
    loaded, both = load_dynamics(tmp_path / "tuned")
    assert same_step(one, loaded, router)
    plain, alone = load_dynamics(one.dynamics[router])
    fluxes = []
    for name, model, decoder in (("before", plain, alone), ("after", loaded, both)):
        path = rollout_store(decoder, model, one.fields["open_channel"], tmp_path / name, num_steps=2, trajectories=[3])
        fluxes.append(open_store(path).read("velocity", 0, slice(None)))
    assert torch.equal(*fluxes)
    rollout_store(both, loaded, one.fields["porous"], tmp_path / "new", num_steps=2, trajectories=[3])


def test_what_trains(one: OneFamily) -> None:
    new_condition = "transformer.embed_condition.0.added.weight"
    for freeze in (True, False):
        full = one.prepare("full", freeze_router=freeze)[0]
        frozen = {name for name, p in full.named_parameters() if not p.requires_grad}
        routing = {name for name, _ in full.named_parameters() if ".router." in name}
        assert len(routing) == 2 * 3 and frozen == (routing if freeze else set())
        assert [r.num_frozen for r in full.transformer.routers()] == [4 * freeze] * 2
        low = one.prepare("lora", freeze_router=freeze, alpha=2.0)[0]
        trained = {name for name, p in low.named_parameters() if p.requires_grad}
        rest = {name for name in trained if not name.endswith((".a", ".b"))}
        assert rest == {new_condition} | (set() if freeze else routing)
        assert {module.scale for module in low.modules() if isinstance(module, LowRank)} == {2.0 / 4}
    grown = one.prepare("experts")[0]
    trained = {name for name, p in grown.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 + 1 and all(name.endswith(".new") or name == new_condition for name in trained)
    assert [(r.num_frozen, r.num_experts) for r in grown.transformer.routers()] == [(4, 6)] * 2


def test_every_way_learns_the_new_family(one: OneFamily) -> None:
    """Equal steps on the same windows; none of it says which way is the best."""
    found = {}
    for way in WAYS:
        dynamics, _, _ = one.prepare(way)
        found[way] = optimise(one, dynamics, new_optimizer(dynamics), 15)
    pretrained = open_checkpoint(one.dynamics["top1"])
    conditioning = Conditioning.fit([one.fields["porous"]], [TRAIN])
    torch.manual_seed(0)
    scratch = new_dynamics(pretrained.config, 8, conditioning, {"porous": dynamics.intervals["porous"]})
    scratch.load_state_dict(
        {n: t for n, t in dynamics.state_dict().items() if n.endswith(("mean", "_std"))}, strict=False
    )
    found["scratch"] = optimise(one, scratch, new_optimizer(scratch), 15)
    for way, losses in found.items():
        print(f"{way:8} {losses[0]:.3f} → {losses[-1]:.3f}")
        assert losses[-1] < 0.9 * losses[0], way


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_stopped_goes_on_to_the_same_bits(one: OneFamily, tmp_path: Path, way: str) -> None:
    """Prepared anew, then given the checkpoint's weights and moments."""
    dynamics, autoencoder, config = one.prepare(way)
    optimizer = new_optimizer(dynamics)
    optimise(one, dynamics, optimizer, 2)
    save(one, tmp_path / "half", dynamics, autoencoder, config, optimizer)
    optimise(one, dynamics, optimizer, 2)
    torch.manual_seed(5)
    resumed, _, _ = one.tuned(FineTuning(one.dynamics["top1"], **WAYS[way]), ["porous"])
    again, found = new_optimizer(resumed), open_checkpoint(tmp_path / "half")
    found.load_into(resumed)
    checkpoint.load_optimizer(found.path, again, resumed)
    optimise(one, resumed, again, 2)
    state = resumed.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in dynamics.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_says_all_of_itself_and_merges_to_a_plain_one(one: OneFamily, tmp_path: Path, way: str) -> None:
    dynamics, autoencoder, config = one.prepare(way)
    optimise(one, dynamics, new_optimizer(dynamics), 3)
    save(one, tmp_path / "tuned", dynamics, autoencoder, config)
    loaded, _ = load_dynamics(tmp_path / "tuned")
    assert loaded.adaptation is None and not any("parametrizations" in name for name in loaded.state_dict())
    with torch.no_grad():
        tuned, merged = one.step(dynamics, "porous"), one.step(loaded, "porous")
        torch.testing.assert_close(merged, tuned, rtol=1e-5, atol=1e-5)
    plain = merge_checkpoint(tmp_path / "tuned", tmp_path / "plain")
    assert "adaptation" not in open_checkpoint(plain).extra
    assert open_checkpoint(plain).step == open_checkpoint(tmp_path / "tuned").step == 1
    assert set(load_dynamics(plain)[1].scales) == {"open_channel", "porous"}
    assert set(load_file(plain / "model.safetensors")) == set(loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(one.step(load_dynamics(plain)[0], "porous"), merged)
        lazy, _ = load_dynamics(plain, max_resident_experts=6)
        torch.testing.assert_close(one.step(lazy, "porous"), merged, rtol=1e-5, atol=1e-5)
    if way != "full":
        with pytest.raises(ValueError, match="a plain checkpoint to read experts from, .*finetune.merge_checkpoint"):
            load_dynamics(tmp_path / "tuned", max_resident_experts=2)
    with pytest.raises(ValueError, match="a path that is free, got .*plain, which exists"):
        merge_checkpoint(tmp_path / "tuned", plain)


def test_a_tuned_model_can_be_tuned_again(one: OneFamily, tmp_path: Path) -> None:
    """A low-rank update of a model that has grown; the channel still may not choose the porous experts."""
    dynamics, autoencoder, config = one.prepare("experts")
    optimise(one, dynamics, new_optimizer(dynamics), 2)
    save(one, tmp_path / "tuned", dynamics, autoencoder, config)
    second, _, config = one.tuned(FineTuning(tmp_path / "tuned", "lora", rank=2), ["open_channel", "porous"])
    assert config["router"]["num_experts"] == 6 and second.experts == {"open_channel": 4}
    assert len(second.conditioning.added) == 1 and same_step(one, second, "top1")
    optimise(one, second, new_optimizer(second), 1)
    save(one, tmp_path / "second", second, autoencoder, config)
    assert load_dynamics(tmp_path / "second")[0].experts == {"open_channel": 4}


def test_a_third_family_gets_experts_that_neither_of_the_others_may_choose(one: OneFamily, tmp_path: Path) -> None:
    dynamics, autoencoder, config = one.prepare("experts")
    optimise(one, dynamics, new_optimizer(dynamics), 2)
    save(one, tmp_path / "tuned", dynamics, autoencoder, config)
    latents, fields = (open_store(group["porous"].path) for group in (one.latents, one.fields))
    latents.family = fields.family = "third"
    tuning, interval = FineTuning(tmp_path / "tuned", **WAYS["experts"]), {"third": dynamics.interval("porous")}
    grown, _, _ = prepare(tuning, load_autoencoder(one.extended), [latents], [fields], [TRAIN], interval)
    assert grown.experts == {"open_channel": 4, "porous": 6}
    assert [router.num_experts for router in grown.transformer.routers()] == [8] * 2
    before = load_dynamics(tmp_path / "tuned")[0].requires_grad_(False)
    for family in ("open_channel", "porous"):
        assert torch.equal(one.step(grown.requires_grad_(False), family), one.step(before, family))


def test_the_copied_experts_are_those_that_the_new_family_uses_most(one: OneFamily, tmp_path: Path) -> None:
    """A router whose bias sends nearly everything to experts 2 and 1."""
    before, autoencoder = load_dynamics(one.dynamics["top1"])
    for router in before.transformer.routers():
        router.bias_E.copy_(torch.tensor([0.0, 2.0, 2.1, 0.0]))
    biased = tmp_path / "biased"
    save(one, biased, before, autoencoder, open_checkpoint(one.dynamics["top1"]).config)
    dynamics, _, _ = one.tuned(FineTuning(biased, **WAYS["experts"]), ["porous"])
    for old, block in zip(before.transformer.blocks, dynamics.transformer.blocks, strict=True):
        now, kept = (each.get_submodule("feed_forward.experts").w_in_EDG for each in (block, old))
        assert isinstance(now, Tensor) and isinstance(kept, Tensor)
        assert torch.equal(now[:4], kept)
        nearest = (now[4:, None] - kept[None]).square().mean((2, 3)).argmin(1)
        assert sorted(nearest.tolist()) == [1, 2]


def test_an_autoencoder_gets_scales_of_families_it_never_saw(one: OneFamily, tmp_path: Path) -> None:
    before, after = load_autoencoder(one.autoencoder), load_autoencoder(one.extended)
    assert list(before.scales) == ["open_channel"] and set(after.scales) == {"open_channel", "porous"}
    assert after.scales["open_channel"].to_dict() == before.scales["open_channel"].to_dict()
    assert all(torch.equal(t, before.state_dict()[n]) for n, t in after.state_dict().items())
    store = one.fields["open_channel"]
    flux, where = store.read("velocity", 0, slice(0, 2)), store.geometry(0)
    assert torch.equal(before.encode(flux, where, "open_channel"), after.encode(flux, where, "open_channel"))
    porous = one.fields["porous"]
    scale, squares = after.scale("porous"), []
    for i in TRAIN:
        u = scale.normalise(porous.read("velocity", i, slice(None)), porous.grid)
        squares.append(u[:, porous.geometry(i).open_faces].square().flatten())
    assert torch.cat(squares).mean().item() == pytest.approx(1.0, rel=1e-3)
    # Full: everything trains; the scales that are known are not measured again.
    model, config = prepare_autoencoder(FineTuning(one.extended), [porous], [[0]])
    assert all(p.requires_grad for p in model.parameters()) and config == open_checkpoint(one.autoencoder).config
    assert model.scale("porous").to_dict() == after.scale("porous").to_dict()
    # The autoencoder inside a dynamics checkpoint will do.
    inside, _ = prepare_autoencoder(FineTuning(one.dynamics["top1"], "scales"), [porous], [TRAIN])
    assert inside.scale("porous").to_dict() == after.scale("porous").to_dict()
    given = {"porous": after.scale("porous"), "open_channel": after.scale("porous")}
    model, _ = prepare_autoencoder(FineTuning(one.autoencoder), [porous], [TRAIN], given)
    assert model.scale("porous") is given["porous"]
    assert model.scale("open_channel").to_dict() == before.scale("open_channel").to_dict()
    # A dynamics model keeps the scales of its families where the new latents' autoencoder has none of them.
    alone = load_autoencoder(one.extended)
    del alone.scales["open_channel"]
    interval = {"porous": float(porous.times[1])}
    _, both, _ = prepare(FineTuning(one.dynamics["top1"]), alone, [one.latents["porous"]], [porous], [TRAIN], interval)
    assert {name: scale.to_dict() for name, scale in both.scales.items()} == {
        name: scale.to_dict() for name, scale in after.scales.items()
    }


def test_what_does_not_fit_is_refused(one: OneFamily, road: Road, tmp_path: Path) -> None:
    for settings, message in (
        ({"adapt": "adapter"}, r"Expected adapt = experts \| full \| lora \| scales, got 'adapter'"),
        (
            {"adapt": "lora", "new_experts": 2},
            "new_experts ≥ 1 with adapt = experts and 0 without, got 2 with adapt = l",
        ),
        ({"adapt": "experts"}, "new_experts ≥ 1 with adapt = experts and 0 without, got 0 with adapt = experts"),
        ({"new_experts": -1}, "new_experts ≥ 1 with adapt = experts and 0 without, got -1"),
        ({"adapt": "experts", "new_experts": 1, "freeze_router": False}, "freeze_router = true with adapt = experts"),
    ):
        with pytest.raises(ValueError, match=message):
            FineTuning(one.dynamics["top1"], **settings)
    with pytest.raises(
        ValueError, match=r"adapt = full \| lora \| experts for a model of kind 'dynamics', got 'scales'"
    ):
        one.tuned(FineTuning(one.dynamics["top1"], "scales"), ["porous"])
    with pytest.raises(ValueError, match=r"adapt = full \| scales for a model of kind 'autoencoder', got 'lora'"):
        prepare_autoencoder(FineTuning(one.autoencoder, "lora"), [], [])
    with pytest.raises(ValueError, match="a rank from 1 to 31 for weights of .*, got 32"):
        one.prepare("lora", rank=32)
    with pytest.raises(ValueError, match="a checkpoint of kind 'dynamics', got one of kind 'autoencoder'"):
        one.tuned(FineTuning(one.autoencoder), ["porous"])
    with pytest.raises(ValueError, match="only new families to train new experts on, got 'open_channel'"):
        one.tuned(FineTuning(one.dynamics["top1"], **WAYS["experts"]), ["porous", "open_channel"])
    stores, sources = [one.latents["porous"]], [one.fields["porous"]]
    tuning, other = FineTuning(one.dynamics["top1"]), load_autoencoder(one.extended)
    with pytest.raises(ValueError, match="latents of the autoencoder of .*, got those of one with other weights"):
        prepare(tuning, load_autoencoder(road.autoencoder), stores, sources, [TRAIN], {})
    other.scales["open_channel"] = other.scales["porous"]
    with pytest.raises(ValueError, match="the scale of family 'open_channel' in the autoencoder of .*, got another"):
        prepare(tuning, other, stores, sources, [TRAIN], {})
    stores, sources = [one.latents["open_channel"]], [one.fields["open_channel"]]
    model = load_autoencoder(one.extended)
    known = load_dynamics(one.dynamics["top1"])[0].interval("open_channel")
    for interval in (3.0, known * 1.001):
        message = f"interval of .* s that the model knows for family 'open_channel', got {interval:g} s"
        with pytest.raises(ValueError, match=message):
            prepare(tuning, model, stores, sources, [TRAIN], {"open_channel": interval})


def test_parameters_that_cannot_enter_as_they_did_are_refused(one: OneFamily, tmp_path: Path) -> None:
    known = Conditioning.fit([one.fields["open_channel"]])
    damaged = Path(shutil.copytree(one.fields["porous"].path, tmp_path / "porous.zarr"))
    assert known.extended([one.fields["open_channel"]]) == known
    wider = known.extended([one.fields["porous"]])
    assert wider.added == [1] and wider.first_channels == known.num_channels == wider.num_channels - 1
    assert wider.parameters[:-1] == known.parameters and wider.parameters[-1].name == "porosity"
    assert Conditioning.from_dict(json.loads(json.dumps(wider.to_dict()))) == wider
    zarr.open_array(str(damaged / "parameters" / "viscosity"), mode="r+")[0] = -1.0
    with pytest.raises(ValueError, match="a positive parameter 'viscosity', as the model knows it, got -1 in .*porous"):
        known.extended([open_store(damaged)])
    constant = Conditioning([Parameter("force", 3, False, False, [0.0] * 3, [1.0] * 3)])
    with pytest.raises(ValueError, match="'force' of size 3, constant, as the model knows it, got size 3, changing in"):
        constant.extended([one.fields["porous"]])


def test_a_router_of_functions_cannot_take_new_parameters(one: OneFamily, tmp_path: Path) -> None:
    channel = one.latents["open_channel"].path
    run = tmp_path / "function"
    path = train("dynamics", [channel], run, "dynamics.routing=function", "trainer.num_steps=1")
    with pytest.raises(
        ValueError, match="only parameters that the model knows where routing = function.*got 1 new num"
    ):
        one.tuned(FineTuning(path), ["porous"])
    one.tuned(FineTuning(path), ["open_channel"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_new_numbers_that_are_zero_leave_every_bit_of_a_linear_map(dtype: torch.dtype) -> None:
    """One product over all of them would not: it adds up in another order."""
    inner = torch.nn.Linear(5, 32).to(dtype)
    wide = WidenedLinear(inner, 3).to(dtype)
    assert not wide.added.weight.any()
    torch.nn.init.normal_(wide.added.weight)
    for number in range(1, 8):
        x = torch.randn(number, 5, dtype=dtype)
        assert torch.equal(wide(torch.cat([x, torch.zeros(number, 3, dtype=dtype)], 1)), inner(x))
        y = torch.randn(number, 3, dtype=dtype)
        torch.testing.assert_close(
            wide(torch.cat([x, y], 1)) - inner(x), y @ wide.added.weight.mT, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("way", ["lora", "experts"])
def test_the_commands_tune_a_model_and_go_on_with_a_run_that_stopped(one: OneFamily, tmp_path: Path, way: str) -> None:
    """Frozen weights keep every bit, trained ones move, and so does their average; a stop in between changes no bit."""
    settings = [f"finetune.{name}={value}" for name, value in {"checkpoint": one.dynamics["top1"], **WAYS[way]}.items()]
    settings += ["trainer.ema=0.5", "trainer.num_steps=6", "trainer.schedule=constant", "dynamics.dim=48"]
    stores = [one.latents["porous"].path]
    whole = train("dynamics", stores, tmp_path / "whole", *settings)
    train("dynamics", stores, tmp_path / "run", *settings, "trainer.num_steps=3")
    last = train("dynamics", stores, tmp_path / "run", *settings)
    # What the run is of is the checkpoint's model, whatever the presets say.
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dynamics"] == open_checkpoint(last).config
    found = {}
    for name in ("model", "ema", "optimizer"):
        found[name], expected = load_file(last / f"{name}.safetensors"), load_file(whole / f"{name}.safetensors")
        assert set(found[name]) == set(expected) and all(torch.equal(found[name][k], expected[k]) for k in expected)
    before = load_file(open_checkpoint(one.dynamics["top1"]).path / "model.safetensors")
    tuned = {key.rpartition(".parametrizations.")[0] for key in found["model"] if ".parametrizations." in key}
    kept = [key for key in before if key in found["model"] and "bias_E" not in key]
    assert tuned and len(kept) > 20 and all(torch.equal(before[key], found["model"][key]) for key in kept)
    assert any(not torch.equal(found["model"][key], found["ema"][key]) for key in found["model"])
    merged, _ = load_dynamics(last)
    assert {"porous", "open_channel"} <= set(merged.intervals)
    assert_averaged(merged, last)


def assert_averaged(model: torch.nn.Module, path: Path) -> None:
    """Every weight that a model shares with a checkpoint is the averaged one, and not by chance."""
    last, average = (load_file(path / f"{name}.safetensors") for name in ("model", "ema"))
    state = model.state_dict()
    shared = sorted(state.keys() & average.keys())
    assert len(shared) > 10 and all(torch.equal(state[key], average[key]) for key in shared)
    assert any(not torch.equal(last[key], average[key]) for key in shared)


def test_a_model_that_is_loaded_for_use_has_the_averaged_weights(one: OneFamily, tmp_path: Path) -> None:
    """Whole, with experts that are read one at a time, as the start of fine-tuning, and merged."""
    settings = ["trainer.ema=0.5", "trainer.num_steps=3", "trainer.learning_rate=4e-3", "trainer.schedule=constant"]
    autoencoder = train("autoencoder", [one.fields["open_channel"].path], tmp_path / "autoencoder", *settings)
    assert_averaged(load_autoencoder(autoencoder), autoencoder)
    tuned, _ = prepare_autoencoder(FineTuning(autoencoder), [one.fields["porous"]], [TRAIN])
    assert_averaged(tuned, autoencoder)
    path = train("dynamics", [one.latents["open_channel"].path], tmp_path / "dynamics", *settings)
    whole, lazy = load_dynamics(path)[0], load_dynamics(path, max_resident_experts=2)[0]
    merged = load_dynamics(merge_checkpoint(path, tmp_path / "merged"))[0]
    regimes = open_checkpoint(path).extra["regimes"]
    assert regimes and open_checkpoint(tmp_path / "merged").extra["regimes"] == regimes
    for model in (whole, lazy, merged, one.tuned(FineTuning(path), ["porous"])[0]):
        assert_averaged(model, path)
    with torch.no_grad():
        steps = [one.step(model, "open_channel") for model in (whole, lazy)]
        torch.testing.assert_close(*steps, rtol=1e-5, atol=1e-5)
        open_checkpoint(path).load_into(whole)  # the last ones
        assert (one.step(whole, "open_channel") - steps[0]).abs().max() > 1e-3


def test_the_command_adds_scales_to_an_autoencoder(one: OneFamily, tmp_path: Path) -> None:
    settings = [f"finetune.checkpoint={one.autoencoder}", "finetune.adapt=scales"]
    last = train("autoencoder", [one.fields["porous"].path], tmp_path / "run", *settings)
    assert set(load_autoencoder(last).scales) == {"open_channel", "porous"}
    with pytest.raises(ValueError, match=r"Expected adapt = full \| scales for a model of kind 'autoencoder', got"):
        train("autoencoder", [one.fields["porous"].path], tmp_path / "other", settings[0], "finetune.adapt=lora")
