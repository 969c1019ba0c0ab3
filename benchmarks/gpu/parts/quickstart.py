"""The quickstart from the command line to a sheet of samples, as a user has it."""

from __future__ import annotations

import shutil

from look import Look
from processes import run_command
from steps import TINY

from e2ediff.store.run_directory import RunDirectory

_KEPT = ("psnr", "rank", "latent_std")


def run(look: Look) -> None:
    """Train and sample by commands; the sheet goes to `quickstart.png`."""
    out, sets = look.work / "quickstart", [f"device={look.device}"]
    if look.tiny:
        sets += ["steps=6", "cadence={log: 2, diagnose: 3, preview: 6, checkpoint: 6}"]
        sets += [*TINY, "sampler.steps=2", "probe={images: 32, calibration: 32, glance: 16}"]
    words = [word for text in sets for word in ("--set", text)]
    recipe = look.recipe("quickstart")
    trained = run_command(
        look, "e2ediff", "run", recipe, *words, "--out", out, limit=look.limit - 25
    )
    look.note(what="run", ok=trained.code == 0, seconds=trained.seconds, last=trained.tail)
    with look.attempt(what="speed"):
        lines = RunDirectory.open(out).read_metrics()
        figures = {key: value for line in lines for key, value in line.items()}
        looking = [v for line in lines for k, v in line.items()
                   if k.startswith("wall_") and k.endswith("_seconds")]  # fmt: skip
        last = {k: round(v, 4) for k, v in figures.items()
                if k in _KEPT or k.startswith("loss/")}  # fmt: skip
        rate = figures["wall_images_per_second"]
        look.note(what="speed", images_per_second=rate, looking_seconds=sum(looking), last=last)
    with look.attempt(what="samples"):
        sheets = sorted((out / "samples").glob("step-*.png"))
        shutil.copy(sheets[-1], look.out / "quickstart.png")
        words = ["--count", "8", "--device", look.device]
        if look.tiny:
            words = ["--count", "1", "--device", look.device]
        sampled = run_command(look, "e2ediff", "sample", out, *words, limit=60)
        look.note(what="samples", ok=sampled.code == 0, seconds=sampled.seconds)
