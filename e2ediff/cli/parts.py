"""`e2ediff parts`."""

from __future__ import annotations

import click


@click.command("parts")
@click.argument("kind", required=False)
def command(kind: str | None) -> None:
    """List the parts of KIND (objectives, backbones, ...), or of all kinds, with their options."""
    from e2ediff.host.listing import part_lines
    from e2ediff.host.plugins import load
    from e2ediff.host.registry import did_you_mean

    host = load()
    kinds = {**host.registries, **{r.kind.replace(" ", "_"): r for r in host.registries.values()}}
    if kind is not None and kind not in kinds:
        raise click.UsageError(f"unknown kind '{kind}'. {did_you_mean(kind, [*host.registries])}")
    host.load_all()
    for registry in [kinds[kind]] if kind else host.registries.values():
        click.secho(registry.plural, bold=True)
        for part in sorted(registry, key=lambda p: p.name):
            for line in part_lines(part):
                click.echo(f"  {line}")
