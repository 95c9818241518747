"""Names that select an algorithm: an unknown one is an error, never another algorithm."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from uncurl_jax.errors import InputError


def require_choice(what: str, got: str, choices: Iterable[str]) -> str:
    """Returns `got` if it is one of `choices`.

    Raises:
      InputError: If it is not; the message holds the nearest names and all names.
    """
    known = sorted(choices)
    if got in known:
        return got
    near = difflib.get_close_matches(str(got), known, n=2)
    meant = f"; did you mean {' or '.join(near)}?" if near else "."
    raise InputError(f"{what} must be one of {', '.join(known)}, got {got!r}{meant}")
