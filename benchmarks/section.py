"""Print the tables of a section of docs/results/end-to-end.md, from the results of its study.

    python benchmarks/section.py docs/results/data/end-to-end.json --against 'two_stage, equal'

What each variant reaches, how it differs from one of them by seed (`paired.py --brief`), what it
costs, and, of runs that have them, held-out losses over training. Means and standard deviations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from paired import SHOWN, brief
from score import summary

REACHED: Mapping[str, tuple[str, str]] = {
    "agreement": ("label agreement", ".3f"),
    "frechet": ("Fréchet distance", ".1f"),
    "pixel_frechet": ("of pixels", ".1f"),
    "psnr": ("reconstruction PSNR, dB", ".2f"),
    "reconstruction_frechet": ("distance of reconstructions", ".2f"),
}
COSTS: Mapping[str, tuple[str, str, float]] = {
    "steps": ("steps", ",.0f", 1),
    "images": ("images, thousands", ",.0f", 1e-3),
    "parameters": ("parameters, M", ".2f", 1e-6),
    "flops_per_image": ("MFLOPs an image", ".1f", 1e-6),
    "flops_total": ("TFLOPs in all", ".2f", 1e-12),
    "train_seconds": ("training, s", ",.0f", 1),
}
OF_REAL: Mapping[str, str] = {
    "agreement": "accuracy",
    "frechet": "frechet",
    "pixel_frechet": "pixel_frechet",
}
"""What judges say of held-out images in place of generated ones."""


def of_share(share: float) -> Callable[[Mapping[str, Sequence[float]]], float]:
    """Return what finds PSNR at the survey nearest to a share of the training."""

    def found(history: Mapping[str, Sequence[float]]) -> float:
        images = history["images"]
        nearest = min(range(len(images)), key=lambda i: abs(images[i] - share * images[-1]))
        return history["psnr"][nearest]

    return found


LOSSES: Mapping[str, tuple[Callable[[Mapping[str, Sequence[float]]], float], str]] = {
    "PSNR, dB, after a tenth": (of_share(0.1), ".2f"),
    "half": (of_share(0.5), ".2f"),
    "4/5": (of_share(0.8), ".2f"),
    "the end": (of_share(1.0), ".2f"),
    "denoising error, t = 0.5, lowest": (lambda history: min(history["unexplained@0.5"]), ".3f"),
    "at the end": (lambda history: history["unexplained@0.5"][-1], ".3f"),
}


def section(results: Mapping[str, Any], against: str) -> str:
    """Return a section's tables in Markdown, a row for each variant in the order of its runs."""
    runs = [run for run in results["runs"] if "figures" in run]
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_name.setdefault(run["objective"], []).append(run)
    paired = _paired(by_name, against)
    real = [*results["real"].values()]
    floor = [
        _short([one[OF_REAL[key]] for one in real], form) if key in OF_REAL else ""
        for key, (_, form) in REACHED.items()
    ]
    tables = [
        _table(
            [title for title, _ in REACHED.values()],
            {
                name: [
                    _short([run["figures"][key] for run in its], form)
                    for key, (_, form) in REACHED.items()
                ]
                for name, its in by_name.items()
            }
            | {"*held-out images*": floor},
        ),
        brief({"runs": paired}, SHOWN, against) if paired else "",
        _table(
            [title for title, *_ in COSTS.values()],
            {
                name: [
                    _short([run["figures"][key] * scale for run in its], form)
                    for key, (_, form, scale) in COSTS.items()
                ]
                for name, its in by_name.items()
            },
        ),
    ]
    if all("history" in run for run in runs):
        tables.append(
            _table(
                [*LOSSES],
                {
                    name: [
                        _short([found(run["history"]) for run in its], form)
                        for found, form in LOSSES.values()
                    ]
                    for name, its in by_name.items()
                },
            )
        )
    return "\n".join(table for table in tables if table)


def _paired(
    by_name: Mapping[str, Sequence[Mapping[str, Any]]], against: str
) -> list[Mapping[str, Any]]:
    """Runs of variants that share two seeds or more with the other, as an interval needs them."""
    theirs = {run["seed"] for run in by_name[against]}
    return [
        run
        for its in by_name.values()
        if len(theirs & {run["seed"] for run in its}) > 1
        for run in its
    ]


def _short(values: Sequence[float], form: str) -> str:
    return summary(values, form, deviation=False)


def _table(titles: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [["objective", *titles], ["---"] * (1 + len(titles))]
    lines += [[name, *cells] for name, cells in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@click.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--against", required=True, metavar="VARIANT", help="What others are compared with.")
def main(path: Path, against: str) -> None:
    """Print the tables of one section from a study's results."""
    results = json.loads(path.read_text())
    if not any(run["objective"] == against and "figures" in run for run in results["runs"]):
        raise click.ClickException(f"{path}: no run of '{against}' has figures")
    click.echo(section(results, against), nl=False)


if __name__ == "__main__":
    main()
