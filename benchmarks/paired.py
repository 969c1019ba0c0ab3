"""Compare a study's variants with one of them, seed by seed, and say how sure the differences are.

    python benchmarks/paired.py DIR/results.json --against two_stage

One table for each figure: the mean of the paired differences, also as a share of the other's mean,
its 95 % interval by Student's t, and every seed's difference.
`--brief` prints one table for all figures, without the seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from power import LEVEL, read
from scipy.special import stdtrit

DIGITS = {
    "frechet": 1,
    "pixel_frechet": 1,
    "psnr": 2,
    "agreement": 3,
    "agreement_to_real": 3,
    "nearest": 2,
    "reconstruction_frechet": 1,
    "sharpness": 3,
}
"""Figures of `score.py` that can be compared, and how many digits of them are shown."""

SHOWN = ("frechet", "pixel_frechet", "psnr", "agreement")


def differences(
    results: Mapping[str, Any], figure: str, against: str
) -> dict[str, tuple[dict[int, float], float]]:
    """Return each variant's differences by seed, and the other's mean over the same seeds."""
    means = {
        name: {seed: statistics.fmean(said) for seed, said in by_seed.items()}
        for name, by_seed in read(results, figure).items()
    }
    found = {}
    for name, its in means.items():
        shared = [seed for seed in its if seed in means[against]]
        if name != against and shared:
            other = statistics.fmean(means[against][seed] for seed in shared)
            found[name] = ({seed: its[seed] - means[against][seed] for seed in shared}, other)
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the mean's 95 % interval, by Student's t; infinite for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return -math.inf, math.inf
    t = float(stdtrit(len(values) - 1, 1 - LEVEL / 2))
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def table(results: Mapping[str, Any], figure: str, against: str) -> str:
    """Return one figure's table in Markdown; an interval without zero is set in bold."""
    digits = DIGITS[figure]
    lines = [
        f"| `{figure}` minus that of {against} | mean | share | 95 % interval | by seed |",
        "|---|---|---|---|---|",
    ]
    for name, (by_seed, other) in differences(results, figure, against).items():
        values = [*by_seed.values()]
        mean = statistics.fmean(values)
        each = ", ".join(f"{value:+.{digits}f}" for value in values)
        lines.append(
            f"| {name} | {mean:+.{digits}f} | {mean / other:+.0%} | {_sure(values, digits)} "
            f"| {each} |"
        )
    return "\n".join(lines) + "\n"


def brief(results: Mapping[str, Any], figures: Sequence[str], against: str) -> str:
    """Return one table of all figures in Markdown: each mean difference with its interval.

    Distances have their share too, which decibels and rates do not bear.
    """
    found = {figure: differences(results, figure, against) for figure in figures}
    names = dict.fromkeys(name for its in found.values() for name in its)
    lines = [
        f"| minus {against} | " + " | ".join(f"`{figure}`" for figure in figures) + " |",
        "|---" * (len(figures) + 1) + "|",
    ]
    for name in names:
        cells = [name]
        for figure, its in found.items():
            if name not in its:
                cells.append("")
                continue
            by_seed, other = its[name]
            values, digits = [*by_seed.values()], DIGITS[figure]
            mean = statistics.fmean(values)
            share = f", {mean / other:+.0%}" if figure.endswith("frechet") else ""
            cells.append(f"{mean:+.{digits}f}{share} ({_sure(values, digits)})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _sure(values: Sequence[float], digits: int) -> str:
    """The interval of a mean in words; in bold if it is without zero."""
    low, high = interval(values)
    text = f"{low:+.{digits}f} to {high:+.{digits}f}"
    return f"**{text}**" if low > 0 or high < 0 else text


@click.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--against", required=True, metavar="VARIANT", help="What the others are compared with."
)
@click.option(
    "--figure",
    "figures",
    multiple=True,
    default=SHOWN,
    show_default=True,
    type=click.Choice([*DIGITS]),
)
@click.option("--brief", "short", is_flag=True, help="One table, without the seeds.")
def main(path: Path, against: str, figures: tuple[str, ...], short: bool) -> None:
    """Compare a study's variants with one of them, seed by seed."""
    results = json.loads(path.read_text())
    names = list(dict.fromkeys(run["objective"] for run in results["runs"] if "figures" in run))
    if against not in names:
        raise click.ClickException(
            f"{path}: no run of '{against}' has figures; there are {', '.join(names)}"
        )
    if short:
        click.echo(brief(results, figures, against), nl=False)
        return
    click.echo("\n".join(table(results, figure, against) for figure in figures), nl=False)


if __name__ == "__main__":
    main()
