"""Every file is read right, never counts, is counted as left out, or is refused by name.

20,000 files: kinds of images x names x places x layouts, in sets of folders and archives.
"""

from __future__ import annotations

import csv
import io
import random
import shutil
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from pictures import tar_bytes
from PIL import Image
from source_kinds import source_of

from e2ediff.data import DataSource
from e2ediff.errors import BadImageError, DataError
from e2ediff.evaluate.images import FolderImages
from e2ediff.files.listing import EncodedImages
from e2ediff.parts.sources import ImageFolder

SIDE = 6
FILES = 20_000
CLASSES = ("n01", "2", "a b", "Ünï", "[x]", "10")


# What a file holds: its bytes, and its pixels (H, W, 3) if it is to be read


@attrs.frozen(eq=False)
class Content:
    kind: str
    data: bytes
    pixels: np.ndarray | None


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def contents() -> list[Content]:
    """Images of every kind, whose pixels are known without our code, and what is no image."""
    g = np.random.default_rng(0)
    found = []

    def add(kind: str, data: bytes, pixels: np.ndarray | None) -> None:
        found.append(Content(kind, data, pixels))

    def grey(values: np.ndarray) -> np.ndarray:
        return np.repeat(values[..., None], 3, 2)

    for _ in range(4):
        rgb = g.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
        byte, alpha = rgb[..., 0], rgb[..., 1]
        wide = g.integers(65536, size=(SIDE, SIDE)).astype(np.uint16)
        palette, index = g.integers(256, size=(16, 3), dtype=np.uint8), byte >> 4
        paletted = Image.fromarray(index).convert("L")
        paletted.putpalette(palette.tobytes())
        for kind in ("PNG", "BMP", "TIFF"):
            add(f"RGB {kind}", encoded(Image.fromarray(rgb), kind), rgb)
            add(f"L {kind}", encoded(Image.fromarray(byte), kind), grey(byte))
            bits = Image.fromarray(byte > 127)
            add(f"1 {kind}", encoded(bits, kind), grey((byte > 127) * np.uint8(255)))
            add(f"P {kind}", encoded(paletted, kind), palette[index])
        for kind in ("PNG", "TIFF"):
            add(
                f"I;16 {kind}",
                encoded(Image.fromarray(wide), kind),
                grey((wide >> 8).astype("u1")),
            )
            both = Image.merge("LA", [Image.fromarray(byte), Image.fromarray(alpha)])
            add(f"LA {kind}", encoded(both, kind), grey(byte))
            four = Image.fromarray(np.dstack([rgb, alpha]))
            add(f"RGBA {kind}", encoded(four, kind), rgb)
        add("GIF", encoded(paletted, "GIF"), palette[index])
        add("film", encoded(paletted, "GIF", save_all=True, append_images=[bits]), palette[index])
        add("WebP", encoded(Image.fromarray(rgb), "WEBP", lossless=True), rgb)
        for mode in ("RGB", "L", "CMYK"):
            data = encoded(Image.fromarray(rgb).convert(mode), "JPEG", quality=90)
            with Image.open(io.BytesIO(data)) as image:
                add(f"{mode} JPEG", data, np.array(image.convert("RGB")))
        for image in (Image.fromarray(wide.astype("f4")), Image.fromarray(wide.astype("i4"))):
            add(f"{image.mode} TIFF", encoded(image, "TIFF"), None)
        cut = [one for one in found if one.pixels is not None and one.kind != "film"]
        for whole in cut[-12:]:
            add(f"a third of a {whole.kind}", whole.data[: len(whole.data) // 3], None)
    add("LAB TIFF", encoded(Image.new("LAB", (SIDE, SIDE)), "TIFF"), None)
    add("nothing", b"", None)
    add("text", b"x,0\n", None)
    add("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n", None)
    add("ppm", encoded(Image.new("RGB", (SIDE, SIDE)), "PPM"), None)
    add("enormous", encoded(Image.new("1", (9000, 9000)), "PNG"), None)
    add("a long line", encoded(Image.new("1", (1, 2_000_000)), "PNG"), None)
    return found


CONTENTS = contents()

# What a file is called, with `{}` for what makes it unique; and what becomes of it
COUNTS, LEFT_OUT, HIDDEN = "counts", "left out", "hidden"
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
NAMES = {
    COUNTS: [
        *(f"{{}}{suffix}" for suffix in SUFFIXES),
        *(f"{{}}{suffix.upper()}" for suffix in SUFFIXES),
        *("a b {}.png", "[{}].png", "{}#.png", "#{}.png", "%20{}.png", "{}?*.png", "~{}.png"),
        *(
            "日本{}.png",
            "é{}.png",
            "e\u0301{}.png",
            "-{}.png",
            "{}.tar.png",
            "{}.JPEG.png",
            "'{}'.png",
        ),
        *('"{}".png', "{},1.png", "{};1.png", "deep/er/{}.png", "images/{}.png", "{} .png"),
    ],
    LEFT_OUT: [
        *(
            "{}.heic",
            "{}.HEIC",
            "{}.txt",
            "{}.svg",
            "{}.avif",
            "{}.jp2",
            "{}.npz",
            "{}",
            "{}.png.part",
        ),
        *("{}.png.txt", "{}.jpg_", "{}png", "{}.json", "{}.csv", "deep/{}.xml", "{}.mp4"),
    ],
    HIDDEN: [
        *("._{}.png", ".{}.jpg", ".ipynb_checkpoints/{}-checkpoint.png", ".thumbnails/{}.png"),
        *("{}.png~", "#{}.png#", "__MACOSX/{}.png", "@eaDir/{}.jpg/SYNOPHOTO_THUMB_M.jpg"),
        *("deep/.git/{}.png", "$RECYCLE.BIN/{}.png", "lost+found/{}.png", "x{}/Thumbs.db"),
    ],
}


@attrs.frozen(eq=False)
class File:
    path: str
    label: int
    fate: str
    content: Content


def files(g: random.Random, count: int, classes: int, *, sound: bool = False) -> list[File]:
    """Files of a set, below class folders if there are classes; each class has an image."""
    pool = [one for one in CONTENTS if one.pixels is not None] if sound else CONTENTS
    found = []
    for i in range(count):
        label = i if i < classes else g.randrange(max(1, classes))
        fate = COUNTS if i <= classes else g.choices((COUNTS, LEFT_OUT, HIDDEN), (6, 2, 2))[0]
        folder = f"{CLASSES[label]}/" if classes else g.choice(("", "", "a/", "b/c/"))
        path = folder + g.choice(NAMES[fate]).format(i)
        found.append(File(path, label, fate, g.choice(pool)))
    return found


Source = Callable[[list[File], Path, int], DataSource]


def on_disk(found: list[File], place: Path) -> str:
    for one in found:
        path = place / "tree" / one.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(one.content.data)
    return str(place / "tree")


def zipped(found: list[File], place: Path) -> str:
    with zipfile.ZipFile(place / "x.zip", "w") as file:
        for one in found:
            file.writestr(one.path, one.content.data)
    return str(place / "x.zip")


def folder(found: list[File], place: Path, classes: int) -> DataSource:
    return ImageFolder(root=on_disk(found, place), size=SIDE, classes=classes).open()


def zip_address(found: list[File], place: Path, classes: int) -> DataSource:
    root = f"zip://::{zipped(found, place)}"
    return ImageFolder(root=root, size=SIDE, classes=classes).open()


def archive(found: list[File], place: Path, classes: int) -> DataSource:
    return source_of("archive", path=zipped(found, place), size=SIDE, classes=classes).open()


def class_tars(found: list[File], place: Path, classes: int) -> DataSource:
    inner = []
    for k, name in enumerate(CLASSES[:classes]):
        own = [(one.path.partition("/")[2], one.content.data) for one in found if one.label == k]
        inner.append((f"{name}.tar", tar_bytes(own)))
    (place / "x.tar").write_bytes(tar_bytes(inner))
    return source_of("class_tars", path=str(place / "x.tar"), size=SIDE, classes=classes).open()


LAYOUTS: dict[str, Source] = {
    "folder": folder,
    "zip by its address": zip_address,
    "archive": archive,
    "class tars": class_tars,
}
SETS = 50


def check(found: list[File], source: DataSource, classes: int) -> Counter[str]:
    """Hold a source to the fate of every file; returns how many had which."""
    assert isinstance(source, EncodedImages)
    fates: Counter[str] = Counter()
    counted = {one.path: one for one in found if one.fate == COUNTS}
    left = {one.path for one in found if one.fate == LEFT_OUT}
    assert sum(one.count for one in source.left_out) == len(left)
    assert {one.first for one in source.left_out} <= left
    assert sorted(source.listing.names) == sorted(counted)
    order, labels = sorted(CLASSES[:classes]), source.labels().tolist()
    for i, name in enumerate(source.listing.names):
        one = counted[name]
        what = (name, one.content.kind)
        assert labels[i] == (order.index(CLASSES[one.label]) if classes else 0), what
        if one.content.pixels is None:
            with pytest.raises(BadImageError) as caught:
                source.read([i])
            assert caught.value.place == source.path_of(i)
            assert name in caught.value.place
            fates["refused"] += 1
        else:
            x = source.read([i])[0][0]
            assert np.array_equal(x.permute(1, 2, 0), one.content.pixels), what
            fates["read"] += 1
    return fates + Counter({LEFT_OUT: len(left), HIDDEN: sum(f.fate == HIDDEN for f in found)})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_of_a_set_has_one_of_four_outcomes(layout: str, tmp_path: Path) -> None:
    g, fates = random.Random(layout), Counter[str]()
    for k in range(SETS):
        place = tmp_path / str(k)
        place.mkdir()
        classes = g.choice((1, 2, 3, 6)) if layout == "class tars" else g.choice((0, 1, 2, 3, 6))
        found = files(g, FILES // len(LAYOUTS) // SETS, classes)
        fates += check(found, LAYOUTS[layout](found, place, classes), classes)
        shutil.rmtree(place)
    assert sum(fates.values()) == FILES // len(LAYOUTS)
    assert min(fates[one] for one in ("read", "refused", LEFT_OUT, HIDDEN)) > FILES // 50


def test_scores_read_the_same_and_name_what_they_cannot_read(tmp_path: Path) -> None:
    g = random.Random(0)
    for k in range(20):
        place = tmp_path / str(k)
        place.mkdir()
        found = files(g, 50, 0, sound=True)
        root = on_disk(found, place) if k % 2 else zipped(found, place)
        images = FolderImages(root)
        counted = sorted((one.path, one) for one in found if one.fate == COUNTS)
        assert images.count == len(counted)
        assert sum(one.count for one in images.left_out) == sum(
            one.fate == LEFT_OUT for one in found
        )
        x = torch.cat([*images.batches(0, images.count, 7)])
        for (path, one), pixels in zip(counted, x, strict=True):
            assert np.array_equal(pixels.permute(1, 2, 0), one.content.pixels), path
        bad = g.choice([one for one in CONTENTS if one.pixels is None])
        found.append(File("bad.png", 0, COUNTS, bad))
        root = on_disk(found, place) if k % 2 else zipped(found, place)
        with pytest.raises(DataError, match=r"bad\.png"):
            torch.cat([*FolderImages(root).batches(0, images.count + 1, 7)])


# Files of labels


LABELS = {
    "numbers": ("0", "1", "2", "10"),
    "names": ("cat", "golden retriever", "a, b", 'the "best"', "Ünï", "n01440764", "10 %", "x;y"),
}
SPELLINGS: dict[str, Callable[[str], str]] = {
    "path": str,
    "name": lambda path: path.rpartition("/")[2],
    "stem": lambda path: path.rpartition("/")[2].rpartition(".")[0],
    "dot": lambda path: f"./{path}",
    "windows": lambda path: path.replace("/", "\\"),
    "composed": lambda path: unicodedata.normalize("NFC", path),
    "decomposed": lambda path: unicodedata.normalize("NFD", path),
}
HEADERS = (None, ("filename", "label"), ("image", "class"), ("ImageId", "PredictionString"))


def written(g: random.Random, rows: list[tuple[str, str]]) -> bytes:
    """A file of labels as some program writes it."""
    out = io.StringIO()
    header, end = g.choice(HEADERS), g.choice(("\n", "\r\n", "\r"))
    plain = all(not {*'",;\t'} & {*name} and " " not in name and "." in name for name, _ in rows)
    if plain and all('"' not in label for _, label in rows) and g.random() < 0.5:
        out.writelines(f"{name} {label}{end}" for name, label in rows)
        header = None
    else:
        quoting = g.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
        delimiter = g.choice(",;\t")
        file = csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator=end)
        file.writerows(([header] if header else []) + rows)
    mark = "\ufeff" if g.random() < 0.3 else ""
    return (mark + out.getvalue()).encode()


def labelled_set(g: random.Random, place: Path) -> tuple[list[str], dict[str, str]]:
    """Images on disk, and the label of each."""
    found = [
        f"{g.choice(('', 'a/', 'b c/'))}{g.choice(NAMES[COUNTS]).format(i)}" for i in range(40)
    ]
    for path in found:
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(CONTENTS[0].data)
    labels = LABELS[g.choice(list(LABELS))]
    return found, {path: g.choice(labels) for path in found}


def opened_with(place: Path, data: bytes, classes: int) -> DataSource:
    (place.parent / "labels.csv").write_bytes(data)
    block = {"size": SIDE, "classes": classes, "labels": str(place.parent / "labels.csv")}
    return ImageFolder(root=str(place), **block).open()


@pytest.mark.parametrize("seed", range(4))
def test_a_file_of_labels_is_read_right_or_refused_with_the_image(seed: int, tmp_path) -> None:
    g = random.Random(seed)
    for k in range(25):
        place = tmp_path / str(k) / "tree"
        found, label = labelled_set(g, place)
        spell = SPELLINGS[g.choice(list(SPELLINGS))]
        rows = [(spell(path), label[path]) for path in found]
        g.shuffle(rows)
        data = written(g, rows)
        numbers = all(one.isdecimal() for one in label.values())
        names = sorted({*label.values()})
        source = opened_with(place, data, max(map(int, names)) + 1 if numbers else len(names))
        assert isinstance(source, EncodedImages)
        assert source.class_names == (() if numbers else tuple(names))
        for path, given in zip(source.listing.names, source.labels().tolist(), strict=True):
            assert given == (int(label[path]) if numbers else names.index(label[path])), path
        # The same with one fault
        image, other = g.sample(found, 2)
        wrong = next(one for one in names if one != label[image])
        full = [(path, label[path]) for path in found]
        faults = {
            "missing": [row for row in full if row[0] != image],
            "unknown": [*full, ("no such.png", label[image])],
            "two labels": [*full, (g.choice((image, f"./{image}")), wrong)],
            "no class": [row if row[0] != image else (image, "") for row in full],
            "no image": [row if row[0] != image else ("", label[image]) for row in full],
            "mixed": [
                row if row[0] != image else (image, "7" if not numbers else "x") for row in full
            ],
        }
        twin = place / "twin" / SPELLINGS["name"](other)
        for fault, changed in faults.items():
            with pytest.raises(DataError) as caught:
                opened_with(place, written(g, changed), 99)
            said = str(caught.value)
            assert "labels.csv" in said or fault == "mixed", (fault, said)
        twin.parent.mkdir()
        twin.write_bytes(CONTENTS[0].data)
        ambiguous = [(SPELLINGS["name"](path), label[path]) for path in found]
        with pytest.raises(DataError, match=r"labels\.csv does not match"):
            opened_with(place, written(g, ambiguous), 99)
