"""What other libraries say of files that they cannot read, as one line with the file's name."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into a ValueError; our own messages pass.

    Decoders raise what they stumble over: an index, a key, a struct, a class of their own.

    Args:
        path: the file.
        kind: what it should be, such as ``a NetCDF file``.

    Raises:
        ValueError: anything raised inside.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("Expected"):
            raise
        traceback.clear_frames(error.__traceback__)  # a file that is open in them would stay open
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"Expected {kind} that can be read at {path}, got: {reason}; it is damaged.") from error
