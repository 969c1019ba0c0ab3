"""Rank candidates, mark those tied with the best, and format a table and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import attrs

from e2ediff_sweep.proxy import Mean, Z, difference
from e2ediff_sweep.search import Result

_COLUMNS = (
    "place", "score", "error", "low", "high", "behind", "behind_error", "tied", "network_calls",
    "weights", "settings", "file",
)  # fmt: skip


@attrs.frozen(eq=False)
class RankedCandidate:
    """A candidate's rank: `behind` is the paired difference to the best one."""

    result: Result
    behind: Mean

    @property
    def tied(self) -> bool:
        """Return whether 0 lies in the 95 % interval of the difference."""
        return self.behind.value <= Z * self.behind.error


def ranked(results: Sequence[Result]) -> list[RankedCandidate]:
    """Rank results, the best first."""
    order = sorted(results, key=lambda r: r.mean.value)
    return [RankedCandidate(r, difference(r.shares, order[0].shares)) for r in order]


def cheapest(rows: Sequence[RankedCandidate]) -> RankedCandidate:
    """Return the candidate with the fewest network calls among those tied with the best."""
    return min((row for row in rows if row.tied), key=lambda row: row.result.calls)


def lines(rows: Sequence[RankedCandidate]) -> list[str]:
    """Format the table; `*` marks the best and those tied with it."""
    (name,) = rows[0].result.card.scores
    head = ("", name, "+-", "behind the best", "calls", "candidate")
    cells = [head]
    for row in rows:
        mean, behind = row.result.mean, row.behind
        gap = "" if row is rows[0] else f"{behind.value:.2g} +- {Z * behind.error:.2g}"
        mark, figures = "*" if row.tied else "", (f"{mean.value:.5g}", f"{Z * mean.error:.2g}")
        calls = f"{row.result.calls:g}"
        cells.append((mark, *figures, gap, calls, row.result.candidate.words))
    widths = [max(len(c[i]) for c in cells) for i in range(len(head) - 1)]
    return [
        "  ".join([*(c.ljust(w) for c, w in zip(one[:-1], widths, strict=True)), one[-1]])
        for one in cells
    ]


def as_csv(rows: Sequence[RankedCandidate]) -> str:
    """Format all figures as CSV, one line a candidate; intervals are 95 %."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    for place, row in enumerate(rows, start=1):
        result, mean = row.result, row.result.mean
        low, high = mean.value - Z * mean.error, mean.value + Z * mean.error
        table.writerow(
            [place, mean.value, mean.error, low, high, row.behind.value, row.behind.error,
             "yes" if row.tied else "no", result.calls, result.candidate.weights,
             " ".join(result.candidate.overrides), result.card.place.rpartition("/")[2]]
        )  # fmt: skip
    return text.getvalue()
