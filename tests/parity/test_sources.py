"""The same images through every kind of source, in the same order, for any number of workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import attrs
import fsspec
import pytest
import torch
from pictures import (
    as_class_tars,
    as_dataset_json,
    as_idx,
    as_npz,
    as_parquet,
    as_shards,
    as_zip,
    damage,
    tar_bytes,
    write_tree,
)
from PIL import Image

from e2ediff.data import DataSource, SourceConfig
from e2ediff.errors import BadImageError, DataError
from e2ediff.parts import sources
from e2ediff.parts.sources.folder import FolderBytes
from e2ediff.parts.sources.location import expand
from e2ediff.prepare.write import Settings, prepare
from e2ediff.run.bad_images import Skipping, open_source
from e2ediff.run.loader import batches
from e2ediff.run.order import Order

CPU = torch.device("cpu")
COUNTS = [2 + k % 5 for k in range(30)]  # 119 images, up to three times as many in a class
TOTAL = sum(COUNTS)
SIZE = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sources")
    write_tree(place / "tree", COUNTS)
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def classes_of(place: Path) -> int:
    return len(list((place / "tree").iterdir()))


def folder(place: Path, **options: object) -> SourceConfig:
    root = str(place / "tree")
    return sources.ImageFolder(root=root, size=SIZE, classes=classes_of(place), **options)


def prepared(place: Path, path: Path, form: str) -> Path:
    source = folder(place).open()
    settings = Settings(
        source="", images=len(source), size=SIZE, channels=3, classes=classes_of(place),
        format=form, quality=95, each=25, skip=False,
    )  # fmt: skip
    prepare(source, settings, str(path), workers=0, progress=lambda line: None)
    return path


def in_memory(tree: Path, out: Path) -> str:
    """A copy of the tree on a file system that is not the disk."""
    url = f"memory:/{out}"
    for path in tree.rglob("*.JPEG"):
        with fsspec.open(f"{url}/{path.relative_to(tree)}", "wb") as file:
            file.write(path.read_bytes())
    return url


def separate_tars(tree: Path, out: Path) -> Path:
    out.mkdir()
    for inner in sorted(tree.iterdir()):
        members = [(path.name, path.read_bytes()) for path in inner.iterdir()]
        (out / f"{inner.name}.tar").write_bytes(tar_bytes(members))
    return out


def arrays(place: Path, tmp: Path, kind: str) -> dict[str, str]:
    x, y = folder(place).open().read(range(TOTAL))
    x = x.permute(0, 2, 3, 1).numpy()
    if kind == "npz":
        return {"images": str(as_npz(x, y.numpy(), tmp / "all.npz"))}
    images, labels = as_idx(x, tmp / "x-ubyte"), as_idx(y.numpy(), tmp / "y-ubyte")
    return {"images": str(images), "labels": str(labels)}


# Part, and what gives its options from the folder that holds the tree and a new one.
KINDS: dict[str, tuple[str, Callable[[Path, Path], dict[str, str]]]] = {
    "folder on another file system": (
        "ImageFolder", lambda p, t: {"root": in_memory(p / "tree", t / "m")}),
    "folder in a zip": (
        "ImageFolder", lambda p, t: {"root": f"zip://::{as_zip(p / 'tree', t / 'x.zip')}"}),
    "zip": ("Archive", lambda p, t: {"path": as_zip(p / "tree", t / "x.zip")}),
    "zip as EDM's": ("Archive", lambda p, t: {"path": as_dataset_json(p / "tree", t / "x.zip")}),
    "tar of class tars": (
        "ClassTars", lambda p, t: {"path": as_class_tars(p / "tree", t / "x.tar")}),
    "class tars": ("ClassTars", lambda p, t: {"path": separate_tars(p / "tree", t / "x")}),
    "shards with cls": ("TarShards", lambda p, t: {"path": as_shards(p / "tree", t / "x", 50)}),
    "shards with json": (
        "TarShards", lambda p, t: {"path": as_shards(p / "tree", t / "x", 50, "json")}),
    "parquet": ("Parquet", lambda p, t: {"path": as_parquet(p / "tree", t / "x")}),
    "npz": ("Arrays", lambda p, t: arrays(p, t, "npz")),
    "idx": ("Arrays", lambda p, t: arrays(p, t, "idx")),
    "prepared as png": ("Shards", lambda p, t: {"path": prepared(p, t / "x", "png")}),
    "prepared as raw": ("Shards", lambda p, t: {"path": prepared(p, t / "x", "raw")}),
}  # fmt: skip


def make(kind: str, place: Path, tmp: Path, **options: object) -> SourceConfig:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    name, given = KINDS[kind]
    paths = {key: str(value) for key, value in given(place, tmp).items()}
    options = {"size": SIZE, "classes": classes_of(place), **options}
    return getattr(sources, name)(**paths, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_shows_the_labels_and_pixels_of_class_folders(
    kind: str, place: Path, tmp_path: Path
) -> None:
    """The first 10,000 labels of a run, and every pixel of every image."""
    plain, config = folder(place).open(), make(kind, place, tmp_path)
    for _ in range(2):  # the second time with the index of the first
        other = config.open()
        seen = Order(len(other), seed=3).indices(0, 10_000)
        expected = plain.labels()[Order(TOTAL, seed=3).indices(0, 10_000)]
        assert torch.equal(other.labels()[seen], expected)
        assert torch.equal(other.read(range(TOTAL))[0], plain.read(range(TOTAL))[0])
        assert torch.equal(other.read(range(TOTAL))[1], plain.labels())


THOUSAND = ["zip as EDM's", "tar of class tars", "shards with cls", "parquet", "prepared as raw"]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("imagenet")
    write_tree(place / "tree", [1 + k % 2 for k in range(1000)])
    return place


@pytest.mark.parametrize("kind", THOUSAND)
def test_a_thousand_classes_come_in_the_same_order_from_every_kind(
    kind: str, imagenet: Path, tmp_path: Path
) -> None:
    """The first 10,000 labels of a run: more than six epochs of 1,500 images."""
    plain, other = folder(imagenet).open(), make(kind, imagenet, tmp_path).open()
    first = [Order(len(s), seed=0).indices(0, 10_000) for s in (plain, other)]
    assert torch.equal(plain.labels()[first[0]], other.labels()[first[1]])
    assert len(plain.labels().unique()) == 1000
    assert torch.equal(plain.read(first[0][:50])[0], other.read(first[1][:50])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_any_source_serves_without_classes_and_sets_the_null_label(
    kind: str, place: Path, tmp_path: Path
) -> None:
    config = make(kind, place, tmp_path, classes=0)
    source = config.open()
    assert len(source) == TOTAL
    assert config.image.null_label == 0
    assert not source.labels().any()
    assert not source.read([5, TOTAL - 1])[1].any()


def test_a_jpeg_of_a_prepared_crop_has_its_label_and_nearly_its_pixels(place, tmp_path) -> None:
    path = str(prepared(place, tmp_path / "x", "jpeg"))
    source = sources.Shards(path=path, size=SIZE, classes=len(COUNTS)).open()
    x, label = source.read(range(TOTAL))
    plain = folder(place).open().read(range(TOTAL))
    assert torch.equal(label, plain[1])
    error = (x.float() - plain[0].float()).abs()
    assert 0 < error.mean() < 3


def test_braces_stand_for_ranges_and_choices() -> None:
    assert expand("s3://b/{008..010}.tar") == [f"s3://b/{i}.tar" for i in ("008", "009", "010")]
    assert expand("{train,val}-{0..1}") == ["train-0", "train-1", "val-0", "val-1"]
    assert expand("plain.tar") == ["plain.tar"]


# The index of tars


def test_an_index_is_kept_beside_the_data_and_made_again_when_they_change(tmp_path) -> None:
    tree = write_tree(tmp_path / "tree", [3, 2])
    path = as_class_tars(tree, tmp_path / "x.tar")
    config = sources.ClassTars(path=str(path), size=SIZE, classes=2)
    first = config.open().read(range(5))[0]
    assert (tmp_path / "x.tar.index.safetensors").exists()
    write_tree(tmp_path / "more", [4, 4])
    as_class_tars(tmp_path / "more", path)
    assert len(config.open()) == 8
    (tmp_path / "x.tar.index.safetensors").write_bytes(b"damaged")
    assert len(config.open()) == 8
    as_class_tars(tree, path)
    assert torch.equal(config.open().read(range(5))[0], first)


def test_an_index_lies_in_the_cache_where_the_data_cannot_be_written(tmp_path, cache) -> None:
    path = as_class_tars(write_tree(tmp_path / "tree", [3, 2]), tmp_path / "x.tar")
    (tmp_path / "x.tar.index.safetensors").mkdir()  # also root may not replace a folder
    config = sources.ClassTars(path=str(path), size=SIZE, classes=2)
    whole = config.open().read(range(5))[0]
    (kept,) = cache.iterdir()
    # From now on nobody could scan the tar, whose images are where they were.
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[257:262] = b"wrong"
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert torch.equal(config.open().read(range(5))[0], whole)
    kept.unlink()
    with pytest.raises(DataError, match="cannot be read as a plain tar"):
        config.open()


def test_a_flat_validation_tar_takes_its_labels_from_a_file(tmp_path) -> None:
    tree = write_tree(tmp_path / "tree", [3, 2])
    path = as_class_tars(tree, tmp_path / "train.tar")
    images = sorted(tree.rglob("*.JPEG"))
    flat = [(f"val_{i}.JPEG", p.read_bytes()) for i, p in enumerate(images)]
    (tmp_path / "val.tar").write_bytes(tar_bytes(flat))
    rows = [f"val_{i},{p.parent.name} 1 2 3 4" for i, p in enumerate(images)]
    (tmp_path / "val.csv").write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]))
    config = sources.ClassTars(
        path=str(path), held_out=str(tmp_path / "val.tar"), size=SIZE, classes=2,
        held_out_labels=str(tmp_path / "val.csv"),
    )  # fmt: skip
    training, held_out = config.open(), config.open(held_out=True)
    assert torch.equal(training.labels(), held_out.labels())
    assert torch.equal(training.read(range(5))[0], held_out.read(range(5))[0])


# The loader


def seen(config: SourceConfig, source: DataSource | None = None, **options: object):
    given = {"batch": 20, "seed": 1, "first": 0, "last": 9, "workers": 0, **options}
    return list(
        batches(
            source or config.open(),
            flip=config.flip,
            device=CPU,
            sampling=config.sampling,
            **given,
        )
    )


def assert_same(these, those) -> None:
    assert len(these) == len(those) > 0
    for a, b in zip(these, those, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.label, b.label)


@pytest.mark.parametrize("kind", ["zip", "tar of class tars", "parquet", "prepared as raw"])
def test_workers_and_a_resume_in_mid_epoch_see_the_same_images(kind, place, tmp_path) -> None:
    """9 batches of 20 are one epoch and a half of 119 images; half of them are mirrored."""
    whole = seen(folder(place))
    config = make(kind, place, tmp_path)
    assert_same(seen(config, workers=0), whole)
    assert_same(seen(config, workers=1), whole)
    assert_same(seen(config, workers=2, first=4), whole[4:])


@pytest.mark.parametrize("sampling", ["natural", "class_balanced"])
def test_rows_of_several_ranks_are_the_batch_of_one(place, sampling) -> None:
    config = folder(place, sampling=sampling)
    whole = seen(config)
    parts = [seen(config, rows=rows) for rows in (slice(0, 10), slice(10, 15), slice(15, 20))]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].x for part in parts]), batch.x)
        assert torch.equal(torch.cat([part[step].label for part in parts]), batch.label)


def test_rows_that_another_rank_has_are_not_read(place) -> None:
    source = folder(place).open()
    read: list[int] = []

    class Counting(FolderBytes):
        def __call__(self, i: int) -> bytes:
            read.append(i)
            return super().__call__(i)

    fetch = source.listing.fetch
    counting = Counting(fetch.location, fetch.names)
    source.listing = attrs.evolve(source.listing, fetch=counting)
    seen(folder(place), source, rows=slice(5, 9), last=2)
    order = Order(TOTAL, 1).indices(0, 40)
    assert read == order[5:9] + order[25:29]


def test_an_image_is_mirrored_by_epoch_and_index_alone() -> None:
    """Whatever the batch, and whatever else is in the epoch."""
    order = Order(50, 7)
    by_image: list[dict[int, bool]] = []
    for epoch in range(2):
        indices, mirrored = order.seen(epoch * 50, 50)
        by_image.append(dict(zip(indices, mirrored.tolist(), strict=True)))
        for start, count in ((0, 7), (7, 20), (27, 23)):
            part, flips = Order(50, 7).seen(epoch * 50 + start, count)
            assert [by_image[epoch][i] for i in part] == flips.tolist()
    assert by_image[0] != by_image[1]
    assert 10 < sum(by_image[0].values()) < 40
    # Shown in another order, with repetitions: still the same images.
    labels = torch.tensor([0] * 45 + [1] * 5)
    indices, mirrored = Order(50, 7, labels).seen(0, 50)
    assert [by_image[0][i] for i in indices] == mirrored.tolist()


def test_loading_leaves_the_global_generator_alone(place) -> None:
    state = torch.get_rng_state()
    seen(folder(place), workers=1, last=1)
    assert torch.equal(state, torch.get_rng_state())


# Class-balanced sampling


@pytest.mark.parametrize("counts", [[1, 5, 60], [3, 3], [7], [1, 1, 1, 40, 2]])
def test_balanced_epochs_show_classes_equally_and_repeat_images_only_when_all_came(counts) -> None:
    labels = torch.tensor([k for k, count in enumerate(counts) for _ in range(count)])
    order = Order(len(labels), 5, labels)
    for epoch in range(3):
        indices = order.indices(epoch * len(labels), len(labels))
        shown = torch.bincount(labels[indices], minlength=len(counts))
        assert shown.max() - shown.min() <= 1
        for k, count in enumerate(counts):
            times = torch.bincount(torch.tensor([i for i in indices if labels[i] == k]))
            of_class = times[labels[: len(times)] == k]
            most = -(-int(shown[k]) // count)
            assert of_class.max() <= most
    resumed = Order(len(labels), 5, labels).indices(len(labels) + 3, 10)
    assert resumed == order.indices(len(labels) + 3, 10)


# Damaged images


@pytest.fixture
def broken(place: Path, tmp_path: Path) -> tuple[SourceConfig, list[int]]:
    """The tree with one image cut short, one that is text, one empty; and their indices."""
    tree = write_tree(tmp_path / "tree", COUNTS)
    paths = sorted(tree.rglob("*.JPEG"))
    bad = [10, 50, TOTAL - 1]
    damage(paths[10])
    paths[50].write_bytes(b"<html>404</html>")
    paths[TOTAL - 1].write_bytes(b"")
    return folder(tmp_path, on_bad_image="skip"), bad


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_keeps_labels_and_all_other_images_where_they_are(place, broken, workers) -> None:
    config, bad = broken
    told: list = []
    source = open_source(config)
    options = {"workers": workers, "report": told.extend}
    skipped, whole = seen(config, source, **options), seen(folder(place))
    order = torch.tensor(Order(TOTAL, 1).indices(0, 180)).reshape(9, 20)
    for a, b, indices in zip(skipped, whole, order, strict=True):
        assert torch.equal(a.label, b.label)
        same = (a.x == b.x).flatten(1).all(dim=1)
        good = ~torch.isin(indices, torch.tensor(bad))
        assert torch.equal(same, good)
    assert {s.number for s in told} == set(bad)
    labels = source.labels()
    for s in told:
        assert labels[s.number] == labels[s.instead]
        assert s.instead not in bad
        assert "damaged image" in s.what
        assert s.place.endswith(".JPEG")


def test_stopping_is_the_default_and_names_the_image(broken) -> None:
    config, _ = broken
    with pytest.raises(DataError, match=r"n0\d+_\d+.JPEG: damaged image .*on_bad_image: skip"):
        seen(attrs.evolve(config, on_bad_image="stop"))


def test_a_class_without_any_sound_image_ends_the_run(tmp_path) -> None:
    tree = write_tree(tmp_path / "tree", [3, 2])
    for path in (tree / "n00000001").iterdir():
        damage(path)
    source = Skipping(sources.ImageFolder(root=str(tree), size=SIZE, classes=2).open())
    source.read([0, 1, 2])
    with pytest.raises(DataError, match="none of the 2 images of its class can be used instead"):
        source.read([3])


def test_a_file_that_vanished_is_never_skipped(tmp_path) -> None:
    tree = write_tree(tmp_path / "tree", [3, 2])
    source = Skipping(sources.ImageFolder(root=str(tree), size=SIZE, classes=2).open())
    (tree / "n00000000/n00000000_1.JPEG").unlink()
    with pytest.raises(DataError, match="cannot be read: ") as caught:
        source.read([1])
    assert not isinstance(caught.value, BadImageError)


@pytest.mark.parametrize("side", [100, 20_000])
def test_an_image_above_the_limit_is_not_decoded(tmp_path, monkeypatch, side) -> None:
    """A picture of 400 megapixels takes 1.2 GB to decode, and 50 kB on the disk."""
    (tmp_path / "tree/a").mkdir(parents=True)
    Image.new("1", (side, side)).save(tmp_path / "tree/a/bomb.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "tree/a/small.png")
    config = sources.ImageFolder(
        root=str(tmp_path / "tree"), size=SIZE, classes=1, on_bad_image="skip", max_pixels=5000
    )
    loaded: list[tuple[int, int]] = []
    load = Image.Image.load

    def watched(image, *args):
        loaded.append(image.size)
        return load(image, *args)

    monkeypatch.setattr(Image.Image, "load", watched)
    source = open_source(config)
    source.read([0, 1])
    (skipped,) = source.take()
    assert "data.max_pixels: 5000" in skipped.what
    assert all(max(size) <= 64 for size in loaded)
