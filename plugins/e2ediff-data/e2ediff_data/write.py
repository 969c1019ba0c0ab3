"""`e2ediff data prepare`: crop every image once, into shards with an index and hashes.

The result is what the source `shards` reads (`e2ediff_data.shards` has the layout).
Meanwhile `parts/` keeps one JSON file for each finished shard: after a kill only shards without
one, or whose hash differs, are made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import attrs
import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import DataSource, Size, height_width
from e2ediff.errors import BadImageError, DataError, ResourceError
from e2ediff.files.arrays import picture
from e2ediff.files.index import Index, column
from e2ediff.files.listing import Names
from e2ediff.files.location import Location
from e2ediff.limits import MAX_GRAPH, json_object
from e2ediff.loading.batches import read
from e2ediff.store.storage import Store
from e2ediff_data.shards import (
    INDEX,
    PREPARED,
    VERIFIED,
    VERSION,
    check_shards,
    sha256,
    verified_key,
)

Format = Literal["png", "jpeg", "raw"]
SETTINGS = "parts/settings.json"
_DST = "DST"  # the folder's argument on the command line
_Part = dict[str, Any] | str | ResourceError  # record of a shard, or the error
_Kept = list[tuple[int, bytes]]  # number in the source, and what is stored of it
_HEADER = 512  # bytes of a tar member's header


@attrs.frozen(kw_only=True)
class Settings:
    """Settings that determine the content of the shards.

    `source` is the data block as text; `images`, `classes`, `channels` and `size` describe it;
    `each` is the number of images of the source in a shard, `quality` the JPEG quality.
    """

    source: str
    images: int
    size: Size
    channels: int
    classes: int
    format: Format
    quality: int
    each: int
    skip: bool

    @property
    def shards(self) -> int:
        """Return the number of shards."""
        return -(-self.images // self.each)


@attrs.frozen
class Done:
    """Counts of images, images left out, shards, and shards that existed already."""

    images: int
    left_out: tuple[tuple[str, str], ...]
    shards: int
    kept: int


def prepare(
    source: DataSource,
    settings: Settings,
    folder: Address,
    *,
    workers: int,
    progress: Callable[[str], None],
    class_names: Sequence[str] = (),
) -> Done:
    """Write shards of all images of a source, or the missing ones.

    Args:
        source: Opened with the size to crop to.
        settings: The same at every resumption.
        folder: A folder or URL, new or of an earlier attempt.
        workers: Number of worker processes; 0 crops in this process.
        progress: Called with progress.
        class_names: Names of the classes, by label, where the source has none itself.

    Raises:
        DataError: An image is damaged and `skip` is off, or the folder holds something else.
        ResourceError: The disk is full or read-only, or the system killed a worker process.
    """
    folder = addresses.plain(folder)
    store = Store(folder, _DST)
    _claim(store, settings)
    location = Location(folder, _DST)
    with ThreadPoolExecutor(8) as pool:
        numbers = range(settings.shards)
        before = pool.map(lambda k: _finished(store, location, k), numbers)
        parts = {k: part for k, part in zip(numbers, before, strict=True) if part}
    kept = len(parts)
    todo = [k for k in range(settings.shards) if k not in parts]
    items = read(_Shards(source, settings, folder), todo, workers, option="--workers")
    for k, part in zip(todo, items, strict=True):
        if isinstance(part, ResourceError):
            raise part
        if isinstance(part, str):
            raise DataError(part)
        parts[k] = part
        progress(f"shard {len(parts)} of {settings.shards}")
    location.fs.invalidate_cache()
    names = tuple(source.class_names or class_names)[: settings.classes]
    return _finish(store, location, settings, names, [parts[k] for k in sorted(parts)], kept)


def _claim(store: Store, settings: Settings) -> None:
    """Record the settings in a new folder, or compare them with the recorded ones."""
    now = json.dumps(attrs.asdict(settings), indent=1)
    if store.exists(SETTINGS):
        before, wanted = _noted(store), json.loads(now)
        changed = [key for key in wanted if before.get(key) != wanted[key]]
        if changed:
            told = ", ".join(f"{k} was {before.get(k)!r}, is {wanted[k]!r}" for k in changed)
            raise DataError(
                f"{store.url}: holds shards that were prepared otherwise ({told}); give another "
                "folder, or remove this one"
            )
    elif not store.is_vacant():
        raise DataError(f"{store.url}: is not empty; give a new folder for the shards")
    else:
        store.write(SETTINGS, now.encode())


def _noted(store: Store) -> dict[str, Any]:
    """Read the settings of the previous attempt."""
    try:
        return json_object(store.read(SETTINGS, MAX_GRAPH))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{store.where(SETTINGS)}: is damaged: the settings of the shards beside it are not "
            "known; remove the folder, or give another one"
        ) from error


def _part_name(k: int) -> str:
    return f"parts/shard-{k:05}.json"


def _finished(store: Store, location: Location, k: int) -> dict[str, Any] | None:
    """Return the record of an intact shard; None if it has to be made."""
    if not store.exists(_part_name(k)):
        return None
    try:
        part = json_object(store.read(_part_name(k), MAX_GRAPH))
        whole = {"bytes", "images", "left_out"} <= part.keys()
        if whole and sha256(location, location.below(part["file"])) == part["sha256"]:
            return part
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


class _Shards(Dataset[_Part]):
    """Item k makes shard k and returns its record; copied to worker processes.

    For a shard that cannot be made the item is the error message, since an exception from a
    worker process would arrive with a page of traceback.
    """

    def __init__(self, source: DataSource, settings: Settings, folder: str) -> None:
        self.source = source
        self.settings = settings
        self.folder = folder
        self.labels = source.labels() if settings.classes else None

    def __getitem__(self, k: int) -> _Part:
        try:
            return self._made(k)
        except ResourceError as error:
            return error
        except DataError as error:
            return str(error)

    def _made(self, k: int) -> dict[str, Any]:
        s, store = self.settings, Store(self.folder, _DST)
        kept: _Kept = []
        left_out = []
        for i in range(k * s.each, min((k + 1) * s.each, s.images)):
            try:
                x = self.source.read([i])[0][0]
            except BadImageError as error:
                if not s.skip:
                    raise
                left_out.append([error.place, error.what])
            else:
                kept.append((i, encode(x, s.format, s.quality)))
        write = self._array if s.format == "raw" else self._tar
        name, pieces, rows = write(k, kept)
        size, digest = sum(map(len, pieces)), hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        store.write(name, pieces, size)
        part = {
            "file": name,
            "bytes": size,
            "sha256": digest.hexdigest(),
            "images": rows,
            "left_out": left_out,
        }
        store.write(_part_name(k), json.dumps(part).encode())
        return part

    def _row(self, i: int, name: str, start: int, size: int) -> list[object]:
        label = int(self.labels[i]) if self.labels is not None else 0
        return [name, label, start, size, self.source.path_of(i)]

    def _tar(self, k: int, kept: _Kept) -> tuple[str, list[bytes], list[Any]]:
        pieces, rows, end = list[bytes](), [], 0
        file, suffix = f"shard-{k:05}.tar", "jpg" if self.settings.format == "jpeg" else "png"
        for i, data in kept:
            members = [(f"{i:08}.{suffix}", data)]
            rows.append(self._row(i, f"{file}/{members[0][0]}", end + _HEADER, len(data)))
            if self.labels is not None:
                members.append((f"{i:08}.cls", str(int(self.labels[i])).encode()))
            for name, content in members:
                info = tarfile.TarInfo(name)  # no time or owner: equal images give equal bytes
                info.size = len(content)
                pieces += info.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % 512)
                end += sum(map(len, pieces[-3:]))
        blank = 2 * _HEADER  # and as much as fills a record
        pieces.append(bytes(blank + -(end + blank) % tarfile.RECORDSIZE))
        return file, pieces, rows

    def _array(self, k: int, kept: _Kept) -> tuple[str, list[bytes], list[Any]]:
        s, out, file = self.settings, io.BytesIO(), f"shard-{k:05}.npy"
        shape = (len(kept), *height_width(s.size), s.channels)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        each, first = math.prod(shape[1:]), out.tell()
        rows = [
            self._row(i, f"{file}#{n}", first + n * each, each) for n, (i, _) in enumerate(kept)
        ]
        return file, [out.getvalue(), *(data for _, data in kept)], rows


def encode(x: Tensor, format_: Format, quality: int) -> bytes:
    """Encode an image (C, H, W), uint8: as PNG, lossless, as JPEG (4:4:4), or its (H, W, C)."""
    image, out = picture(x), io.BytesIO()
    if format_ == "raw":
        return image.tobytes()
    if format_ == "jpeg":
        image.save(out, "JPEG", quality=quality, subsampling=0)
    else:
        # Filtered photos hardly repeat themselves but in runs: to look for more takes three times
        # as long and saves little.
        image.save(out, "PNG", compress_type=zlib.Z_RLE)
    return out.getvalue()


def _finish(
    store: Store,
    location: Location,
    s: Settings,
    class_names: tuple[str, ...],
    parts: list[dict[str, Any]],
    kept: int,
) -> Done:
    """Write the index, then the file that commits the result."""
    rows = [(k, *row) for k, part in enumerate(parts) for row in part["images"]]
    left_out = tuple((place, what) for part in parts for place, what in part["left_out"])
    if not rows:
        raise DataError(f"{store.url}: none of the {s.images} images could be read")
    number, names, labels, start, size, _ = zip(*rows, strict=True)
    index = Index(
        tuple(part["file"] for part in parts),
        Names(names),
        column(number),
        column(start),
        column(size),
        column(labels),
        s.classes,
        class_names,
    ).dumps(PREPARED)
    store.write(INDEX, index)
    files = {p["file"]: {"bytes": p["bytes"], "sha256": p["sha256"]} for p in parts}
    files[INDEX] = {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    told = {
        "e2ediff": VERSION,
        **attrs.asdict(s),
        "images": len(rows),
        "left_out": len(left_out),
        "files": files,
    }
    store.write(PREPARED, json.dumps(told, indent=1).encode())
    shards = check_shards(location, told, verify=False)
    # The hashes were taken while writing, so the first use need not verify them.
    store.write(VERIFIED, verified_key(told, shards))
    return Done(len(rows), left_out, s.shards, kept)
