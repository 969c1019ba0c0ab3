"""How many seeds does a difference need? From the results of a study, whose spread it reads.

    python benchmarks/power.py DIR/results.json --difference 0.1

For every pair of variants: the standard deviation over seeds of their paired difference, and the
fewest seeds with which a difference of that share of the second one's mean would be found, by a
paired t-test of level 0.05, in four of five studies. For every variant: how much of its variance
over seeds is the judges'.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import click
from scipy.special import stdtrit

POWER = 0.8
LEVEL = 0.05

Scores = Mapping[str, Mapping[int, Sequence[float]]]
"""What each judge says, by variant and seed."""


def read(results: Mapping[str, Any], figure: str) -> Scores:
    """Return a figure of the results' runs; one that is no judge's has one value a run."""
    found: dict[str, dict[int, Sequence[float]]] = {}
    for run in results["runs"]:
        if "figures" in run:
            figures = run["figures"]
            said = figures.get("by_judge", {}).get(figure, [figures[figure]])
            found.setdefault(run["objective"], {})[run["seed"]] = said
    return found


def seeds_needed(deviation: float, difference: float, most: int = 10_000) -> int:
    """Return the fewest pairs with which a paired t-test finds a difference with `POWER`.

    Args:
        deviation: Standard deviation of a pair's difference.
        difference: The true difference.
        most: Returned where more would be needed.

    Source: n >= ((t_(1 - LEVEL / 2) + t_POWER) deviation / difference)^2, both quantiles of
    Student's t with n - 1 degrees of freedom.
    """
    for n in range(2, most):
        t = float(stdtrit(n - 1, 1 - LEVEL / 2)) + float(stdtrit(n - 1, POWER))
        if t * deviation <= math.sqrt(n) * abs(difference):
            return n
    return most


def variances(by_seed: Mapping[int, Sequence[float]]) -> tuple[float, float]:
    """Return the variance between seeds and that of a judge around its seed's and its own mean.

    The first is of a mean over the judges, less the judges' part in it; at least 0.

    Source: two-way analysis of variance without interaction, by the mean squares.
    """
    rows = [*by_seed.values()]
    seeds, judges = len(rows), len(rows[0])
    means = [statistics.fmean(row) for row in rows]
    between = statistics.variance(means)
    if judges == 1:
        return between, 0.0
    columns = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    whole = statistics.fmean(means)
    rest = sum(
        (value - means[i] - columns[j] + whole) ** 2
        for i, row in enumerate(rows)
        for j, value in enumerate(row)
    ) / ((seeds - 1) * (judges - 1))
    return max(0.0, between - rest / judges), rest


def table(scores: Scores, share: float, *, apart: bool = False) -> str:
    """Return both tables in Markdown; with `apart`, of judges by seed, that of pairs alone."""
    spread = [
        "| variant | seeds | mean | sd of seeds | sd of a judge | sd with one judge, with all |",
        "|---|---|---|---|---|---|",
    ]
    for name, by_seed in scores.items():
        if len(by_seed) < 2:
            continue
        between, rest = variances(by_seed)
        judges = len(next(iter(by_seed.values())))
        mean = statistics.fmean(statistics.fmean(row) for row in by_seed.values())
        one, every = (math.sqrt(between + rest / k) for k in (1, judges))
        spread.append(
            f"| {name} | {len(by_seed)} | {mean:.4g} | {math.sqrt(between):.3g} | "
            f"{math.sqrt(rest):.3g} | {one:.3g}, {every:.3g} |"
        )
    lines = [
        *([] if apart else [*spread, ""]),
        f"| pair | seeds | mean difference | its sd | seeds for {share:.0%} |",
        "|---|---|---|---|---|",
    ]
    for first, second in permutations(scores, 2):
        a, b = ({s: statistics.fmean(v) for s, v in scores[n].items()} for n in (first, second))
        shared = [seed for seed in a if seed in b]
        if len(shared) < 2 or first > second:
            continue
        gaps = [a[seed] - b[seed] for seed in shared]
        deviation, goal = statistics.stdev(gaps), share * statistics.fmean(b[s] for s in shared)
        lines.append(
            f"| {first} - {second} | {len(shared)} | {statistics.fmean(gaps):+.3g} | "
            f"{deviation:.3g} | {seeds_needed(deviation, goal)} |"
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--figure", default="frechet", show_default=True)
@click.option(
    "--difference", default=0.1, show_default=True, type=click.FloatRange(0, min_open=True)
)
def main(path: Path, figure: str, difference: float) -> None:
    """Say how many seeds a difference needs, by the spread in a study's results."""
    results = json.loads(path.read_text())
    apart = len({str(run.get("judges")) for run in results["runs"]}) > 1
    scores = read(results, figure)
    if not any(len(by_seed) > 1 for by_seed in scores.values()):
        raise click.ClickException(f"{path}: no variant has two seeds, so their spread is unknown")
    if apart:
        click.echo(
            "Seeds have different judges, whose spread cannot be told from that of seeds: pairs "
            "alone.\n"
        )
    click.echo(table(scores, difference, apart=apart), nl=False)


if __name__ == "__main__":
    main()
