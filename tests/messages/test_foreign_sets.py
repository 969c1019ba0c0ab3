"""Sets of images that lie in a stranger's run already are continued, or refused by name."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from e2ediff.errors import DataError
from e2ediff.sample.outputs import open_output
from e2ediff.store.storage import Store

LABELS = [0, 1, 0, 1]
SHAPE = (8, 8, 3)
X = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, *SHAPE)
FILES = {"png": "images/000000.png", "tar": "shards/000000000-000000004.tar"}
PARTS = {"npz": "parts/000000000-000000004.npy", "zip": "parts/000000000-000000004.zip"}
MERGED = {"npz": "samples.npz", "zip": "samples.zip"}


def stored(folder: Path, kind: str, *, merged: bool = False):
    output = open_output(kind, Store(folder), SHAPE, LABELS)
    output.put(range(4), X)
    if merged:
        output.close()
    return output


@pytest.mark.parametrize("content", [b"", b"junk" * 99, bytes(4096)])
@pytest.mark.parametrize(("kind", "file"), [*FILES.items(), *PARTS.items(), *MERGED.items()])
def test_a_damaged_part_is_named(tmp_path, kind, file, content):
    output = stored(tmp_path, kind, merged=file in MERGED.values())
    assert np.array_equal(output.first(4), X)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=rf"{file}: .*its images are made again"):
        output.first(4)
    if file in PARTS.values():
        with pytest.raises(DataError, match=file):
            output.close()
        assert not (tmp_path / MERGED[kind]).exists()


@pytest.mark.parametrize("kind", ["npz", "zip", "tar"])
def test_a_part_of_numbers_beyond_the_set_is_not_counted(tmp_path, kind):
    output = stored(tmp_path, kind)
    file = tmp_path / (FILES | PARTS)[kind]
    for name in (f"000000000-{'9' * 18}", f"000000004-{'9' * 200}", "000000003-000000005"):
        shutil.copy(file, file.with_stem(name))
    assert output.finished() == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["png", "tar"])
def test_an_image_larger_than_those_of_the_set_is_not_decoded(tmp_path, kind):
    output = stored(tmp_path, kind)
    Image.new("RGB", (4000, 4000)).save(tmp_path / "large.png")
    if kind == "png":
        shutil.copy(tmp_path / "large.png", tmp_path / "images/000000.png")
    else:
        tar = io.BytesIO()
        output.encode(tar, range(4), np.zeros((4, 9, 9, 3), np.uint8))
        (tmp_path / FILES["tar"]).write_bytes(tar.getvalue())
    with pytest.raises(DataError, match="pixels, more than the 64"):
        output.first(4)


@pytest.mark.parametrize("kind", ["npz", "zip"])
def test_a_merged_set_that_is_packed_is_not_unpacked(tmp_path, kind):
    output = stored(tmp_path, kind, merged=True)
    with zipfile.ZipFile(tmp_path / MERGED[kind], "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", bytes(1 << 24))
    with pytest.raises(DataError, match="its members are packed"):
        output.first(4)


@pytest.mark.parametrize(("kind", "file"), [*PARTS.items(), ("tar", FILES["tar"])])
def test_a_part_longer_than_any_that_is_written_is_not_read(tmp_path, kind, file):
    output = stored(tmp_path, kind)
    with (tmp_path / file).open("r+b") as part:
        part.truncate(1 << 40)  # of zeros that take no space
    with pytest.raises(DataError, match=rf"{file}: .*more than the"):
        output.first(4)


def test_a_member_of_a_merged_zip_longer_than_any_that_is_written_is_not_read(tmp_path):
    output = stored(tmp_path, "zip", merged=True)
    with zipfile.ZipFile(tmp_path / MERGED["zip"], "w") as archive:
        archive.writestr(output.member(0), bytes(1 << 20))
    with pytest.raises(DataError, match="a PNG of this set"):
        output.first(4)


def test_a_part_with_other_images_is_refused(tmp_path):
    output = stored(tmp_path, "npz")
    np.save(tmp_path / PARTS["npz"], np.zeros((4, 2, 2, 3), np.uint8))
    with pytest.raises(DataError, match=r"expected \(4, 8, 8, 3\)"):
        output.close()
