"""Put the results of one study together that was run in parts, as by several machines.

    python benchmarks/merge.py A/results.json B/results.json --out results.json

Prints the table of all runs. Parts must be of the same recipe, sampler, judges and number of
images, and a variant of the same options; a run that two of them have is taken from the first.
With `--judges-apart` a part may have judges of its own, as those that another kind of machine has
trained are; all runs of a seed must then have the same ones, or they could not be paired.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from score import table

_SAME = ("recipe", "sampler", "count", "match_compute", "judge_epochs", "train_images")


def merged(parts: dict[str, dict[str, Any]], *, apart: bool = False) -> dict[str, Any]:
    """Return the results of all parts, by their files, in the order of variants and seeds.

    With `apart` the judges of all parts are kept, and each run has the numbers of its own.

    Raises:
        click.ClickException: Two parts are of different studies, or with `apart` a seed has runs
            of different judges.
    """
    (first_file, first), *others = parts.items()
    for file, part in others:
        unlike = [key for key in _SAME if part[key] != first[key]]
        unlike += [] if apart or _are_close(part["real"], first["real"]) else ["judges"]
        unlike += [f"options of {name}" for name in _changed(first, part)]
        if unlike:
            raise click.ClickException(
                f"{first_file} and {file} are of different studies: {', '.join(unlike)} differ"
            )
    real: dict[str, Any] = dict(first["real"])
    runs: dict[tuple[str, int], Mapping[str, Any]] = {}
    for part in parts.values():
        numbers = {own: _number(real, said, own) for own, said in part["real"].items()}
        for run in part["runs"]:
            if "figures" in run:
                judges = [numbers[own] for own in run.get("judges", part["real"])]
                own = {**run, "judges": judges} if apart else run
                runs.setdefault((run["objective"], run["seed"]), own)
    names = list(dict.fromkeys(name for name, _ in runs))
    ordered = sorted(runs.values(), key=lambda run: (names.index(run["objective"]), run["seed"]))
    if apart:
        _refuse_unlike_judges(ordered)
    cpus = dict.fromkeys(
        cpu for part in parts.values() for cpu in part["machine"]["cpu"].split(" and ")
    )
    return {
        **first,
        "date": max(part["date"] for part in parts.values()),
        "machine": {**first["machine"], "cpu": " and ".join(cpus)},
        "seeds": sorted({run["seed"] for run in ordered}),
        "real": real,
        "runs": ordered,
    }


def _number(real: dict[str, Any], said: Mapping[str, Any], own: str) -> str:
    """A judge's number among all, of which it becomes one if it is new."""
    for number in (own, *real):
        if number in real and _are_close({"": real[number]}, {"": said}):
            return number
    new = str(len(real))
    real[new] = said
    return new


def _refuse_unlike_judges(runs: Sequence[Mapping[str, Any]]) -> None:
    of_seed: dict[int, Mapping[str, Any]] = {}
    for run in runs:
        other = of_seed.setdefault(run["seed"], run)
        if other["judges"] != run["judges"]:
            raise click.ClickException(
                f"{other['objective']} and {run['objective']} of seed {run['seed']} have "
                "different judges, and could not be paired; score them by the same ones"
            )


def _are_close(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether judges say the same of real images, but for what another machine rounds."""
    return ours.keys() == theirs.keys() and all(
        ours[judge].keys() == theirs[judge].keys()
        and all(math.isclose(ours[judge][k], theirs[judge][k], rel_tol=1e-3) for k in ours[judge])
        for judge in ours
    )


def _changed(first: Mapping[str, Any], part: Mapping[str, Any]) -> list[str]:
    """Return the variants whose options differ between two parts."""
    ours, theirs = (
        {
            run["objective"]: [one for one in run["overrides"] if not one.startswith("seed=")]
            for run in body["runs"]
        }
        for body in (first, part)
    )
    return [name for name in ours if theirs.get(name, ours[name]) != ours[name]]


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--judges-apart", is_flag=True, help="Parts may have judges of their own.")
def main(files: tuple[str, ...], out: Path, judges_apart: bool) -> None:
    """Merge the results of parts of a study, and print their table."""
    parts = {file: json.loads(Path(file).read_text()) for file in files}
    results = merged(parts, apart=judges_apart)
    out.write_text(json.dumps(results, indent=1) + "\n")
    click.echo(table(results), nl=False)


if __name__ == "__main__":
    main()
