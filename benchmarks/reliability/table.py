"""Write the tables of `docs/guarantees.md` from the results in `docs/results/reliability`.

python -m benchmarks.reliability.table            # the page from the kept results
python -m benchmarks.reliability.table --keep DIR # keep the results in DIR first
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results/reliability"
PAGE = ROOT / "docs/guarantees.md"
BEGIN = "<!-- made by `python -m benchmarks.reliability.table`; do not edit -->"
END = "<!-- end -->"
ORDER = ("kills", "mutations", "resume_cuts", "returns", "full_disk", "signals",
         "command_signals", "two_ranks", "object_store", "s3_server", "fuzz", "files")  # fmt: skip


def results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the kept results in their order."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(found, key=lambda one: ORDER.index(one["suite"]))


def tables(found: list[dict[str, Any]]) -> str:
    """Return the tables of all results."""
    lines = ["| attack | trials | promise | broken |", "|---|---|---|---|"]
    for one in found:
        title, trials = one["title"], f"{one['trials']:,}"
        if why := one.get("skipped"):
            lines.append(f"| {title} | 0 | not tried: {why} | |")
            continue
        promises = [*one["promises"].values()]
        if one["aborted"]:
            promises.append(["every trial comes to its end", one["aborted"]])
        for text, broken in promises:
            lines.append(f"| {title} | {trials} | {text} | {broken:,} |")
            title = trials = ""
    lines += ["", "| attack | what happened | command | code | date |", "|---|---|---|---|---|"]
    for one in found:
        facts = [f"{name}: {count:,}" for name, count in one["facts"].items()]
        facts += [f"{name}: {_spread(values)}" for name, values in one["figures"].items()]
        facts += [f"CPU seconds of a trial: median {one['cpu_seconds_median']:g}"]
        lines.append(
            f"| {one['title']} | {'; '.join(facts)} | `{one['command']}` | {one['code']} "
            f"| {one['date']} |"
        )
    machines = []
    for one in found:
        m = one["machine"]
        text = (
            f"{m['cpu']}, {m['cores']} cores; {m['system']}; Python {m['python']}; "
            f"torch {m['torch']}"
        )
        if text not in machines:
            machines.append(text)
    return "\n".join([*lines, "", *(f"Machine: {text}." for text in machines)])


def _spread(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def page(text: str, found: list[dict[str, Any]]) -> str:
    """Return the page with these results' tables in their place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{after}"


def main(words: list[str] | None = None) -> int:
    """Keep new results if there are any, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability.table")
    parser.add_argument("--keep", metavar="DIR", help="keep the results in this directory")
    given = parser.parse_args(words)
    if given.keep:
        RESULTS.mkdir(parents=True, exist_ok=True)
        for path in Path(given.keep).glob("*.json"):
            one = json.loads(path.read_text())
            one["failures"] = one["failures"][:5]
            (RESULTS / path.name).write_text(json.dumps(one, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), results()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
