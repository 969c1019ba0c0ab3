"""Check and convert the entries of a run's records, which somebody else may have written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from e2ediff.store.manifest import MOST, block, count

_FORMAT = re.compile(r"[-+ ]?[#0,]{0,2}\d{0,2}[,_]?(\.\d{1,2})?[a-zA-Z%]?")
"""Formats of figures, as in `format(value, ".2f")`."""

_HAS_SPECIAL = re.compile(rb'"(nan|-?inf)"').search
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _kind(kind: type) -> Callable[[Any, str], object]:
    return lambda value, name: block(value, kind, name)


RUN_KINDS: Mapping[str, Callable[[Any, str], object]] = {
    **dict.fromkeys(("name", "created"), _kind(str)),
    "argv": _kind(list),
    **dict.fromkeys(("versions", "plugins", "git", "hardware", "seeds"), _kind(dict)),
}
"""By entry of `run.json`, what refuses a value of another kind; null counts as left out."""

STATUS_KINDS: Mapping[str, Callable[[Any, str], object]] = {
    **dict.fromkeys(("state", "reason", "collapsed", "last_checkpoint"), _kind(str)),
    **dict.fromkeys(("images", "step", "exit_code"), count),
}
"""The same for `status.json`."""


def check_texts(row: Mapping[str, Any]) -> None:
    """Refuse texts of a declared figure that are none, and formats that could fill the memory.

    Raises:
        TypeError, ValueError: One is.
    """
    for name in {"name", "title", "panel", "short", "form"} & {*row}:
        block(row[name], str, name)
    if not _FORMAT.fullmatch(row.get("form", "")):
        raise ValueError(f"form is {row['form'][:20]!r}, expected a format such as .2f")
    for name in ("dead_below", "dead_above"):
        if row.get(name) is not None and not is_figure(row[name]):
            raise TypeError(f"{name} is {str(row[name])[:20]}, expected a number")


def is_until(images: int, line: bytes) -> bool:
    """Return whether a line of figures is valid, and of at most this many training images."""
    try:
        values = json.loads(line)
        check_position(values)
        return bool(values.get("images", 0) <= images)
    except (ValueError, AttributeError, RecursionError):
        return False


def check_position(line: Mapping[str, Any]) -> None:
    """Refuse a line of figures that says of no step that it is from there.

    Raises:
        ValueError: Its `step` or `images` is no count.
    """
    for name in ("step", "images"):
        count(line.get(name, 0), name)


def is_figure(value: object) -> bool:
    """Return whether a value is a number that arithmetic in floats can take."""
    return type(value) is float or (type(value) is int and abs(value) < MOST)


def without_specials(value: Any) -> Any:
    """Replace nan and inf, which JSON does not have, by text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: without_specials(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_specials(item) for item in value]
    return value


def with_specials(values: dict[str, Any], line: bytes) -> dict[str, Any]:
    """Put nan and inf back into the entries of a line, where text replaced them."""
    return {k: _special(v) for k, v in values.items()} if _HAS_SPECIAL(line) else values


def _special(value: Any) -> Any:
    return _SPECIAL.get(value, value) if isinstance(value, str) else value
