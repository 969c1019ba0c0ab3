"""A stranger's source of images: recognised, and moved at a resume, like one of ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import OURS, e2ediff, needs

from e2ediff.errors import DataError, PluginError, RecipeError
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.storage import Store

PLUGIN = """
from pathlib import Path
from typing import ClassVar
import attrs
import numpy as np
import torch
from e2ediff import hookimpl
from e2ediff.data import DataSource, ImageSpec, Recognised, SourceConfig

@attrs.frozen(kw_only=True)
class Stack(SourceConfig):
    "Images in `x.stack`, labels in `y.stack` of a folder."
    movable: ClassVar[tuple[str, ...]] = ("place",)
    harmless: ClassVar[tuple[str, ...]] = (*SourceConfig.harmless, "cache")

    place: str
    shade: int = 0
    cache: int = 1
    workers: int = 0
    classes: int = 2

    @classmethod
    def recognises(cls, address):
        if (Path(address) / "x.stack").is_file():
            return Recognised({"place": address}, "certain")

    def with_counted_classes(self):
        return attrs.evolve(self, classes=int(self.open().labels().max()) + 1)

    @property
    def image(self):
        return ImageSpec(1, 16, 16, self.classes)

    def open(self, *, held_out=False):
        return _Stack(self)

class _Stack(DataSource):
    def __init__(self, config):
        self.x, self.y = (np.load(Path(config.place) / f"{k}.stack") for k in "xy")
        self.shade = config.shade
    def __len__(self):
        return len(self.x)
    def labels(self):
        return torch.from_numpy(self.y)
    def read(self, indices):
        rows = list(indices)
        return torch.from_numpy(self.x[rows]) + self.shade, self.labels()[rows]

@hookimpl
def register(add):
    add("sources", "stack", Stack)
"""


def write(folder: Path, count: int = 24) -> Path:
    folder.mkdir()
    chance = np.random.default_rng(0)
    for name, array in (
        ("x", chance.integers(0, 200, (count, 1, 16, 16), dtype=np.uint8)),
        ("y", np.arange(count) % 2),
    ):
        with (folder / f"{name}.stack").open("wb") as file:
            np.save(file, array)
    return folder


@pytest.fixture
def place(inside, tiny_text) -> Path:
    """The plugin, a recipe, and a folder of images for it."""
    inside.install("stacks", PLUGIN)
    text = tiny_text.replace("steps: 12", "steps: 4")
    (inside.cwd / "tiny.yaml").write_text(text + "requires: [stacks]\n")
    return write(inside.cwd / "images")


def trained(out: str, *changes: str, **data: object) -> None:
    block = json.dumps({"name": "stack", **data})
    words = [word for change in changes for word in ("--set", change)]
    resume = ["--resume"] if Path(out).exists() else []
    done = e2ediff("run", "tiny.yaml", "--set", f"data={block}", *words, *resume, "--out", out)
    assert done.code == 0, done.err


def weights(out: str) -> dict[str, bytes]:
    found = open_checkpoint(Store(out))
    return {
        f"{file}:{name}": t.contiguous().numpy().tobytes()
        for file in found.files
        for name, t in found.tensors(file).items()
    }


def test_a_strangers_images_may_be_moved_and_read_otherwise_between_two_parts_of_a_run(
    place,
) -> None:
    trained("whole", "steps=8", place="images")
    trained("cut", place="images")
    place.rename("elsewhere")
    trained("cut", "steps=8", place="elsewhere", cache=5, workers=1)
    assert weights("cut") == weights("whole")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"place": "images", "shade": 3}, "data.shade: was 0 in cut, is 3 here."),
        ({"place": "fewer"}, "which holds 23 training images instead of 24."),
    ],
)
def test_other_images_of_a_strangers_source_are_refused(place, data, said) -> None:
    write(Path("fewer"), 23)
    trained("cut", place="images")
    block = json.dumps({"name": "stack", **data})
    done = e2ediff("run", "tiny.yaml", "--set", f"data={block}", "--resume", "--out", "cut")
    assert done.code == RecipeError.exit_code
    assert said in done.err


# Recognised


@pytest.fixture
def data_command(place, monkeypatch) -> None:
    """The command `data`, of a plugin that is blocked with our others in these tests."""
    others = (name for name in OURS.split(",") if name != "data_tools")
    monkeypatch.setenv("E2EDIFF_BLOCK", ",".join(others))


def proposed(*words: str) -> dict[str, object]:
    done = e2ediff("data", "stats", *words, "--workers", 0)
    assert done.code == 0, done.err
    return yaml.safe_load(done.out.partition("# proposed\n")[2])["data"]


@needs("e2ediff-data")
@pytest.mark.usefixtures("data_command")
def test_a_strangers_source_is_asked_and_counts_its_classes() -> None:
    block = proposed("images", "--set", "name=stack")
    assert (block["name"], block["place"], block["classes"]) == ("stack", "images", 2)
    assert proposed("images") == block
    assert e2ediff("data", "check", "images", "--workers", 0).code == 0
    done = e2ediff("data", "prepare", "images", "out", "--size", 16, "--workers", 0)
    assert (done.code, done.out) == (0, "out\n"), done.err
    assert proposed("out")["name"] == "shards"
    Path("x.txt").touch()
    said = e2ediff("data", "check", "x.txt").err
    assert "x.txt: not recognised. Expected a folder of class folders" in said
    assert "stack" in said.partition(", or data of ")[2].rstrip(".\n").split(", ")


OTHER = """
import attrs
from pathlib import Path
from e2ediff import hookimpl
from e2ediff.data import Recognised
from e2ediff_stacks import Stack

@attrs.frozen(kw_only=True)
class Pile(Stack):
    "Reads the same."
    @classmethod
    def recognises(cls, address):
        if "fault" in address:
            raise KeyError("no")
        return Stack.recognises(address)

@hookimpl
def register(add):
    add("sources", "pile", Pile)
"""


@needs("e2ediff-data")
@pytest.mark.usefixtures("data_command")
def test_data_that_two_sources_read_equally_well_are_for_the_user_to_choose(inside) -> None:
    inside.install("piles", OTHER.replace("e2ediff_stacks", "stacks"))
    done = e2ediff("data", "stats", "images", "--workers", 0)
    assert done.code == DataError.exit_code
    assert "images: pile and stack can read it; choose with --set name=pile" in done.err
    assert proposed("images", "--set", "name=pile")["name"] == "pile"
    assert proposed("images", "--set", "data.name=stack")["name"] == "stack"


@needs("e2ediff-data")
@pytest.mark.usefixtures("data_command")
def test_a_source_that_fails_when_it_is_asked_is_named(inside) -> None:
    inside.install("piles", OTHER.replace("e2ediff_stacks", "stacks"))
    done = e2ediff("data", "stats", "fault", "--workers", 0)
    assert done.code == PluginError.exit_code
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "plugin 'piles' (piles 1.2), piles.py line 14: pile fails to recognise" in line
    assert line.endswith("To go on without it: E2EDIFF_BLOCK=piles")
