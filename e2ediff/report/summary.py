"""Summarise runs as a table: figures by cell, over seeds, and against the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from e2ediff.ablate.grid import GridError
from e2ediff.figure import Figure
from e2ediff.report.gather import Gathered, Run, differing_values
from e2ediff.report.statistics import Difference, MeanStd, paired, spread

MINUS = "\N{MINUS SIGN}"


@attrs.frozen
class Column:
    """A figure of the table: `form` is `.2f`-like, or `si`; `better` is high, low or neither.

    `of` is what it scores: samples, reconstructions, or neither.
    """

    key: str
    title: str
    form: str = ".4g"
    better: str = ""
    fixed: bool = False
    of: str = ""


_COST = (
    Column("wall_images_per_second", "images/s", ".0f", "high"),
    Column("parameters", "parameters", "si", fixed=True),
    Column("flops_per_image", "FLOPs / image", "si", fixed=True),
    Column("flops_total", "FLOPs", "si", fixed=True),
)


@attrs.frozen
class CellFigure(MeanStd):
    """One figure of one cell over its seeds, and its paired difference to the baseline.

    `values` are by seed; `difference` is None for the baseline itself, for figures that do not
    depend on the seed, and if no seed is shared.
    """

    values: Mapping[int, float]
    difference: Difference | None


@attrs.frozen
class CellSummary:
    """A cell's figures, from `counted` of its `runs`; `collapsed` counts among all of them."""

    name: str
    runs: int
    counted: int
    collapsed: int
    figures: Mapping[str, CellFigure]


@attrs.frozen
class Summary:
    """The table: `columns`, then `further` ones; `judged` is the figure of the verdict."""

    columns: Sequence[Column]
    further: Sequence[Column]
    cells: Mapping[str, CellSummary]
    baseline: str
    judged: Column


def counted_runs(gathered: Gathered, cell: str) -> list[Run]:
    """Return the runs of a cell that count: in an ablation, those that are done."""
    runs = gathered.cells[cell]
    if gathered.kind == "group":
        return [run for run in runs if run.is_done]
    return [run for run in runs if run.figures]


def summarize(gathered: Gathered, judged: str | None = None) -> Summary:
    """Summarise the figures of every cell, with differences to the baseline.

    Args:
        gathered: The runs.
        judged: The figure of the verdict; by default a score of samples that every cell has,
            preferably a distance, else a figure of reconstructions.

    Raises:
        GridError: No run has the figure `judged`.
    """
    used = {cell: counted_runs(gathered, cell) for cell in gathered.cells}
    by_cell = {cell: _values(runs) for cell, runs in used.items()}
    seen = {key for values in by_cell.values() for key in values}
    if judged is not None and judged not in seen:
        raise GridError(
            f"--judge {judged}: no run has this figure. There are: {', '.join(sorted(seen))}."
        )
    described = gathered.described
    columns = columns_of(seen, described)
    base = by_cell[gathered.baseline]
    every = [*columns, *_further(seen, columns, described)]
    cells = {}
    for cell, values in by_cell.items():
        runs, others = gathered.cells[cell], base if cell != gathered.baseline else {}
        figures = {
            c.key: _figure(values[c.key], others.get(c.key), fixed=c.fixed)
            for c in every
            if c.key in values
        }
        collapsed = sum(bool(run.collapse) for run in runs)
        cells[cell] = CellSummary(cell, len(runs), len(used[cell]), collapsed, figures)
    key = judged or judged_of([values for values in by_cell.values() if values], described)
    about = next((c for c in every if c.key == key), Column(key, key))
    return Summary(columns, every[len(columns) :], cells, gathered.baseline, about)


def judged_of(cells: Sequence[Mapping[str, object]], described: Mapping[str, Figure]) -> str:
    """Choose the figure that compares cells best; "" if there is none.

    Scores of samples that all cells have come before figures of reconstructions, evaluations
    before scores measured in training, which have curves, and distances before others.
    """
    shared = set.intersection(*(set(cell) for cell in cells)) if cells else set()
    judging = [f for f in described.values() if f.better and "table" in f.shown_on]
    samples = [f for f in judging if f.of == "samples" and f.name in shared]
    if samples:
        return min(samples, key=lambda f: ("charts" in f.shown_on, f.better != "low", f.name)).name
    return next((f.name for f in judging if f.of == "reconstructions"), "")


def columns_of(seen: set[str], described: Mapping[str, Figure]) -> list[Column]:
    """Choose the main columns among the existing figures, scores of samples first."""
    losses = [
        Column(key, f"loss: {key.removeprefix('loss/')}", ".4g", "low")
        for key in sorted(seen)
        if key.startswith("loss/")
    ]
    first = [f for f in described.values() if "table" in f.shown_on]
    samples = sorted((f for f in first if f.of == "samples"), key=lambda f: f.name)
    shown = [_column(f) for f in (*samples, *(f for f in first if f.of != "samples"))]
    return [column for column in (*shown, *losses, *_COST) if column.key in seen]


def _column(figure: Figure) -> Column:
    return Column(figure.name, figure.title, figure.form, figure.better or "", of=figure.of)


def _further(
    seen: set[str], columns: Sequence[Column], described: Mapping[str, Figure]
) -> list[Column]:
    others = sorted(seen - {column.key for column in columns})
    found = [_column(described.get(key) or Figure(key)) for key in others]
    return [attrs.evolve(c, title=c.title.replace("wall_", "").replace("_", " ")) for c in found]


def _values(runs: Sequence[Run]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        figures = dict(run.figures)
        if run.cost is not None:
            figures["parameters"] = run.cost.parameters
            figures["flops_per_image"] = run.cost.per_image
            figures["flops_total"] = run.cost.at(run.images)
        for key, value in figures.items():
            found.setdefault(key, {})[run.seed] = value
    return found


def _figure(
    values: Mapping[int, float], baseline: Mapping[int, float] | None, *, fixed: bool
) -> CellFigure:
    own = spread(list(values.values()))
    difference = paired(values, baseline) if baseline else None
    if fixed and difference:  # the seed does not change it
        difference = attrs.evolve(difference, low=None, high=None)
    return CellFigure(own.n, own.mean, None if fixed else own.std, values, difference)


def differing(gathered: Gathered) -> dict[str, dict[str, str]]:
    """Return values of the recipe that differ between cells, by path and cell."""
    return differing_values(gathered.recipes)


def number(value: float, form: str) -> str:
    """Format a figure by a format such as `.2f`, or with an SI prefix."""
    if form != "si":
        return f"{value:,{form}}" if form.endswith("f") else f"{value:{form}}"
    for power, prefix in zip(range(18, 0, -3), "EPTGMk", strict=True):
        if abs(value) >= 10.0**power:
            return f"{value / 10.0**power:.3g} {prefix}"
    return f"{value:.3g}"


def signed(value: float, form: str) -> str:
    """Format a figure as `number` does, with a sign and a typographic minus."""
    text = number(abs(value), form)
    return f"{MINUS if value < 0 else '+'}{text}"
