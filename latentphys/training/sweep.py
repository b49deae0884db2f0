"""Sweeps: every combination of some settings, and the training run that each of them is.

The grammar is Hydra's multirun: ``router=top1,topk trainer.seed=range(0,3)``. Each run has a folder of its own that its
settings name, so that the same command again goes on with what is not done.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentphys.configuration import compose
from latentphys.training.provenance import HARMLESS, differences

DONE = "done"
_OWN = ("run", "resume")
"""Settings that say where a run is, and not what it computes."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        model: ``autoencoder`` or ``dynamics``.
        run: its run directory, below the sweep's.
        overrides: its settings as they follow ``latentphys train MODEL``, without the run directory.
    """

    model: str
    run: Path
    overrides: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """What follows ``latentphys``."""
        return ["train", self.model, *self.overrides, f"run={_quoted(self.run)}"]

    @property
    def log(self) -> Path:
        """Where a run on this machine says what it says."""
        return self.run.parent / "logs" / f"{self.run.name}.log"

    def config(self) -> dict[str, Any]:
        """The composed configuration, exactly as ``latentphys train`` composes it."""
        return compose("train", [f"trainer={self.model}", *self.arguments[2:]])

    def status(self) -> dict[str, Any]:
        """What the run directory says of itself; nothing where nothing was begun, or where it cannot be read."""
        try:
            status = json.loads((self.run / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def state(self) -> str:
        """``new``, or what the run directory says, such as ``done``."""
        return str(self.status().get("state", "new"))


def expand(model: str, overrides: Sequence[str]) -> list[Job]:
    """The runs of a sweep: the product of all settings that are given several values, the last changing fastest.

    Every combination is composed and checked, and compared with the run that is there already, before anything runs.

    Args:
        model: ``autoencoder`` or ``dynamics``.
        overrides: ``out=DIR`` for the sweep's folder, and Hydra overrides, some with several values.

    Raises:
        ValueError: a combination that ``latentphys train`` would refuse, no ``out``, no setting with several values,
            the same run twice, or a run directory that was begun with other settings.
    """
    out, parsed = _parse(overrides)
    fixed = [f"{one.get_key_element()}={one.get_value_element_as_str()}" for one in parsed if not _sweeps(one)]
    swept = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()] for one in parsed if _sweeps(one)
    ]
    if not swept:
        raise ValueError(
            "Expected at least one setting with several values, such as trainer.seed=0,1,2, got none; "
            "for a single run use `latentphys train`."
        )
    jobs = [Job(model, out / _name(chosen), (*fixed, *chosen)) for chosen in itertools.product(*swept)]
    for first, second in itertools.combinations(jobs, 2):
        if first.run == second.run:
            raise ValueError(f"Expected runs with names of their own, got {first.run.name} twice.")
    for job in jobs:
        _check_begun(job, job.config())
    return jobs


def _parse(overrides: Sequence[str]) -> tuple[Path, list[Any]]:
    """The sweep's folder, and the other overrides as Hydra understands them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ValueError(f"Expected overrides such as trainer.seed=0,1,2: {' '.join(str(error).split())}") from None
    out = [one.value() for one in parsed if one.get_key_element() == "out" and not _sweeps(one)]
    if len(out) != 1:
        raise ValueError(f"Expected the sweep's folder once, got {len(out)}; add out=DIR to the command.")
    for one in parsed:
        if one.get_key_element() in _OWN:
            raise ValueError(
                f"Expected no {one.get_key_element()}=… in a sweep, got {one.input_line}; "
                "its runs lie below out=DIR and always resume."
            )
        if _sweeps(one) and not one.is_discrete_sweep():
            raise ValueError(f"Expected values one by one or range(…), got {one.input_line}, which has no end.")
    return Path(str(out[0])), [one for one in parsed if one.get_key_element() != "out"]


def _sweeps(override: Any) -> bool:
    return bool(override.is_sweep_override())


def _name(chosen: Sequence[str]) -> str:
    """The folder of a run, such as ``router=top1,trainer.seed=0``."""
    return re.sub(r"[^\w.,=+\-\[\]]", "_", ",".join(text.lstrip("+").replace("/", ".") for text in chosen))


def _quoted(path: Path) -> str:
    """A path as Hydra takes it whatever its characters."""
    return "'" + str(path).replace("'", r"\'") + "'"


def _check_begun(job: Job, config: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that was begun with other settings; those that came later and are off do not count."""
    file = job.run / "config.json"
    if not file.is_file():
        return
    try:
        changed = differences(json.loads(file.read_text()), config)
    except ValueError:
        raise ValueError(f"Expected a readable {file}, got a damaged one; remove {job.run}.") from None
    for name, (before, now) in changed.items():
        if (before, now) == ("(none)", None):
            continue
        if name not in HARMLESS or name == "trainer.num_steps":
            raise ValueError(
                f"Expected the settings that {job.run} was begun with, got {name} = {now!r} where it has {before!r}; "
                "choose another out=DIR or remove that folder."
            )
