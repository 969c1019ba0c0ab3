"""The smallest recipe that trains, with whatever lines a test needs otherwise."""

from __future__ import annotations

LINES = {
    "e2ediff": "1",
    "name": "tiny",
    "steps": "4",
    "batch": "8",
    "data": "{name: synthetic, size: 16, count: 64}",
    "backbone": "{name: vit, width: 16, depth: 1, heads: 1, patch: 8, latent_dim: 4}",
    "interpolant": "linear",
    "times": "uniform",
    "objective": "detached",
    "optimizer": "{name: adamw, lr: 0.001}",
    "sampler": "{name: euler, steps: 2}",
    "cadence": "{log: 1, diagnose: 2, preview: 2, checkpoint: 2}",
    "probe": "{images: 8, times: [0.5], calibration: 8}",
    "preview": "{rows: 1, classes: 2}",
    "device": "cpu",
}


def tiny(**lines: str) -> str:
    """The recipe's text, with these values instead; a new key comes last."""
    return "".join(f"{key}: {value}\n" for key, value in {**LINES, **lines}.items())
