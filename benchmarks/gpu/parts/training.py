"""Three objectives side by side for the same steps: two sheets, figures and scores.

With `images.zip` in the kit, folders of classes in `train` and one of `val`, `validation` and
`test`, on its photographs at 64 pixels; otherwise on the bundled clothes at 32.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from look import Look
from measuring import seconds_of
from PIL import Image, ImageDraw
from processes import run_command
from steps import random_batch, stepper

from e2ediff.files.images import opened
from e2ediff.host.plugins import load
from e2ediff.host.recipe import Recipe, load_recipe
from e2ediff.store.run_directory import RunDirectory
from parts.use import cheap_scores

_CASES = {
    "dsd": [],
    "detached": [
        "objective={name: detached, reconstruction: {kind: l2}, denoising_weight: 0.1}"
    ],
    "two_stage": [
        "objective={name: two_stage, reconstruction: {kind: l2}}",
        "backbone.trunks=denoiser_apart",
    ],
}  # fmt: skip
_KEPT = ("psnr", "rank", "rank_fraction", "latent_std", "images", "wall_images_per_second")
_SHEETS = {"samples": "step-*.png", "reconstructions": "reconstructions-*.png"}
_SCORING = 85.0  # seconds that are kept for what follows the training


def run(look: Look, seconds: str = "80") -> None:
    """Train all for as many steps as fit into these seconds, then draw and score them."""
    small = ["backbone.depth=2", "backbone.width=32", "backbone.heads=2", "batch=8"]
    common = [_data(look), *(small if look.tiny else []), f"device={look.device}"]
    steps, images = _length(look, common, float(seconds))
    common += [
        f"images={images}", f"optimizer.warmup_images={images // 20}",
        "ema=[{name: slow, decay: 0.999}]", "checkpoint.keep=1",
        f"cadence={{log: {max(1, steps // 40)}, diagnose: {max(2, steps // 8)}, "
        f"preview: {steps}, checkpoint: {steps}}}",
    ]  # fmt: skip
    if look.tiny:
        common += ["sampler.steps=2", "probe={images: 32, calibration: 64, glance: 32}"]
    cases = dict(list(_CASES.items())[:2]) if look.tiny else _CASES
    codes = _train(look, common, cases)
    for name, code in codes.items():
        with look.attempt(method=name):
            lines = RunDirectory.open(_run(look, name)).read_metrics()
            last = {key: value for line in lines for key, value in line.items()
                    if key in _KEPT or key.startswith("loss/")}  # fmt: skip
            look.note(method=name, ok=code == 0, code=code, **last)
        if code:
            log = _log(look, name).read_text(encoding="utf-8", errors="replace")
            look.note(method=name, log=log[-500:])
    for kind, pattern in _SHEETS.items():
        with look.attempt(picture=kind):
            found = {name: sorted((_run(look, name) / "samples").glob(pattern)) for name in cases}
            drawn = {name: files[-1] for name, files in found.items() if files}
            if drawn:
                _beside(drawn, look.out / f"training-{kind}.png")
            look.note(picture=kind, ok=len(drawn) == len(cases), of=", ".join(drawn))
    judged = list(cases)[:1] if look.tiny else list(cases)
    with ThreadPoolExecutor(len(judged)) as pool:
        list(pool.map(lambda name: _score(look, name), judged))


def _run(look: Look, name: str) -> Path:
    return look.work / "training" / name


def _log(look: Look, name: str) -> Path:
    return look.work / f"training-{name}.log"


def _data(look: Look) -> str:
    """Return the data block."""
    file = look.kit / "images.zip"
    if not file.exists():
        return "data={name: fashion_mnist, size: 32}"
    with zipfile.ZipFile(file) as archive:
        classes = {tuple(name.split("/")[:2]) for name in archive.namelist() if "/" in name}
    tops = {top for top, _ in classes}
    held = next((top for top in ("validation", "val", "test") if top in tops), "train")
    count = sum(top == "train" for top, _ in classes)
    return (
        f"data={{name: image_folder, root: 'zip://train::{file}', held_out: "
        f"'zip://{held}::{file}', size: 64, classes: {count}, flip: true, workers: 4}}"
    )


def _length(look: Look, common: Sequence[str], seconds: float) -> tuple[int, int]:
    """Return the steps and images of the runs, from the time of a step that runs alone."""
    recipe = load_recipe(load(), str(look.recipe("dsd_clothing64")), common)
    alone = _step_seconds(look, recipe)
    # All run at once, and are looked at in between.
    steps = 4 if look.tiny else max(100, int(seconds / (2.2 * alone)))
    look.note(step_ms_alone=1e3 * alone, steps=steps, batch=recipe.batch, data=common[0])
    if look.device == "cuda":
        torch.cuda.empty_cache()  # the runs are processes of their own
    return steps, steps * recipe.batch


def _step_seconds(look: Look, recipe: Recipe) -> float:
    device = torch.device(look.device)
    step, _ = stepper(recipe, device, look.tiny)
    batch = random_batch(recipe, device)
    return seconds_of(lambda: step(batch, 0), device, 5, 3)


def _train(
    look: Look, common: Sequence[str], cases: Mapping[str, Sequence[str]]
) -> dict[str, int | None]:
    """Train all at once, one after the other in a rehearsal; return their exit codes."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    recipe = str(look.recipe("dsd_clothing64"))
    for name, sets in cases.items():
        words = [word for text in (*common, *sets) for word in ("--set", text)]
        words += ["--threads", "2", "--out", str(_run(look, name))]
        with open(_log(look, name), "w", encoding="utf-8") as log:
            started[name] = subprocess.Popen(
                [sys.executable, "-m", "e2ediff", "run", recipe, *words],
                cwd=look.root, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        if look.tiny:
            started[name].wait()
    end = time.monotonic() + max(20.0, look.limit - _SCORING)
    for process in started.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(1.0, end - time.monotonic()))
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # it saves, and leaves with code 75
    for process in started.values():
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return {name: process.returncode for name, process in started.items()}


def _score(look: Look, name: str) -> None:
    """Note the figures that `eval` prints."""
    with look.attempt(method=name, what="scores") as row:
        words: list[object] = ["--count", 512, "--batch", 256, "--set", "sampler.steps=20"]
        if look.tiny:
            words = ["--count", 16, "--batch", 16, *cheap_scores(look)]
        ended = run_command(
            look, "e2ediff", "eval", _run(look, name), "--reference", "held-out", *words,
            "--device", look.device, limit=60,
        )  # fmt: skip
        figures = dict(re.findall(r"^\s*([A-Za-z_][\w@.-]*)\s+(-?\d[\d.e+-]*)(?:\s|$)",
                                  ended.said, re.MULTILINE))  # fmt: skip
        look.note(
            **row, ok=ended.code == 0, seconds=ended.seconds, figures=figures,
            said="" if figures else ended.tail,
        )  # fmt: skip


def _beside(pictures: Mapping[str, Path], path: Path) -> None:
    """Draw sheets side by side, each under its name."""
    sheets = {}
    for name, file in pictures.items():
        with opened(file.read_bytes(), str(file)) as image:
            sheets[name] = image.convert("RGB")
    width = sum(image.width + 8 for image in sheets.values())
    height = max(image.height for image in sheets.values()) + 18
    drawn, x = Image.new("RGB", (width, height), "white"), 0
    for name, image in sheets.items():
        ImageDraw.Draw(drawn).text((x + 4, 3), name, fill="black")
        drawn.paste(image, (x, 18))
        x += image.width + 8
    drawn.save(path)
