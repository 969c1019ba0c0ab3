"""A file that somebody damaged, or made to do damage, is refused with an error of ours.

Each reader gets some hundred damaged copies; what would fill the memory is judged by its headers.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import damaged, damaged_json, damaged_member, outcomes
from pictures import header
from safetensors.torch import save
from torch import nn

from e2ediff import limits
from e2ediff.errors import DataError
from e2ediff.evaluate.passport import Card, Passport, Score, read_card
from e2ediff.evaluate.ranking import figures_of, other_versions, rank
from e2ediff.evaluate.reference import open_reference
from e2ediff.features import load_weights, read_weights
from e2ediff.files.arrays import read_idx
from e2ediff.files.labels import read_labels
from e2ediff.host.plugins import load

HOST = load()
NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5))


def saved(**options: object) -> bytes:
    out = io.BytesIO()
    torch.save(NET.state_dict(), out, **options)
    return out.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def weights(path: str) -> None:
    load_weights(NET, read_weights(path)[0], path, "this network")


def statistics(path: str) -> None:
    images = open_reference(path, HOST, None).images
    if images is not None:
        list(images.batches(0, images.count, 4))


def card(path: str) -> None:
    found = read_card(path)
    figures_of([found]), other_versions([found, found]), found.text()
    for name in found.scores:
        rank([found, found], name)


CARD = Card(
    "",
    Passport({"convention": "adm", "images": 5}, {"weights": "online"}, {"git": {"commit": "a"}}),
    {"FID": Score(1.0, 0.1, ("w",), (0.5, 1.5), "low", metric={"name": "fd"})},
)
PIXELS = np.zeros((3, 8, 8, 3), np.uint8)
MOMENTS = npz(mu=np.zeros(5), sigma=np.eye(5), arr_0=PIXELS)
IDX = b"\0\0\x08\3" + b"".join(n.to_bytes(4, "big") for n in (3, 8, 8)) + bytes(192)
LABELS = json.dumps({"labels": [["a.png", 0], ["b.png", 1]]}).encode()
READERS = {
    "zip.pt": (saved(), weights, (damaged, damaged_member)),
    "legacy.pt": (saved(_use_new_zipfile_serialization=False), weights, (damaged,)),
    "x.safetensors": (save(NET.state_dict()), weights, (damaged,)),
    "statistics.npz": (MOMENTS, statistics, (damaged, damaged_member)),
    "x-ubyte.gz": (gzip.compress(IDX), lambda p: read_idx(Path(p).read_bytes(), p), (damaged,)),
    "dataset.json": (LABELS, read_labels, (damaged, damaged_json)),
    "scores.json": (CARD.text().encode(), card, (damaged, damaged_json)),
}


@pytest.mark.parametrize("name", READERS)
def test_damage_is_refused_with_an_error_of_ours(name: str, tmp_path: Path) -> None:
    seed, read, ways = READERS[name]
    _, refused = outcomes(seed, tmp_path / name, read, 60, *ways)
    assert refused > 20


# What would fill the memory


def grown(work: Callable[[], object]) -> tuple[str, int]:
    """What it is refused with, and by how many bytes the process has grown at most."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((DataError, ValueError)) as caught:
        work()
    return str(caught.value), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def packed(member: str, head: bytes, size: int) -> bytes:
    """A zip of which a member has so many zeros behind its head."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, head + bytes(size))
    return out.getvalue()


def test_weights_that_are_packed_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(packed("x/data/0", b"", 1 << 26))
    said, growth = grown(lambda: read_weights(tmp_path / "x.pt"))
    assert "x.pt is not a file of tensors: 67,108,8" in said
    assert "bytes unpacked from 6" in said
    assert growth < 1 << 25


def test_statistics_that_promise_more_than_there_is_are_refused_unread(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name, shape in (("mu", (16_000,)), ("sigma", (16_000, 16_000))):
            archive.writestr(f"{name}.npy", header(*shape))
    said, growth = grown(lambda: open_reference(str(tmp_path / "x.npz"), HOST, None))
    assert "its header promises 16,000" in said
    assert growth < 1 << 26


def test_an_array_that_is_too_large_for_what_it_is_packed_in_is_refused() -> None:
    limits.check_array(1 << 29, 1)
    limits.check_array(3_020_000_000, 27_000_000)  # dSprites
    with pytest.raises(limits.OversizedError, match="write it without compression"):
        limits.check_array(4_500_000_000, 4_400_000)
    idx = b"\0\0\x08\3" + b"".join(n.to_bytes(4, "big") for n in (60_000, 256, 256))
    said, growth = grown(lambda: read_idx(gzip.compress(idx + bytes(1 << 20)), "x-ubyte.gz"))
    assert said.startswith("x-ubyte.gz: 3,932,160,000 bytes unpacked from 1,")
    assert growth < 1 << 26


def test_what_the_memory_has_no_room_for_is_refused(tmp_path: Path) -> None:
    free = limits.free_memory()
    assert free is not None
    assert free > 1 << 24
    limits.check_memory(free // 2)
    with open(tmp_path / "x.pt", "wb") as file:
        file.truncate(1 << 42)  # of holes, which take no place
    said, _ = grown(lambda: read_weights(tmp_path / "x.pt"))
    assert "4,398,046,511,104 bytes, and " in said
    with (
        (tmp_path / "x.pt").open("rb") as file,
        pytest.raises(limits.OversizedError, match="bytes of memory are free"),
    ):
        limits.read_whole(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_weights_are_read_from_files_alone(tmp_path: Path) -> None:
    """A pipe of nobody would be waited for, and this device has no end."""
    os.mkfifo(tmp_path / "x.pt")
    for place in (tmp_path / "x.pt", "/dev/zero"):
        with pytest.raises(DataError, match="is a pipe or a device; expected a file"):
            read_weights(place)


# JSON


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"7", b"\xff", b""])
def test_json_that_is_no_object_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        limits.json_object(data)
    for name in ("x.json", "dataset.json"):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError):
        read_card(tmp_path / "x.json")
    with pytest.raises(DataError):
        read_labels(tmp_path / "dataset.json")


def test_deep_labels_in_a_folder_s_json_are_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_bytes(b'{"labels":' + b"[" * 100_000)
    with pytest.raises(DataError, match="it is nested too deeply; expected a line"):
        read_labels(tmp_path / "dataset.json")
    with pytest.raises(limits.OversizedError, match="17,000,000 bytes, more than the 16,777,216"):
        limits.json_object(b" " * 17_000_000, limits.MAX_GRAPH)
