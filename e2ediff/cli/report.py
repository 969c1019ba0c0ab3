"""`e2ediff report`."""

from __future__ import annotations

import click

from e2ediff.cli import options
from e2ediff.terminal import echo, echo_path


@click.command("report")
@click.argument("place", metavar="RUN|GROUP")
@click.option("--out", metavar="FILE", help="An HTML file. Default: report.html in RUN or GROUP.")
@options.judge
def command(place: str, out: str | None, judge: str | None) -> None:
    """Write one HTML page on RUN or on the ablation GROUP, which opens without a network.

    Its table is written beside it as CSV and LaTeX, and all figures as JSON.
    The verdict goes to stderr, the page's path to stdout.
    """
    from e2ediff.host.plugins import load
    from e2ediff.report.gather import gather
    from e2ediff.report.write import write_report
    from e2ediff.train.progress import Progress

    with Progress() as progress, progress.doing("reading runs and drawing the report"):
        written, sentences = write_report(gather(load(), place), out, judge)
    for sentence in sentences:
        echo(sentence, err=True)
    echo_path(written.html)
