"""With `deterministic: true` a run is the same to the bit, twice and after a stop."""

from __future__ import annotations

import io
import shutil

import pytest
import torch
from command_line import needs_dsd
from tiny_recipe import tiny

from e2ediff.host.plugins import load
from e2ediff.store.checkpoint import list_checkpoints, open_checkpoint
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

OBJECTIVES = {
    "detached": "detached",
    "coupled": "coupled",
    "dsd": "{name: dsd, augmentation: {jitter: 0.2, mask_probability: 0.5}}",
}


def tensors(store: Store) -> dict[str, torch.Tensor]:
    found = open_checkpoint(store)
    return {f"{file}:{key}": t for file in found.files for key, t in found.tensors(file).items()}


ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASES = [
    pytest.param("cpu", "detached", "float32", id="cpu"),
    *(
        pytest.param(
            "cuda", name, precision,
            marks=[*ON_CUDA, *([needs_dsd] if name == "dsd" else [])], id=f"{name} {precision}",
        )
        for name in OBJECTIVES
        for precision in ("float32", "bfloat16")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("device", "objective", "precision"), CASES)
def test_a_run_is_the_same_twice_and_after_a_stop(device, objective, precision, tmp_path) -> None:
    """With every diagnostic of core, none of which is left out."""
    size, width = (32, 64) if device == "cuda" else (16, 16)  # what kernels need to be split
    text = tiny(
        steps="6",
        data=f"{{name: synthetic, size: {size}, count: 64, classes: 4}}",
        backbone=f"{{name: vit, width: {width}, depth: 2, heads: 1, patch: 2, latent_dim: 4, "
        "latent_norm: batch, refine: 8}",
        objective=OBJECTIVES[objective],
        precision=precision,
        deterministic="true",
        guards="{spike: skip, window: 2, factor: 100}",
        cadence="{log: 1, diagnose: 3, survey: 3, preview: 6, checkpoint: 3}",
        checkpoint="{keep: 9}",
        device=device,
    )
    (tmp_path / "tiny.yaml").write_text(text)

    def run(name, **options):
        out = str(tmp_path / name)
        train(load(), str(tmp_path / "tiny.yaml"), [], out, progress=Progress(io.StringIO()),
              **options)  # fmt: skip
        return Store(out)

    first, again = run("first"), run("again")
    events = (tmp_path / "first" / "events.jsonl").read_text()
    assert "_off" not in events
    straight, repeated = tensors(first), tensors(again)
    assert all(torch.equal(repeated[key], value) for key, value in straight.items())
    last = list_checkpoints(first)[-1]
    shutil.rmtree(first.local_path(f"checkpoints/{last}"))
    resumed = tensors(run("first", resume=True))
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())
