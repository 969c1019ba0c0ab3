"""Write the table of a report as JSON, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from e2ediff.host.listing import aligned
from e2ediff.report.gather import Gathered
from e2ediff.report.statistics import CONFIDENCE, Difference
from e2ediff.report.summary import MINUS, CellFigure, Column, Summary, differing, number, signed

_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    MINUS: r"$-$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}
_OF_RUNS = ("cell", "seed", "path", "state", "error", "step", "images", "collapse", "figures")


def as_json(
    gathered: Gathered, summary: Summary, sentences: Sequence[str], written: str
) -> dict[str, Any]:
    """Return everything that the page shows, except curves and pictures.

    Args:
        gathered: The runs.
        summary: Their table.
        sentences: The verdict.
        written: Time of writing, in ISO 8601.
    """
    return {
        "version": 1,
        "kind": gathered.kind,
        "name": gathered.name,
        "created": gathered.created,
        "written": written,
        "command": list(gathered.command),
        "verdict": list(sentences),
        "judged": summary.judged.key,
        "baseline": summary.baseline,
        "match": gathered.match,
        "confidence": CONFIDENCE,
        "columns": [attrs.asdict(c) for c in (*summary.columns, *summary.further)],
        "cells": [
            {
                "name": name,
                "overrides": list(gathered.overrides.get(name, ())),
                **attrs.asdict(cell),
            }
            for name, cell in summary.cells.items()
        ],
        "runs": [
            {
                **{key: getattr(run, key) for key in _OF_RUNS},
                "path": run.path.removeprefix(f"{gathered.place.rstrip('/')}/"),
            }
            for run in gathered.runs
        ],
        "differences": differing(gathered),
    }


def json_text(document: Mapping[str, Any]) -> str:
    """Format a document as JSON."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def csv_text(summary: Summary) -> str:
    """Format a CSV line for each cell, with mean, standard deviation and difference."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    every = [*summary.columns, *summary.further]
    parts = ("mean", "std", "n", "difference", "difference_low", "difference_high")
    head = [f"{column.key} {part}" for column in every for part in parts]
    writer.writerow(["cell", "baseline", "runs", "counted", "collapsed", *head])
    for cell in summary.cells.values():
        row: list[object] = [cell.name, int(cell.name == summary.baseline)]
        row += [cell.runs, cell.counted, cell.collapsed]
        for column in every:
            row += _numbers(cell.figures.get(column.key))
        writer.writerow(row)
    return buffer.getvalue()


def _numbers(figure: CellFigure | None) -> list[object]:
    if figure is None:
        return [""] * 6
    difference = figure.difference
    bounds = [difference.mean, difference.low, difference.high] if difference else [None] * 3
    found = [figure.mean, figure.std, figure.n, *bounds]
    return ["" if value is None else value for value in found]


def tex_text(summary: Summary) -> str:
    """Format the main figures as a LaTeX `tabular`, which needs the package booktabs."""
    columns = summary.columns
    head = ["cell", "runs", "collapsed", *(column.title for column in columns)]
    lines = [
        "% Mean ± standard deviation over seeds; below, the paired difference to the baseline",
        f"% {_comment(summary.baseline)} with its {CONFIDENCE * 100:g} % interval.",
        "% Needs the package booktabs.",
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        "\\toprule",
        _row(head),
        "\\midrule",
    ]
    for cell in summary.cells.values():
        cells, below = [cell.name, str(cell.counted)], ["", "", ""]
        cells.append(f"{cell.collapsed} of {cell.runs}")
        for column in columns:
            value, difference = texts(cell.figures.get(column.key), column)
            cells.append(value)
            below.append(difference)
        lines.append(_row(cells))
        if any(below):
            lines.append(_row(below))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def texts(figure: CellFigure | None, column: Column) -> tuple[str, str]:
    """Format a figure as `mean ± std`, and its difference as `+mean [low, high]`."""
    if figure is None:
        return "", ""
    form = column.form
    value = number(figure.mean, form)
    if figure.std is not None:
        value += f" ± {number(figure.std, form)}"
    difference = figure.difference
    if difference is None:
        return value, ""
    below = signed(difference.mean, form)
    return value, f"{below} {interval(difference, form)}".rstrip()


def interval(difference: Difference, form: str) -> str:
    """Format the interval of a difference, "" if it has none."""
    if difference.low is None or difference.high is None:
        return ""
    return f"[{signed(difference.low, form)}, {signed(difference.high, form)}]"


def plain_lines(summary: Summary, differences: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Format the table for a terminal, one figure a line, then differences of the recipes.

    Args:
        summary: The table.
        differences: Values of the recipe, by path and cell.
    """
    names, cells = list(summary.cells), summary.cells.values()
    rows: list[list[str]] = [["", *names]]
    rows.append(["runs", *(f"{c.counted} of {c.runs}" for c in cells)])
    rows.append(["collapsed", *(f"{c.collapsed} of {c.runs}" for c in cells)])
    for column in summary.columns:
        pairs = [texts(c.figures.get(column.key), column) for c in cells]
        rows.append([column.title, *(value or "-" for value, _ in pairs)])
        if any(below for _, below in pairs):
            rows.append(["  minus baseline", *(below for _, below in pairs)])
    rows += [
        [path, *(values.get(name, "-") for name in names)] for path, values in differences.items()
    ]
    return aligned(rows)


def tex(text: str) -> str:
    """Escape the special characters of LaTeX."""
    return "".join(_TEX.get(sign, sign) for sign in " ".join(text.split()))


def _comment(text: str) -> str:
    return re.sub(r"[\r\n%]+", " ", text)


def _row(cells: Sequence[str]) -> str:
    return " & ".join(tex(cell) for cell in cells) + r" \\"
