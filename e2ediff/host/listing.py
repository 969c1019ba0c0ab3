"""Parts and their options as text, for `e2ediff parts` and the reference page."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import attrs

from e2ediff.errors import PluginError
from e2ediff.host.registry import DEFAULTS, Part, options
from e2ediff.host.structure import describe


def summary(part: Part) -> str:
    """The first line of a part's documentation."""
    return (part.cls.__doc__ or "").strip().split("\n", 1)[0]


def option_rows(cls: type) -> Iterator[tuple[str, str, str]]:
    """Name, type and default of each option of a part or block; `required` for no default."""
    defaults = {a.name: a.default for a in attrs.fields(cls)}
    for option in options(cls).values():
        default = defaults[option.attribute]
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory()
        if default is attrs.NOTHING:
            default = DEFAULTS.get(option.hint, "required")
        text = _written(default)
        yield option.name, describe(option.hint), text


def part_lines(part: Part) -> Iterator[str]:
    """A part on one line, and each of its options on another, indented."""
    yield f"{part.name}  [{part.plugin.name}]  {summary(part)}"
    for name, kind, default in option_rows(part.cls):
        yield f"    {name}: {kind} = {default}"


def lines_of(part: Part) -> Iterator[str]:
    """As `part_lines`; of a class that cannot be imported, why."""
    try:
        yield from part_lines(part)
    except PluginError as error:
        yield f"{part.name}  [{part.plugin.name}]  cannot be used: {error}"


def part_page(part: Part) -> Iterator[str]:
    """Lines of a part's whole documentation and its options."""
    lines = (inspect.getdoc(part.cls) or "").splitlines() or [""]
    yield f"{part.name}  [{part.plugin.name}]  {lines[0]}"
    yield from (f"    {line}".rstrip() for line in lines[1:])
    yield from ("", *[*part_lines(part)][1:])


def _written(default: object) -> str:
    """A default as a recipe would have it; a block by the words that differ in none."""
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple | list):
        return f"[{', '.join(_written(item) for item in default)}]"
    if attrs.has(type(default)):
        inner = ", ".join(f"{n}: {d}" for n, _, d in option_rows(type(default)))
        return f"{{{inner}}}" if inner else "{}"
    return str(default)
