"""What the Climate and Forecast (CF) conventions say of axes, units and velocities.

Reference: NetCDF Climate and Forecast Metadata Conventions 1.11, chapters 3 (units, names) and 4 (coordinates).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

NAMES = {
    "b": ("trajectory", "realization", "member", "ensemble", "sample", "b"),
    "t": ("time", "t"),
    "x": ("x", "xc", "xt", "xh", "nx"),
    "y": ("y", "yc", "yt", "yh", "ny"),
    "z": ("z", "zc", "zt", "zh", "nz", "height", "altitude", "depth"),
    "c": ("component", "axis", "vector", "c"),
}
STANDARD = {
    "time": "t",
    "realization": "b",
    "projection_x_coordinate": "x",
    "projection_y_coordinate": "y",
    "height": "z",
    "altitude": "z",
    "depth": "z",
}
SPHERE = ("lat", "latitude", "lon", "longitude", "grid_latitude", "grid_longitude")
_LENGTHS = {"m": 1.0, "metre": 1.0, "meter": 1.0, "km": 1e3, "cm": 1e-2, "mm": 1e-3, "um": 1e-6, "µm": 1e-6, "nm": 1e-9}
_TIMES = {"s": 1.0, "sec": 1.0, "second": 1.0, "min": 60.0, "minute": 60.0, "h": 3600.0, "hr": 3600.0, "hour": 3600.0}
_TIMES |= {"d": 86400.0, "day": 86400.0, "ms": 1e-3, "millisecond": 1e-3, "us": 1e-6, "microsecond": 1e-6}
_SPEEDS = ("m/s", "m s-1", "m s**-1", "m s^-1", "m.s-1", "m*s-1", "m sec-1", "meter/second", "metre/second")
_BY_NAME = (
    ("u", "v", "w"),
    ("ux", "uy", "uz"),
    ("vx", "vy", "vz"),
    ("u_x", "u_y", "u_z"),
    ("velocity_x", "velocity_y", "velocity_z"),
    ("x_velocity", "y_velocity", "z_velocity"),
)
_BY_STANDARD_NAME = (
    re.compile(r"(\w+_)?(x_(velocity|wind)|eastward_(\w+_)?(velocity|wind))"),
    re.compile(r"(\w+_)?(y_(velocity|wind)|northward_(\w+_)?(velocity|wind))"),
    re.compile(r"(\w+_)?(z_velocity|upward_(\w+_)?(velocity|wind))"),
)


def axis_of(name: str, attributes: Mapping[str, Any]) -> str | None:
    """What a dimension means: b trajectory, t time, x y z space, c component; None where nothing says.

    Raises:
        ValueError: latitudes and longitudes.
    """
    standard, units = str(attributes.get("standard_name", "")).lower(), str(attributes.get("units", "")).lower()
    if standard in SPHERE or name.lower() in SPHERE or units.startswith(("degrees_", "degree_")):
        raise ValueError(
            f"Expected a box in metres, got latitudes or longitudes ({name}); regrid the data to a projection first."
        )
    letter = str(attributes.get("axis", "")).lower()
    if letter in ("t", "x", "y", "z"):
        return letter
    if standard in STANDARD:
        return STANDARD[standard]
    if " since " in units:
        return "t"
    return next((letter for letter, names in NAMES.items() if name.lower() in names), None)


def metres(units: str) -> float:
    """How many metres a unit of length is; 1 where there is none.

    Raises:
        ValueError: a unit that is no length.
    """
    return _factor(units, _LENGTHS, "a length")


def seconds(units: str) -> float:
    """How many seconds a unit of time is, ``hours since …`` too; 1 where there is none.

    Raises:
        ValueError: a unit that is no time, or one without a fixed length, such as months.
    """
    return _factor(units.split(" since ")[0], _TIMES, "a time of fixed length")


def _factor(units: str, factors: Mapping[str, float], what: str) -> float:
    unit = units.strip()
    if not unit:
        return 1.0
    for name in (unit, unit.lower(), unit.lower().removesuffix("s")):
        if name in factors:
            return factors[name]
    raise ValueError(f"Expected the unit of {what}, got {units!r}")


def is_speed(units: str) -> bool:
    """Whether a unit is m/s, or not given."""
    return not units.strip() or " ".join(units.split()) in _SPEEDS


def velocity(variables: Mapping[str, Mapping[str, Any]], axes: Collection[str]) -> list[str | None] | None:
    """The variables that are the velocity along x, y, z; None for a component along an axis that the data lack.

    Args:
        variables: attributes of the scalar variables, by name.
        axes: the axes of space that the data have; of these every component must be there.
    """
    speeds = {name: a for name, a in variables.items() if is_speed(str(a.get("units", "")))}
    standard = [
        next((n for n, a in speeds.items() if pattern.fullmatch(str(a.get("standard_name", "")).lower())), None)
        for pattern in _BY_STANDARD_NAME
    ]
    lower = {name.lower(): name for name in speeds}
    for found in (standard, *([lower.get(name) for name in names] for names in _BY_NAME)):
        if all(name is not None for name, axis in zip(found, "xyz", strict=True) if axis in axes):
            return list(found)
    return None
