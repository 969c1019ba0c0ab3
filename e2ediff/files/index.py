"""Where each image lies in its file: built once, stored beside the data or in a cache."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from e2ediff.data import LeftOut
from e2ediff.files.listing import Names
from e2ediff.files.location import Location, SidecarFile
from e2ediff.limits import check_size, json_object

VERSION = 1


@attrs.frozen(eq=False)
class Index:
    """Ranges of bytes in files, one for each image, with names and labels.

    `file`, `start`, `size` and `labels` are (M,), int64: number of the file in `files`, first
    byte, number of bytes, class. `classes` is 0 if there are no labels.
    `left_out` is what lies in the files besides.
    """

    files: tuple[str, ...]
    names: Names
    file: Tensor
    start: Tensor
    size: Tensor
    labels: Tensor
    classes: int
    class_names: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def dumps(self, key: str) -> bytes:
        """Return it as a safetensors file; `key` says of what data it is the index."""
        told: dict[str, Any] = {
            "version": VERSION,
            "key": key,
            "classes": self.classes,
            "files": self.files,
            "class_names": self.class_names,
        }
        if self.left_out:
            told["left_out"] = [attrs.astuple(one) for one in self.left_out]
        tensors = {
            "file": self.file,
            "start": self.start,
            "size": self.size,
            "labels": self.labels,
            "letters": self.names.letters,
            "ends": self.names.ends,
        }
        # One entry: with several, their order would differ from time to time.
        return save(tensors, {"index": json.dumps(told)})

    def _consistent(self) -> bool:
        """Return whether every image has a name, a place in a file, and one of the classes."""
        columns = (self.file, self.start, self.size, self.labels, self.names.ends)
        if any(c.dtype != torch.int64 or c.shape != (len(self.names),) for c in columns):
            return False
        ends, letters = self.names.ends, self.names.letters
        return (
            _below(self.file, len(self.files))
            and _below(self.labels, max(1, self.classes))
            and not any(bool((c < 0).any()) for c in (self.start, self.size, ends, ends.diff()))
            and letters.dtype == torch.uint8
            and (not len(ends) or int(ends[-1]) <= len(letters))
            and len(self.class_names) <= self.classes
        )

    @classmethod
    def loads(cls, data: bytes, key: str | None = None) -> Index | None:
        """Read what `dumps` wrote; None if it is damaged, or of other data than `key`'s."""
        try:
            t, told = load(data), _metadata(data)
            if told["version"] != VERSION or key not in (None, told["key"]):
                return None
            found = cls(
                tuple(told["files"]),
                Names.of(t["letters"], t["ends"]),
                t["file"],
                t["start"],
                t["size"],
                t["labels"],
                int(told["classes"]),
                tuple(told["class_names"]),
                tuple(LeftOut(*one) for one in told.get("left_out", ())),
            )
            return found if found._consistent() else None
        except (SafetensorError, ValueError, KeyError, TypeError, struct.error):
            return None


def _below(numbers: Tensor, limit: int) -> bool:
    return not bool(((numbers < 0) | (numbers >= limit)).any())


def _metadata(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    return json_object(json_object(data[8 : 8 + length])["__metadata__"]["index"])


def stored_index(location: Location, path: str, key: str, build: Callable[[], Index]) -> Index:
    """Read that key's index at `path` or in the cache; if neither has it, build and store it."""
    sidecar = SidecarFile(location, path)
    for data in sidecar.read():
        index = Index.loads(data, key)
        if index is not None:
            return index
    index = build()
    sidecar.write(index.dumps(key))
    return index


@attrs.frozen(eq=False)
class RangeBytes:
    """The bytes of images in an index, by number."""

    location: Location
    paths: Sequence[str]
    index: Index

    def __call__(self, i: int) -> bytes:
        """Read one range of one file."""
        file, start, size = (
            int(column.numpy()[i])
            for column in (self.index.file, self.index.start, self.index.size)
        )
        check_size(size)
        return self.location.read(self.paths[file], start, start + size)


def column(values: Sequence[int]) -> Tensor:
    """Return a column of an index, (M,), int64."""
    return torch.tensor(values, dtype=torch.int64)
