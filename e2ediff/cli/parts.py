"""`e2ediff parts`."""

from __future__ import annotations

import click

from e2ediff.terminal import echo


@click.command("parts")
@click.argument("kind", required=False)
@click.argument("name", required=False)
def command(kind: str | None, name: str | None) -> None:
    """List the parts of KIND (objectives, backbones, ...), or of all kinds, with their options.

    With NAME, one part with all that its documentation says.
    """
    from e2ediff.host.listing import lines_of, part_page
    from e2ediff.host.plugins import load
    from e2ediff.host.registry import did_you_mean

    host = load()
    kinds = {**host.registries, **{r.kind.replace(" ", "_"): r for r in host.registries.values()}}
    if kind is not None and kind not in kinds:
        raise click.UsageError(f"unknown kind '{kind}'. {did_you_mean(kind, [*host.registries])}")
    if kind and name:
        known = {part.name: part for part in kinds[kind]}
        if name not in known:
            what = f"unknown {kinds[kind].kind} '{name}'. {did_you_mean(name, known)}"
            raise click.UsageError(what)
        for line in part_page(known[name]):
            echo(line)
        return
    for registry in [kinds[kind]] if kind else host.registries.values():
        echo(registry.plural, bold=True)
        for part in sorted(registry, key=lambda p: p.name):
            for line in lines_of(part):
                echo(f"  {line}")
