"""What grows with the length of a run and the size of a data set.

    python benchmarks/speed/growth.py
    python benchmarks/speed/growth.py --lines 1000000 --rounds 1 --json

Lines of nine figures are logged, read, drawn, reported and dropped again; a folder of empty files
is opened, and the order of an epoch drawn. Memory is the most that a work needed beyond what the
process had before, so it is read off Linux alone; freed memory is given back before each work,
so that none is reused unseen. The log is whole again before each round of dropping lines.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import click
from measuring import Report, benchmark, give_back_freed_memory, seconds_of

from e2ediff.figure import Figure
from e2ediff.host.plugins import load
from e2ediff.host.recipe import dump_recipe, load_recipe
from e2ediff.loading.order import Order
from e2ediff.monitor.pictures import curves_png
from e2ediff.parts.sources import ImageFolder
from e2ediff.report.gather import gather_runs
from e2ediff.report.write import write_report
from e2ediff.store.run_directory import METRICS, RunDirectory

_NAMES = ("loss/a", "loss/b", "loss/c", "grad_norm", "lr", "speed", "rank")
_LOGGED = 2000  # lines that are written one by one, as a run does


def figures(count: int) -> Iterable[dict[str, float]]:
    """Yield lines as a run logs them."""
    drawn = random.Random(0)
    for i in range(count):
        yield {"step": i, "images": 16 * i, **{name: drawn.random() for name in _NAMES}}


def memory(name: str) -> int:
    """Return a figure of this process's status in KiB; 0 where there is none."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    return int(text.partition(f"{name}:")[2].split()[0]) if name in text else 0


class Growth:
    """Times work `rounds` times, and reports it."""

    def __init__(self, report: Report, rounds: int) -> None:
        self.report, self.rounds = report, rounds

    def measure(
        self, what: str, size: int, work: Callable[[], object],
        first: Callable[[], object] = lambda: None, answer: str = "",
    ) -> None:  # fmt: skip
        """Report the seconds of CPU, those of a million of what it grows with, and the memory.

        `first` is called before each round, outside the clock. What `work` returns in each round
        is noted as the field `answer`, where that is given.
        """
        taken, needed, answers = [], [], list[object]()
        for _ in range(self.rounds):
            first()
            give_back_freed_memory()
            before = memory("VmRSS")
            if before:
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            taken.append(seconds_of(lambda: answers.append(work()), self.report.device))
            needed.append((memory("VmHWM") - before) / 1024)
            if not answer:
                answers.clear()  # else what a round has read would stay
        seconds, most = statistics.median(taken), max(needed)
        each = seconds / size * 1e6
        self.report.row(
            f"{what:<22} {size:>9,}: {seconds:7.3f} s of CPU, {each:6.2f} us each, "
            f"+{most:.0f} MiB",
            what=what, size=size, seconds=seconds, microseconds_each=each, mebibytes=most,
            **({answer: answers} if answer else {}),
        )  # fmt: skip


@benchmark(rounds=3)
@click.option("--lines", default=100_000, show_default=True, type=click.IntRange(_LOGGED))
@click.option("--files", default=50_000, show_default=True, type=click.IntRange(50))
@click.option("--images", default=1_281_167, show_default=True, type=click.IntRange(1))
@click.option("--recipe", default="recipes/quickstart.yaml", show_default=True)
def main(report: Report, rounds: int, lines: int, files: int, images: int, recipe: str) -> None:
    """Measure each in turn."""
    growth, host = Growth(report, rounds), load()
    text = dump_recipe(host, load_recipe(host, recipe, []))
    with tempfile.TemporaryDirectory() as place:
        with RunDirectory.create(f"{place}/run", "long", text, text, {}) as run:
            run.declare([Figure("rank", shown_on=("charts",))])
            log_lines(growth, run, lines)
            growth.measure("read_metrics", lines, run.read_metrics)
            growth.measure("curves", lines, lambda: curves_png(run.stream_metrics(), "", []))
            growth.measure(
                "report", lines, lambda: write_report(gather_runs(host, [f"{place}/run"]))
            )
            log, spare = Path(run.path, METRICS), Path(place, "spare")
            shutil.copyfile(log, spare)
            for what, images in {"nothing later": 16 * lines, "to the middle": 8 * lines}.items():
                growth.measure(
                    f"rewind, {what}", lines, lambda images=images: run.rewind(images),
                    first=lambda: shutil.copyfile(spare, log), answer="dropped",
                )  # fmt: skip
        for number in range(files):
            folder = Path(place, "images", f"class{number % 50}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").touch()
        source = ImageFolder(root=f"{place}/images", size=8, classes=50)
        growth.measure("open a folder of files", files, source.open)
    orders = [Order(images, seed) for seed in range(rounds)]
    growth.measure("draw an epoch's order", images, lambda: orders.pop().indices(0, 64))


def log_lines(growth: Growth, run: RunDirectory, count: int) -> None:
    """Log lines; all but the first ones are written at once, which takes less time."""
    first = [*figures(_LOGGED)]
    growth.measure("log_metrics", _LOGGED, lambda: [run.log_metrics(line) for line in first])
    with open(Path(run.path, METRICS), "w") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in figures(count))


if __name__ == "__main__":
    main()
