"""Files of labels as people and spreadsheets write them, and what is refused in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from e2ediff.errors import DataError
from e2ediff.files.labels import read_labels
from e2ediff.parts import sources


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))


def written(*names: str) -> sources.ImageFolder:
    """A source over images of these names in `tree`, with labels in `labels.csv`."""
    for name in names:
        Path("tree", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(Path("tree", name))
    return sources.ImageFolder(root="tree", labels="labels.csv", size=8, classes=2)


def said(text: str | bytes, name: str = "labels.csv") -> dict[str, str] | None:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_labels(name)


@pytest.mark.parametrize(
    ("line", "image", "label"),
    [
        ("0.jpg,golden retriever", "0.jpg", "golden retriever"),
        ("0.jpg, golden retriever ", "0.jpg", "golden retriever"),
        ("0.jpg golden retriever", "0.jpg", "golden retriever"),
        ("0.jpg\tgolden retriever", "0.jpg", "golden retriever"),
        ('0.jpg,"golden retriever"', "0.jpg", "golden retriever"),
        ('"0.jpg","retriever, golden"', "0.jpg", "retriever, golden"),
        ("0.jpg,Boeing 747", "0.jpg", "Boeing 747"),
        ("0.jpg,golden retriever,0.93,train", "0.jpg", "golden retriever"),
        ("my dog.jpg 3", "my dog.jpg", "3"),
        ("my photos/my dog.JPEG,golden retriever", "my photos/my dog.JPEG", "golden retriever"),
        ("0.jpg 3", "0.jpg", "3"),
        ("0.jpg,3", "0.jpg", "3"),
        ("0.jpg 3 4 5", "0.jpg", "3"),
        ("val_1,n02099601 1 2 3 4", "val_1", "n02099601"),
        ("val_1,n02099601 1 2 3 4 n02099601 5 6 7 8", "val_1", "n02099601"),
        ("val_1 n02099601", "val_1", "n02099601"),
    ],
)
def test_a_line_is_an_image_and_its_class(line: str, image: str, label: str) -> None:
    assert said(line) == {image: label}
    assert said(f"ImageId,PredictionString\r\n{line}\r\n\r\n") == {image: label}


def test_a_class_with_a_space_is_one_class() -> None:
    config = written("0.jpg", "1.jpg", "2.jpg")
    Path("labels.csv").write_text("0.jpg,golden retriever\n1.jpg,golden eagle\n2.jpg,golden eagle")
    source = config.open()
    assert source.class_names == ("golden eagle", "golden retriever")
    assert source.labels().tolist() == [1, 0, 0]


def test_a_byte_order_mark_is_no_part_of_the_first_name() -> None:
    config = written("0.jpg", "1.jpg")
    Path("labels.csv").write_text("0.jpg,0\n1.jpg,1", encoding="utf-8-sig")
    assert config.open().labels().tolist() == [0, 1]
    assert said("\ufeffImageId,PredictionString\n0.jpg,1") == {"0.jpg": "1"}
    told = json.dumps({"labels": [["0.jpg", 1]]})
    assert said(f"\ufeff{told}", "dataset.json") == {"0.jpg": "1"}


def test_a_name_that_two_images_have_is_refused_unless_its_path_is_given() -> None:
    config = written("a/001.jpg", "a/002.jpg", "b/001.jpg", "b/002.jpg")
    Path("labels.csv").write_text("001.jpg,0\n002.jpg,1")
    with pytest.raises(DataError) as caught:
        config.open()
    assert str(caught.value) == (
        "data.root: labels.csv does not match tree: '001.jpg' may be a/001.jpg or b/001.jpg; "
        "expected a label for each. Write their paths, relative to tree"
    )
    Path("labels.csv").write_text("001,0\n002,1")
    with pytest.raises(DataError, match=r"'001' may be a/001\.jpg or b/001\.jpg"):
        config.open()
    Path("labels.csv").write_text("a/001.jpg,0\nb/001.jpg,1\na/002.jpg,1\n002.jpg,0")
    assert config.open().labels().tolist() == [0, 1, 1, 0]


def test_two_labels_for_one_image_are_refused() -> None:
    with pytest.raises(DataError, match=r"labels\.csv: 0\.jpg has two labels, 1 and 2; expected"):
        said("0.jpg,1\n1.jpg,1\n0.jpg,2")
    assert said("0.jpg,1\n0.jpg,1") == {"0.jpg": "1"}
    told = json.dumps({"labels": [["0.jpg", 1], ["0.jpg", 2]]})
    with pytest.raises(DataError, match=r"0\.jpg has two labels, 1 and 2"):
        said(told, "dataset.json")


@pytest.mark.parametrize("line", ["0.jpg", "0.jpg,", ",0", '"0.jpg"', '"0.jpg",', "0.jpg ,, 3"])
def test_a_line_without_image_or_class_is_named(line: str) -> None:
    with pytest.raises(DataError, match="line 2 is '"):
        said(f"1.jpg 0\n{line}\n")
