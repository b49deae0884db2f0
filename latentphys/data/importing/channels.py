"""Arrays whose last word is the user's: what the axes mean, and what the components are called."""

from __future__ import annotations

from collections.abc import Sequence

from latentphys.data.importing.blocks import Piece
from latentphys.data.importing.boxes import spec
from latentphys.data.importing.h5 import H5File
from latentphys.data.importing.source import ImportOptions
from latentphys.fields import FieldSpec


def components(file: H5File, arrays: Sequence[str], axes: str) -> tuple[list[Piece], list[str]]:
    """Every component of some arrays, and what it is called where the user does not say: after its array."""
    pieces, names = [], []
    for array in arrays:
        name, number = array.split("/")[-1], dict(zip(axes, file.array(array).shape or (), strict=True)).get("c")
        pieces += [Piece(array, axes)] if number is None else [Piece(array, axes, (i,)) for i in range(number)]
        names += [name] if number in (None, 1) else [f"{name}_{i}" for i in range(number)]
    return pieces, names


def fields_of(
    pieces: Sequence[Piece], names: Sequence[str], options: ImportOptions
) -> tuple[dict[str, FieldSpec], dict[str, tuple[Piece, ...]]]:
    """Scalars from single components, and vectors from those that the user gives one name.

    Raises:
        ValueError: names for another number of components, or more than three for one vector.
    """
    given = list(options.fields or names)
    if len(given) != len(pieces):
        raise ValueError(f"Expected names of {len(pieces)} components ({', '.join(names)}), got {given}.")
    specs: dict[str, FieldSpec] = {}
    result: dict[str, tuple[Piece, ...]] = {}
    for label in dict.fromkeys(given):
        own = tuple(piece for piece, other in zip(pieces, given, strict=True) if other == label)
        if len(own) > 3:
            raise ValueError(f"Expected at most three components of a vector, got {len(own)} named {label!r}.")
        new = spec(label, len(own) > 1, options)
        if new.name in specs:
            raise ValueError(f"Expected different names of fields, got {new.name!r} twice.")
        specs[new.name], result[new.name] = new, own
    return specs, result


def parse_axes(text: str | Sequence[str], rank: int, where: str) -> str:
    """Axes such as ``b t x y z c`` as one letter each.

    Raises:
        ValueError: other letters, letters twice, none of x, or another number of them than the array has.
    """
    axes = "".join(text).replace(" ", "").replace(",", "")
    space = "".join(axis for axis in axes if axis in "xyz")
    if set(axes) - set("btxyzc") or len(set(axes)) != len(axes) or set(space) != set("xyz"[: len(space)]) or not space:
        raise ValueError(f"Expected axes out of b t x y z c, each once, x or x y or x y z among them, got {axes!r}.")
    if len(axes) != rank:
        raise ValueError(f"Expected one axis of {where} for each of {rank}, got {axes!r}.")
    return axes
