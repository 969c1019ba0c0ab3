"""What `data check`, `data stats` and `data prepare` print, and how they are called."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import yaml
from command_line import OURS, e2ediff
from e2ediff_data.address import recognise, source_config
from e2ediff_data.write import Settings, prepare
from pictures import damage, write_tree
from refusals import image_tree

from e2ediff import addresses
from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe
from e2ediff.store.run_directory import RunDirectory
from e2ediff.terminal import printable


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return image_tree(tmp_path, monkeypatch)


def test_check_names_every_broken_image_and_fails() -> None:
    done = e2ediff("data", "check", "tiny.yaml", "--workers", "0")
    assert (done.code, done.out) == (0, "")
    assert done.err.endswith("tiny.yaml: all 20 images can be read\n")
    cut = Path("tree/n00000001/n00000001_3.JPEG")
    cut.write_bytes(cut.read_bytes()[:-60])  # behind its header
    Path("tree/n00000002/n00000002_0.JPEG").write_bytes(b"<html>")
    done = e2ediff("data", "check", "tree", "--workers", "1")
    assert done.code == 5
    assert done.out.splitlines() == [
        "tree/n00000001/n00000001_3.JPEG: damaged image (image file is truncated (43 bytes not "
        "processed))",
        "tree/n00000002/n00000002_0.JPEG: damaged image (none of JPEG, PNG, WEBP, BMP, GIF, TIFF)",
    ]
    assert "error: tree: 2 of 20 images cannot be used; remove or replace them" in done.err
    quick = e2ediff("data", "check", "tree", "--quick", "--workers", "0")
    assert quick.code == 5
    assert quick.out.splitlines() == done.out.splitlines()[1:]


def test_stats_count_measure_and_propose_a_block_that_reads_the_data() -> None:
    write_tree(Path("wide"), [1, 12, 3], size=(40, 60))
    damage(Path("wide/n00000001/n00000001_3.JPEG"))
    done = e2ediff("data", "stats", "wide", "--workers", "0")
    assert done.code == 0, done
    figures, _, proposed = done.out.partition("\n# proposed\n")
    assert figures.splitlines()[:3] == [
        "images      16",
        "classes     3, of 1 (n00000000) to 12 (n00000001) images, median 3",
        "imbalance   12.0 times as many in the largest as in the smallest",
    ]
    assert "shorter side 40 to 43 pixels" in figures
    assert "broken      1 of 16 images looked at" in figures
    Path("block.yaml").write_text(proposed)
    config = source_config(load(entry_points=False), "block.yaml")
    assert (config.image.height, config.image.classes, config.image.channels) == (32, 3, 3)
    assert (config.sampling, config.on_bad_image) == ("class_balanced", "skip")


def test_a_shape_that_is_not_square_is_proposed_as_it_was_chosen_and_prepared_as_squares() -> None:
    Path("tall.yaml").write_text("data: {name: synthetic, size: [24, 16], count: 64}\n")
    assert "size: [24, 16]" in e2ediff("data", "stats", "tall.yaml", "--workers", "0").out
    for size in (24, 16):
        image = source_config(load(entry_points=False), "tall.yaml", size=size).image
        assert (image.height, image.width) == (size, size)


def test_stats_as_json_say_what_the_text_says() -> None:
    done = e2ediff("data", "stats", "tree", "--json", "--images", "6", "--workers", "0")
    found = json.loads(done.out)
    assert [list(c.values()) for c in found["classes"]] == [
        [0, "n00000000", 4], [1, "n00000001", 6], [2, "n00000002", 10]
    ]  # fmt: skip
    assert (found["images"], found["looked_at"], found["broken"]) == (20, 6, [])
    assert 20 <= found["sizes"]["min"] <= found["sizes"]["median"] <= found["sizes"]["max"] < 28
    assert len(found["mean"]) == len(found["std"]) == 3
    text = e2ediff("data", "stats", "tree", "--images", "6", "--workers", "0").out
    assert yaml.safe_load(text.partition("# proposed\n")[2]) == found["proposed"]
    damage(Path("tree/n00000001/n00000001_3.JPEG"))
    done = e2ediff("data", "stats", "tree", "--json", "--workers", "0")
    (broken,) = json.loads(done.out)["broken"]
    assert broken["image"] == "tree/n00000001/n00000001_3.JPEG"
    done = e2ediff("data", "stats", "tree", "--json", "--workers", "0", "--set", "classes=0")
    assert json.loads(done.out)["classes"] == []


def test_a_path_is_recognised_with_its_classes() -> None:
    host = load(entry_points=False)
    config = source_config(host, "tree", ["size=16"])
    assert host.registries["sources"].name_of(type(config)) == "image_folder"
    assert (config.image.height, config.image.classes) == (16, 3)
    assert len(config.open()) == 20


def test_a_path_that_is_nothing_known_is_said() -> None:
    done = e2ediff("data", "check", "nowhere")
    assert done.code == 5
    assert done.err.startswith("error: nowhere: nothing is there. Expected a folder of class")
    assert "shards" in done.err
    assert "data of shards" not in done.err
    assert e2ediff("data", "check", "tiny.txt").code == 5
    done = e2ediff("data", "check", "tree", "--set", "sise=3")
    assert done.code == 3
    assert "unknown option 'sise'. Did you mean 'size'?" in done.err


def test_a_size_that_a_source_cannot_have_is_said() -> None:
    Path("b.yaml").write_text("name: fashion_mnist\n")
    done = e2ediff("data", "prepare", "b.yaml", "out", "--size", 20, "--workers", 0)
    assert (done.code, done.err) == (
        5, "error: b.yaml: cannot be cropped to 20 pixels: 'size' must be in (28, 32) (got 20)\n"
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_a_place_that_cannot_be_written_is_called_what_the_command_calls_it(workers) -> None:
    Path("file").touch()
    done = e2ediff("data", "prepare", "tree", "file", "--size", 16, "--workers", workers)
    assert done.code == 8
    assert done.err.startswith("error: file/parts/settings.json: cannot write: Not a directory (")
    assert done.err.endswith("is reachable, or choose another DST.\n")
    words = ("data", "prepare", "tree", "out", "--size", 16, "--each", 6, "--workers", workers)
    assert e2ediff(*words).code == 0
    Path("out/shard-00001.tar").unlink()
    Path("out/shard-00001.tar/x").mkdir(parents=True)
    done = e2ediff(*words)
    assert done.code == 8
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: out/shard-00001.tar: cannot write: Is a directory (")
    assert done.err.splitlines()[-1] == line


@pytest.mark.parametrize("name", ["12", "it's, my: #1"])
def test_prepare_prints_what_a_shell_and_a_recipe_take_for_any_folder(name) -> None:
    words = ("prepare", "tree", name, "--size", "16", "--workers", "0", "--each", "6")
    done = e2ediff("data", *words)
    option, told = shlex.split(done.err.splitlines()[-1].removeprefix("read them with: "))
    assert e2ediff("check", "tiny.yaml", option, told).code == 0
    assert load_recipe(load(), "tiny.yaml", [told]).data.path == name


def test_prepare_prints_how_to_read_what_it_wrote() -> None:
    """And a run of it computes what a run of the folder computes."""
    words = ("prepare", "tree", "shards", "--size", "16", "--workers", "1", "--each", "6")
    done = e2ediff("data", *words)
    assert (done.code, done.out) == (0, "shards\n")
    assert "20 images in 4 shards; 0 left out" in done.err
    told = done.err.splitlines()[-1].removeprefix("read them with: --set '").removesuffix("'")
    assert "4 of them made before" in e2ediff("data", *words).err
    assert e2ediff("run", "tiny.yaml", "--out", "a").code == 0
    assert e2ediff("run", "tiny.yaml", "--set", told, "--out", "b").code == 0
    losses = [
        [m["loss/denoising"] for m in RunDirectory.open(p).read_metrics() if "loss/denoising" in m]
        for p in ("a", "b")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert e2ediff("data", "check", "shards").code == 0
    # A flipped bit that neither size nor time shows, in the padding behind the last image.
    shard = Path("shards/shard-00000.tar")
    data, stat = bytearray(shard.read_bytes()), shard.stat()
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    done = e2ediff("data", "check", "shards")
    assert done.code == 5
    assert (
        "1 of 5 files have another SHA-256 than prepared.json says (shard-00000.tar)" in done.err
    )


def test_a_whole_block_takes_the_place_of_what_was_recognised() -> None:
    done = e2ediff("data", "stats", "tree", "--workers", 0, "--set", "data=synthetic")
    assert (done.code, "name: synthetic" in done.out) == (0, True)
    block = "data={name: image_folder, root: tree, size: 16, classes: 0}"
    done = e2ediff("data", "stats", "tree", "--workers", 0, "--set", block)
    assert (done.code, "classes     0 (unconditional)" in done.out) == (0, True)


# How they are called


@pytest.mark.parametrize("words", [(), ("prepare",), ("check",), ("stats",)], ids=" ".join)
def test_help_answers_without_torch(words: tuple[str, ...]) -> None:
    program = (
        "import sys\n"
        "from e2ediff.cli import main\n"
        "try: main(['data', *sys.argv[1:], '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'fsspec', 'rich', 'matplotlib'} & {*sys.modules}\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    others = ",".join(name for name in OURS.split(",") if name != "data_tools")
    done = subprocess.run(
        [sys.executable, "-c", program, *words], env={**os.environ, "E2EDIFF_BLOCK": others},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" ".join(["Usage: e2ediff data", *words]))


@attrs.frozen
class Pathlike:
    """A path of another library's."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("form", [Path, lambda name: Pathlike(Path(name))], ids=["path", "other"])
def test_paths_are_taken_as_text_is(
    form: Callable[[str], addresses.Address],
) -> None:
    host = load()
    assert recognise(host, form("tree")) == recognise(host, "tree")
    config = source_config(host, form("tree"), (), 16)
    assert config == source_config(host, "tree", (), 16)
    assert source_config(host, form("tiny.yaml")) == source_config(host, "tiny.yaml")
    settings = Settings(
        source="", images=20, size=16, channels=3, classes=3, format="png", quality=95, each=20,
        skip=False,
    )  # fmt: skip
    prepare(config.open(), settings, form("shards"), workers=0, progress=print)
    assert source_config(host, form("shards")).path == "shards"


@pytest.mark.parametrize(
    "address", ["reference://::memory://x", "simplecache::reference://x", "REFERENCE://x"]
)
def test_an_address_that_is_never_opened_is_refused(address: str) -> None:
    done = e2ediff("data", "check", address)
    assert (done.code, "is never opened" in done.err) == (5, True), done


def test_names_of_classes_and_files_cannot_command_a_terminal() -> None:
    odd = "n\x1b[31m\x9b2J \u202e\nFORGED"
    write_tree(Path("wide"), [3, 3, 3], size=(20, 20))
    Path("wide/n00000001").rename(f"wide/{odd}")
    for path in Path(f"wide/{odd}").iterdir():
        damage(path)
        path.rename(f"wide/{odd}/{odd}.JPEG")
    for words in (["stats", "wide", "--classes"], ["check", "wide"], ["stats", "wide", "--json"]):
        done = e2ediff("data", *words, "--workers", "0")
        for text in (done.out, done.err):
            assert text == printable(text, lines=True)
            assert "\nFORGED" not in text
        assert re.search(r"\\(x|u00)1b\[31m", done.out + done.err), words
