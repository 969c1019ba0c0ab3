"""A run with fused AdamW that was stopped goes on from the state that it had."""

from __future__ import annotations

import io
import shutil

import pytest
import torch
from tiny_recipe import tiny

from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.step.assembly import assemble
from e2ediff.store.checkpoint import list_checkpoints, open_checkpoint
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train
from e2ediff.train.snapshot import put_back, tensors_of

RECIPE = tiny(
    steps="6",
    backbone="{name: vit, width: 64, depth: 1, heads: 1, patch: 4, latent_dim: 4, "
    "attention: sdpa, latent_norm: layer}",
    cadence="{log: 1, diagnose: 3, preview: 6, checkpoint: 3}",
    checkpoint="{keep: 9}",
    ema="[{name: slow, decay: 0.9}]",
)


@pytest.fixture
def trained(tmp_path, device):
    """Return a function that trains, or resumes, a run; it returns the run's checkpoints."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)

    def start(name, *changes, **options):
        given = [f"device={device}", *changes]
        quiet = Progress(io.StringIO())
        out = str(tmp_path / name)
        train(load(), str(tmp_path / "tiny.yaml"), given, out, progress=quiet, **options)
        return Store(out)

    return start


def tensors(checkpoint) -> dict[str, torch.Tensor]:
    return {
        f"{file}:{key}": value
        for file in checkpoint.files
        for key, value in checkpoint.tensors(file).items()
    }


def test_the_state_of_a_fused_optimizer_returns_to_its_device_bit_for_bit(trained, device) -> None:
    checkpoint = open_checkpoint(trained("run"))
    recipe = parse_recipe(load(), RECIPE, "tiny", [f"device={device}"])
    parts = assemble(recipe, device)
    (optimizer,) = parts.optimizers.values()
    assert all(group["fused"] for group in optimizer.param_groups)
    put_back(parts, checkpoint, device, recipe)
    for state in optimizer.state.values():
        for value in state.values():
            assert value.device.type == device.type
    saved = tensors(checkpoint)
    held = {f"{f}:{k}": t for f, group in tensors_of(parts)[0].items() for k, t in group.items()}
    assert saved.keys() == held.keys()
    for key, value in saved.items():
        assert torch.equal(held[key].cpu(), value), key


def test_a_resumed_run_goes_where_the_one_went_that_was_not_stopped(trained, device) -> None:
    """To the bit on a CPU. On a GPU sums may be taken in another order.

    There a number whose gradient is rounding alone may go either way, so all are judged together.
    """
    store = trained("run")
    before, last = list_checkpoints(store)[-2:]
    middle = tensors(open_checkpoint(store, before))
    straight = tensors(open_checkpoint(store, last))
    shutil.rmtree(store.local_path(f"checkpoints/{last}"))
    resumed = tensors(open_checkpoint(trained("run", resume=True)))
    assert straight.keys() == resumed.keys() == middle.keys()
    if device.type == "cpu":
        assert all(torch.equal(resumed[key], value) for key, value in straight.items())
    for file in ("online", "slow", "optimizer-joint"):
        keys = [key for key in straight if key.startswith(f"{file}:")]
        ours, theirs, start = (
            torch.cat([held[key].double().flatten() for key in keys])
            for held in (resumed, straight, middle)
        )
        assert (theirs - start).norm() > 0
        assert (ours - theirs).norm() < 0.02 * (theirs - start).norm(), file
