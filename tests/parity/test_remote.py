"""Every kind of source, and `data prepare`, on stores that are not the disk.

`memory://` needs nothing. `s3://` is a real server of S3's protocol on this machine (moto), read
by the real client: it needs `pip install '.[reliability]'`.
"""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from command_line import e2ediff, needs
from pictures import as_idx, write_tree
from source_kinds import KINDS, SIZE, classes_of, folder, part, source_of

from e2ediff.errors import DataError
from e2ediff.files.location import Location
from e2ediff.parts import sources

pytestmark = pytest.mark.usefixtures("cache")

COUNTS = [1, 3, 2]
# A folder is uploaded as it is; the same in other kinds of file systems is tested elsewhere.
FILES = [k for k in KINDS if k not in ("folder on another file system", "folder in a zip")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sources")
    write_tree(place / "tree", COUNTS)
    return place


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket on a server of this process."""
    pytest.importorskip("s3fs", reason="needs `pip install s3fs`")
    server = pytest.importorskip("moto.server", reason="needs `pip install 'moto[s3]' flask-cors`")
    started = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started.start()
        host, port = started.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
        started.stop()


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new address on a remote store."""
    root = "memory://bucket" if request.param == "memory" else request.getfixturevalue("s3")
    return f"{root}/{tmp_path.name}"


def upload(path: Path, url: str) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    for file in path.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"{root}/{file.relative_to(path)}", file.read_bytes())


@pytest.mark.parametrize("kind", ["folder", "folder in a zip", *FILES])
def test_every_kind_of_source_reads_from_a_remote_store_what_it_reads_from_the_disk(
    kind: str, place: Path, store: str, tmp_path: Path
) -> None:
    """Labels and every pixel; the second time with the index that the first left in the store."""
    if kind != "folder":
        part(KINDS[kind][0])  # skips the test where it is not installed
    plain, made = folder(place).open(), tmp_path / "made"
    made.mkdir()
    if kind == "folder":
        name, options = "image_folder", {"root": str(made)}
        write_tree(made, COUNTS)
    else:
        name, given = KINDS[kind]
        options = {key: str(value) for key, value in given(place, made).items()}
    upload(made, store)
    options = {key: value.replace(str(made), store) for key, value in options.items()}
    assert all(store in value for value in options.values())
    config = source_of(name, **options, size=SIZE, classes=classes_of(place))
    for _ in range(2):
        source = config.open()
        assert torch.equal(source.labels(), plain.labels())
        assert torch.equal(source.read(range(6))[0], plain.read(range(6))[0])


def test_fashion_mnist_as_it_is_published_is_read_from_a_store(store: str, tmp_path) -> None:
    g = np.random.default_rng(0)
    for split, count in (("train", 5), ("t10k", 3)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            path = as_idx(g.integers(10, size=shape), tmp_path / "x")
            (tmp_path / "made").mkdir(exist_ok=True)
            packed = tmp_path / f"made/{split}-{kind}-ubyte.gz"
            packed.write_bytes(gzip.compress(path.read_bytes()))
    upload(tmp_path / "made", store)
    near, far = (sources.FashionMNIST(root=root) for root in (str(tmp_path / "made"), store))
    for held_out, count in ((False, 5), (True, 3)):
        a, b = near.open(held_out=held_out), far.open(held_out=held_out)
        assert len(a) == len(b) == count
        assert torch.equal(a.labels(), b.labels())
        assert torch.equal(a.read(range(count))[0], b.read(range(count))[0])


@needs("e2ediff-data")
def test_images_are_prepared_from_a_store_into_one_and_checked_there(
    place: Path, store: str
) -> None:
    """Twice: the second time nothing is left to do; and what is damaged is found and mended."""
    upload(place / "tree", f"{store}/tree")
    words = ("prepare", f"{store}/tree", f"{store}/shards", "--size", SIZE, "--each", 2)
    done = e2ediff("data", *words, "--workers", 0)
    assert (done.code, done.out) == (0, f"{store}/shards\n"), done.err
    assert "3 of them made before" in e2ediff("data", *words, "--workers", 0).err
    source = source_of("shards", path=f"{store}/shards", size=SIZE, classes=3).open()
    assert torch.equal(source.read(range(6))[0], folder(place).open().read(range(6))[0])
    check = ("data", "check", f"{store}/shards", "--workers", 0)
    assert e2ediff(*check).code == 0
    fs, path = fsspec.core.url_to_fs(f"{store}/shards/shard-00001.tar")
    fs.pipe_file(path, fs.cat_file(path)[:-1] + b"x")
    done = e2ediff(*check)
    assert done.code == 5
    assert "1 of 4 files have another SHA-256 than prepared.json says" in done.err
    assert "2 of them made before" in e2ediff("data", *words, "--workers", 0).err
    assert e2ediff(*check).code == 0


@needs("e2ediff-data")
def test_broken_images_in_a_store_are_named_by_their_address(place: Path, store: str) -> None:
    name = "n00000001/n00000001_2.JPEG"
    upload(place / "tree", f"{store}/tree")
    fs, path = fsspec.core.url_to_fs(f"{store}/tree/{name}")
    fs.pipe_file(path, b"<html>")
    done = e2ediff("data", "check", f"{store}/tree", "--set", "size=8", "--workers", 0)
    assert done.code == 5
    assert (
        done.out
        == f"{store}/tree/{name}: damaged image (none of JPEG, PNG, WEBP, BMP, GIF, TIFF)\n"
    )


# Refusals


def config_of(kind: str, url: str) -> object:
    """A source at an address below one that is not there."""
    given = {
        "image_folder": {"root": f"{url}/train"},
        "archive": {"path": f"{url}/x.zip"},
        "class_tars": {"path": f"{url}/x.tar"},
        "tar_shards": {"path": f"{url}/train-{{00..01}}.tar"},
        "parquet": {"path": f"{url}/*.parquet"},
        "arrays": {"images": f"{url}/x.npz"},
        "shards": {"path": f"{url}/shards"},
        "fashion_mnist": {"root": f"{url}/fashion"},
    }[kind]
    if kind != "fashion_mnist":
        given |= {"size": SIZE, "classes": 3}
    return source_of(kind, **given)


ALL = [
    "image_folder", "archive", "class_tars", "tar_shards", "parquet", "arrays", "shards",
    "fashion_mnist",
]  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
def test_a_missing_bucket_is_said_in_one_line(kind: str, s3: str) -> None:
    with pytest.raises(DataError) as caught:
        config_of(kind, "s3://nowhere").open()
    (line,) = str(caught.value).splitlines()
    assert line.startswith(("data.root: ", "data.path: ", "data.images: no file"))
    assert "s3://nowhere" in line or "nowhere/train-00.tar" in line or "nowhere/x.tar" in line
    assert "xpected" in line or "must" in line


@pytest.mark.parametrize("kind", ALL)
def test_missing_credentials_are_said_in_one_line(
    kind: str, s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.filesystem("s3").clear_instance_cache()
    try:
        with pytest.raises(DataError) as caught:
            config_of(kind, "s3://bucket").open()
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
    (line,) = str(caught.value).splitlines()
    assert "redentials" in line
    assert "s3://bucket/" in line


@pytest.mark.parametrize(
    ("url", "package"),
    [("gs://bucket/train", "gcsfs"), ("hf://datasets/a/b", "huggingface_hub")],
)
def test_an_address_whose_package_is_missing_names_what_to_install(url: str, package: str) -> None:
    if _importable(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(DataError) as caught:
        Location(url, "data.root")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"data.root: cannot open {url}: ")
    assert line.endswith(f"Run: pip install {package}")


def test_an_unknown_kind_of_address_is_said() -> None:
    with pytest.raises(
        DataError, match=r"data.root: cannot open nope://x: .*[Pp]rotocol not known"
    ):
        Location("nope://x", "data.root")


def _importable(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None
