"""A stranger's source of images: moved at a resume like one of ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import e2ediff

from e2ediff.errors import RecipeError
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.storage import Store

PLUGIN = """
from pathlib import Path
from typing import ClassVar
import attrs
import numpy as np
import torch
from e2ediff import hookimpl
from e2ediff.data import DataSource, ImageSpec, SourceConfig

@attrs.frozen(kw_only=True)
class Stack(SourceConfig):
    "Images in `x.stack`, labels in `y.stack` of a folder."
    movable: ClassVar[tuple[str, ...]] = ("place",)
    harmless: ClassVar[tuple[str, ...]] = (*SourceConfig.harmless, "cache")

    place: str
    shade: int = 0
    cache: int = 1
    workers: int = 0

    @property
    def image(self):
        return ImageSpec(1, 16, 16, 2)

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
def register_sources(add):
    add("stack", Stack)
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
