"""`e2ediff run`."""

from __future__ import annotations

import click


@click.command("run")
@click.argument("recipe")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change one value of the recipe: --set objective=coupled --set optimizer.lr=1e-3.",
)
@click.option(
    "--out", metavar="DIR", help="The run's directory or URL. Default: runs/<recipe's name>."
)
@click.option("--resume", is_flag=True, help="Continue the run in --out, or the newest one.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: all cores.")
def command(
    recipe: str, overrides: tuple[str, ...], out: str | None, resume: bool, threads: int | None
) -> int:
    """Train by RECIPE, a YAML file or URL.

    The run's directory is printed at the end, on stdout.
    Ctrl-C saves and ends; --resume continues.
    """
    import torch

    from e2ediff.host.plugins import load
    from e2ediff.run.session import train

    if threads:
        torch.set_num_threads(threads)
    outcome = train(load(), recipe, overrides, out, resume=resume)
    if outcome.exit_code:
        click.echo(f"{outcome.path}: {outcome.reason}", err=True)
    else:
        click.echo(
            f"done. Curves: {outcome.path}/curves.png, samples: {outcome.path}/samples/\n"
            f"next: e2ediff sample {outcome.path}",
            err=True,
        )
    click.echo(outcome.path)
    return outcome.exit_code
