"""Put the results of one study together that was run in parts, as by several machines.

    python benchmarks/merge.py A/results.json B/results.json --out results.json

Prints the table of all runs. Parts must be of the same recipe, sampler, judges and number of
images, and a variant of the same options; a run that two of them have is taken from the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from score import table

_SAME = ("recipe", "sampler", "count", "match_compute", "judge_epochs", "train_images")


def merged(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the results of all parts, by their files, in the order of variants and seeds.

    Raises:
        click.ClickException: Two parts are of different studies.
    """
    (first_file, first), *others = parts.items()
    runs = {(run["objective"], run["seed"]): run for run in first["runs"] if "figures" in run}
    for file, part in others:
        unlike = [key for key in _SAME if part[key] != first[key]]
        unlike += [] if _are_close(part["real"], first["real"]) else ["judges"]
        unlike += [f"options of {name}" for name in _changed(first, part)]
        if unlike:
            raise click.ClickException(
                f"{first_file} and {file} are of different studies: {', '.join(unlike)} differ"
            )
        for run in part["runs"]:
            if "figures" in run:
                runs.setdefault((run["objective"], run["seed"]), run)
    names = list(dict.fromkeys(name for name, _ in runs))
    ordered = sorted(runs.values(), key=lambda run: (names.index(run["objective"]), run["seed"]))
    cpus = dict.fromkeys(part["machine"]["cpu"] for part in parts.values())
    return {
        **first,
        "date": max(part["date"] for part in parts.values()),
        "machine": {**first["machine"], "cpu": " and ".join(cpus)},
        "seeds": sorted({run["seed"] for run in ordered}),
        "runs": ordered,
    }


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
def main(files: tuple[str, ...], out: Path) -> None:
    """Merge the results of parts of a study, and print their table."""
    results = merged({file: json.loads(Path(file).read_text()) for file in files})
    out.write_text(json.dumps(results, indent=1) + "\n")
    click.echo(table(results), nl=False)


if __name__ == "__main__":
    main()
