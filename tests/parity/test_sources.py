"""The same images through every kind of source, in the same order."""

from __future__ import annotations

import os
from pathlib import Path

import attrs
import pytest
import torch
from pictures import write_tree
from source_kinds import COUNTS, KINDS, SIZE, TOTAL, folder, make, prepared, source_of

from e2ediff.errors import DataError
from e2ediff.files.location import Location, expand, find_files
from e2ediff.loading.order import Order

pytestmark = pytest.mark.usefixtures("cache")


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


# Arrays have no order of their own: they are made of the folder's.
THOUSAND = [kind for kind in KINDS if kind not in ("npz", "idx")]


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
    source = source_of("shards", path=path, size=SIZE, classes=len(COUNTS)).open()
    x, label = source.read(range(TOTAL))
    plain = folder(place).open().read(range(TOTAL))
    assert torch.equal(label, plain[1])
    error = (x.float() - plain[0].float()).abs()
    assert 0 < error.mean() < 3


def test_braces_stand_for_ranges_and_choices() -> None:
    assert expand("s3://b/{008..010}.tar") == [f"s3://b/{i}.tar" for i in ("008", "009", "010")]
    assert expand("{train,val}-{0..1}") == ["train-0", "train-1", "val-0", "val-1"]
    assert expand("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize("kind", ["tar of class tars", "shards with cls", "parquet"])
def test_files_may_be_links_and_are_noticed_when_what_they_point_to_changes(
    kind: str, place: Path, tmp_path: Path
) -> None:
    """As the cache of Hugging Face's hub has them."""
    config = make(kind, place, tmp_path)
    plain, links = config.open(), tmp_path / "links"
    links.mkdir()
    files = [p for p in tmp_path.rglob("*") if p.suffix in (".tar", ".parquet")]
    for path in files:
        (links / path.name).symlink_to(path)
    name = Path(config.path).name if Path(config.path).name != "x" else ""
    linked = attrs.evolve(config, path=str(links / name))
    assert torch.equal(linked.open().labels(), plain.labels())
    assert torch.equal(linked.open().read(range(9))[0], plain.read(range(9))[0])
    files[0].write_bytes(b"x" * 1024)
    with pytest.raises(DataError, match=r"cannot be read as"):
        linked.open()


def test_a_pipe_or_a_device_in_place_of_a_small_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "labels.csv")
    (tmp_path / "labels.txt").symlink_to("/dev/zero")
    for name in ("labels.csv", "labels.txt"):
        with pytest.raises(OSError, match=f"{name} is a pipe or a device"):
            Location(f"{tmp_path}", "data").read_labels(f"{tmp_path / name}")


@pytest.mark.parametrize(
    ("target", "said"), [("x.tar", "cannot open .*x.tar"), ("nowhere", "no file")]
)
def test_a_link_that_leads_nowhere_is_said_where_it_is(target, said, tmp_path: Path) -> None:
    (tmp_path / "x.tar").symlink_to(target)
    with pytest.raises(DataError, match=rf"data\.path: {said}"):
        find_files(f"{tmp_path}", "data.path", ".tar")
