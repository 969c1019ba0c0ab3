"""Format parts and their options, for `e2ediff parts` and the reference page; and tables."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence

import attrs

from e2ediff.errors import PluginError
from e2ediff.host.leaves import text_of
from e2ediff.host.registry import Part, options
from e2ediff.host.structure import describe


def summary(part: Part) -> str:
    """Return the first line of a part's documentation."""
    return (part.cls.__doc__ or "").strip().split("\n", 1)[0]


def option_rows(cls: type) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and default of each option of a part or block; or `required`."""
    defaults = {a.name: a.default for a in attrs.fields(cls)}
    for option in options(cls).values():
        default = defaults[option.attribute]
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory()
        if default is attrs.NOTHING:
            default = option.part or "required"
        yield option.name, describe(option.hint), text_of(default)


def part_lines(part: Part) -> Iterator[str]:
    """Yield a part on one line, and each of its options on another, indented."""
    yield f"{part.name}  [{part.plugin.name}]  {summary(part)}"
    for name, kind, default in option_rows(part.cls):
        yield f"    {name}: {kind} = {default}"


def lines_of(part: Part) -> Iterator[str]:
    """Yield `part_lines`, or the reason why the class cannot be imported."""
    try:
        yield from part_lines(part)
    except PluginError as error:
        yield f"{part.name}  [{part.plugin.name}]  cannot be used: {error}"


def part_page(part: Part) -> Iterator[str]:
    """Yield the lines of a part's documentation and its options."""
    lines = (inspect.getdoc(part.cls) or "").splitlines() or [""]
    yield f"{part.name}  [{part.plugin.name}]  {lines[0]}"
    yield from (f"    {line}".rstrip() for line in lines[1:])
    yield from ("", *[*part_lines(part)][1:])


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return the rows of a table as lines, with columns as wide as their longest text.

    Text lies on the left side of its column, in the columns `right` on the right side.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if i in right else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
