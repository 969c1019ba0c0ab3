"""Checkpoints stay readable: a run of each format that there was lies here, stopped half-way.

`format_1` was trained for three of six steps by e2ediff 0.1.0 with checkpoint format 1, and
`format_1.json` has the losses of the other three as that version trained them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import attrs
import pytest
import torch
from command_line import e2ediff

from e2ediff.errors import CheckpointError
from e2ediff.store.checkpoint import list_checkpoints, open_checkpoint
from e2ediff.store.manifest import open_one, sealed
from e2ediff.store.migration import FORMAT_VERSION, STEPS, Body, migrate
from e2ediff.store.rewriting import rewrite
from e2ediff.store.storage import Store

HERE = Path(__file__).parent
FORMATS = sorted(path for path in HERE.glob("format_*") if path.is_dir())
NAME = "images-000000000024"
FIRST = "embed_decode.bias"


@pytest.fixture(params=FORMATS, ids=lambda path: path.name)
def run(request, tmp_path) -> Path:
    return Path(shutil.copytree(request.param, tmp_path / request.param.name))


def test_a_run_of_each_format_is_kept() -> None:
    assert [path.name for path in FORMATS] == [
        f"format_{version}" for version in range(1, FORMAT_VERSION + 1)
    ]
    assert {*STEPS} == {*range(1, FORMAT_VERSION)}, "a step from each to the next"


def test_it_is_resumed_and_gives_the_losses_that_its_own_version_gave(run) -> None:
    done = e2ediff("run", run / "recipe.yaml", "--out", run, "--resume", "--threads", 1)
    assert done.code == 0, done.err
    assert "at step 3" in done.err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if "loss/denoising" in line}
    for expected in json.loads((HERE / f"{run.name}.json").read_text()):
        for name, value in expected.items():
            # Kernels of other processors sum in another order.
            assert found[expected["step"]][name] == pytest.approx(value, rel=1e-4)


def test_it_is_sampled(run) -> None:
    done = e2ediff("sample", run, "--count", 2, "--format", "npz", "--out", run / "set")
    assert done.code == 0, done.err


# The steps between formats


def test_a_body_takes_every_step_from_its_format_to_the_present_one() -> None:
    def noted(number):
        return lambda body: attrs.evolve(body, state={**body.state, number: len(body.state)})

    steps = {1: noted("1"), 2: noted("2"), 3: noted("3")}
    old = Body(state={}, latent={})
    assert migrate(old, 1, steps, to=4).state == {"1": 0, "2": 1, "3": 2}
    assert migrate(old, 3, steps, to=4).state == {"3": 0}
    assert migrate(old, 4, steps, to=4) == old
    with pytest.raises(LookupError):
        migrate(old, 1, {}, to=2)


def step(body: Body) -> Body:
    """The next format renames a tensor, and gives a key of the state another name."""
    state = {"counts": body.state["averages"]}
    return Body(state, body.latent, {"online": {FIRST: "renamed"}})


def test_names_of_tensors_that_a_step_gives_are_those_that_are_read(run) -> None:
    before = open_checkpoint(Store(run), NAME)
    held = before.tensors("online")
    after = open_one(Store(run), NAME, True, {1: step}, to=2)
    tensors = after.tensors("online")
    assert after.state == {"counts": before.state["averages"]}
    assert {*tensors} == {*held} - {FIRST} | {"renamed"}
    assert torch.equal(tensors["renamed"], held[FIRST])
    assert {*after.tensors("target")} == {*held}


def test_a_checkpoint_is_rewritten_in_the_format_that_it_is_read_as(run) -> None:
    """Under its own name, and whole; what no step changed keeps its bytes."""
    store, told = Store(run), list[str]()
    before = open_checkpoint(store, NAME)
    held, same = before.tensors("online")[FIRST], before.sha256("target")
    assert rewrite(store, NAME, told.append, {1: step}, to=2) == 1
    assert list_checkpoints(store) == [NAME]
    after = open_one(store, NAME, True, {}, to=2)
    assert after.about.version == 2
    assert after.state == {"counts": before.state["averages"]}
    assert (after.step, after.images, after.latents) == (3, 24, before.latents)
    assert after.about.created == before.about.created
    assert torch.equal(after.tensors("online")["renamed"], held)
    assert after.sha256("target") == same
    assert rewrite(store, NAME, told.append, {}, to=2) == 2
    with pytest.raises(CheckpointError, match="newer e2ediff"):
        open_checkpoint(store, NAME)
    assert not told


def test_a_step_that_fails_leaves_the_old_one(run) -> None:
    store, before = Store(run), sorted(os.listdir(run / "checkpoints" / NAME))
    with pytest.raises(CheckpointError, match="cannot be read as format 1"):
        rewrite(store, NAME, print, {}, to=2)
    assert os.listdir(run / "checkpoints") == [NAME]
    assert sorted(os.listdir(run / "checkpoints" / NAME)) == before


@pytest.mark.parametrize("version", [0, -1, "1", None])
def test_a_number_that_is_no_format_is_damage(run, version) -> None:
    path = run / "checkpoints" / NAME / "MANIFEST.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    path.write_bytes(sealed({**body, "format_version": version}))
    with pytest.raises(CheckpointError, match="format_version"):
        open_checkpoint(Store(run), NAME)
