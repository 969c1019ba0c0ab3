"""Render the page: one HTML file without scripts, web fonts or external addresses."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import attrs
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from e2ediff.host.leaves import leaves
from e2ediff.report import charts, sheets
from e2ediff.report.gather import Gathered, Run
from e2ediff.report.statistics import CONFIDENCE
from e2ediff.report.summary import Summary, counted_runs, differing, number
from e2ediff.report.tables import texts
from e2ediff.store.records import SAVES, STAGED

_EVENTS = 60
_OWN = ("argv", "seeds", "created", "name", "class_names", "empty_classes")


def render(gathered: Gathered, summary: Summary, sentences: Sequence[str], written: str) -> str:
    """Render the page of a report.

    Args:
        gathered: The runs.
        summary: Their table.
        sentences: The verdict.
        written: Time of writing, in ISO 8601.
    """
    source = resources.files("e2ediff.report").joinpath("page.html.jinja").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    drawn = {cell: [run for run in runs if run.curves] for cell, runs in gathered.cells.items()}
    facts, differ = _environments(gathered.runs)
    described = gathered.described
    return environment.from_string(source).render(
        g=gathered,
        s=summary,
        verdict=sentences,
        written=written,
        command=shlex.join(gathered.command),
        confidence=f"{CONFIDENCE:.0%}",
        texts=texts,
        styles={
            cell: (f"c{i % charts.COLOURS}", charts.dashes(i))
            for i, cell in enumerate(gathered.cells)
        },
        over_images=[Markup(svg) for svg in charts.panels(drawn, over="images")],  # noqa: S704
        over_flops=[Markup(svg) for svg in charts.panels(drawn, over="flops")],  # noqa: S704
        pictures=sheets.rows({c: counted_runs(gathered, c) or r for c, r in drawn.items()}),
        differences=differing(gathered),
        leaves=gathered.runs[0].leaves if gathered.kind == "run" else {},
        events=[(run, list(event_lines(run))) for run in gathered.runs if run.events],
        failures=_failures(gathered.runs),
        tables=[
            columns
            for declared in (True, False)
            if (columns := [c for c in summary.columns if (c.key in described) is declared])
        ],
        followed=[figure for figure in described.values() if "line" in figure.shown_on],
        uncounted={run.uncounted for run in gathered.runs if run.uncounted},
        facts=facts,
        differing_facts=differ,
        number=number,
    )


def _failures(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """List cell, seeds and error of failures, with seeds that failed alike together."""
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for run in runs:
        if run.error:
            seeds.setdefault((run.cell, run.state, run.error), []).append(str(run.seed))
    return [
        (cell, f"seed {', '.join(numbers)}: {state}", error)
        for (cell, state, error), numbers in seeds.items()
    ]


def event_lines(run: Run) -> list[tuple[str, str, str]]:
    """List time, kind and text of a run's events; consecutive saves are one line."""
    found: list[tuple[str, str, str]] = []
    saves = 0
    for event in run.events:
        kind, time = str(event.get("kind", "")), str(event.get("time", ""))[:19].replace("T", " ")
        if kind == STAGED:  # the complete checkpoint is listed
            continue
        if kind == "kernels":
            kind = "started" if not found else "started again"
        rest = {k: v for k, v in event.items() if k not in ("kind", "time")}
        words = ", ".join(f"{k} {_words(v)}" for k, v in rest.items())
        if kind in SAVES:
            saves += 1
            if saves > 1:
                found.pop()
                words = f"{saves} times, last: {words}"
        else:
            saves = 0
        found.append((time, kind, words))
    if len(found) > _EVENTS:
        left = len(found) - _EVENTS
        found = [("", "", f"{left} earlier events: see events.jsonl"), *found[-_EVENTS:]]
    return found


def _words(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(map(_words, value))
    return f"{value:,}" if type(value) is int else str(value)


def _environments(runs: Sequence[Run]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return what the runs' environments have in common, and what differs, by run.

    Command, seeds and start time always differ, and class names belong to the data.
    """
    own = {run: _flat(run.environment) for run in runs if run.environment}
    paths = {path: None for facts in own.values() for path in facts}
    same, differ = {}, {}
    for path in paths:
        values = {
            f"{run.cell} seed {run.seed}": facts.get(path, "-") for run, facts in own.items()
        }
        if len(set(values.values())) == 1:
            same[path] = next(iter(values.values()))
        else:
            differ[path] = values
    return same, differ


def _flat(environment: Mapping[str, Any]) -> dict[str, str]:
    return {
        path: value if isinstance(value, str) else json.dumps(value)
        for path, value in leaves({k: v for k, v in environment.items() if k not in _OWN})
        if value != {}
    }


@attrs.frozen
class Written:
    """Addresses of the files of a report."""

    html: str
    csv: str
    tex: str
    json: str
