"""A checkpoint that someone edited and sealed again is refused, or loads what it says.

SHA-256 beside the data proves that it is whole, not who wrote it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import e2ediff, trained
from resealing import edit_json, edit_tensors
from tiny_recipe import tiny

import e2ediff as package
from e2ediff.errors import CheckpointError

NAME = "images-000000000016"
STEP_2 = "checkpoints/" + NAME


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps that may go on to four."""
    folder = tmp_path_factory.mktemp("resealed")
    return trained(folder, tiny(steps="2", optimizer="{name: adamw, lr: 0.001}"))


@pytest.fixture
def folder(run, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(run, "run")) / STEP_2


def resumed() -> tuple[int, str]:
    done = e2ediff("run", "--resume", "run", "--set", "steps=4", "--threads", 1)
    return done.code, done.err


def put(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def edit(body: dict[str, Any]) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return edit


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "alarm is text": put("alarm", value="x"),
    "averages is no object": put("averages", value=math.nan),
    "averages is a number": put("averages", value=1),
    "averages are fewer": put("averages", value={}),
    "choices is a number": put("choices", value=3),
    "data is a number": put("data", value=5),
    "data holds numbers": put("data", value=[1, 2]),
    "no optimizers": put("optimizers", value={}),
    "updates below zero": put("averages", "target", value=-1),
    "updates of the future": put("averages", "target", value=3),
    "updates are true": put("averages", "target", value=True),
    "updates are no whole number": put("averages", "target", value=1.5),
    "guards are text": put("guards", value="x"),
    "a step known to be bad is below zero": put("guards", "known", value=[-1]),
    "a number of rollbacks is text": put("guards", "returns", value="1"),
    "a part of the guards that is unknown": put("guards", "settle", value=1),
    "a streak below zero": put("alarm", "streak", value=-1),
    "a part of the alarm that is unknown": put("alarm", "evaluate", value=1),
    "the alarm's best is text": put("alarm", "best", value={"rank": "x"}),
    "the alarm's best is infinite": put("alarm", "best", value={"rank": math.inf}),
    "a rate is text": put("optimizers", "joint", "groups", value="x"),
    "groups of nothing": put("optimizers", "joint", "groups", value=[None, None]),
}

MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a step below zero": put("step", value=-3),
    "a step that is true": put("step", value=True),
    "a huge step": put("step", value=10**30),
    "images in text": put("images", value="16"),
    "format true": put("format_version", value=True),
    "format 1.5": put("format_version", value=1.5),
    "format 0": put("format_version", value=0),
    "format -1": put("format_version", value=-1),
    "a file above": put("files", "../x.safetensors", value={"bytes": 1, "sha256": "0" * 64}),
    "files are a list": put("files", value=[]),
    "sizes below zero": put("files", "state.json", "bytes", value=-1),
    "latents of text": put("latent", "target", "tokens", value="x"),
    "a scale that is infinite": put("latent", "target", "scale", value=math.inf),
}


@pytest.mark.parametrize("edit", STATES.values(), ids=STATES.keys())
def test_a_state_of_odd_content_is_refused_when_the_run_goes_on(folder, edit) -> None:
    edit_json(folder, "state.json", edit)
    code, told = resumed()
    assert code == 6, told
    assert NAME in told


@pytest.mark.parametrize("edit", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_of_odd_content_is_refused(folder, edit) -> None:
    edit_json(folder, "MANIFEST.json", edit)
    with pytest.raises(CheckpointError, match=NAME):
        package.load("run")


def test_a_step_that_makes_another_number_of_images_is_refused(folder) -> None:
    edit_json(folder, "MANIFEST.json", put("step", value=1))
    edit_json(folder, "state.json", put("averages", "target", value=1))
    code, told = resumed()
    assert code == 6, told
    assert "step 1 in batches of 8 makes 8 images, and it counts 16" in told


def test_rates_of_another_kind_are_refused(folder) -> None:
    def edit(body: dict[str, Any]) -> None:
        body["optimizers"]["joint"]["groups"][0]["values"].update(lr="x", betas=[0.9])

    edit_json(folder, "state.json", edit)
    code, told = resumed()
    assert code == 6, told
    assert "lr is 'x', expected something like 0.001" in told


# Tensors


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if tensors[name].dim() == 2)


def of_type(dtype: torch.dtype) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        name = first(tensors)
        tensors[name] = tensors[name].to(dtype)

    return edit


def filled(value: float, word: str = "") -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        name = next(n for n in sorted(tensors) if word in n and tensors[n].is_floating_point())
        tensors[name] = torch.full_like(tensors[name], value)

    return edit


def smaller(tensors: dict[str, Any]) -> None:
    name = first(tensors)
    tensors[name] = tensors[name][:1].clone()


WEIGHTS = {
    "integers": (of_type(torch.int32), "is int32, expected float32"),
    "halves": (of_type(torch.float16), "is float16, expected float32"),
    "nan": (filled(math.nan), "holds nan or inf"),
    "inf": (filled(math.inf), "holds nan or inf"),
}


@pytest.mark.parametrize(("edit", "why"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weights_of_another_type_or_not_finite_are_refused_wherever_they_are_loaded(
    folder, edit, why
) -> None:
    for name in ("target", "online"):
        edit_tensors(folder, name, edit)
    with pytest.raises(CheckpointError, match=why):
        package.load("run")
    for words in (["sample", "run", "--count", 1], ["reconstruct", "run"]):
        done = e2ediff(*words)
        assert done.code == 6, done
        assert why in done.err
    code, told = resumed()
    assert (code, why in told) == (6, True), told


OPTIMIZER = {
    "integers": (of_type(torch.int32), "int32, expected torch.float32"),
    "doubles": (of_type(torch.float64), "float64, expected torch.float32"),
    "another shape": (smaller, "has shape"),
    "nan": (filled(math.nan), "holds nan or inf"),
    "steps below zero": (filled(-1.0, ".step"), "expected a number of steps"),
    "a part of a step": (filled(0.5, ".step"), "expected a number of steps"),
}


@pytest.mark.parametrize(("edit", "why"), OPTIMIZER.values(), ids=OPTIMIZER.keys())
def test_odd_tensors_of_an_optimizer_are_refused(folder, edit, why) -> None:
    edit_tensors(folder, "optimizer-joint", edit)
    code, told = resumed()
    assert (code, why in told) == (6, True), told


def test_what_is_sealed_again_unchanged_goes_on(folder) -> None:
    """Else the refusals above could be of anything."""
    edit_json(folder, "state.json", lambda body: None)
    edit_json(folder, "MANIFEST.json", lambda body: None)
    edit_tensors(folder, "target", lambda tensors: None)
    assert json.loads((folder / "state.json").read_text())["averages"]["target"] == 2
    code, told = resumed()
    assert code == 0, told
