"""What the library webdataset writes is read by its own rules, and what is not read is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from command_line import e2ediff, needs
from e2ediff_sources.tars import ClassTars, TarShards
from pictures import tar_bytes
from refusals import refusal

from e2ediff.data import LeftOut, SourceConfig
from e2ediff.errors import DataError

SIZE, LABELS = 8, [1, 0, 2, 1]
PIXELS = np.random.default_rng(0).integers(256, size=(4, SIZE, SIZE, 3), dtype=np.uint8)
X = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write(*suffixes: str, path: str = "x.tar", key: str = "{:03}", **more: str) -> str:
    """Samples whose images have these suffixes (the first the right ones) and more text."""
    with wds.TarWriter(path) as out:
        for i, pixels in enumerate(PIXELS):
            images = {s: pixels if s == suffixes[0] else 255 - pixels for s in suffixes}
            texts = {s: text.format(LABELS[i]) for s, text in more.items()}
            out.write({"__key__": key.format(i), **images, **texts})
    return path


def shards(path: str = "x.tar", classes: int = 3, **options: Any) -> TarShards:
    return TarShards(path=path, size=SIZE, classes=classes, **options)


def assert_holds(config: SourceConfig, *, labelled: bool = True) -> None:
    source = config.open()
    pixels, labels = source.read(range(len(source)))
    assert torch.equal(pixels, X)
    assert labels.tolist() == (LABELS if labelled else [0] * 4)


def left_out(config: SourceConfig) -> dict[str, int]:
    return {one.reason: one.count for one in config.open().left_out}


@pytest.mark.parametrize("suffix", ["png", "PNG", "ppm.png", "input.png", "Input.PNG"])
def test_the_only_suffix_of_images_is_taken(suffix: str) -> None:
    write(suffix, cls="{}")
    assert_holds(shards())
    assert left_out(shards()) == {}


def test_a_plain_suffix_goes_before_compound_ones() -> None:
    write("png", "seg.png", cls="{}")
    assert_holds(shards())
    assert left_out(shards()) == {"with suffix .seg.png": 4}
    assert left_out(shards(image_suffix="seg.png")) == {"with suffix .png": 4}


@pytest.mark.parametrize("named", ["input.png", ".input.png", "INPUT.PNG"])
def test_one_of_several_compound_suffixes_is_the_recipe_s_choice(named: str) -> None:
    write("input.png", "target.png", cls="{}")
    assert refusal(shards()).endswith(
        "x.tar holds images with several suffixes after the first dot of their names: "
        "input.png (4), target.png (4); choose one with `--set data.image_suffix=input.png`, or "
        "pack the shards again if these are parts of names"
    )
    assert_holds(shards(image_suffix=named))
    assert left_out(shards(image_suffix=named)) == {"with suffix .target.png": 4}
    line = refusal(shards(image_suffix="output.png"))
    assert "looked for <key>.<suffix> with output.png); it has the suffixes " in line
    assert "input.png (4)" in line
    assert line.endswith("Name one with `--set data.image_suffix=...`")


@pytest.mark.parametrize(
    ("suffix", "text", "options"),
    [
        ("cls", "{}", {}),
        ("CLS", "{}\n", {}),
        ("json", '{{"label": {}}}', {}),
        ("label.txt", "{}", {"label": "label.txt"}),
        ("label.txt", "{}", {"label": ".Label.TXT"}),
        ("meta.json", '{{"class": {}}}', {"label": "meta.json", "label_key": "class"}),
    ],
)
def test_labels_are_read_from_the_suffix_that_holds_them(
    suffix: str, text: str, options: dict[str, str]
) -> None:
    write("input.png", **{suffix: text})
    assert_holds(shards(**options))
    assert left_out(shards(**options)) == {}


def test_labels_that_were_not_found_are_looked_for_in_what_is_left_out() -> None:
    write("png", **{"label.txt": "{}", "txt": "a cat"})
    line = refusal(shards())
    assert "holds no labels, the recipe says data.classes: 3; give the labels, or" in line
    assert "4 with suffix .label.txt (x.tar/000.label.txt), 4 with suffix .txt (x.tar/000." in line
    assert_holds(shards(classes=0), labelled=False)


@pytest.mark.parametrize("key", ["{:03}", "a/b/{:03}", "a.b/c.d/{:03}", "images/{:03}"])
def test_keys_end_at_the_first_dot_of_the_last_name(key: str) -> None:
    write("input.png", key=key, cls="{}")
    assert_holds(shards())
    with open("x.tar", "rb") as stream:
        files = wds.tariterators.tar_file_expander([{"url": "x.tar", "stream": stream}])
        names = [sample["__key__"] for sample in wds.tariterators.group_by_keys(files)]
    read = [shards().open().path_of(i) for i in range(4)]
    assert read == [str(Path(f"x.tar/{n}.input.png").absolute()) for n in names]


def test_images_whose_names_have_dots_of_their_own_are_refused() -> None:
    images = [(f"photo.{i}.png", b"x") for i in range(3)]
    Path("x.tar").write_bytes(tar_bytes(images))
    line = refusal(shards(classes=0))
    assert "several suffixes after the first dot of their names: 0.png (1), 1.png (1), 2." in line


def test_what_was_written_to_several_shards_is_read_in_order() -> None:
    with wds.ShardWriter("train-%04d.tar", maxcount=3, verbose=0) as out:
        for i, pixels in enumerate(PIXELS):
            out.write({"__key__": f"{i}", "png": pixels, "cls": LABELS[i], "json": {"a": i}})
    for path in ("train-{0000..0001}.tar", "train-*.tar", "."):
        assert_holds(shards(path))
    assert left_out(shards(".")) == {"with suffix .json": 4}


def test_samples_without_an_image_are_counted() -> None:
    write("png", cls="{}")
    with wds.TarWriter("y.tar") as out:
        out.write({"__key__": "9", "cls": 1, "txt": "no image"})
        out.write({"__key__": "a.b/8", "png": PIXELS[0], "cls": 1})
    Path("notes.md").write_text("no shard")
    source = shards(".").open()
    assert len(source) == 5
    assert source.left_out == (
        LeftOut("of samples without an image", 2, "y.tar/9.cls"),
        LeftOut("with suffix .md", 1, "notes.md"),
    )
    assert shards(".").open().left_out == source.left_out, "as the stored index has them"


def test_two_images_or_labels_of_a_sample_are_refused() -> None:
    for names, said in (
        (("0.png", "0.jpg"), "x.tar/0.jpg is the second image of sample '0'"),
        (("0.in.png", "0.IN.png"), "x.tar/0.IN.png is the second image of sample '0'"),
        (("0.png", "0.cls", "0.CLS"), "x.tar/0.CLS is the second label of sample '0'"),
    ):
        Path("x.tar").write_bytes(tar_bytes([(name, b"0") for name in names]))
        assert said in refusal(shards())


def test_an_empty_label_is_none() -> None:
    members = [("0.png", b"x"), ("0.cls", b""), ("1.png", b"x"), ("1.cls", b"1")]
    Path("x.tar").write_bytes(tar_bytes(members))
    with pytest.raises(DataError, match=r"x.tar/0.png has no label, 1 of 2 images have one"):
        shards().open()


def test_class_tars_count_what_they_leave_out() -> None:
    inner = tar_bytes([("n_0.png", b"x"), ("notes.txt", b"x"), ("deep.tar", tar_bytes([]))])
    Path("x.tar").write_bytes(tar_bytes([("n.tar", inner), ("README", b"x")]))
    assert ClassTars(path="x.tar", size=SIZE, classes=1).open().left_out == (
        LeftOut("with suffix .tar", 1, "n/deep.tar"),
        LeftOut("with suffix .txt", 1, "n/notes.txt"),
        LeftOut("without suffix", 1, "README"),
    )
    Path("folder").mkdir()
    for name in ("m", "n"):
        Path(f"folder/{name}.tar").write_bytes(tar_bytes([(f"{name}_0.png", b"x")]))
    Path("folder/o.tar.gz").write_bytes(b"x")
    config = ClassTars(path="folder", size=SIZE, classes=2)
    for _ in range(2):  # the second time beside the index
        assert config.open().left_out == (LeftOut("with suffix .gz", 1, "o.tar.gz"),)


@needs("e2ediff-data")
def test_data_stats_name_what_is_left_out() -> None:
    write("input.png", cls="{}", txt="a cat")
    done = e2ediff("data", "stats", "x.tar", "--workers", 0)
    assert "\nleft out    4 files are left out: 4 with suffix .txt (x.tar/000.txt)\n" in done.out
