"""Compose Hydra configurations from the YAML that comes with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def compose(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration ``name`` with overrides such as ``family=porous`` or ``grid.shape=[64,64,64]``, resolved.

    Raises:
        ValueError: an unknown option or choice, or a value that is missing.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(Path(__file__).parent.resolve() / "configs"), version_base="1.3"):
            config = hydra_compose(name, list(overrides))
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"Expected options that {name}.yaml knows: {_one_line(error)}") from None
    assert isinstance(resolved, dict)
    for key, value in resolved.items():
        if value == "???":
            raise ValueError(f"Expected a value for {key!r}, got none; add {key}=… to the command.")
    return {str(key): value for key, value in resolved.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
