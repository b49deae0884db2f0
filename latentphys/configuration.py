"""Compose Hydra configurations from the YAML that comes with the package."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any


def compose(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration ``name`` with overrides such as ``family=porous`` or ``grid.shape=[64,64,64]``, resolved.

    Raises:
        ValueError: an unknown option or choice, a value that is missing, or one of another type than the default's.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = Path(__file__).parent.resolve() / "configs"
    choices = [text for text in overrides if (folder / text.partition("=")[0].lstrip("+")).is_dir()]
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            config, default = hydra_compose(name, list(overrides)), _default(name, tuple(choices))
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
        _check_types(default, resolved, "")
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"Expected options that {name}.yaml knows: {_one_line(error)}") from None
    assert isinstance(resolved, dict)
    settings: dict[str, Any] = {str(key): value for key, value in resolved.items()}
    for key, value in settings.items():
        if value == "???":
            raise ValueError(f"Expected a value for {key!r}, got none; add {key}=… to the command.")
    return settings


@cache
def _default(name: str, choices: tuple[str, ...]) -> Any:
    """The configuration as the package has it; to be called within Hydra."""
    from hydra import compose as hydra_compose
    from omegaconf import OmegaConf

    return OmegaConf.to_container(hydra_compose(name, list(choices)))


def _check_types(default: Any, value: Any, name: str) -> None:
    """Refuse numbers, switches and lists of another type than the default's."""
    if isinstance(default, dict) and isinstance(value, dict):
        for key in default.keys() & value.keys():
            _check_types(default[key], value[key], f"{name}.{key}".lstrip("."))
    elif isinstance(default, dict) and value is not None:
        raise ValueError(
            f"Expected options for {name!r}, got {value!r}; write {name}.{next(iter(default), 'OPTION')}=…."
        )
    elif isinstance(default, list):
        if not isinstance(value, list):
            raise ValueError(f"Expected a list for {name!r}, got {value!r}; write {name}=[…].")
        for one in value if default else ():
            _check_types(default[0], one, name)
    else:
        for kinds, wanted in ((bool, "true or false"), (int, "a whole number"), ((int, float), "a number")):
            if isinstance(default, kinds):
                if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                    raise ValueError(f"Expected {wanted} for {name!r}, got {value!r}.")
                return


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
