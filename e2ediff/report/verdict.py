"""Summarise a report's figures in sentences that claim no more than the figures show."""

from __future__ import annotations

from collections.abc import Sequence

from e2ediff.report.gather import Gathered, Run
from e2ediff.report.statistics import CONFIDENCE, paired
from e2ediff.report.summary import CellSummary, Column, Summary, number, signed
from e2ediff.report.tables import interval, texts


def verdict(gathered: Gathered, summary: Summary) -> list[str]:
    """Return sentences on the best cell, whether that is significant, and on failures."""
    if gathered.kind == "run":
        return _one_run(gathered.runs[0])
    sentences = [*_best(summary), *_collapsed(summary)]
    if gathered.kind == "group":
        sentences += _unfinished(gathered)
    else:
        sentences += _shorter(gathered)
        sentences += [text for run in gathered.runs for text in _lengthened(run)]
    return [*sentences, *_costs(summary, gathered.match)]


def _one_run(run: Run) -> list[str]:
    total = run.cost.total_steps if run.cost else None
    of = f" of {total:,}" if total else ""
    why = f" ({run.reason})" if run.reason else ""
    state = {"done": "All of its steps are done", "failed": "It failed"}.get(
        run.state, f"Its state is '{run.state}'{why}"
    )
    found = [f"{state}: step {run.step:,}{of}, {run.images:,} images."]
    if run.error:
        found.append(f"The error: {run.error}")
    figures = run.figures
    shown = [
        f"{figure.title} {number(figures[key], figure.form)}"
        for key, figure in run.described.items()
        if key in figures and "table" in figure.shown_on
    ]
    if shown:
        found.append(f"Last measured: {', '.join(shown)}.")
    if run.collapse:
        found.append(f"Its latents have collapsed, {run.collapse}.")
    elif figures:
        found.append("Its latents show no sign of collapse.")
    found += _lengthened(run)
    found.append("One run does not show how much its figures vary by chance.")
    return found


def _best(summary: Summary) -> list[str]:
    column, key = summary.judged, summary.judged.key
    if not key:
        return ["No figure says which cell is better: there is nothing to compare yet."]
    measured = [c for c in summary.cells.values() if key in c.figures]
    if not measured:
        return [f"No run has a final {column.title}: there is nothing to compare yet."]
    if len(measured) == 1:
        return [
            f"Only {measured[0].name} has a final {column.title}: there is nothing to compare."
        ]
    if not column.better:
        return [f"{column.title} has no better direction, so no cell is called best."]
    sound = [c for c in measured if not c.collapsed] or measured
    sign = 1 if column.better == "high" else -1
    best = max(sound, key=lambda c: sign * c.figures[key].mean)
    baseline = summary.cells[summary.baseline]
    word = "highest" if sign > 0 else "lowest"
    among = "" if len(sound) == len(measured) else " among the cells that did not collapse"
    figure = best.figures[key]
    found = [
        f"{best.name} has the {word} {column.title}{among}: {texts(figure, column)[0]} over "
        f"{_seeds(figure.n)}."
    ]
    if column.of == "reconstructions":
        found.append(
            f"{column.title} judges reconstruction; it does not judge samples, which `scores` in "
            "the recipe and e2ediff eval do."
        )
    if key not in baseline.figures:
        return [*found, f"The baseline {baseline.name} has none: no difference can be given."]
    if best is baseline:
        others = [c for c in measured if c is not baseline]
        best = max(others, key=lambda c: sign * c.figures[key].mean)
        found.append(f"It is the baseline; the next is {best.name}.")
    found += _difference(best, baseline, column, len(measured) - 1)
    return found


def _difference(
    cell: CellSummary, baseline: CellSummary, column: Column, comparisons: int
) -> list[str]:
    figure = cell.figures[column.key]
    difference, form = figure.difference, column.form
    what = f"{cell.name} minus {baseline.name}"
    if difference is None:
        return [f"{what}: they share no seed, so no paired difference can be given."]
    mean, between = signed(difference.mean, form), interval(difference, form)
    if not between:
        return [
            f"{what}: {mean}, on {_seeds(difference.n)}. With fewer than two seeds no interval "
            "can be given: whether the difference is real cannot be said."
        ]
    level = 1 - (1 - CONFIDENCE) / comparisons
    strict = paired(figure.values, baseline.figures[column.key].values, level)
    assert strict is not None
    if not difference.excludes_zero:
        meaning = "The interval includes 0: these seeds do not show a real difference."
    elif comparisons == 1:
        meaning = "The interval excludes 0: the difference is more than chance between seeds."
    elif strict.excludes_zero:
        meaning = (
            "The interval excludes 0, and does so after Bonferroni's correction for "
            f"{comparisons} comparisons: the difference is more than chance between seeds."
        )
    else:
        meaning = (
            "The interval excludes 0, but no longer after Bonferroni's correction for "
            f"{comparisons} comparisons: it may be the luckiest of several. More seeds would tell."
        )
    over = f"interval {between} over {_seeds(difference.n)}"
    return [f"{what}: {mean}, {CONFIDENCE:.0%} {over}.", meaning]


def _collapsed(summary: Summary) -> list[str]:
    cells = summary.cells.values()
    bad = [f"{c.name} in {c.collapsed} of {c.runs} runs" for c in cells if c.collapsed]
    if bad:
        return [f"Latents collapsed: {'; '.join(bad)}."]
    return ["No run ended with collapsed latents."] if any(c.counted for c in cells) else []


def _unfinished(gathered: Gathered) -> list[str]:
    runs = gathered.runs
    failed = [run for run in runs if run.state in ("failed", "damaged")]
    others = [run for run in runs if not run.is_done and run not in failed]
    found = []
    if failed:
        found.append(
            f"{len(failed)} of {len(runs)} runs failed and are left out of all figures: "
            f"{_names(failed)}."
        )
    if others:
        found.append(f"{len(others)} of {len(runs)} runs are not done yet: {_names(others)}.")
    return found


def _shorter(gathered: Gathered) -> list[str]:
    runs = [run for run in gathered.runs if not run.is_done]
    found = []
    if runs:
        states = ", ".join(f"{run.cell} ({run.state}, step {run.step:,})" for run in runs)
        found.append(f"Not all runs are done, and their figures are not final: {states}.")
    if len({run.images for run in gathered.runs}) > 1:
        found.append("The runs have seen different numbers of images.")
    return found


def _lengthened(run: Run) -> list[str]:
    """Return what the schedule of a run did where the run was continued with another length."""
    return [
        f"{run.cell} was continued at step {event.get('step')}: "
        f"{str(event.get('text')).partition('. ')[0]}."
        for event in run.events
        if event.get("kind") == "schedule" and event.get("phases")
    ]


def _costs(summary: Summary, match: str) -> list[str]:
    found = [c.figures["flops_total"].mean for c in summary.cells.values()
             if "flops_total" in c.figures]  # fmt: skip
    if len(found) < 2:
        return []
    low, high = number(min(found), "si"), number(max(found), "si")
    if max(found) <= 1.02 * min(found):
        return [f"All cells were given the same compute, within 2 %: {high}FLOPs."]
    given = " (they were matched by steps)" if match == "steps" else ""
    return [f"Compute differs between cells, from {low}FLOPs to {high}FLOPs{given}."]


def _names(runs: Sequence[Run]) -> str:
    names = [f"{run.cell} seed {run.seed}" for run in runs]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"
