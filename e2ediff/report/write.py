"""Write a report: the page, and its table as CSV, LaTeX and JSON beside it."""

from __future__ import annotations

from datetime import UTC, datetime

from e2ediff import addresses
from e2ediff.ablate.grid import GridError
from e2ediff.addresses import Address
from e2ediff.errors import RunDirectoryError
from e2ediff.report.gather import Gathered
from e2ediff.report.page import Written, render
from e2ediff.report.summary import Summary, summarize
from e2ediff.report.tables import as_json, csv_text, json_text, tex_text
from e2ediff.report.verdict import verdict
from e2ediff.store.storage import Store


def write_report(
    gathered: Gathered, out: Address | None = None, judged: str | None = None
) -> tuple[Written, list[str]]:
    """Write a report.

    Args:
        gathered: The runs.
        out: The page's file. By default `report.html` in the directory of the run or ablation,
            beside `report.json`, `table.csv` and `table.tex`; otherwise these are named after it.
        judged: The figure of the verdict, as for `summarize`.

    Returns:
        Addresses of the files, and the verdict.

    Raises:
        GridError: `out` does not end in .html, or no run has the figure `judged`.
        ResourceError: A file cannot be written.
    """
    summary: Summary = summarize(gathered, judged)
    sentences = verdict(gathered, summary)
    written = datetime.now(UTC).isoformat(timespec="seconds")
    folder, names = _names(gathered, None if out is None else addresses.plain(out))
    store = Store(folder)
    document = as_json(gathered, summary, sentences, written)
    texts = {
        names.json: json_text(document),
        names.csv: csv_text(summary),
        names.tex: tex_text(summary),
        names.html: render(gathered, summary, sentences, written),
    }
    for name, text in texts.items():
        store.write(name, text.encode(errors="backslashreplace"))  # lone surrogates
    places = (store.where(n) for n in (names.html, names.csv, names.tex, names.json))
    return Written(*places), sentences


def _names(gathered: Gathered, out: str | None) -> tuple[str, Written]:
    if out is None:
        return gathered.place, Written("report.html", "table.csv", "table.tex", "report.json")
    folder, slash, name = out.rpartition("/")
    stem, dot, ending = name.rpartition(".")
    if not stem or not dot or ending.lower() not in ("html", "htm"):
        raise GridError(f"--out {out}: give a file whose name ends in .html.")
    if Store(folder or ".").exists(name) and Store(out).list():
        raise RunDirectoryError(f"--out {out}: is a directory.")
    return folder or slash or ".", Written(name, *(f"{stem}.{e}" for e in ("csv", "tex", "json")))
