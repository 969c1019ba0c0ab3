"""`data: ADDRESS`: the block is inferred from the images, reported, and kept with the run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import Done, e2ediff
from PIL import Image
from tiny_recipe import tiny

from e2ediff.host.data_block import proposed_size
from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe
from e2ediff.host.yaml import resolve
from e2ediff.parts.sources.folder import ImageFolder

HERE = ("--set", "data.workers=0")


def folder(root: str, size: tuple[int, int], mode: str = "RGB", classes: str = "ab") -> None:
    for number, name in enumerate(classes):
        place = Path(root, name)
        place.mkdir(parents=True)
        for i in range(8):
            image = Image.effect_noise(size, 60 + number).convert(mode)
            if mode == "RGB":
                image.putpixel((size[0] // 2, size[1] // 2), (255, 0, 0))
            image.save(place / f"{i}.png")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a folder of colour images, one of grey ones, and a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("E2EDIFF_RUNS", raising=False)
    folder("colour", (50, 40))
    folder("grey", (20, 28), "L", "abc")
    Path("tiny.yaml").write_text(tiny(steps="2"))
    return tmp_path


def block(*changes: str, recipe: str = "tiny.yaml") -> ImageFolder:
    config = load_recipe(load(), recipe, changes).data
    assert isinstance(config, ImageFolder)
    return config


def run(*words: str | Path) -> Done:
    return e2ediff("run", "tiny.yaml", *words, "--out", "out")


def refused(code: int, *words: str) -> str:
    done = e2ediff(*words)
    assert done.code == code, done
    return done.err


def test_size_channels_and_classes_are_inferred() -> None:
    expected = {"colour": (32, 3, 2), "grey": (32, 1, 3)}
    for root, (size, channels, classes) in expected.items():
        made = ImageFolder(root=root, size=size, channels=channels, classes=classes)
        assert block(f"data={root}") == made


def test_grey_images_that_are_stored_as_colour_are_grey() -> None:
    for path in Path("grey").rglob("*.png"):
        Image.open(path).convert("RGB").save(path)
    assert block("data=grey").channels == 1


def test_a_folder_without_classes_has_none() -> None:
    assert block("data=colour/a") == ImageFolder(root="colour/a", size=32, classes=0)


@pytest.mark.parametrize(("grid", "record"), [("grid", "set"), ("reconstructions", "psnr")])
def test_the_grid_of_a_set_that_was_written_is_no_image_of_it(grid, record) -> None:
    shutil.copytree("colour/a", "made/images")
    Image.new("RGB", (320, 320)).save(f"made/{grid}.png")
    Path(f"made/{record}.json").write_text("{}")
    assert block("data=made") == ImageFolder(root="made/images", size=32, classes=0)
    assert len(block("data=made").open()) == 8
    given = ImageFolder(root=".", size=32, classes=0).open()
    paths = [given.path_of(i) for i in range(len(given))]
    assert sum("made/" in path for path in paths) == 8
    shutil.copy(f"made/{grid}.png", f"colour/a/{grid}.png")
    assert len(block("data=colour/a").open()) == 9, "an image of that name is one elsewhere"


def test_the_size_is_one_that_half_of_the_images_have() -> None:
    sides = {(10,): 32, (64, 63, 64): 64, (300, 200, 200): 128, (256,): 256, (4000, 512): 512}
    assert {given: proposed_size(given) for given in sides} == sides


def test_what_is_given_is_not_inferred() -> None:
    given = block("data=colour", "data.size=24", "data.flip=false")
    assert given == ImageFolder(root="colour", size=24, classes=2, flip=False)
    assert block("data=colour", "data.classes=0").classes == 0


def test_a_recipe_may_hold_the_address() -> None:
    lines = tiny().splitlines()
    assert any(line.startswith("data:") for line in lines)
    for value in ("colour", "{name: colour, channels: 1}"):
        text = [f"data: {value}" if line.startswith("data:") else line for line in lines]
        Path("own.yaml").write_text("\n".join(text))
        read = block(recipe="own.yaml")
        assert read == ImageFolder(
            root="colour", size=32, classes=2, channels=1 if "{" in value else 3
        )


def test_an_address_is_taken_literally() -> None:
    """Where YAML would read a comment, an alias, a list or a number."""
    for name in ("a #1", "*x", "[1]", "2024", "null", "a: b", "a' \"b", "ä"):
        shutil.copytree("colour", name)
        assert block(f"data={name}").root == name
    assert resolve("2024") == 2024
    assert block("data='colour'").root == "colour"


def test_the_block_is_the_one_that_stats_proposes() -> None:
    pytest.importorskip("e2ediff_data")
    for root in ("colour", "grey"):
        config = block(f"data={root}")
        said = e2ediff("data", "stats", root, "--workers", "0").out.partition("# proposed")[2]
        Path("proposed.yaml").write_text(said)
        (line,) = [one for one in said.splitlines() if one.startswith("data:")]
        assert block(f"data={line.removeprefix('data:').strip()}") == config


def test_a_run_reports_what_it_took_and_keeps_it() -> None:
    """And sampling, checking and resuming need nothing of it again."""
    done = run("--set", "data=colour", *HERE)
    assert done.code == 0, done.err
    assert (
        "data: image_folder at colour: 16 images, 2 classes, 32 x 32, colour (inferred; give "
        "data.size=... to choose others)\n"
    ) in done.err
    kept = block(recipe="out/resolved.yaml")
    assert kept == ImageFolder(root="colour", size=32, classes=2, workers=0)
    shutil.move("colour", "elsewhere")
    assert e2ediff("sample", "out", "--label", "a", "--count", "1").code == 0
    assert e2ediff("check", "out/resolved.yaml").code == 0
    again = run("--set", "data=elsewhere", *HERE, "--set", "steps=4", "--resume")
    assert again.code == 0, again.err
    assert "2 classes, 32 x 32, colour (as in the run)" in again.err


def test_the_block_of_the_run_counts_when_it_is_resumed() -> None:
    """Also where other options would be inferred now."""
    data = "data={name: image_folder, root: colour, size: 16, classes: 2, flip: false, workers: 0}"
    assert run("--set", data).code == 0
    done = run("--set", "data=colour", "--set", "steps=4", "--resume")
    assert done.code == 0, done.err
    done = run("--set", "data=colour", "--set", "data.size=32", "--resume")
    assert done.code == 3
    assert "data.size: was 16 in out, is 32 here" in done.err


def test_every_cell_of_an_ablation_has_the_block() -> None:
    words = ("--set", "data=colour", "--vary", "objective=coupled,detached", "--dry-run")
    done = e2ediff("ablate", "tiny.yaml", *words)
    assert done.code == 0, done.err
    assert done.err.count("data: image_folder at colour") == 1


def test_an_address_at_which_nothing_is_known_is_refused_with_what_was_meant() -> None:
    Path("empty").mkdir()
    Path("notes.txt").write_text("x")
    for address, words in {
        "empty": "empty: an empty folder. Expected a folder of class folders or images",
        "./clour": "./clour: nothing is there. Did you mean ./colour? Expected",
        "clour": "'clour' is neither the name of a data source nor a path that exists. Did you "
        "mean colour? ",
        "synthetics": "'synthetics' is neither the name of a data source nor a path that exists. "
        "Did you mean 'synthetic'? Known: ",
        "notes.txt": "notes.txt: not recognised. Expected",
        "sftp://x/y": "protocol 'sftp' is not allowed here",
    }.items():
        said = refused(3, "run", "tiny.yaml", "--set", f"data={address}")
        assert f"--set 1: data: {words}" in said.replace("cannot open sftp://x/y: ", "")
    assert not Path("runs").exists()


def test_all_problems_of_a_recipe_are_reported_beside_that_of_its_data() -> None:
    said = refused(3, "check", "tiny.yaml", "--set", "data=./no", "--set", "optimizer.lr=-1")
    assert "2 problems" in said
    assert "optimizer.lr" in said


def test_a_source_is_preferred_to_a_folder_of_its_name_and_that_is_said() -> None:
    shutil.copytree("colour", "synthetic")
    done = e2ediff("check", "tiny.yaml", "--set", "data=synthetic")
    assert done.code == 0
    assert "synthetic is a data source; for the folder of that name give ./synthetic" in done.err
    assert block("data=./synthetic").classes == 2


def test_a_size_that_the_model_does_not_fit_is_refused_with_one_that_fits() -> None:
    said = refused(3, "check", "tiny.yaml", "--set", "data=colour", "--set", "data.size=30")
    assert "does not divide the image, 30 x 30 (height x width); " in said
    assert ". Or give --set data.size=" in said
    size = said.rpartition("data.size=")[2].split()[0]
    assert size == "24"
    assert (
        e2ediff("check", "tiny.yaml", "--set", "data=colour", "--set", f"data.size={size}").code
        == 0
    )


def test_images_of_which_none_can_be_read_are_refused() -> None:
    for path in Path("colour").rglob("*.png"):
        path.write_bytes(b"no picture")
    said = refused(5, "check", "tiny.yaml", "--set", "data=colour")
    assert "none of the 16 images looked at can be read; the first is colour/a/0.png" in said
