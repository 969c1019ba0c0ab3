"""`e2ediff plugins`."""

from __future__ import annotations

import click


@click.command("plugins")
def command() -> None:
    """List plugins with their versions and hooks; then those that could not be loaded, and why."""
    from e2ediff.host.plugins import load

    host = load()
    for plugin in host.plugins:
        origin = f"{plugin.distribution} {plugin.version}".strip() or "part of e2ediff"
        hooks = ", ".join(plugin.hooks)
        click.echo(f"{plugin.name}  ({origin})  {hooks}")
    for name, why in sorted(host.broken.items()):
        click.echo(f"{name}  BROKEN: {why}")
