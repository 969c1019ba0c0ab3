"""`data prepare`: what it writes is what training would have read, also after a kill."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import attrs
import fsspec
import numpy as np
import pytest
import torch
from command_line import e2ediff
from e2ediff_data.examine import compare_hashes
from e2ediff_data.shards import Shards
from e2ediff_data.write import Done, Settings, encode, prepare
from e2ediff_testing import check_source
from pictures import as_idx, damage, write_tree
from PIL import Image

from e2ediff.data import DataSource, HeightWidth
from e2ediff.errors import DataError
from e2ediff.files.images import decode
from e2ediff.files.index import Index
from e2ediff.parts.sources import FASHION_CLASSES, ImageFolder
from e2ediff.parts.sources.folder import FolderBytes

COUNTS = [5, 9, 7]
SETTINGS = Settings(
    source="tree", images=21, size=8, channels=3, classes=3, format="png", quality=95, each=4,
    skip=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache instead of the user's."""
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> DataSource:
    tree = write_tree(tmp_path / "tree", COUNTS)
    return ImageFolder(root=str(tree), size=8, classes=3).open()


def run(source: DataSource, folder: Path, progress=lambda line: None, **changes: object) -> Done:
    workers = changes.pop("workers", 0)
    settings = attrs.evolve(SETTINGS, **changes)
    return prepare(source, settings, str(folder), workers=workers, progress=progress)


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file, but for what is noted about times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "verified.txt"
    }


def killed(source: DataSource, folder: Path, after: int, **changes: object) -> None:
    """Prepare in another process, which kills itself after so many shards."""
    child = os.fork()
    if child == 0:
        told = []

        def progress(line: str) -> None:
            told.append(line)
            if len(told) == after:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            run(source, folder, progress, **changes)
        finally:
            os._exit(1)  # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("form", ["png", "raw", "jpeg"])
def test_after_a_kill_the_rest_is_made_and_the_whole_is_as_without(source, tmp_path, form) -> None:
    whole = run(source, tmp_path / "whole", format=form)
    assert (whole.images, whole.shards, whole.kept) == (21, 6, 0)
    killed(source, tmp_path / "x", 3, format=form)
    assert not (tmp_path / "x/prepared.json").exists()
    with pytest.raises(DataError, match=r"holds no prepared.json.*run it again"):
        Shards(path=str(tmp_path / "x"), size=8, classes=3).open()
    # Cut short at other places too: a shard without its note, and a temporary file.
    suffix = "npy" if form == "raw" else "tar"
    (tmp_path / f"x/shard-00004.{suffix}").write_bytes(b"half")
    (tmp_path / "x/.tmp-shard-00005.tar-1").write_bytes(b"half")
    done = run(source, tmp_path / "x", format=form)
    assert done.kept == 3
    (tmp_path / "x/.tmp-shard-00005.tar-1").unlink()
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")


def test_several_processes_write_what_one_writes(source, tmp_path) -> None:
    run(source, tmp_path / "one")
    run(source, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_prepared_again_it_is_left_alone_and_what_is_damaged_is_mended(source, tmp_path) -> None:
    run(source, tmp_path / "x")
    before = contents(tmp_path / "x")
    assert run(source, tmp_path / "x").kept == 6
    damage(tmp_path / "x/shard-00002.tar")
    (tmp_path / "x/shard-00004.tar").unlink()
    assert run(source, tmp_path / "x").kept == 4
    assert contents(tmp_path / "x") == before


@pytest.mark.parametrize("form", ["png", "raw"])
def test_shards_keep_the_contract_of_sources(source, tmp_path, form) -> None:
    run(source, tmp_path / "x", format=form)
    check_source(Shards(path=str(tmp_path / "x"), size=8, classes=3))


def test_shards_are_what_webdataset_reads(source, tmp_path) -> None:
    run(source, tmp_path / "x")
    with tarfile.open(tmp_path / "x/shard-00001.tar") as tar:
        names = tar.getnames()
        label = tar.extractfile("00000005.cls").read()
    assert names[:4] == ["00000004.png", "00000004.cls", "00000005.png", "00000005.cls"]
    assert label == b"1"


def test_shards_are_to_the_byte_what_tarfile_and_numpy_write(source, tmp_path) -> None:
    run(source, tmp_path / "x")
    run(source, tmp_path / "raw", format="raw")
    for number in range(6):
        written, again = tmp_path / f"x/shard-{number:05}.tar", io.BytesIO()
        with (
            tarfile.open(written) as tar,
            tarfile.open(fileobj=again, mode="w", format=tarfile.USTAR_FORMAT) as copy,
        ):
            for member in tar:
                info = tarfile.TarInfo(member.name)
                info.size = member.size
                copy.addfile(info, tar.extractfile(member))
        assert again.getvalue() == written.read_bytes()
        written, again = tmp_path / f"raw/shard-{number:05}.npy", io.BytesIO()
        array = np.load(written)
        np.save(again, array)
        assert again.getvalue() == written.read_bytes()
        x, _ = source.read(range(4 * number, min(4 * number + 4, 21)))
        assert np.array_equal(array, x.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_png_loses_nothing_and_little_space_and_jpeg_is_pillow_s_own(channels) -> None:
    """PNG is at most a tenth longer than with the search for repetitions that photos lack."""
    size = HeightWidth(96, 128)
    g = np.random.default_rng(0)
    coarse = Image.fromarray(g.integers(256, size=(8, 10, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((128, 96), Image.Resampling.BICUBIC), np.float32)
    for noise in (0, 2, 8, 32):
        noisy = smooth + g.normal(scale=noise, size=smooth.shape) if noise else smooth
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image = image if channels == 3 else image.convert("L")
        x = torch.from_numpy(np.array(image).reshape(96, 128, channels)).permute(2, 0, 1)
        searched, jpeg = io.BytesIO(), io.BytesIO()
        image.save(searched, "PNG")
        image.save(jpeg, "JPEG", quality=95, subsampling=0)
        data = encode(x, "png", 95)
        assert torch.equal(decode(data, "x", channels, size), x)
        assert len(data) <= 1.1 * len(searched.getvalue())
        assert encode(x, "jpeg", 95) == jpeg.getvalue()


@pytest.mark.parametrize("form", ["png", "raw", "jpeg"])
def test_each_image_is_fetched_once(source, tmp_path, form) -> None:
    fetched: list[int] = []

    class Counting(FolderBytes):
        def __call__(self, i: int) -> bytes:
            fetched.append(i)
            return super().__call__(i)

    fetch = source.listing.fetch
    source.listing = attrs.evolve(source.listing, fetch=Counting(fetch.location, fetch.names))
    run(source, tmp_path / "x", format=form)
    assert fetched == [*range(21)]


def test_class_names_and_origins_are_kept(source, tmp_path) -> None:
    run(source, tmp_path / "x")
    opened = Shards(path=str(tmp_path / "x"), size=8, classes=3).open()
    assert opened.class_names == ("n00000000", "n00000001", "n00000002")
    part = json.loads((tmp_path / "x/parts/shard-00001.json").read_text())
    assert part["images"][0][-1].endswith("tree/n00000000/n00000000_4.JPEG")


def test_class_names_that_are_in_the_code_of_a_source_are_kept_as_well(tmp_path) -> None:
    for name, array in (
        ("images-idx3", np.zeros((3, 28, 28))),
        ("labels-idx1", np.array([0, 9, 7])),
    ):
        path = as_idx(array, tmp_path / "plain")
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(path.read_bytes()))
    Path(tmp_path, "b.yaml").write_text(f"name: fashion_mnist\nroot: {tmp_path}\n")
    words = (tmp_path / "b.yaml", tmp_path / "x", "--size", 28, "--workers", 0)
    assert e2ediff("data", "prepare", *words).code == 0
    config = Shards(path=str(tmp_path / "x"), size=28, classes=10, channels=1)
    assert config.open().class_names == FASHION_CLASSES


def test_damaged_images_end_it_or_are_left_out_and_listed(source, tmp_path) -> None:
    damage(tmp_path / "tree/n00000001/n00000001_2.JPEG")
    with pytest.raises(DataError, match=r"n00000001_2.JPEG: damaged image"):
        run(source, tmp_path / "x")
    done = run(source, tmp_path / "y", skip=True)
    ((place, what),) = done.left_out
    assert place.endswith("n00000001_2.JPEG")
    assert what.startswith("damaged image")
    opened = Shards(path=str(tmp_path / "y"), size=8, classes=3).open()
    assert done.images == len(opened) == 20
    bad = source.class_names.index("n00000001") and 5 + 2
    good = [i for i in range(21) if i != bad]
    assert torch.equal(opened.read(range(20))[0], source.read(good)[0])
    assert torch.equal(opened.labels(), source.labels()[good])


def test_other_settings_and_other_folders_are_refused(source, tmp_path) -> None:
    run(source, tmp_path / "x")
    with pytest.raises(DataError, match=r"prepared otherwise \(format was 'png', is 'raw'\)"):
        run(source, tmp_path / "x", format="raw")
    with pytest.raises(DataError, match="is not empty; give a new folder"):
        run(source, tmp_path / "tree")


def test_a_shard_with_another_hash_is_named_when_it_is_opened(source, tmp_path) -> None:
    """Also when its size and the time of its writing are right."""
    run(source, tmp_path / "x")
    config = Shards(path=str(tmp_path / "x"), size=8, classes=3)
    config.open()
    shard = tmp_path / "x/shard-00003.tar"
    data, stat = bytearray(shard.read_bytes()), shard.stat()
    data[700] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError) as caught:
        config.open()
    assert str(caught.value) == (
        f"data.path: {tmp_path}/x: 1 of 7 files have another SHA-256 than prepared.json says "
        "(shard-00003.tar): they are damaged. Run `e2ediff data prepare` again: it rewrites "
        "what is damaged or missing."
    )
    attrs.evolve(config, verify=False).open()
    shard.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"shard-00003.tar has \d+ bytes, expected \d+"):
        config.open()
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00003.tar is missing"):
        config.open()


def test_a_copy_is_compared_although_it_keeps_times_and_the_note_that_all_agreed(
    source, tmp_path
) -> None:
    run(source, tmp_path / "x")
    shutil.copytree(tmp_path / "x", tmp_path / "y")  # as rsync -a and cp -a
    note = tmp_path / "y/verified.txt"
    assert note.read_bytes() == (tmp_path / "x/verified.txt").read_bytes()
    Shards(path=str(tmp_path / "y"), size=8, classes=3).open()
    assert note.read_bytes() != (tmp_path / "x/verified.txt").read_bytes()

    shutil.copytree(tmp_path / "x", tmp_path / "z")
    shard = tmp_path / "z/shard-00003.tar"
    data, stat = bytearray(shard.read_bytes()), shard.stat()
    data[700] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"another SHA-256 .*\(shard-00003.tar\)"):
        Shards(path=str(tmp_path / "z"), size=8, classes=3).open()


def test_what_agreed_once_is_read_again_by_data_check_alone(source, tmp_path) -> None:
    """A bit that flips in the store itself, which nothing tells."""
    url = f"memory:/{tmp_path}/x"
    run(source, url)
    fs, root = fsspec.core.url_to_fs(url)
    fs.store[f"{root}/shard-00003.tar"].getbuffer()[-1] ^= 1
    config = Shards(path=url, size=8, classes=3)
    config.open()
    with pytest.raises(DataError, match=r"another SHA-256 .*\(shard-00003.tar\)"):
        compare_hashes(config)


@pytest.mark.parametrize("verify", [True, False])
def test_an_index_with_other_labels_is_refused_always(source, tmp_path, verify) -> None:
    run(source, tmp_path / "x")
    path = tmp_path / "x/index.safetensors"
    stat, index = path.stat(), Index.loads(path.read_bytes())
    path.write_bytes(attrs.evolve(index, labels=2 - index.labels).dumps("prepared.json"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    with pytest.raises(DataError) as caught:
        Shards(path=str(tmp_path / "x"), size=8, classes=3, verify=verify).open()
    assert str(caught.value) == (
        f"data.path: {tmp_path}/x/index.safetensors is damaged. Run `e2ediff data prepare` "
        "again: it rewrites what is damaged or missing."
    )


def test_shards_of_another_size_are_refused(source, tmp_path) -> None:
    run(source, tmp_path / "x")
    with pytest.raises(DataError, match=r"prepared with size 8, the recipe says data.size: 16"):
        Shards(path=str(tmp_path / "x"), size=16, classes=3).open()


@pytest.mark.parametrize("form", ["png", "raw"])
@pytest.mark.parametrize("size", [(6, 10), (10, 6)])
def test_shards_have_the_height_and_width_that_training_would_have(size, form, tmp_path) -> None:
    tree = write_tree(tmp_path / "tree", [3, 2])
    height, width = size
    words = ("--size", f"{height},{width}", "--format", form, "--workers", 0)
    done = e2ediff("data", "prepare", tree, tmp_path / "x", *words)
    assert done.code == 0, done.err
    assert f"size: [{height}, {width}], classes: 2" in done.err
    plain = ImageFolder(root=str(tree), size=size, classes=2).open()
    shards = Shards(path=str(tmp_path / "x"), size=size, classes=2).open()
    assert shards.read([0])[0].shape == (1, 3, height, width)
    assert torch.equal(shards.read(range(5))[0], plain.read(range(5))[0])
    assert "can be read" in e2ediff("data", "check", tmp_path / "x").err
    again = e2ediff("data", "prepare", tree, tmp_path / "x", *words)
    assert "1 of them made before" in again.err
    with pytest.raises(DataError, match=rf"with size \[{height}, {width}\], the recipe says data"):
        Shards(path=str(tmp_path / "x"), size=(width, height), classes=2).open()


@pytest.mark.parametrize("size", ["0", "8,0", "8,8,8", "8x8", "", "-8", "8.5"])
def test_a_size_that_is_none_is_refused(size: str, tmp_path) -> None:
    done = e2ediff("data", "prepare", tmp_path, tmp_path / "x", "--size", size)
    assert done.code == 2
    assert "expected a side in pixels, or height,width" in done.err


def test_without_classes_no_labels_are_written(source, tmp_path) -> None:
    run(source, tmp_path / "x", classes=0)
    with tarfile.open(tmp_path / "x/shard-00000.tar") as tar:
        assert tar.getnames() == [f"{i:08}.png" for i in range(4)]
    with pytest.raises(DataError, match=r"holds no labels, the recipe says data.classes: 3"):
        Shards(path=str(tmp_path / "x"), size=8, classes=3).open()


def test_shards_killed_at_their_beginning_are_taken_up(source, tmp_path) -> None:
    """What is written first is whole or a temporary file."""
    folder = tmp_path / "x"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts/.tmp-x.json-0123abcd").write_text("{")
    assert run(source, folder).images == 21
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        run(source, folder)
