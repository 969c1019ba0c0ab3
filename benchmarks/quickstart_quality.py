"""Train a recipe with several objectives and seeds, and score what the runs can do.

    python benchmarks/quickstart_quality.py --out DIR

A study (`study.py`) with a variant for each objective; leaves what every study leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from study import Study, Variant, options, run

from e2ediff.errors import E2EDiffError
from e2ediff.host.plugins import Host, load
from e2ediff.host.recipe import load_recipe
from e2ediff.parts.sources import FashionMNIST

_REPOSITORY = Path(__file__).resolve().parents[1]


def study_of(
    host: Host,
    recipe: str,
    objectives: Sequence[str],
    sets: Sequence[str] = (),
    *,
    match_compute: bool = False,
) -> Study:
    """A variant for each objective; options they share are equal.

    `two_stage` gets a denoiser with weights of its own, which it needs.
    """
    base = load_recipe(host, recipe, sets)
    if not isinstance(base.data, FashionMNIST):
        raise click.UsageError(
            "the judge knows Fashion-MNIST only; give a recipe that trains on it"
        )
    shared = getattr(base.backbone, "trunks", "") == "one"
    apart = {"two_stage": ["backbone.trunks=denoiser_apart"]} if shared else {}
    variants = {name: Variant(apart.get(name, ()), objective=name) for name in objectives}
    return Study(recipe, variants, match_compute=match_compute)


@click.command()
@click.option(
    "--recipe", default=str(_REPOSITORY / "recipes" / "quickstart.yaml"), show_default="quickstart"
)
@click.option("--objectives", default="dsd,coupled,detached,two_stage", show_default=True)
@click.option("--count", default=1000, type=click.IntRange(2), help="Images generated a run.")
@click.option(
    "--match-compute",
    is_flag=True,
    help="Give every objective the FLOPs of the recipe's own, instead of its steps.",
)
@options
def main(
    recipe: str, objectives: str, match_compute: bool, sets: tuple[str, ...], **given: Any
) -> None:
    """Train by a recipe with each objective and seed, score the runs, write a table."""
    try:
        study = study_of(load(), recipe, objectives.split(","), sets, match_compute=match_compute)
    except E2EDiffError as error:
        raise click.ClickException(str(error)) from error
    run(study, sets=sets, **given)


if __name__ == "__main__":
    main()
