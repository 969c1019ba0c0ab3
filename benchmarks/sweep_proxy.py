"""Does the cheap score of `e2ediff sweep` rank candidates as a full evaluation does?

    python benchmarks/sweep_proxy.py RUN --out DIR --jobs 2

Sweeps one grid at several counts, evaluates every candidate in full with another seed, and
compares the rankings. Runs the commands that a user would; what is in DIR is not made again.
Features are those of the quickstart's judge, so RUN must be one on Fashion-MNIST.
Needs the plugin e2ediff-sweep: pip install -c constraints.txt . plugins/e2ediff-sweep
Leaves `results.json` and `table.md`.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import click
import numpy as np
from judge import export_judge, train_judge

AXES = ("guidance.scale=1,1.25,1.5,2,3", "sampler.spacing=uniform,karras")


@attrs.frozen(kw_only=True)
class Candidate:
    """Settings of one row of a sweep."""

    weights: str
    settings: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """As a command has them."""
        return ["--weights", self.weights, *(w for s in self.settings for w in ("--set", s))]

    @property
    def title(self) -> str:
        """As a table has it."""
        return " ".join((self.weights, *self.settings))


def command(*words: object) -> None:
    """One command of e2ediff, on one thread.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "e2ediff", *map(str, words)], check=True, env=alone)


def swept(
    run: str, count: int, axes: Sequence[str], features: str, out: Path
) -> dict[Candidate, dict[str, Any]]:
    """A sweep's rows, by candidate."""
    varied = [word for axis in axes for word in ("--vary", axis)]
    words = ("--count", count, "--features", features, "--out", out)
    command("sweep", run, "--grid", *varied, *words)
    with (out / "sweep.csv").open(newline="") as file:
        return {
            Candidate(weights=row["weights"], settings=tuple(row["settings"].split())): {
                "score": float(row["score"]),
                "error": float(row["error"]),
                "tied": row["tied"] == "yes",
            }
            for row in csv.DictReader(file)
        }


def evaluated(
    run: str, candidate: Candidate, count: int, features: str, out: Path
) -> dict[str, float]:
    """A full evaluation's distances, with a seed that the sweep has not seen."""
    if not any(out.glob("*.json")):
        words = ("--count", count, "--seed", 1, "--metrics", "fid,kid", "--features", features)
        command("eval", run, *candidate.words, *words, "--out", out)
    (file,) = out.glob("*.json")
    scores = json.loads(file.read_text())["scores"]
    return {name.partition("-")[0]: float(found["value"]) for name, found in scores.items()}


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, for figures without ties."""
    first, second = (np.argsort(np.argsort(np.asarray(x))) for x in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def verdict(
    proxy: Mapping[Candidate, Mapping[str, Any]], full: Mapping[Candidate, Mapping[str, float]]
) -> dict[str, Any]:
    """How a sweep's ranking compares with the full one."""
    names = [*full]
    picked = min(names, key=lambda c: float(proxy[c]["score"]))
    scores = [float(proxy[c]["score"]) for c in names]
    found: dict[str, Any] = {
        "picked": picked.title,
        "tied": sum(bool(proxy[c]["tied"]) for c in names),
    }
    for name in ("KD", "FD"):
        values = [full[c][name] for c in names]
        best = names[int(np.argmin(values))]
        found[name] = {
            "correlation": rank_correlation(scores, values),
            "best": best.title,
            "best_is_marked": bool(proxy[best]["tied"]),
            "of_best": full[picked][name] / full[best][name],
        }
    return found


def table(
    proxies: Mapping[int, Mapping[Candidate, Mapping[str, Any]]],
    full: Mapping[Candidate, Mapping[str, float]],
) -> str:
    """Markdown: candidates by their full distance, then a verdict on each count."""
    counts = sorted(proxies)
    lines = [
        "| candidate | full FD | full KD | " + " | ".join(f"KD of {n}" for n in counts) + " |",
        "|---|---|---|" + "---|" * len(counts),
    ]
    for c in sorted(full, key=lambda c: full[c]["FD"]):
        cells = [f"{full[c]['FD']:.2f}", f"{full[c]['KD']:.4g}"]
        for n in counts:
            row = proxies[n][c]
            mark = "\\* " if row["tied"] else ""
            cells.append(f"{mark}{row['score']:.4g} ± {row['error']:.2g}")
        lines.append(f"| `{c.title}` | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| images a candidate | marked | rank correlation with full KD | with full FD "
        "| best by FD is marked | FD of the pick, over the best |",
        "|---|---|---|---|---|---|",
    ]
    for n in counts:
        v = verdict(proxies[n], full)
        lines.append(
            f"| {n} | {v['tied']} of {len(full)} | {v['KD']['correlation']:.2f} "
            f"| {v['FD']['correlation']:.2f} | {'yes' if v['FD']['best_is_marked'] else 'no'} "
            f"| {v['FD']['of_best']:.3f} |"
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("run")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where to write.")
@click.option("--vary", "axes", multiple=True, default=AXES, show_default=True)
@click.option("--count", "counts", multiple=True, type=int, default=(128, 512), show_default=True)
@click.option("--full", default=5000, show_default=True, help="Images of a full evaluation.")
@click.option("--jobs", default=1, show_default=True, help="Evaluations at once.")
def main(
    run: str, out: Path, axes: tuple[str, ...], counts: tuple[int, ...], full: int, jobs: int
) -> None:
    """Compare the ranking of sweeps of RUN with that of full evaluations."""
    features = export_judge(train_judge(0, out / "judges"), out / "judge.pt2")
    proxies = {n: swept(run, n, axes, features, out / f"proxy-{n}") for n in counts}
    candidates = [*next(iter(proxies.values()))]
    places = {c: out / "full" / str(i) for i, c in enumerate(sorted(candidates, key=str))}
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda c: evaluated(run, c, full, features, places[c]), candidates)
        scores = dict(zip(candidates, found, strict=True))
    results = {
        "full": {c.title: scores[c] for c in candidates},
        "proxies": {n: {c.title: row for c, row in proxies[n].items()} for n in counts},
        "verdicts": {n: verdict(proxies[n], scores) for n in counts},
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.md").write_text(table(proxies, scores))
    click.echo(out / "table.md")


if __name__ == "__main__":
    main()
