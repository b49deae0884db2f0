"""A checkpoint comes back bit for bit or not at all, and once there is one there is always one."""

import errno
import json
import os
import random
import resource
import select
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small import spoil
from torch import Tensor, nn

from latentphys.training import checkpoint, durable, manifest, open_checkpoint
from latentphys.training.run_directory import RunDirectory
from latentphys.training.sharding import shard

KIND = "autoencoder"


def new_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4, bias=False))
    model.register_buffer("counts", torch.arange(3))
    return model


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(step))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


def save(path: Path, model: nn.Module, step: int = 1, **more: Any) -> None:
    checkpoint.save(path, kind=KIND, model=model, config={"a": 1}, extra={"b": [2.5]}, step=step, **more)


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit, in type and in how tensors lie in memory."""
    assert type(a) is type(b) or isinstance(a, Tensor), (a, b)
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


def soap(parameters: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(parameters, lr=1e-2, precondition_frequency=2)


class Odd(torch.optim.SGD):
    """Keeps everything that an optimiser might."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            group["rounds"] = group.get("rounds", 0) + 1
            group["history"] = (0.1 * group["rounds"], None, torch.tensor(group["rounds"]))
            for p in group["params"]:
                self.state[p]["nested"] = {"half": p.detach().half(), "empty": [], "pair": [None, (p.numel(), "x")]}
                self.state[p]["double"] = p.detach().double() / 3
                self.state[p]["turned"] = p.detach().clone() if p.ndim < 2 else p.detach().clone().T.contiguous().T
                self.state[p]["number"] = 1 / 3
                self.state[p]["flag"] = True
        return result


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adamw foreach amsgrad": lambda p: torch.optim.AdamW(p, foreach=True, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2, history_size=2),
    "odd": lambda p: Odd(p, lr=0.1, momentum=0.9),
    "muon": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=1e-2),
    "soap": soap,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_as_if_it_had_never_stopped(tmp_path: Path, name: str) -> None:
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    model = new_model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for step in range(4):
        take_step(model, optimizer, step)
    save(tmp_path / "step-4", model, optimizer=optimizer)
    again = new_model(seed=1)
    resumed = OPTIMIZERS[name](list(again.parameters()))
    take_step(again, resumed, 9)  # whatever it held is forgotten
    found = open_checkpoint(tmp_path / "step-4")
    found.load_into(again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.load_optimizer(found.path, resumed, again)
    for step in range(4, 7):
        for kept, other in zip(optimizer.param_groups, resumed.param_groups, strict=True):
            assert_same({k: v for k, v in kept.items() if k != "params"}, {k: other[k] for k in kept if k != "params"})
            for p, q in zip(kept["params"], other["params"], strict=True):
                assert_same(dict(optimizer.state[p]), dict(resumed.state[q]))
        assert len(optimizer.state) == len(resumed.state)
        assert_same(dict(model.state_dict()), dict(again.state_dict()))
        take_step(model, optimizer, step)
        take_step(again, resumed, step)
    assert not any(file.suffix in (".pt", ".pkl", ".bin") for file in found.path.iterdir())


def test_settings_of_an_optimizer_are_those_it_was_made_with(tmp_path: Path) -> None:
    """The learning rate follows the step; others are told; one that counts differently has no business here."""
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    take_step(model, optimizer, 0)
    save(tmp_path / "a", model, optimizer=optimizer)
    other = torch.optim.AdamW(model.parameters(), lr=0.2, weight_decay=0.3, foreach=True)
    with pytest.warns(UserWarning, match=r"goes on with other settings: weight_decay: 0.3 \(.* made with 0.1\)\.$"):
        checkpoint.load_optimizer(tmp_path / "a", other, model)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (0.2, 0.3)
    with pytest.raises(ValueError, match="Expected the optimiser of .*, AdamW, got SGD; choose that one"):
        checkpoint.load_optimizer(tmp_path / "a", torch.optim.SGD(model.parameters()), model)
    few = torch.optim.AdamW(model[0].parameters())
    with pytest.raises(
        ValueError, match=r"Expected moments of the optimiser's parameters in .*, got some of '1.weight'"
    ):
        checkpoint.load_optimizer(tmp_path / "a", few, model)
    save(tmp_path / "few", model, optimizer=few)
    with pytest.raises(ValueError, match=r"moments of the optimiser's parameters in .*, got none of '1.weight'"):
        checkpoint.load_optimizer(tmp_path / "few", optimizer, model)
    save(tmp_path / "none", model)
    with pytest.raises(ValueError, match=r"without a readable optimizer\.json"):
        checkpoint.load_optimizer(tmp_path / "none", optimizer, model)


def test_moments_that_a_checkpoint_does_not_have_are_forgotten(tmp_path: Path) -> None:
    model = new_model()
    fresh, used = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(model.parameters())
    save(tmp_path / "a", model, optimizer=fresh)
    take_step(model, used, 0)
    assert used.state
    checkpoint.load_optimizer(tmp_path / "a", used, model)
    assert not used.state


def test_groups_may_be_cut_differently_but_not_counts(tmp_path: Path) -> None:
    model = new_model()
    parameters = list(model.parameters())
    whole = Odd(parameters, lr=0.1)
    take_step(model, whole, 0)
    save(tmp_path / "a", model, optimizer=whole)
    cut = Odd([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1)
    checkpoint.load_optimizer(tmp_path / "a", cut, model)
    assert [group["rounds"] for group in cut.param_groups] == [1, 1]
    cut.param_groups[1]["rounds"] = 5
    save(tmp_path / "b", model, optimizer=cut)
    with pytest.raises(
        ValueError, match="Expected one 'rounds' for the parameters of a group, got several in .*; group"
    ):
        checkpoint.load_optimizer(tmp_path / "b", whole, model)


def test_states_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[next(model.parameters())]["strange"] = object()
    with pytest.raises(
        ValueError, match=r"in an optimiser's state, got a object as '0.weight.strange'; choose another"
    ):
        save(tmp_path / "a", model, optimizer=optimizer)
    foreign = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="Expected an optimiser of the model's parameters, got 1 of another module"):
        save(tmp_path / "a", model, optimizer=foreign)
    for ema in ({"7.weight": torch.zeros(2)}, {"0.weight": torch.zeros(2)}):
        with pytest.raises(ValueError, match=r"averages of the model's weights, got '..weight' of shape \(2,\)"):
            save(tmp_path / "a", model, ema=ema)
    assert not list(tmp_path.iterdir())


def test_averages_and_the_trainers_state_come_back(tmp_path: Path) -> None:
    model, other = new_model(), new_model(1)
    ema = {name: parameter.detach().clone() + 1 / 3 for name, parameter in model.named_parameters()}
    del ema["2.weight"]
    state = {"best": 0.1 + 0.2, "nothing": float("inf"), "skipped": [1, 2], "losses": {"porous": [1e-300, 2 / 3]}}
    save(tmp_path / "a", model, ema=ema, state=state)
    found = open_checkpoint(tmp_path / "a", KIND)
    assert found.has_ema and found.state == state
    assert (found.config, found.extra, found.step) == ({"a": 1}, {"b": [2.5]}, 1)
    assert_same(found.average(), ema)
    found.load_into(other)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    found.load_into(other, ema=True)
    assert_same(dict(other.state_dict()), {**model.state_dict(), **ema})
    save(tmp_path / "b", model)
    plain = open_checkpoint(tmp_path / "b")
    assert not plain.has_ema and plain.state == {}
    assert sorted(file.name for file in plain.path.iterdir()) == ["checkpoint.json", "model.safetensors"]
    plain.load_into(other, ema=True)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    with pytest.raises(ValueError, match="Expected averaged weights in .*, got none; go on without an average"):
        plain.average()


def _distributed(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters())
    take_step(model, optimizer, 0)
    if rank == 0:  # the other rank says nothing: a collective would wait for it, and time out
        save(folder / "step-1", model, optimizer=optimizer, ema=dict(model.named_parameters()))
    dist.barrier()
    sharded = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    with torch.no_grad():
        for n, parameter in enumerate(sharded.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 7 + n)
    shard(sharded)
    optimizer = torch.optim.AdamW(sharded.parameters())
    take_step(sharded, optimizer, rank)
    ema = {name: parameter.detach().clone() + 1 for name, parameter in sharded.named_parameters()}
    save(folder / "step-2", sharded, optimizer=optimizer, ema=ema)
    dist.barrier()
    before = {name: tensor.to_local().clone() for name, tensor in sharded.state_dict().items()}
    found = open_checkpoint(folder / "step-2")
    found.load_into(sharded, ema=True)
    for name, tensor in sharded.state_dict().items():
        assert torch.equal(tensor.to_local(), before[name] + 1)
    checkpoint.load_optimizer(found.path, optimizer, sharded)
    dist.barrier()
    dist.destroy_process_group()


def test_one_rank_saves_what_every_rank_has_and_all_save_what_is_shared(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_distributed, (tmp_path,), 2, start_method="fork")
    model = new_model()
    take_step(model, torch.optim.AdamW(model.parameters()), 0)
    loaded = new_model(1)
    open_checkpoint(tmp_path / "step-1").load_into(loaded, ema=True)
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    weights, average = (
        checkpoint.read_tensors(open_checkpoint(tmp_path / "step-2").weights(ema)) for ema in (False, True)
    )
    assert weights["0.weight"].shape == (4, 6)
    assert all(torch.equal(average[name], weights[name] + 1) for name in weights)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint with another one in it."""
    model, path = new_model(), tmp_path / "run" / "step-000002"
    optimizer = torch.optim.AdamW(model.parameters())
    take_step(model, optimizer, 0)
    ema = dict(model.named_parameters())
    save(path, model, 2, optimizer=optimizer, ema=ema, parts=lambda folder: save(folder / "autoencoder", model))
    return path


FILES = (
    *("checkpoint.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors", "optimizer.json"),
    *("autoencoder/checkpoint.json", "autoencoder/model.safetensors"),
)


def test_every_file_at_any_depth_is_listed(whole: Path) -> None:
    there = {file.relative_to(whole).as_posix() for file in whole.rglob("*") if file.is_file()}
    assert there == set(FILES) == set(manifest.read(whole)["files"]) | {"checkpoint.json"}
    checkpoint.verify(whole)
    checkpoint.verify(whole / "autoencoder")
    with pytest.raises(ValueError, match=r"without a readable checkpoint\.json"):
        checkpoint.verify(whole.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_a_cut_or_a_missing_file_is_named(whole: Path, name: str) -> None:
    file = whole / name
    data = file.read_bytes()
    for place in (0, len(data) // 3, len(data) // 2, len(data) - 9):
        file.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(ValueError, match=f"^Expected .*{file.name}"):
            checkpoint.verify(whole)
        with pytest.raises(ValueError, match=f"{file.name}"):
            open_checkpoint(whole)
    file.write_bytes(data[:-9])
    with pytest.raises(
        ValueError, match=f"Expected {len(data)} bytes in .*{name}, got {len(data) - 9}; copy it|readable"
    ):
        open_checkpoint(whole)
    file.unlink()
    with pytest.raises(ValueError, match=f"Expected .*{name}, got no such file; copy it|without a readable checkpoint"):
        open_checkpoint(whole)
    file.write_bytes(data)
    open_checkpoint(whole)


def test_any_changed_byte_of_the_description_is_found_or_means_nothing(whole: Path) -> None:
    file = whole / "checkpoint.json"
    data, said = file.read_bytes(), manifest.read(whole)
    found = 0
    places = range(0, len(data), 3)
    for place in places:
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            assert manifest.check(whole) == said
        except ValueError:
            found += 1
    assert found > len(places) // 2


def test_other_schemas_and_incomplete_descriptions_are_refused(whole: Path) -> None:
    said = {key: value for key, value in manifest.read(whole).items() if key not in ("sha256", "files")}
    manifest.seal(whole, said | {"schema": "latentphys.checkpoint/1"})
    with pytest.raises(
        ValueError, match=r"schema 'latentphys.checkpoint/2', got 'latentphys.checkpoint/1' in .*no other"
    ):
        open_checkpoint(whole)
    manifest.seal(whole, {key: value for key, value in said.items() if key != "config"})
    with pytest.raises(ValueError, match="a complete checkpoint, got no 'config'"):
        open_checkpoint(whole)
    manifest.seal(whole, said)
    assert open_checkpoint(whole).step == 2
    with pytest.raises(ValueError, match="a checkpoint of kind 'dynamics', got one of kind 'autoencoder'"):
        open_checkpoint(whole, "dynamics")


def new_run(folder: Path, *steps: int) -> Path:
    """Checkpoints that know their step by their weights too."""
    for step in steps:
        model = new_model()
        nn.init.constant_(list(model.parameters())[-1], step)
        save(folder / f"step-{step:06d}", model, step)
    durable.write_json(folder / "last.json", {"checkpoint": f"step-{steps[-1]:06d}"})
    return folder


def test_a_run_gives_its_newest_whole_checkpoint_and_says_so(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", 2, 4, 6)
    durable.write_json(run / "best.json", {"checkpoint": "step-000002"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [open_checkpoint(path).step for path in (run, run / "last", run / "best")] == [6, 6, 2]
    spoil(run / "step-000006")
    for path in (run, run / "last"):
        with pytest.warns(
            UserWarning, match=r"Damaged: .*SHA-256 .* of .*step-000006/model.*step-000004 is used instead"
        ):
            assert open_checkpoint(path).step == 4
    with pytest.raises(ValueError, match="SHA-256"):
        open_checkpoint(run / "step-000006")
    (run / "step-000004" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"step-000006.*step-000004.*no such file.*step-000002 is used instead"):
        assert open_checkpoint(run).step == 2
    spoil(run / "step-000002")
    with pytest.raises(
        ValueError, match=r"SHA-256.*step-000006.* None of the 3 there is whole, and nothing was removed"
    ):
        open_checkpoint(run)
    with pytest.raises(ValueError, match=r"SHA-256.*step-000002"):
        open_checkpoint(run / "best")
    assert len(checkpoint.steps(run)) == 3


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "{}", '{"checkpoint": "../step-000006"}', '{"checkpoint": 3}', "\0"]
)
def test_without_a_readable_last_json_the_newest_is_found(tmp_path: Path, text: str | None) -> None:
    run = new_run(tmp_path / "run", 4, 1000000, 20)
    (run / "last.json").unlink()
    if text is not None:
        (run / "last.json").write_text(text)
    with pytest.warns(UserWarning, match=r"without a readable last.json. step-1000000 is used instead"):
        assert open_checkpoint(run).step == 1000000
    shutil.rmtree(run / "step-1000000")
    durable.write_json(run / "last.json", {"checkpoint": "step-1000000"})
    with pytest.warns(
        UserWarning, match=r"step-1000000, without a readable checkpoint.json. step-000020 is used instead"
    ):
        assert open_checkpoint(run).step == 20


def test_replacing_a_checkpoint_leaves_one_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped before, between and after all its renames and removals; the name always opens something whole."""
    path, stopped = tmp_path / "run" / "step-000002", 0
    save(path, new_model(0), 2)
    for count in range(20):
        left = count

        def stop(original: Any) -> Any:
            def stopping(*given: Any, **named: Any) -> Any:
                nonlocal left
                if left == 0:
                    os._exit(9)
                left -= 1
                return original(*given, **named)

            return stopping

        child = os.fork()
        if child == 0:
            monkeypatch.setattr(os, "replace", stop(os.replace))
            monkeypatch.setattr(shutil, "rmtree", stop(shutil.rmtree))
            monkeypatch.setattr(durable, "sync", stop(durable.sync))
            try:
                save(path, new_model(count + 1), 2)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) in (0, 9)
        for place in (path, path.parent):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # there is no last.json
                assert open_checkpoint(place).step == 2
        stopped += os.waitstatus_to_exitcode(status) == 9
    assert 8 <= stopped < 20
    durable.restore(path)
    save(path, new_model(99), 2)
    assert [entry.name for entry in path.parent.iterdir()] == ["step-000002"]
    assert torch.equal(
        checkpoint.read_tensors(path / "model.safetensors")["0.weight"], new_model(99).state_dict()["0.weight"]
    )


def write_without_end(run: Path, ready: int) -> None:
    """A run that does nothing but save."""
    model = nn.Linear(60, 40)
    optimizer = torch.optim.AdamW(model.parameters())
    with RunDirectory(run, True) as directory:
        directory.begin({}, [], True)
        found = directory.newest(KIND)
        step = found.step if found else 0
        os.write(ready, b"!")
        while True:
            model(torch.ones(60)).sum().backward()
            optimizer.step()
            step += 1
            nn.init.constant_(model.bias, step)
            more: dict[str, Any] = {"optimizer": optimizer, "ema": dict(model.named_parameters())}
            directory.save(step, partial(save, model=model, step=step, **more), step % 5 == 0)


def test_sigkill_at_any_moment_leaves_a_newest_checkpoint(tmp_path: Path) -> None:
    """A process that saves without a pause is killed fifteen times and goes on; a reader looks on all the while."""
    run, before, moments = tmp_path / "run", 0, random.Random(0)
    for _ in range(15):
        listen, ready = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_without_end(run, ready)
            finally:
                os._exit(1)
        assert select.select([listen], [], [], 60)[0] and os.read(listen, 1) == b"!"
        os.close(listen)
        os.close(ready)
        deadline = time.monotonic() + 0.1 + moments.random() / 5
        while time.monotonic() < deadline:
            if before:
                assert open_checkpoint(run).step >= before
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if not before and not (run / "last.json").exists():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = open_checkpoint(run)
        assert found.step >= before
        assert (checkpoint.read_tensors(found.weights())["bias"] == found.step).all()
        before = found.step
    assert before > 20 and open_checkpoint(run / "best").step % 5 == 0
    assert len(checkpoint.steps(run)) <= 4


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.json", "checkpoint.json"])
def test_a_full_disk_leaves_what_was_there(
    whole: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters())
    take_step(model, optimizer, 0)
    original = {"save_file": checkpoint.save_file, "write_text": Path.write_text, "dumps": json.dumps}

    def full(*given: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    if name == "model.safetensors":
        monkeypatch.setattr(checkpoint, "save_file", full)
    elif name == "optimizer.json":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"Expected \d+ bytes for .*step-00000[24], got .* with \d+ free; make room"
    ) as caught:
        save(whole.with_name("step-000004"), model, 4, optimizer=optimizer)
    with pytest.raises(OSError, match="The checkpoints before are as they were"):
        save(whole, model, 2, optimizer=optimizer)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC and original["dumps"] is json.dumps
    assert [path.name for path in whole.parent.iterdir()] == ["step-000002"]
    assert before == {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    checkpoint.verify(whole)


def test_a_rename_that_fails_gives_the_name_back(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.replace

    def refuse(source: Path, target: Path) -> None:
        if target == whole and source == durable.partial_of(whole):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        save(whole, new_model(1), 3)
    assert [entry.name for entry in whole.parent.iterdir()] == ["step-000002"]
    assert open_checkpoint(whole).step == 2


def test_a_limit_on_the_size_of_files_is_met_alike(tmp_path: Path) -> None:
    """No fault is injected here: the operating system refuses to write on."""
    path = tmp_path / "step-000002"
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            model = nn.Linear(100, 100)
            optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
            model(torch.ones(100)).sum().backward()
            optimizer.step()
            # 10100 weights, averages and moments, of four bytes each
            save(path, model, 2, optimizer=optimizer, ema=dict(model.named_parameters()))
        except OSError as error:
            os._exit(7 if "Expected 121200 bytes for" in str(error) and not list(tmp_path.iterdir()) else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
