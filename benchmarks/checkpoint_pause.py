"""Measure for how long a save stops training, what it costs, and the memory that it takes.

    python benchmarks/checkpoint_pause.py recipes/dsd_in256.yaml --out DIR [--in-place] [--saves 3]

Builds the networks, averages and optimizers of a recipe on the CPU, with one thread, and saves
them as a run does, without training: the first save allocates the copy, later ones reuse it.
Prints a line of JSON for each save. `--in-place` writes while training waits.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import shutil
import threading
import time
from pathlib import Path

import torch

from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.host.recipe import dump_recipe, load_recipe
from e2ediff.monitor.alarm import CollapseDetector
from e2ediff.step.assembly import assemble
from e2ediff.store.run_directory import RunDirectory
from e2ediff.train.progress import Progress
from e2ediff.train.recorder import Recorder
from e2ediff.train.saving import Saver
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


def main() -> None:
    """Save some times, and print what each save took."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("recipe")
    asked.add_argument("--out", required=True, type=Path)
    asked.add_argument("--in-place", action="store_true")
    asked.add_argument("--saves", type=int, default=3)
    given = asked.parse_args()
    torch.set_num_threads(1)
    host, cpu = load(), torch.device("cpu")
    recipe = load_recipe(host, given.recipe, ["device=cpu", "checkpoint.keep=1"])
    parts = assemble(recipe, cpu, World())
    for optimizer in parts.optimizers.values():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    shutil.rmtree(given.out, ignore_errors=True)
    text = dump_recipe(host, recipe)
    with RunDirectory.create(str(given.out), recipe.name, text, text, {}) as directory:
        recorder = Recorder(host, recipe, directory, cpu, Progress(io.StringIO()), World())
        image = recipe.data.image
        nothing = torch.zeros(2, image.channels, image.height, image.width)
        detector = CollapseDetector(recipe.alarm, ())
        staging = Staging(free=lambda: 0) if given.in_place else Staging()
        saver = Saver(recipe, parts, detector, recorder, nothing, {}, staging)
        before = resident()
        for number in range(given.saves):
            recorder.position.images += recipe.batch
            recorder.position.step += 1
            began, cpu_before = time.perf_counter(), time.process_time()
            own = time.thread_time()
            with Peak() as peak:
                saver.begin()
                paused, own = time.perf_counter() - began, time.thread_time() - own
                saver.finish()
            found = {
                "save": number + 1,
                "in_place": given.in_place,
                "gigabytes": round(sum(f.stat().st_size for f in newest(given.out)) / 1e9, 3),
                "paused": round(paused, 3),
                "paused_cpu": round(own, 3),
                "seconds": round(time.perf_counter() - began, 3),
                "cpu": round(time.process_time() - cpu_before, 3),
                "peak_gigabytes": round((peak.most - before) / 1e9, 3),
            }
            print(json.dumps(found), flush=True)
    shutil.rmtree(given.out)


def newest(run: Path) -> list[Path]:
    """Return the files of the newest checkpoint."""
    return list(max((run / "checkpoints").iterdir()).iterdir())


if __name__ == "__main__":
    main()
