"""Training lowers losses, checkpoints give back every bit, and what cannot be trained is refused in one sentence."""

import json
import math
import re
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import zarr
from safetensors.torch import load_file
from small import NUM_TRAJECTORIES, Road, configuration, train

import latentphys
from latentphys.data import Batch, open_store
from latentphys.data.relayout import relayout
from latentphys.training import (
    Trainer,
    encode_store,
    load_autoencoder,
    load_dynamics,
    manifest,
    open_checkpoint,
    train_autoencoder,
    train_dynamics,
)
from latentphys.training.loop import Loop, _seed
from latentphys.training.models import build
from latentphys.training.tasks import DynamicsTask, Output

KINDS = ("autoencoder", "dynamics")


def copied(path: Path, folder: Path) -> Path:
    return Path(shutil.copytree(path, folder / path.name))


def describe(folder: Path, config: dict[str, Any]) -> None:
    """Let a checkpoint say, with a checksum that is right, that its model has another configuration."""
    data = {key: value for key, value in manifest.read(folder).items() if key != "sha256"}
    manifest.seal(folder, {**data, "config": config})


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "ratio"), [("autoencoder", 0.96), ("dynamics", 0.7)])
def test_the_loss_falls(road: Road, tmp_path: Path, kind: str, ratio: float) -> None:
    settings = ["trainer.num_steps=25", "trainer.batch_size=4", "trainer.learning_rate=4e-3", "trainer.log_every=5"]
    noise = "autoencoder.bottleneck.noise=0" if kind == "autoencoder" else "dynamics_training.input_noise=0"
    train(kind, road.inputs(kind)[:1], tmp_path / "run", *settings, noise)
    losses = [line["loss"] for line in log(tmp_path / "run") if "loss" in line]
    assert len(losses) == 5
    assert losses[-1] < ratio * losses[0]


def test_an_untrained_dynamics_model_is_persistence_with_loss_one(road: Road) -> None:
    """The scales of latents and increments: every channel has unit variance and unit increments over the families."""
    dynamics, _ = load_dynamics(road.dynamics)
    latents = [open_store(path) for path in road.latents.values()]
    x = torch.stack(
        [torch.stack([s.read("latent", i, slice(None)) for i in range(NUM_TRAJECTORIES - 1)]) for s in latents]
    )
    increments = (x[:, :, 1:] - x[:, :, :-1]) / dynamics.increment_std
    scaled = (x - dynamics.latent_mean) / dynamics.latent_std
    axes = (0, 1, 2, 4, 5, 6)
    torch.testing.assert_close(increments.square().mean(axes), torch.ones(8), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(scaled.mean(axes), torch.zeros(8), rtol=0.0, atol=1e-4)
    torch.testing.assert_close(scaled.square().mean(axes), torch.ones(8), rtol=1e-4, atol=0.0)


def test_the_log_has_losses_and_held_out_figures(road: Road) -> None:
    for kind, figure in (("autoencoder", "vrmse"), ("dynamics", "latent_mse")):
        lines = log(road.autoencoder.parent / kind)
        assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
        tests = [line for line in lines if f"test/open_channel/{figure}" in line]
        assert [line["step"] for line in tests] == [3, 6]
        scores = [mean(line[f"test/{family}/{figure}"] for family in road.fields) for line in tests]
        run = road.autoencoder.parent / kind
        assert open_checkpoint(run).state["best"] == pytest.approx(min(scores))
        assert open_checkpoint(run / "best").step == (3, 6)[scores.index(min(scores))]
        assert all(math.isfinite(value) for line in lines for key, value in line.items() if key != "routing")


def test_every_step_has_its_own_learning_rate_and_random_numbers(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []
    seeds: list[int] = []
    take = Loop._step

    def taking(self: Loop, *given: Any) -> None:
        take(self, *given)
        rates.append([group["lr"] for group in self.optimizer.param_groups])
        seeds.append(torch.initial_seed())

    monkeypatch.setattr(Loop, "_step", taking)
    config = configuration("dynamics", road.inputs("dynamics"), tmp_path / "run", "trainer.log_every=1")
    train_dynamics(config)
    expected = [build(config["trainer"]).learning_rate_at(step) for step in range(6)]
    assert len(set(expected)) > 3 and rates == [[rate] * len(rates[0]) for rate in expected]
    assert [line["lr"] for line in log(tmp_path / "run") if "lr" in line] == expected
    assert seeds == [_seed(0, step, 0) for step in range(6)]
    assert len({_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(8)}) == 1200


def test_held_out_windows_are_tested_without_noise_on_averaged_weights(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that hardly move are persistence still: its error is known of every window, each step from the last."""
    modes: set[tuple[bool, int]] = set()
    averaged: list[bool] = []
    forward, test = DynamicsTask.forward, Loop.test

    def seeing(self: DynamicsTask, batch: Batch) -> Output:
        output = forward(self, batch)
        modes.update((self.training, trajectory) for trajectory in batch.trajectories.tolist())
        if not self.training:
            errors = (batch.values[:, 1:] - batch.values[:, :1]) / self.dynamics.increment_std
            torch.testing.assert_close(next(iter(output.figures.values())), errors.square().mean())
            assert set(output.figures) == {f"{self.stores()[batch.store].family}/latent_mse"}
        return output

    def testing(self: Loop) -> dict[str, float]:
        assert self.average is not None
        weights = self.task.model().state_dict()
        averaged.append(all(torch.equal(weights[name], x) for name, x in self.average.tensors().items()))
        return test(self)

    monkeypatch.setattr(DynamicsTask, "forward", seeing)
    monkeypatch.setattr(Loop, "test", testing)
    settings = ["trainer.learning_rate=1e-9", "trainer.ema=0.9", "trainer.batch_size=4"]
    noise = ["dynamics_training.unroll=2", "dynamics_training.input_noise=0.5"]
    train("dynamics", road.inputs("dynamics"), tmp_path / "run", *settings, *noise)
    assert modes == {(True, 0), (True, 1), (True, 2), (False, 3)} and averaged == [True, True]


def test_checkpoints_give_back_every_bit(road: Road) -> None:
    for run, model in (
        (road.autoencoder, load_autoencoder(road.autoencoder)),
        (road.dynamics, load_dynamics(road.dynamics)[0]),
    ):
        last = open_checkpoint(run)
        assert (last.step, last.path.name) == (6, "step-000006")
        best = json.loads((run / "best.json").read_text())["checkpoint"]
        assert sorted(p.name for p in run.glob("step-*")) == sorted({best, "step-000004", "step-000006"})
        stored, state = load_file(last.path / "model.safetensors"), model.state_dict()
        assert not model.training
        assert set(stored) == set(state) and all(torch.equal(stored[name], state[name]) for name in stored)
        by_step = load_autoencoder(last.path) if run == road.autoencoder else load_dynamics(last.path)[0]
        assert all(torch.equal(by_step.state_dict()[name], state[name]) for name in state)
    inside, outside = load_dynamics(road.dynamics)[1], load_autoencoder(road.autoencoder)
    assert all(
        torch.equal(a, b) for a, b in zip(inside.state_dict().values(), outside.state_dict().values(), strict=True)
    )
    flux = road.store("porous").read("velocity", 0, slice(0, 1))
    where = road.store("porous").geometry(0)
    assert torch.equal(inside.encode(flux, where, "porous"), outside.encode(flux, where, "porous"))
    biases = [name for name in load_file(open_checkpoint(road.dynamics).path / "model.safetensors") if "bias_E" in name]
    assert len(biases) == 2


@pytest.mark.parametrize("target", ["os.system", "subprocess.Popen", "latentphys.demo.shutil.rmtree", "no.such.Thing"])
def test_a_checkpoint_cannot_call_what_is_no_network(road: Road, tmp_path: Path, target: str) -> None:
    folder = copied(open_checkpoint(road.autoencoder).path, tmp_path)
    good = manifest.read(folder)["config"]
    for config in ({**good, "_target_": target}, {**good, "heads": {"_target_": target}}):
        describe(folder, config)
        with pytest.raises(ValueError, match=f"network modules that can be imported in .*, got {target}"):
            load_autoencoder(folder)


def test_weights_of_another_architecture_are_refused(road: Road, tmp_path: Path) -> None:
    run = copied(road.autoencoder, tmp_path)
    folder = open_checkpoint(run).path
    describe(folder, {**manifest.read(folder)["config"], "widths": [8, 32]})
    with pytest.raises(
        ValueError, match="weights that fit the model described in .*step-000006, got others: size mismatch"
    ):
        load_autoencoder(folder)
    with pytest.raises(ValueError, match="Expected the data that .* was trained on, .*; choose another run="):
        train("dynamics", road.inputs("dynamics"), run, "trainer.num_steps=8")


def test_nothing_is_pickled() -> None:
    package = Path(latentphys.__file__).parent
    sources = [
        *package.rglob("*.py"),
        *(p for name in ("autoencoders", "routers") for p in (package / name).glob("*.py")),
    ]
    assert len(sources) > 40
    unsafe = re.compile(
        r"torch\.(load|save)\(|import pickle|\bpickle\.(load|dump)|joblib|allow_pickle=True|weights_only"
    )
    assert not [source for source in sources if unsafe.search(source.read_text())]


def test_stores_that_cannot_be_trained_on_are_refused(road: Road, tmp_path: Path) -> None:
    fields, latents, run = road.inputs("autoencoder"), road.inputs("dynamics"), tmp_path / "run"
    for kind, paths in (("autoencoder", fields), ("dynamics", latents)):
        with pytest.raises(ValueError, match="one store per family, got 2 of 'open_channel'"):
            train(kind, [paths[0], paths[1], paths[0]], run)
        with pytest.raises(ValueError, match="Expected a store at .*nowhere.zarr, got nothing there"):
            train(kind, [paths[0], tmp_path / "nowhere.zarr"], run)
        with pytest.raises(ValueError, match="at least one store to train on, got none"):
            train(kind, [], run)
        with pytest.raises(ValueError, match="a batch of at most 1[58], the windows of"):
            train(kind, paths, run, "trainer.batch_size=20")
    with pytest.raises(ValueError, match=r"fields of a flow in .*latent.zarr, got \['latent'\]"):
        train("autoencoder", latents, run)
    with pytest.raises(ValueError, match="a latent store, got .*make one with `latentphys encode`"):
        train("dynamics", fields, run)
    with pytest.raises(ValueError, match="divisible by the compression of 32"):
        train("autoencoder", fields, run, "autoencoder.widths=[8,8,8,8,8]", "autoencoder.num_blocks=[1,1,1,1,1]")
    for settings in ("stride=0", "stride=6", "unroll=0"):
        with pytest.raises(ValueError, match="unroll ≥ 1 and a stride from 1 to 5 for"):
            train("dynamics", latents, run, f"dynamics_training.{settings}")
    with pytest.raises(ValueError, match="at least 9 snapshots for windows of 9"):
        train("dynamics", latents, run, "dynamics_training.unroll=8")
    assert not run.exists()


def test_velocities_in_cells_are_not_taken_for_fluxes(road: Road, tmp_path: Path) -> None:
    cells = relayout(road.store("open_channel"), tmp_path / "cells.zarr", "cell_centred")
    with pytest.raises(ValueError, match=r"Expected face fluxes of the velocity in .*, got a vector in cells"):
        train("autoencoder", [cells], tmp_path / "run")


def test_latents_of_two_autoencoders_are_refused(road: Road, tmp_path: Path) -> None:
    other = train("autoencoder", road.inputs("autoencoder"), tmp_path / "other", "trainer.num_steps=1")
    path = encode_store(
        load_autoencoder(other), road.store("porous"), tmp_path / "p.zarr", checkpoint=str(other.parent)
    )
    assert open_store(path).attributes["checkpoint"] == str(other.resolve())
    with pytest.raises(ValueError, match="latents of one autoencoder, got those of .*step-00000[16], .*step-00000[16]"):
        train("dynamics", [road.latents["open_channel"], path], tmp_path / "run")


def test_latents_of_fields_that_have_changed_are_refused(road: Road, tmp_path: Path) -> None:
    latent = copied(road.latents["open_channel"], tmp_path)
    zarr.open_group(str(latent), mode="r+").attrs["source"] = str(road.fields["porous"])
    with pytest.raises(ValueError, match="to hold the latents of .*porous.zarr, got others; encode it again"):
        train("dynamics", [latent], tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["num_steps", "batch_size", "log_every", "test_every", "checkpoint_every", "test_batches"]
)
def test_a_trainer_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"Expected {name} ≥ 1, got 0"):
        Trainer(**{"num_steps": 1, "batch_size": 1, name: 0})  # type: ignore[arg-type]


def test_settings_that_a_class_does_not_take_are_refused(road: Road, tmp_path: Path) -> None:
    config = configuration("autoencoder", road.inputs("autoencoder"), tmp_path / "run")
    config["trainer"]["tempo"] = 3
    with pytest.raises(ValueError, match="settings that latentphys.training.Trainer takes: .*'tempo'"):
        train_autoencoder(config)
    config = configuration("dynamics", road.inputs("dynamics"), tmp_path / "run")
    config["dynamics"]["router"]["num_experts"] = 0
    with pytest.raises(ValueError, match="Expected at least 1 expert, got num_experts = 0"):
        train_dynamics(config)
