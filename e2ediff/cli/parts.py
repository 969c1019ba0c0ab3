"""`e2ediff parts`."""

from __future__ import annotations

import click


@click.command("parts")
@click.argument("kind", required=False)
def command(kind: str | None) -> None:
    """List the parts of KIND (objectives, backbones, ...), or of every kind, with their options."""
    import attrs

    from e2ediff.host.plugins import load
    from e2ediff.host.registry import did_you_mean
    from e2ediff.host.structure import describe, options

    host = load()
    kinds = {**host.registries, **{r.kind.replace(" ", "_"): r for r in host.registries.values()}}
    if kind is not None and kind not in kinds:
        raise click.UsageError(f"unknown kind '{kind}'. {did_you_mean(kind, [*host.registries])}")
    shown = [kinds[kind]] if kind else list(host.registries.values())
    for registry in shown:
        click.secho(registry.plural, bold=True)
        for part in sorted(registry, key=lambda p: p.name):
            summary = (part.cls.__doc__ or "").strip().splitlines()[0]
            click.echo(f"  {part.name}  [{part.plugin.name}]  {summary}")
            for option in options(part.cls).values():
                default = "required" if option.default is attrs.NOTHING else _show(option.default)
                click.echo(f"      {option.name}: {describe(option.hint)} = {default}")


def _show(default: object) -> str:
    import attrs

    if attrs.has(type(default)):
        return "{...}"
    return repr(default)
