"""For how long a save stops training, what it costs, the memory it takes, and what reading costs.

    python benchmarks/speed/checkpoint.py recipes/dsd_in256.yaml --out DIR
    python benchmarks/speed/checkpoint.py recipes/dsd_in256.yaml --out DIR --in-place --json

Builds the networks, averages and optimizers of a recipe, and saves them as a run does, without
training; each round is a save. The first one allocates the copy, later ones reuse it. Then the
newest checkpoint is verified, and loaded. `--in-place` writes while training waits. The run lies
in a new folder inside DIR, and is deleted in the end; whatever else is in DIR stays.
"""

from __future__ import annotations

import io
import resource
import tempfile
import threading
import time
from pathlib import Path

import click
import torch
from measuring import Report, benchmark, give_back_freed_memory, seconds_of

from e2ediff.data import DataSource
from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.host.recipe import Recipe, dump_recipe, load_recipe
from e2ediff.monitor.alarm import CollapseDetector
from e2ediff.parts.sources import Synthetic
from e2ediff.step.assembly import Assembly, assemble
from e2ediff.step.guard import Guard
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.run_directory import RunDirectory
from e2ediff.train.bad_steps import BadSteps
from e2ediff.train.progress import Progress
from e2ediff.train.recorder import Recorder
from e2ediff.train.saving import Saver
from e2ediff.train.snapshot import put_back, tensors_of
from e2ediff.train.staging import Staging


def resident() -> int:
    """Return this process's memory in bytes, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """The most memory that this process had inside `with`."""

    def __enter__(self) -> Peak:
        self.most, self._done = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, resident())


def after_a_step(parts: Assembly) -> None:
    """Give optimizers the state that they have after a step."""
    for optimizer in parts.optimizers.values():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def measure(
    report: Report,
    rounds: int,
    read: Recipe,
    parts: Assembly,
    source: DataSource,
    directory: RunDirectory,
    *,
    in_place: bool,
) -> None:
    """Save some times, and report what each save took; then read."""
    recorder = Recorder(load(), read, directory, report.device, Progress(io.StringIO()), World())
    image = read.data.image
    nothing = torch.zeros(2, image.channels, image.height, image.width, device=report.device)
    detector = CollapseDetector(read.alarm, ())
    staging = Staging(free=lambda: 0) if in_place else Staging()
    bad_steps = BadSteps(read, recorder, Guard(read, World(), report.device), source)
    saver = Saver(read, parts, detector, recorder, nothing, [], bad_steps, staging)
    give_back_freed_memory()
    before = resident()
    if not in_place:  # as a run does after its first steps, and goes on training meanwhile
        asked = time.process_time()
        staging.prepare(tensors_of(parts)[0])
        begun = time.process_time() - asked
        staging.settle()
        whole = time.process_time() - asked
        report.row(f"memory asked for in {begun:.2f} s of CPU, there after {whole:.2f} s",
                   what="memory", asked=begun, cpu=whole)  # fmt: skip
    for number in range(rounds):
        recorder.position.images += read.batch
        recorder.position.step += 1
        began, cpu_before = time.perf_counter(), time.process_time()
        own = time.thread_time()
        with Peak() as peak:
            saver.begin()
            paused, own = time.perf_counter() - began, time.thread_time() - own
            saver.finish()
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu_before
        size = sum(file.stat().st_size for file in newest(Path(directory.path)).iterdir())
        kept = round((peak.most - before) / 1e9, 3)
        report.row(
            f"save {number + 1} of {size / 1e9:.2f} GB: training waits {paused:.2f} s "
            f"({own:.2f} s of CPU), all of it {wall:.1f} s ({cpu:.1f} s of CPU), "
            f"memory +{kept:.2f} GB",
            what="save", number=number + 1, in_place=in_place, bytes=size, paused=paused,
            paused_cpu=own, seconds=wall, cpu=cpu, peak_gigabytes=kept,
        )  # fmt: skip
    store = directory.store
    verified = seconds_of(lambda: open_checkpoint(store), report.device)
    found = open_checkpoint(store, verify=False)
    loaded = seconds_of(lambda: put_back(parts, found, report.device, read), report.device)
    report.row(f"verify {verified:.2f} s of CPU, then load {loaded:.2f} s",
               what="read", verify=verified, load=loaded)  # fmt: skip


def newest(run: Path) -> Path:
    """Return the folder of the newest checkpoint."""
    return max((run / "checkpoints").iterdir())


@benchmark(rounds=3)
@click.argument("recipe")
@click.option("--out", required=True, metavar="DIR", help="Of the disk to write to.",
              type=click.Path(path_type=Path, file_okay=False, writable=True))  # fmt: skip
@click.option("--in-place", is_flag=True)
def main(report: Report, rounds: int, recipe: str, out: Path, in_place: bool) -> None:
    """Save some times, and print what each save took; then read."""
    host = load()
    read = load_recipe(host, recipe, [f"device={report.device.type}", "checkpoint.keep=1"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"--out {out}: cannot be made: {error.strerror}.") from error
    parts = assemble(read, report.device, World())
    after_a_step(parts)
    text = dump_recipe(host, read)
    source = Synthetic(size=8, classes=2, count=2).open()  # no image is read from it
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=out) as folder:
        place = Path(folder, "run")
        with RunDirectory.create(str(place), read.name, text, text, {}) as directory:
            measure(report, rounds, read, parts, source, directory, in_place=in_place)


if __name__ == "__main__":
    main()
