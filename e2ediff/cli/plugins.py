"""`e2ediff plugins`: list, info, new, check."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from e2ediff.host.discovery import Entry
    from e2ediff.host.survey import Finding


@click.group("plugins", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """List, look at, begin and check plugins.

    Without a subcommand: `list`.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_)


@command.command("list")
@click.option("--fresh", is_flag=True, help="Import all again; else what has not changed is kept.")
def list_(fresh: bool = False) -> None:
    """Print every installed plugin with what it brings, or with what is wrong, a line each.

    They are imported in a process of their own, so that none can do harm.
    """
    from e2ediff import __version__
    from e2ediff.host.discovery import installed
    from e2ediff.host.survey import survey

    entries = installed()
    findings = survey(entries, fresh=fresh)
    ours = ("e2ediff", "ok", f"e2ediff {__version__}", "the built-in parts: see `e2ediff parts`")
    rows = [ours, *(_row(entry, findings.get(entry.name)) for entry in entries)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[3]]))
    for line in _shared(entries, findings):
        click.echo(line)


def _row(entry: Entry, found: Finding | None) -> tuple[str, str, str, str]:
    """Name, state, distribution, and what there is to say."""
    origin = f"{entry.distribution} {entry.version}".strip()
    if found is None:
        return entry.name, "blocked" if entry.blocked else "refused", origin, entry.refusal()
    if found.broken:
        return entry.name, "broken", origin, found.broken
    brings = "; ".join(f"{plural}: {', '.join(names)}" for plural, names in found.parts.items())
    hooks = ", ".join(h for h in found.hooks if not h.startswith("register_"))
    what = "; ".join(filter(None, [brings, f"hooks: {hooks}" if hooks else ""]))
    if "register_commands" in found.hooks:
        what = "; ".join(filter(None, [what, "commands"]))
    if found.printed:
        return entry.name, "prints", origin, f"{what}  (to stdout, at import: {found.printed!r})"
    return entry.name, "ok", origin, what


def _shared(entries: Sequence[Entry], findings: Mapping[str, Finding]) -> Iterator[str]:
    """A line for each name that several plugins register."""
    owners: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        found = findings.get(entry.name)
        for plural, names in found.parts.items() if found else ():
            for name in names:
                owners.setdefault((plural, name), []).append(entry)
    for (plural, name), several in owners.items():
        if len(several) > 1:
            who = " and ".join(f"{e.name!r} ({e.distribution} {e.version})" for e in several)
            ways = " or ".join(repr(f"{e.name}:{name}") for e in several)
            yield (
                f"{plural}: {name!r} is registered by both {who}; write {ways} in a recipe, "
                f"or block one with E2EDIFF_BLOCK={several[-1].name}"
            )
