"""A run that goes on, and a model of it, compute by the kernels that the run chose first."""

from __future__ import annotations

import json

import pytest
from command_line import e2ediff
from tiny_recipe import tiny

# `NOTE` gets what each `prepare` was told that the run had.
FILE = '''
"""A backbone that writes down which kernels it is told of, and claims to choose others."""

import json
import attrs
from e2ediff import hookimpl
from e2ediff.parts.backbones import ViT, ViTConfig


class Net(ViT):
    def prepare(self, device, dtype):
        with open("NOTE", "a") as file:
            file.write(json.dumps(dict(self.kernels_before)) + "\\n")
        return {**super().prepare(device, dtype), "attention": "mine (for a reason)"}


@attrs.frozen(kw_only=True)
class Noting(ViTConfig):
    """A ViT that notes."""

    def build(self, image):
        return Net(self, image)


@hookimpl
def register(add):
    add("backbones", "noting", Noting)
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = "{name: noting, width: 16, depth: 1, heads: 1, patch: 8, latent_dim: 4}"
    (tmp_path / "tiny.yaml").write_text(tiny(backbone=backbone))
    (tmp_path / "noting.py").write_text(FILE.replace("NOTE", str(tmp_path / "notes.jsonl")))
    command("run", "tiny.yaml", "--out", "run")
    assert told(tmp_path) == [{}]
    (tmp_path / "notes.jsonl").unlink()
    return tmp_path


def command(*words) -> None:
    done = e2ediff(*words, "--plugin", "noting.py")
    assert done.code == 0, done.err


def told(folder) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--resume", "run", "--set", "steps=6"),
        ("sample", "run", "--count", "2"),
        ("reconstruct", "run", "--count", "2"),
    ],
    ids=lambda words: words[0],
)
def test_a_network_is_told_which_kernels_the_run_had(run, words) -> None:
    command(*words)
    assert told(run) == [{"attention": "mine (for a reason)"}]


def test_a_run_that_begins_anew_chooses_anew(run) -> None:
    command("run", "tiny.yaml", "--out", "run", "--restart")
    assert told(run) == [{}]


def test_an_imported_run_chooses_on_its_first_start(run) -> None:
    command("ckpt", "export", "run", "weights.safetensors")
    command("ckpt", "import", "tiny.yaml", "weights.safetensors", "imported")
    (run / "notes.jsonl").unlink()
    command("run", "--resume", "imported")
    assert told(run) == [{}]
