"""`e2ediff compare`."""

from __future__ import annotations

import click

from e2ediff.cli import options
from e2ediff.terminal import echo, echo_path


@click.command("compare")
@click.argument("runs", metavar="RUN|SCORES RUN|SCORES...", nargs=-1, required=True)
@click.option("--out", metavar="FILE", help="Write an HTML page as `report` does, too.")
@click.option(
    "--regardless", is_flag=True, help="Rank scores that were not measured in the same way."
)
@options.judge
def command(
    runs: tuple[str, ...], out: str | None, judge: str | None, *, regardless: bool
) -> None:
    """Print final figures of RUNs, and what differs in their recipes; or rank SCORES.

    Runs whose recipes differ in nothing but the seed are seeds of one cell.
    The first RUN is what the others are compared with.
    SCORES are JSON files of `e2ediff eval`; they are ranked only if they were measured in the
    same way; otherwise the fields that differ are named. A note says where they were measured by
    other versions of a library or of the code.
    """
    if len(runs) < 2:
        raise click.UsageError("give two runs or more; `e2ediff report` is for one")
    if all(place.endswith(".json") for place in runs):
        if out or judge:
            raise click.UsageError("--out and --judge are for runs, not for score files")
        _rank(runs, regardless=regardless)
        return
    from e2ediff.host.plugins import load
    from e2ediff.report.gather import gather_runs
    from e2ediff.report.summary import differing, summarize
    from e2ediff.report.tables import plain_lines
    from e2ediff.report.verdict import verdict
    from e2ediff.report.write import write_report

    gathered = gather_runs(load(), runs)
    summary = summarize(gathered, judge)
    for line in plain_lines(summary, differing(gathered)):
        echo(line)
    for sentence in verdict(gathered, summary):
        echo(sentence, err=True)
    if out:
        written, _ = write_report(gathered, out, judge)
        echo_path(written.html)


def _rank(places: tuple[str, ...], *, regardless: bool) -> None:
    """Rank every score that all files have; exit code 9 if one was measured in unlike ways."""
    from e2ediff.errors import DataError
    from e2ediff.evaluate.passport import read_card
    from e2ediff.evaluate.ranking import other_versions, rank, shared_scores

    cards = [read_card(place) for place in places]
    names = shared_scores(cards)
    if not names:
        has = "; ".join(f"{card.place}: {', '.join(card.scores)}" for card in cards)
        raise DataError(f"these files have no score in common. {has}")
    for what, versions in other_versions(cards).items():
        listed = ", ".join(f"{v} ({c.place})" for v, c in zip(versions, cards, strict=True))
        echo(f"note: {what} differs: {listed}", err=True)
    for name in names:
        for line in rank(cards, name, regardless=regardless):
            echo(line)
