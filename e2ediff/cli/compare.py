"""`e2ediff compare`."""

from __future__ import annotations

import click


@click.command("compare")
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True)
@click.option("--out", metavar="FILE", help="Write an HTML page as `report` does, too.")
def command(runs: tuple[str, ...], out: str | None) -> None:
    """Print final figures of RUNs, and what differs in their recipes.

    Runs whose recipes differ in nothing but the seed are seeds of one cell.
    The first RUN is what the others are compared with.
    """
    from e2ediff.host.plugins import load
    from e2ediff.report.gather import gather_runs
    from e2ediff.report.summary import differing, summarize
    from e2ediff.report.tables import plain_lines
    from e2ediff.report.verdict import verdict
    from e2ediff.report.write import write_report

    if len(runs) < 2:
        raise click.UsageError("give two runs or more; `e2ediff report` is for one")
    gathered = gather_runs(load(), runs)
    summary = summarize(gathered)
    for line in plain_lines(summary, differing(gathered)):
        click.echo(line)
    for sentence in verdict(gathered, summary):
        click.echo(sentence, err=True)
    if out:
        written, _ = write_report(gathered, out)
        click.echo(written.html)
