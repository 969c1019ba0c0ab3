"""Sample, reconstruct and eval in both types, of runs that were trained in both."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from look import Look
from measuring import seconds_of
from processes import run_command
from steps import TINY
from torch import Tensor

import e2ediff
from e2ediff.data import from_pixels, to_pixels
from e2ediff.evaluate.reconstruction import psnr
from e2ediff.host.plugins import load
from e2ediff.model.inference import Precision
from e2ediff.train.session import train
from parts.traps import FEW

TYPES: tuple[Precision, ...] = ("float32", "bfloat16")


def run(look: Look) -> None:
    """Train a run in each type, use it by functions, then by commands."""
    runs = {}
    for kind in TYPES:
        with look.attempt(trained=kind):
            out = look.work / "use" / kind
            given = [*FEW, f"precision={kind}", f"device={look.device}"]
            if look.tiny:
                given += TINY
            else:  # weights that make something of their input
                given += [
                    "steps=400",
                    "cadence={log: 50, diagnose: 200, preview: 400, checkpoint: 400}",
                ]
            train(load(), look.recipe("quickstart"), given, out)
            runs[kind] = out
    for kind, place in runs.items():
        _functions(look, kind, place)
    eval_words: list[object] = ["--count", 64, "--reference", "held-out"]
    eval_words += cheap_scores(look)
    asked: list[tuple[str, list[object]]] = []
    for kind, place in runs.items():
        on, half = ["--device", look.device], ["--precision", "bfloat16"]
        asked += [
            (f"sample, {kind} run", ["sample", place, "--count", 2, *on]),
            (f"sample in bfloat16, {kind} run",
             ["sample", place, "--count", 2, *half, "--out", place / "half", *on]),
            (f"reconstruct, {kind} run", ["reconstruct", place, "--count", 8, *on]),
            (f"eval, {kind} run", ["eval", place, *eval_words, *on]),
        ]  # fmt: skip
    measured = ["plan", look.recipe("quickstart"), "--device", "measured"]
    asked.append(("plan measured", [*measured, "--set", f"device={look.device}"]))
    if look.tiny:
        asked = asked[3:6]  # one of each kind

    def ask(title: str, words: list[object]) -> None:
        with look.attempt(run=title):
            ended = run_command(look, "e2ediff", *words, limit=60)
            look.note(run=title, ok=ended.code == 0, seconds=ended.seconds, said=ended.tail)

    with ThreadPoolExecutor(1 if look.tiny else len(asked)) as pool:
        list(pool.map(lambda one: ask(*one), asked))


def cheap_scores(look: Look) -> list[object]:
    """Return options of `eval` for a rehearsal: on one core its network takes minutes."""
    features = "{name: random_projection, width: 4, side: 4}"
    few = ["--metrics", "[fid, reconstruction, latents]", "--features", features]
    return list(few) if look.tiny else []


def _functions(look: Look, trained: str, place: Path) -> None:
    """Note how far the same weights differ in the two types."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for kind in TYPES:
        with look.attempt(trained=trained, used=kind) as row:
            model = e2ediff.load(place, device=look.device, precision=kind)
            pixels, _ = model.recipe.data.open(held_out=True).read(range(32))
            x = from_pixels(pixels)
            again = model.reconstruct(x)
            made = model.sample([0] * 32)
            seconds = seconds_of(partial(model.reconstruct, x), model.device, 3, 1)
            found[kind] = again, made
            finite = bool(again.isfinite().all() and made.isfinite().all())
            look.note(
                **row, ok=finite, psnr=float(psnr(to_pixels(again), pixels).mean()),
                images_per_second=len(x) / seconds,
            )  # fmt: skip
    if len(found) == len(TYPES):
        (a, b), (c, d) = found["float32"], found["bfloat16"]
        levels = [(to_pixels(p).int() - to_pixels(q).int()).abs().max() for p, q in
                  ((a, c), (b, d))]  # fmt: skip
        look.note(
            trained=trained, what="levels of 255 between the types",
            reconstructions=int(levels[0]), samples=int(levels[1]),
        )  # fmt: skip
