"""Files of labels as people and spreadsheets write them, and what is refused in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from e2ediff.errors import DataError
from e2ediff.files.labels import labelled, read_labels
from e2ediff.files.listing import numbered
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
    found = read_labels(name)
    return None if found is None else {row.image: row.label for row in found.rows}


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
        ("0.jpg 3 0.5 -0.5 1", "0.jpg", "3"),
        ("0.jpg 7 eleven", "0.jpg", "7 eleven"),
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
        "data.root: labels.csv does not match tree: '001.jpg' may be a/001.jpg or b/001.jpg "
        "(line 1); expected a label for each. Write their paths, relative to tree"
    )
    Path("labels.csv").write_text("001,0\n002,1")
    with pytest.raises(DataError, match=r"'001' may be a/001\.jpg or b/001\.jpg"):
        config.open()
    Path("labels.csv").write_text("a/001.jpg,0\nb/001.jpg,1\na/002.jpg,1\n002.jpg,0")
    assert config.open().labels().tolist() == [0, 1, 1, 0]


def test_two_labels_for_one_image_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"labels\.csv: 0\.jpg has two labels, 1 and 2 \(lines 1 and 3\);"
    ):
        said("0.jpg,1\n1.jpg,1\n0.jpg,2")
    assert said("0.jpg,1\n0.jpg,1") == {"0.jpg": "1"}
    told = json.dumps({"labels": [["0.jpg", 1], ["0.jpg", 2]]})
    with pytest.raises(DataError, match=r"0\.jpg has two labels, 1 and 2 \(entries 1 and 2\)"):
        said(told, "dataset.json")


@pytest.mark.parametrize("line", ["0.jpg", "0.jpg,", ",0", '"0.jpg"', '"0.jpg",', "0.jpg ,, 3"])
def test_a_line_without_image_or_class_is_named(line: str) -> None:
    with pytest.raises(DataError, match="line 2 is '"):
        said(f"1.jpg 0\n{line}\n")


# Separators and quotes


@pytest.mark.parametrize(
    ("line", "image", "label"),
    [
        ("0.jpg;golden retriever", "0.jpg", "golden retriever"),
        ("0.jpg;Hund, groß", "0.jpg", "Hund, groß"),
        ('"my;dog.jpg";"golden ""best"" retriever"', "my;dog.jpg", 'golden "best" retriever'),
        ("0.jpg\tretriever, golden", "0.jpg", "retriever, golden"),
        ("0.jpg retriever, golden", "0.jpg", "retriever, golden"),
        ("0.jpg retriever; golden", "0.jpg", "retriever; golden"),
        ("0.jpg,retriever; golden", "0.jpg", "retriever; golden"),
        ("a,b.jpg\tcat", "a,b.jpg", "cat"),
        ("a;b.jpg,cat", "a;b.jpg", "cat"),
        ('"a,b.jpg",cat', "a,b.jpg", "cat"),
        ('"a b" cat', "a b", "cat"),
        ('0.jpg "golden retriever"', "0.jpg", "golden retriever"),
        ("photo.jpg copy.jpg,cat", "photo.jpg copy.jpg", "cat"),
        ("my dog,cat", "my dog", "cat"),
        ('0.jpg,5" disk', "0.jpg", '5" disk'),
        ("0.jpg,cat,,", "0.jpg", "cat"),
    ],
)
def test_what_separates_is_told_by_the_image(line: str, image: str, label: str) -> None:
    assert said(line) == {image: label}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_all_systems(end: str) -> None:
    assert said(end.join(["0.jpg,a", "", "1.jpg,b", ""])) == {"0.jpg": "a", "1.jpg": "b"}
    with pytest.raises(DataError, match=r"line 3 is '1\.jpg'"):
        said(end.join(["0.jpg,a", "", "1.jpg"]))


@pytest.mark.parametrize("odd", ["\x0b", "\x0c", "\x1c", "\x1e", "\x85", "\u2028", "\u2029"])
def test_nothing_else_ends_a_line(odd: str) -> None:
    assert said(f"a{odd}b.jpg,c{odd}d\n") == {f"a{odd}b.jpg": f"c{odd}d"}
    config = written(f"a{odd}b.jpg", "1.jpg")
    Path("labels.csv").write_text(f"1.jpg,1\na{odd}b.jpg,0\n")
    assert sorted(config.open().labels().tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('1.jpg,"golden', "line 2 is '1.jpg,\"golden' (unexpected end of data)"),
        ('1.jpg,"golden" retriever', "line 2 is '1.jpg,\"golden\" retriever' (',' expected"),
        ("a,b.jpg,cat", "line 2 is 'a,b.jpg,cat'"),
        ("1.jpg,retriever, golden", "line 2 has 3 columns, line 1 has 2; put quotes around"),
        ("1.jpg\x1b[31m", r"line 2 is '1.jpg\x1b[31m'"),
    ],
)
def test_a_line_that_is_no_csv_is_named(line: str, why: str) -> None:
    with pytest.raises(DataError) as caught:
        said(f"0.jpg,cat\n{line}\n")
    assert why in str(caught.value)


def test_lines_have_as_many_columns_whichever_is_the_first() -> None:
    for rows in (
        ["0.jpg,retriever, golden", "1.jpg,cat"],
        ["1.jpg,cat", "0.jpg,retriever, golden"],
    ):
        with pytest.raises(DataError, match=r"line 2 has \d columns, line 1 has \d; put quotes"):
            said("\n".join(rows))
    assert said("0.jpg,cat,,\n1.jpg,dog\n2.jpg,eel,") == {
        "0.jpg": "cat", "1.jpg": "dog", "2.jpg": "eel",
    }  # fmt: skip


# What is no text in UTF-8


def test_text_that_is_not_utf8_is_named() -> None:
    rows = "0.jpg,cat\r\n1.jpg,café\r\n"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"):
        with pytest.raises(DataError, match=r"labels\.csv: .*save (it|the file) as UTF-8"):
            said(rows.encode(encoding))
    for begin in ("", "\ufeff"):
        with pytest.raises(DataError, match=r"line 2 is not UTF-8 \(byte 0xe9\)"):
            said(begin.encode() + rows.encode("latin-1"))
    with pytest.raises(DataError, match="line 2 has a zero byte"):
        said("0.jpg,cat\n1.jpg,\0")
    with pytest.raises(DataError, match="is UTF-16 or UTF-32"):
        said('{"labels": null}'.encode("utf-16"), "dataset.json")


# A first line that names the columns


@pytest.mark.parametrize(
    "header",
    ["filename,label", "image;class", "Image Name\tClass ID", "ImageId,PredictionString",
     "file_name,label,split", '"path","category"', "id,target", "image label", "name class split"],
)  # fmt: skip
def test_a_header_is_no_image(header: str) -> None:
    separator = next((s for s in "\t;," if s in header), " ")
    assert said(f"\n{header}\n0.jpg{separator}1\n") == {"0.jpg": "1"}


def test_a_header_anywhere_else_is_no_header() -> None:
    with pytest.raises(DataError, match=r"1 of 2 labels no image \(filename, line 2\)"):
        matched(["0.jpg"], "0.jpg,1\nfilename,label")


@pytest.mark.parametrize(
    "header", ["label,filename", "filename,width,height,class", "id,path,label"]
)
def test_a_header_of_other_columns_is_refused(header: str) -> None:
    """Of the second, widths would be the classes."""
    with pytest.raises(DataError) as caught:
        said(f"{header}\n0.jpg,640,480,cat\n")
    told = ", ".join(f"'{column}'" for column in header.split(","))
    assert f"the first line names the columns {told}; the image must be" in str(caught.value)


def test_a_header_in_words_that_are_not_known_is_named_as_the_first_line() -> None:
    with pytest.raises(DataError) as caught:
        matched(["0.jpg"], "Datei;Klasse\n0.jpg;1")
    assert (
        "1 of 2 labels no image (Datei, line 1; columns are named as in 'filename,label', if at "
        "all)"
    ) in str(caught.value)


def test_a_header_that_is_also_an_image_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        matched(["a/image.png"], "image,class")
    assert (
        "line 1 ('image', 'class') may name columns or label a/image.png; expected one of the two"
    ) in str(caught.value)
    assert matched(["a/image.png"], "image.png,class") == ["class"]


# Which image is meant


def matched(images: list[str], text: str, name: str = "labels.csv") -> list[str]:
    Path(name).write_text(text)
    file = read_labels(name)
    assert file is not None
    return labelled(images, file, "tree", "data.root")


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("images", "rows", "labels"),
    [
        (["a/1.jpg", "b/1.jpg"], ["./a/1.jpg,0", "b//1.jpg,1"], ["0", "1"]),
        (["a/1.jpg", "b/1.jpg"], ["a\\1.jpg,0", ".\\b\\1.jpg,1"], ["0", "1"]),
        ([f"{NFD}/1.jpg", f"{NFC}2.jpg"], [f"{NFC}/1.jpg,0", f"{NFD}2.jpg,1"], ["0", "1"]),
        ([f"a/{NFD}.jpg"], [f"{NFC}.jpg,0"], ["0"]),
        ([f"a/{NFD}.jpg"], [f"{NFC},0"], ["0"]),
        ([f"{NFC}.jpg", f"{NFD}.jpg"], [f"{NFC}.jpg,0", f"{NFD}.jpg,1"], ["0", "1"]),
        (["a\\1.jpg", "a/1.jpg"], ["a\\1.jpg,0", "a/1.jpg,1"], ["0", "1"]),
        (["1.jpg", "a/1.jpg"], ["1.jpg,0", "a/1.jpg,1"], ["0", "1"]),
        (["a.jpg", "a.png"], ["a.png,0", "a.jpg,1"], ["1", "0"]),
        (["A.jpg", "a.jpg"], ["a.jpg,0", "A.jpg,1"], ["1", "0"]),
        ([" a.jpg"], ['" a.jpg",0'], ["0"]),
        (["a/1.jpg"], ["a/1.jpg,0", "1.jpg,0", "1,0"], ["0"]),
        (["a/1.jpg"], ["a/1.jpg,0", "a/.ipynb_checkpoints/1.jpg,1", "__MACOSX\\a\\._1.jpg,1"],
         ["0"]),
    ],
)  # fmt: skip
def test_an_image_is_found_however_a_system_writes_its_name(images, rows, labels) -> None:
    assert matched(images, "\n".join(rows)) == labels
    assert matched(images, "\n".join(reversed(rows))) == labels


@pytest.mark.parametrize(
    ("images", "rows", "why"),
    [
        (["a/1.jpg", "b/1.jpg"], ["1.jpg,0"], "'1.jpg' may be a/1.jpg or b/1.jpg (line 1)"),
        (["a.jpg", "a.png"], ["a,0"], "'a' may be a.jpg or a.png (line 1)"),
        (["a/1.jpg", "b/1.jpg", "c/1.jpg"], ["a/1.jpg,0", "1.jpg,1"],
         "'1.jpg' may be b/1.jpg or c/1.jpg (line 2)"),
        ([f"{NFC}/1.jpg", f"{NFD}/1.jpg"], [f"./{NFC}/1.jpg,0"], "may be"),
        (["a/1.jpg"], ["a/1.jpg,0", "1.jpg,1"], "a/1.jpg has two labels, 0 and 1 (lines 1 and 2)"),
        (["a/1.jpg"], ["./a/1.jpg,0", "", "a\\1.jpg,1"],
         "a/1.jpg has two labels, 0 and 1 (lines 1 and 3)"),
        (["a/1.jpg"], ["1,0", "1.jpg,1"], "a/1.jpg has two labels, 1 and 0 (lines 2 and 1)"),
        (["img_1.jpg"], ["IMG_1.JPG,0"],
         "1 of 1 images have no label (img_1.jpg) and 1 of 1 labels no image (IMG_1.JPG, line 1; "
         "img_1.jpg is written otherwise)"),
        (["a/1.jpg"], ["a/1.jpg,0", "/elsewhere/a/1.jpg,0"],
         "1 of 2 labels no image (/elsewhere/a/1.jpg, line 2)"),
        (["1.jpg"], ["0,1.jpg,1"], "line 1 is '0,1.jpg,1'"),
        (["1.jpg"], [], "1 of 1 images have no label (1.jpg)"),
        (["1.jpg"], ["1.jpg,1", "\x1b[31m.jpg,1"], r"(\x1b[31m.jpg, line 2)"),
    ],
)  # fmt: skip
def test_what_may_be_another_image_is_refused_with_its_lines(images, rows, why: str) -> None:
    with pytest.raises(DataError) as caught:
        matched(images, "\n".join(rows))
    assert why in str(caught.value)


# StyleGAN's dataset.json


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("[]", "it is list, expected an object of JSON"),
        ("{}", "has no key 'labels'"),
        ('{"labels": {"0.jpg": 1}}', "the value of 'labels' is {\"0.jpg\": 1}, no list"),
        ('{"labels": "0.jpg"}', "the value of 'labels' is \"0.jpg\", no list"),
        ('{"labels": [["0.jpg"]]}', 'entry 1 is ["0.jpg"]'),
        ('{"labels": ["ab"]}', 'entry 1 is "ab"'),
        ('{"labels": [["0.jpg", 1], [1, 1]]}', "entry 2 is [1, 1]"),
        ('{"labels": [["0.jpg", 1.0]]}', "the label of 0.jpg (entry 1) is 1.0, no class number"),
        ('{"labels": [["0.jpg", true]]}', "is true, no class number"),
        ('{"labels": [["0.jpg", null]]}', "is null, no class number"),
        ('{"labels": [["0.jpg", [0, 1]]]}', "is [0, 1], no class number"),
        ('{"labels": [["0.jpg", "1"]]}', 'is "1", no class number'),
        ('{"labels": [["0.jpg", -1]]}', "is -1, no class number"),
        ('{"labels": [], "labels": null}', "has the key 'labels' twice"),
        ('{"labels": ' + "[" * 100_000, "is nested too deeply"),
        ('{"labels": [["0.jpg", 1' + "0" * 5000 + "]]}", "limit"),
        ("", "Expecting value"),
    ],
)
def test_a_dataset_json_of_anything_else_is_refused(told: str, why: str) -> None:
    with pytest.raises(DataError) as caught:
        said(told, "dataset.json")
    assert why in str(caught.value)
    assert str(caught.value).endswith('dataset.json with {"labels": [["<image>", <number>], ...]}')


def test_a_dataset_json_may_have_no_labels() -> None:
    assert said('{"labels": null}', "dataset.json") is None
    assert said('{"labels": null}', "DATASET.JSON") is None
    assert said('{"labels": []}', "dataset.json") == {}


# Numbers and names


def test_another_number_of_classes_names_the_file() -> None:
    config = written("0.jpg", "1.jpg", "2.jpg")
    Path("labels.csv").write_text("0.jpg,a\n1.jpg,b\n2.jpg,c")
    with pytest.raises(DataError) as caught:
        config.open()
    assert str(caught.value) == (
        "data.root: labels.csv has 3 classes (a, b, c), the recipe says data.classes: 2; give "
        "another file of labels, or `--set data.classes=3`"
    )


@pytest.mark.parametrize("odd", ["1.0", "+1", "-1", "1,0", "1."])
def test_a_number_of_no_class_is_not_a_name(odd: str) -> None:
    with pytest.raises(DataError, match=f"1.jpg has label {re.escape(odd)}; expected a class num"):
        numbered(["0", odd], ["0.jpg", "1.jpg"], "data.root")


def test_spaces_and_normal_forms_make_no_class_of_their_own() -> None:
    labels, classes, names = numbered(["cat", f"{NFD} ", " cat", NFC], ["x"] * 4, "data.path")
    assert (labels.tolist(), classes, names) == ([1, 0, 1, 0], 2, (NFC, "cat"))
    for empty in ("", "  "):
        with pytest.raises(DataError, match=r"1\.jpg has label ''; expected"):
            numbered(["cat", empty], ["0.jpg", "1.jpg"], "data.path")


def test_numbers_may_have_zeros_and_spaces_around_them() -> None:
    config = written("0.jpg", "1.jpg", "2.jpg")
    Path("labels.csv").write_text('0.jpg, 00\n1.jpg,"01 "\n2.jpg,1')
    assert config.open().labels().tolist() == [0, 1, 1]


def test_one_name_in_two_normal_forms_is_one_class() -> None:
    config = written("0.jpg", "1.jpg", "2.jpg")
    Path("labels.csv").write_text(f"0.jpg,{NFC}\n1.jpg,{NFD} \n2.jpg,a")
    source = config.open()
    assert (source.class_names, source.labels().tolist()) == (("a", NFC), [1, 1, 0])
