"""Images a second of the loader alone, and of the step fed by it, from a folder of JPEGs."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from look import Look, cores
from measuring import seconds_of, synchronize
from PIL import Image
from steps import random_batch, read_recipe, stepper

from e2ediff.data import Batch
from e2ediff.host.recipe import Recipe
from e2ediff.loading.bad_images import open_source
from e2ediff.loading.batches import batches

_CLASSES = 4


def run(look: Look, name: str = "dsd_in256_s") -> None:
    """Note the loader, the step, and the step fed by the loader."""
    device, folder = torch.device(look.device), look.work / "jpegs"
    workers = 2 if look.tiny else max(2, cores() - 2)
    _write(folder, count=32 if look.tiny else 2048, side=64 if look.tiny else 384, jobs=workers)
    data = (
        f"data={{name: image_folder, root: '{folder}', size: 256, classes: {_CLASSES}, "
        f"flip: true, workers: {workers}}}"
    )
    own = [] if look.tiny else ["batch=512", "microshards=4"]
    recipe, steps = read_recipe(look, name, data, *own), 4 if look.tiny else 14
    alone = _rate(recipe, device, steps)
    look.note(loader="alone", workers=workers, images_per_second=alone)
    step, _ = stepper(recipe, device, look.tiny)
    batch = random_batch(recipe, device)
    taken = seconds_of(lambda: step(batch, 0), device, 3, 2)
    look.note(step="data on the device", images_per_second=recipe.batch / taken)
    look.note(step="fed by the loader", images_per_second=_rate(recipe, device, steps, step))


def _rate(
    recipe: Recipe,
    device: torch.device,
    steps: int,
    work: Callable[[Batch, int], object] | None = None,
) -> float:
    """Return images a second from the third batch on."""
    began, seen = time.perf_counter(), 0
    stream = batches(
        open_source(recipe.data), recipe.data.image, batch=recipe.batch, seed=0,
        first=0, last=steps, flip=True, workers=recipe.data.workers,
        microshards=recipe.microshards, device=device,
    )  # fmt: skip
    for i, batch in enumerate(stream):
        if work is not None:
            work(batch, i)
        if i == 1:
            synchronize(device)
            began = time.perf_counter()
        elif i > 1:
            seen += len(batch.x)
    synchronize(device)
    return seen / (time.perf_counter() - began)


def _write(folder: Path, *, count: int, side: int, jobs: int) -> None:
    """Write smooth random JPEGs into folders of classes."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (count, side // 16, side // 16, 3), dtype=np.uint8)
    for k in range(_CLASSES):
        (folder / f"class{k}").mkdir(parents=True, exist_ok=True)
    work = [(small[i], side, folder / f"class{i % _CLASSES}" / f"{i}.jpg") for i in range(count)]
    with ProcessPoolExecutor(min(jobs, 16)) as pool:
        list(pool.map(_jpeg, work, chunksize=32))


def _jpeg(job: tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], int, Path]) -> None:
    small, side, path = job
    large = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
    large.save(path, quality=90)
