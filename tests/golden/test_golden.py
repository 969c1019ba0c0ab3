"""Numbers stay put: the losses of twenty steps of a tiny DSD run with seed 0.

A change that moves them says why in its commit, and writes them anew:

    OMP_NUM_THREADS=1 python tests/golden/test_golden.py
"""

from __future__ import annotations

import io
import json
import platform
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from e2ediff import __version__
from e2ediff.host.plugins import load
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

STORED = Path(__file__).with_name("tiny_dsd.json")
RECIPE = """\
e2ediff: 1
name: tiny_dsd
requires: ["e2ediff-dsd"]
steps: 20
batch: 8
data: {name: synthetic, size: 16, classes: 4, count: 60}
backbone: {name: vit, width: 32, depth: 3, heads: 2, patch: 4, latent_dim: 6, latent_norm: batch}
interpolant: linear
times: logit_normal
objective: {name: dsd, draws: 2, decode_noise: {probability: 0.5}, augmentation: {jitter: 0.1}}
target: {decay: 0.9}
optimizer: {name: adamw, lr: 0.001, warmup_images: 40, schedule: cosine}
sampler: {name: heun, steps: 2}
cadence: {log: 1, diagnose: 1000, preview: 1000, checkpoint: 1000}
probe: {images: 16, times: [0.5], calibration: 16}
preview: {rows: 1, classes: 2}
device: cpu
"""


def losses(place: Path) -> list[dict[str, float]]:
    """Every named loss of every step."""
    torch.set_num_threads(1)
    (place / "tiny_dsd.yaml").write_text(RECIPE)
    progress = Progress(io.StringIO())
    train(load(), str(place / "tiny_dsd.yaml"), out=str(place / "run"), progress=progress)
    lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    found = [{k: v for k, v in line.items() if k.startswith("loss/")} for line in lines]
    return [line for line in found if line]


def test_twenty_losses_of_a_tiny_dsd_run_are_the_stored_ones(tmp_path) -> None:
    pytest.importorskip("e2ediff_dsd", reason="the plugin e2ediff-dsd is not installed")
    stored = json.loads(STORED.read_text())
    assert stored["recipe"] == RECIPE, "the recipe changed: write the losses anew"
    found = losses(tmp_path)
    assert len(found) == 20
    for step, (now, then) in enumerate(zip(found, stored["losses"], strict=True), start=1):
        # kernels of other processors sum in another order; 20 steps amplify 1e-7 to below 1e-4
        assert now == pytest.approx(then, rel=1e-4), f"step {step}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        made = {
            "how": "OMP_NUM_THREADS=1 python tests/golden/test_golden.py",
            "e2ediff": __version__,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "recipe": RECIPE,
            "losses": losses(Path(place)),
        }
    STORED.write_text(json.dumps(made, indent=1) + "\n")
    sys.stdout.write(f"wrote {STORED}\n")
