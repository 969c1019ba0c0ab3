"""How many images a run need be scored on: how distances of one run move with other noise.

    python benchmarks/sample_counts.py RUN RUN ... --judges DIR/judges

For each run and count: the mean Fréchet distance over several sets of generated images, of which
each has noise of its own, and its standard deviation over the sets, which is what the number of
images adds to the spread over seeds. Judges are those of `study.py`, whose folder has their
weights; what is not there is trained.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from judge import EPOCHS, features, frechet_distance, train_judge
from score import Data, balanced_labels

from e2ediff.errors import E2EDiffError
from e2ediff.sample.load import load_model


def distances(
    run: str, judges: Path, counts: Sequence[int], sets: int, *, number: int = 3, epochs: int
) -> dict[int, list[float]]:
    """Return for each count the distance of each set, averaged over judges.

    A smaller set is the beginning of the larger one of the same noise.

    Raises:
        E2EDiffError: The run cannot be loaded.
    """
    model, most = load_model(run), max(counts)
    data = Data.open(model.recipe.data)
    known = [train_judge(i, judges, model.recipe.data, epochs=epochs) for i in range(number)]
    real = [features(judge, data.train.x) for judge in known]
    found: dict[int, list[float]] = {count: [] for count in counts}
    for seed in range(sets):
        x = model.sample(balanced_labels(most, model.recipe.data.image.classes), seed=seed)
        seen = [features(judge, x) for judge in known]
        for count in counts:
            said = [
                frechet_distance(ours[:count], theirs)
                for ours, theirs in zip(seen, real, strict=True)
            ]
            found[count].append(statistics.fmean(said))
    return found


def _counts(context: click.Context, option: click.Parameter, text: str) -> list[int]:
    try:
        return sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise click.BadParameter(f"{text!r}: expected numbers such as 500,1000") from None


@click.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--judges", required=True, type=click.Path(path_type=Path), help="Their folder.")
@click.option("--judge-epochs", "epochs", default=EPOCHS, type=click.IntRange(1))
@click.option("--counts", default="500,1000,2000", show_default=True, callback=_counts)
@click.option("--sets", default=5, show_default=True, type=click.IntRange(2))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="A JSON file.")
def main(
    runs: tuple[str, ...],
    judges: Path,
    epochs: int,
    counts: list[int],
    sets: int,
    out: Path | None,
) -> None:
    """Print a row for each run and count: the mean distance, its deviation, and all sets'."""
    found: dict[str, Any] = {}
    click.echo("| run | images | Fréchet distance | standard deviation | of each set |")
    click.echo("|---|---|---|---|---|")
    for run in runs:
        try:
            its = distances(run, judges, counts, sets, epochs=epochs)
        except E2EDiffError as error:
            raise click.ClickException(str(error)) from error
        name = Path(run).name
        found[name] = {str(count): values for count, values in its.items()}
        for count, values in its.items():
            each = ", ".join(f"{value:.1f}" for value in values)
            mean, deviation = statistics.fmean(values), statistics.stdev(values)
            click.echo(f"| {name} | {count:,} | {mean:.1f} | {deviation:.2f} | {each} |")
    if out:
        out.write_text(json.dumps({"sets": sets, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
