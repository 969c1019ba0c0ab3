"""Small runs as a user starts them: every kernel, precision and switch once."""

from __future__ import annotations

import time

from look import Look

from e2ediff.host.plugins import load
from e2ediff.nn.attention import BACKENDS
from e2ediff.store.run_directory import RunDirectory
from e2ediff.train.session import train

FEW = (
    "steps=4",
    "cadence={log: 1, diagnose: 2, survey: 2, preview: 4, checkpoint: 2}",
    "preview={rows: 1, classes: 4}",
    "probe={images: 32, calibration: 64, glance: 32}",
    "sampler.steps=3",
)
_HALF = "precision=bfloat16"
_SMALL = (
    *("batch=8", "microshards=2", "images=32", "backbone.patch=4"),
    "data={name: fashion_mnist, size: 32}",
)


def run(look: Look) -> None:
    """Train all cases for four steps each, the compiled ones last."""
    plain, in256 = list(FEW), [*FEW[1:], *_SMALL, "backbone.depth=3"]
    deep = [*FEW[1:], *_SMALL, "backbone.depth=6"]
    kernels = BACKENDS if look.device == "cuda" else ("auto",)
    cases = [
        *((f"bf16 {k}", "quickstart", [*plain, _HALF, f"backbone.attention={k}"])
          for k in kernels),
        ("in256_s", "dsd_in256_s", [*in256]),
        ("fp32 auto", "quickstart", plain),
        ("recomputed", "quickstart", [*plain, _HALF, "checkpoint_activations=true"]),
        ("muon", "quickstart", [*plain, _HALF, "optimizer=muon"]),
        ("sgd", "quickstart", [*plain, _HALF, "optimizer=sgd"]),
        ("rope", "quickstart", [*plain, _HALF, "backbone.position=rope"]),
        ("two_stage", "quickstart",
         [*plain, _HALF, "objective=two_stage", "backbone.trunks=denoiser_apart"]),
        ("post_hoc", "quickstart", [*plain, _HALF, "post_hoc={every: 2}"]),
        ("guards", "quickstart", [*plain, _HALF, "guards={spike: skip, window: 3, factor: 100}"]),
        ("unite", "unite_quickstart", [*plain, _HALF]),
        ("jit", "jit_quickstart", [*plain, _HALF]),
        ("in256_s augmented", "dsd_in256_s", [*in256, "objective.augmentation.jitter=0.3"]),
        ("unite_in256", "unite_in256", deep),
        ("jit_in256", "jit_in256", deep),
        ("deterministic", "quickstart", [*plain, _HALF, "deterministic=true"]),
        ("deterministic in256_s", "dsd_in256_s", [*in256, "deterministic=true"]),
        ("deterministic unite_in256", "unite_in256", [*deep, "deterministic=true"]),
        ("deterministic jit_in256", "jit_in256", [*deep, "deterministic=true"]),
        ("compiled", "quickstart", [*plain, _HALF, "compile=blocks"]),
        ("compiled step", "quickstart", [*plain, _HALF, "compile=step"]),
    ]  # fmt: skip
    if look.tiny:
        cases[1][2].extend(["backbone.width=64", "backbone.heads=1"])
    for title, name, sets in cases[:2] if look.tiny else cases:
        _train(look, title, name, sets)


def _train(look: Look, title: str, name: str, sets: list[str]) -> None:
    out, began = look.work / "traps" / title.replace(" ", "-"), time.perf_counter()
    with look.attempt(run=title):
        train(load(), look.recipe(name), [*sets, f"device={look.device}"], out)
        taken, directory = time.perf_counter() - began, RunDirectory.open(out)
        figures = {k: v for line in directory.read_metrics() for k, v in line.items()}
        losses = {k: round(v, 4) for k, v in figures.items() if k.startswith("loss/")}
        events = directory.read_events()
        kernel = next(e.get("attention", "") for e in events if e["kind"] == "kernels")
        left_out = [e["kind"] for e in events if e["kind"].endswith("_off")]
        look.note(
            run=title, ok=not left_out, seconds=taken, kernel=kernel[:90], losses=losses,
            left_out=left_out,
        )  # fmt: skip
