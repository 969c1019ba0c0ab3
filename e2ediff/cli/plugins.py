"""`e2ediff plugins`: list and info."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import click

from e2ediff.terminal import echo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from e2ediff.host.discovery import Plugin
    from e2ediff.host.plugins import Host
    from e2ediff.host.registry import Part


@click.group("plugins", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """List and inspect plugins.

    Without a subcommand: `list`.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_)


@command.command("list")
def list_() -> None:
    """Print every plugin on a line, with what it provides or what is wrong."""
    from e2ediff import __version__
    from e2ediff.host.plugins import load

    host = load()
    rows = [("e2ediff", "ok", f"e2ediff {__version__}", "the built-in parts: see `e2ediff parts`")]
    rows += [_row(host, entry) for entry in host.entries]
    rows += [(p.name, "ok", p.file, _brings(host, p)) for p in host.plugins if p.file]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        echo("  ".join([*cells, row[3]]))
    for line in _shared(host):
        echo(line)


def _row(host: Host, entry: Plugin) -> tuple[str, str, str, str]:
    """Return name, state, distribution and remark of a plugin."""
    from e2ediff.host.checkout import install_command
    from e2ediff.host.discovery import missing

    origin = f"{entry.distribution} {entry.version}".strip()
    if refusal := entry.refusal():
        return (
            entry.name,
            "blocked" if refusal.startswith("blocked") else "refused",
            origin,
            refusal,
        )
    if entry.name in host.broken:
        return entry.name, "broken", origin, str(host.broken[entry.name])
    if lacking := missing(entry.requires):
        what = f"needs {lacking}, which is not installed; run: {install_command(lacking)}"
        return entry.name, "broken", origin, what
    what = _brings(host, entry)
    if printed := host.printed.get(entry.name):
        return entry.name, "prints", origin, f"{what}  (to stdout, at import: {printed!r})"
    return entry.name, "ok", origin, what


def _brings(host: Host, plugin: Plugin) -> str:
    """List parts, hooks and commands of a plugin on one line."""
    found = [
        f"{kind}: {', '.join(names)}"
        for kind, registry in host.registries.items()
        if (names := [p.name for p in registry if p.plugin.name == plugin.name])
    ]
    hooks = [hook for hook in plugin.hooks if hook != "register"]
    commands = [name for name, (_, owner) in host.commands.items() if owner.name == plugin.name]
    found += [f"hooks: {', '.join(hooks)}"] if hooks else []
    found += [f"commands: {', '.join(commands)}"] if commands else []
    return "; ".join(found)


def _shared(host: Host) -> Iterator[str]:
    """Yield a line for each name that several plugins register."""
    for kind, registry in host.registries.items():
        owners: dict[str, list[Part]] = {}
        for part in registry:
            owners.setdefault(part.name, []).append(part)
        for name, several in owners.items():
            if len(several) > 1:
                who = " and ".join(str(part.plugin) for part in several)
                ways = " or ".join(repr(part.qualified) for part in several)
                yield (
                    f"{kind}: {name!r} is registered by both {who}; write {ways} in a recipe, "
                    f"or block one with E2EDIFF_BLOCK={several[-1].plugin.name}"
                )


@command.command("info")
@click.argument("name")
def info(name: str) -> None:
    """Print all that is known of a plugin; NAME is its entry point or its distribution.

    For a broken one, print the traceback.
    """
    from importlib import metadata

    from e2ediff.host.listing import lines_of
    from e2ediff.host.plugins import load

    host = load()
    for entry in host.entries_named(name):
        origin = f"{entry.distribution} {entry.version}".strip()
        echo(f"{entry.name}  {origin}", bold=True)
        if entry.distribution and not entry.fault:
            said = metadata.metadata(entry.distribution)
            if "Summary" in said:
                echo(f"  {'summary':<9} {said['Summary']}")
        echo(f"  {'module':<9} {entry.value}")
        for line in entry.requires:
            echo(f"  {'requires':<9} {line}")
        if entry.name in host.broken:
            echo(f"  {'broken':<9} {host.broken[entry.name]}")
            if error := host.broken[entry.name].__cause__:
                lines = "".join(traceback.format_exception(error)).splitlines()
                for line in lines:
                    echo(f"    {line}")
            continue
        if printed := host.printed.get(entry.name):
            echo(f"  {'prints':<9} {printed!r} to stdout, when it is imported")
        echo(f"  {'hooks':<9} {', '.join(entry.hooks)}")
        for registry in host.registries.values():
            for part in registry:
                if part.plugin.name == entry.name:
                    echo(f"  {registry.plural}")
                    for line in lines_of(part):
                        echo(f"    {line}")
        for command_name, (_, owner) in host.commands.items():
            if owner.name == entry.name:
                echo(f"  {'command':<9} {command_name}")
