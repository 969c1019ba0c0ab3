"""A run in bfloat16 looks, surveys, previews, scores and saves, and its weights are used."""

from __future__ import annotations

import json

import pytest
from command_line import e2ediff
from tiny_recipe import tiny

import e2ediff as package

RECIPE = tiny(
    data="{name: synthetic, size: 16, classes: 2, count: 64}",
    backbone="{name: vit, width: 64, depth: 1, heads: 1, patch: 4, latent_dim: 4, "
    "latent_norm: batch}",
    cadence="{log: 1, diagnose: 2, survey: 4, preview: 2, checkpoint: 2}",
    ema="[{name: slow, decay: 0.9}]",
    scores="{every: 16, images: 8, features: {name: random_projection, width: 4, side: 4}, "
    "metrics: [fid]}",
)
TYPES = ["float32", "bfloat16"]


@pytest.fixture
def run_in(tmp_path, device):
    """Return a function that trains a run in a type."""

    def train(precision):
        (tmp_path / "tiny.yaml").write_text(RECIPE)
        run = tmp_path / precision
        words = [f"precision={precision}", f"device={device}"]
        given = [word for text in words for word in ("--set", text)]
        done = e2ediff("run", tmp_path / "tiny.yaml", "--out", run, *given)
        assert done.code == 0, done.err
        return run

    return train


def test_a_run_in_bfloat16_goes_from_its_first_look_to_its_scores(run_in) -> None:
    run = run_in("bfloat16")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} >= {0, 1, 2, 3, 4}
    assert any("gFD-RandomProjection4" in line for line in lines)
    assert all("rank" in line for line in lines if line["step"] == 0 and len(line) > 4)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert not [event for event in events if event["kind"].endswith("_off")]
    assert len(list((run / "samples").glob("step-*.png"))) == 2


@pytest.mark.parametrize("precision", TYPES)
def test_a_run_in_either_type_is_sampled_reconstructed_and_scored(
    run_in, precision, tmp_path, device
) -> None:
    run, on = run_in(precision), ("--device", device)
    features = ("--features", "random_projection")
    for words in (
        ("sample", run, "--count", 2, "--out", tmp_path / "samples"),
        ("sample", run, "--count", 2, "--precision", "bfloat16", "--out", tmp_path / "half"),
        ("reconstruct", run, "--count", 4, "--out", tmp_path / "pairs"),
        ("eval", run, "--count", 8, "--metrics", "fid,reconstruction,latents", *features),
    ):
        done = e2ediff(*words, *on)
        assert done.code == 0, f"{words}: {done.err}"


def test_samples_and_reconstructions_in_bfloat16_are_near_those_in_float32(run_in, device) -> None:
    run = run_in("float32")
    exact, half = (package.load(run, device=str(device), precision=kind) for kind in TYPES)
    x = exact.sample([0, 1] * 4)
    # bfloat16 has 8 bits: errors of its steps add up over some products and two calls.
    assert (half.sample([0, 1] * 4) - x).abs().max() < 0.1
    assert (half.reconstruct(x) - exact.reconstruct(x)).abs().max() < 0.1
