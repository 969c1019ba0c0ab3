"""Write the images of a set: to a folder of PNGs, an npz, a zip or webdataset tars.

Each output takes finished images in any order, and knows after a crash which ones it has.
The images of a block are written together, and a block is complete or absent.

Shapes: M images, H W C pixels, uint8.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import override

from e2ediff.errors import DataError, ResourceError
from e2ediff.files.damage import DAMAGED_ARRAY
from e2ediff.files.images import Limit, opened
from e2ediff.limits import MAX_BYTES, check_size
from e2ediff.store.storage import Store

Format = Literal["png", "npz", "zip", "tar"]
Pixels = NDArray[np.uint8]
Shape = tuple[int, int, int]

_BLOCK = re.compile(r"(\d{9,18})-(\d{9,18})\.\w+")
_PART = "parts"


class ImageOutput(ABC):
    """A set of images in one format, in one store."""

    def __init__(self, store: Store, shape: Shape, labels: Sequence[int]) -> None:
        self.store = store
        self.shape = shape  # H, W, C
        self.labels = labels

    @abstractmethod
    def finished(self) -> set[int]:
        """Return the numbers of the images that are stored."""

    @abstractmethod
    def put(self, numbers: range, x: Pixels) -> None:
        """Store images (M, H, W, C), one for each of these M numbers.

        Raises:
            ResourceError: The disk or store refused; what was there before is intact.
        """

    @abstractmethod
    def first(self, count: int) -> Pixels:
        """Return the first images, (count, H, W, C), once all are stored."""

    def close(self) -> str:
        """Finish the set once all images are stored, and return its address.

        Raises:
            ResourceError: The disk or store refused; no image is lost.
        """
        return self.store.where()

    def file_of(self, number: int) -> str | None:
        """Return the file that holds this image alone; None if there is no such file."""
        return None

    def checked(self, path: str, read: Callable[[], Iterable[Pixels]], count: int) -> Pixels:
        """Return images (count, H, W, C) that were stored before, by whomever.

        Raises:
            DataError: They are not those of this set, or damaged.
        """
        place = self.store.where(path)
        try:
            x = np.stack([*read()])
            if x.shape != (count, *self.shape) or x.dtype != np.uint8:
                raise ValueError(f"{x.dtype} of {x.shape}, expected {(count, *self.shape)}")
        except (*DAMAGED_ARRAY, tarfile.TarError) as error:
            raise DataError(
                f"{place}: is damaged: {error}. Remove it, and its images are made again"
            ) from error
        except DataError as error:
            raise DataError(f"{place}: {error}, and its images are made again") from error
        return x

    def pixels(self, data: bytes) -> Pixels:
        """Decode a PNG that `png_bytes` made to an image (H, W, C).

        Raises:
            DataError: It is none, or larger than the images of this set.
        """
        limit = Limit(self.shape[0] * self.shape[1])
        with opened(data, "a PNG of this set", limit=limit, formats=("PNG",)) as image:
            x = np.array(image)
        return x[..., None] if x.ndim == 2 else x

    def bytes_needed(self, missing: int) -> int:
        """Return the bytes that this many more images and closing take; None if unknown."""
        return 0


def open_output(kind: Format, store: Store, shape: Shape, labels: Sequence[int]) -> ImageOutput:
    """Open the output of a format, for as many images as there are labels."""
    kinds: Mapping[Format, type[ImageOutput]] = {"png": PNGs, "npz": NPZ, "zip": Zip, "tar": Tars}
    return kinds[kind](store, shape, labels)


class PNGs(ImageOutput):
    """`images/000000.png` and so on, one file for each image and nothing else."""

    @override
    def finished(self) -> set[int]:
        found = (re.fullmatch(r"(\d{6,})\.png", name) for name in self.store.list("images"))
        return {int(match[1]) for match in found if match}

    @override
    def put(self, numbers: range, x: Pixels) -> None:
        for i, pixels in zip(numbers, x, strict=True):
            self.store.write(self.file_of(i), png_bytes(pixels))

    @override
    def first(self, count: int) -> Pixels:
        images = [self.checked(self.file_of(i), partial(self._read, i), 1) for i in range(count)]
        return np.concatenate(images)

    def _read(self, number: int) -> list[Pixels]:
        return [self.pixels(self.store.read(self.file_of(number), MAX_BYTES))]

    @override
    def file_of(self, number: int) -> str:
        return f"images/{number:06d}.png"


class _Blocks(ImageOutput):
    """Images in one file for each block, with `<first>-<one past the last>` in its name."""

    folder = _PART
    suffix: str

    def blocks(self) -> list[range]:
        found = (_BLOCK.fullmatch(name) for name in self.store.list(self.folder))
        blocks = [range(int(match[1]), int(match[2])) for match in found if match]
        return [block for block in blocks if block.start < block.stop <= len(self.labels)]

    def path_of(self, block: range) -> str:
        return f"{self.folder}/{block.start:09d}-{block.stop:09d}.{self.suffix}"

    @override
    def finished(self) -> set[int]:
        return {i for block in self.blocks() for i in block}

    @override
    def put(self, numbers: range, x: Pixels) -> None:
        buffer = io.BytesIO()
        self.encode(buffer, numbers, x)
        self.store.write(self.path_of(numbers), buffer.getvalue())

    @override
    def first(self, count: int) -> Pixels:
        found: dict[int, Pixels] = {}
        for block in self.blocks():
            if block.start < count:
                found.update(zip(block, self.images(block), strict=True))
        return np.stack([found[i] for i in range(count)])

    def images(self, block: range) -> Pixels:
        """Return the images of a block.

        Raises:
            DataError: It is damaged.
        """
        path = self.path_of(block)
        return self.checked(path, lambda: self.decode(self.read(block), block), len(block))

    def read(self, block: range) -> IO[bytes]:
        """Read a block's file; OSError if it is longer than any that `encode` makes."""
        limit = 65536 + len(block) * self.longest()
        return io.BytesIO(self.store.read(self.path_of(block), limit))

    def longest(self) -> int:
        """Return more bytes than an image takes with its label and headers, as PNG or pixels."""
        return 8192 + 2 * int(np.prod(self.shape))

    def in_order(self) -> Iterable[tuple[range, range]]:
        """Yield each block with those of its numbers that no earlier block holds."""
        done = 0
        for block in sorted(self.blocks(), key=lambda b: (b.start, b.stop)):
            if block.stop > done:
                yield block, range(max(done, block.start), block.stop)
                done = block.stop

    @abstractmethod
    def encode(self, file: IO[bytes], numbers: range, x: Pixels) -> None: ...

    @abstractmethod
    def decode(self, file: IO[bytes], numbers: range) -> Iterable[Pixels]: ...


class Tars(_Blocks):
    """Webdataset shards, `shards/<first>-<last>.tar`, with `<number>.png` and `<number>.cls`."""

    folder = "shards"
    suffix = "tar"

    def encode(self, file: IO[bytes], numbers: range, x: Pixels) -> None:
        """Write a tar without times and owners, so that equal images give equal files."""
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i, pixels in zip(numbers, x, strict=True):
                label = str(self.labels[i]).encode()
                for suffix, data in (("png", png_bytes(pixels)), ("cls", label)):
                    entry = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))

    @override
    def decode(self, file: IO[bytes], numbers: range) -> Iterable[Pixels]:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for i in numbers:
                member = tar.extractfile(f"{i:09d}.png")
                if member is None:
                    raise tarfile.ReadError(f"{i:09d}.png is no file")
                yield self.pixels(member.read())


class _Assembled(_Blocks):
    """Blocks that are merged into one file at the end and then removed."""

    name: str

    def finished(self) -> set[int]:
        """Return all numbers once the merged file exists; else those of the blocks."""
        if self.store.exists(self.name):
            return set(range(len(self.labels)))
        return super().finished()

    def close(self) -> str:
        """Write the file, then remove the blocks."""
        if not self.store.exists(self.name):
            with self.store.writing(self.name, self.bytes_needed(0)) as file:
                self.assemble(file)
        error = self.store.remove_dir(_PART)
        if error is not None:
            raise ResourceError(f"{self.store.where(_PART)}: cannot be removed: {error}")
        return self.store.where(self.name)

    def first(self, count: int) -> Pixels:
        """Read from the blocks, or from the merged file once they are removed."""
        if not self.store.exists(self.name):
            return super().first(count)
        return self.checked(self.name, lambda: self._first(count), count)

    def _first(self, count: int) -> Pixels:
        local = self.store.local_path(self.name)
        with _unpacked(local or io.BytesIO(self.store.read(self.name))) as archive:
            return self.first_of(archive, count)

    @abstractmethod
    def assemble(self, file: IO[bytes]) -> None: ...

    @abstractmethod
    def first_of(self, archive: zipfile.ZipFile, count: int) -> Pixels: ...


class NPZ(_Assembled):
    """`samples.npz` as ADM's evaluator reads it: arr_0 (M, H, W, C) uint8, arr_1 labels, int64."""

    name = "samples.npz"
    suffix = "npy"

    def bytes_needed(self, missing: int) -> int:
        """Count the blocks and the merged file, which exist at the same time."""
        one = int(np.prod(self.shape))
        return 0 if self.store.exists(self.name) else (missing + len(self.labels)) * one

    @override
    def encode(self, file: IO[bytes], numbers: range, x: Pixels) -> None:
        np.save(file, x, allow_pickle=False)

    @override
    def decode(self, file: IO[bytes], numbers: range) -> Iterable[Pixels]:
        array: Pixels = np.load(file, allow_pickle=False)
        return array

    def assemble(self, file: IO[bytes]) -> None:
        """Merge block by block, so that the set need not fit into memory."""
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.labels), *self.shape)}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(_entry("arr_0.npy"), "w", force_zip64=True) as array:
                np.lib.format.write_array_header_2_0(array, header)
                for block, own in self.in_order():
                    array.write(self.images(block)[own.start - block.start :].tobytes())
            with archive.open(_entry("arr_1.npy"), "w") as array:
                np.save(array, np.array(self.labels, dtype=np.int64), allow_pickle=False)

    @override
    def first_of(self, archive: zipfile.ZipFile, count: int) -> Pixels:
        with archive.open("arr_0.npy") as array:
            np.lib.format.read_magic(array)
            np.lib.format.read_array_header_2_0(array)
            data = array.read(count * int(np.prod(self.shape)))
        return np.frombuffer(data, dtype=np.uint8).reshape(count, *self.shape)


class Zip(_Assembled):
    """`samples.zip`: `<label>/<number>.png`, with EDM's list of labels in `dataset.json`."""

    name = "samples.zip"
    suffix = "zip"

    def member(self, number: int) -> str:
        """Return the path of an image in the zip."""
        return f"{self.labels[number]:05d}/{number:06d}.png"

    def encode(self, file: IO[bytes], numbers: range, x: Pixels) -> None:
        """Write a zip of PNGs, which `assemble` copies as they are."""
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for i, pixels in zip(numbers, x, strict=True):
                archive.writestr(_entry(self.member(i)), png_bytes(pixels))

    @override
    def decode(self, file: IO[bytes], numbers: range) -> Iterable[Pixels]:
        with _unpacked(file) as archive:
            return [self.image(archive, i) for i in numbers]

    def assemble(self, file: IO[bytes]) -> None:
        """Merge block by block, and add the labels at the end."""
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for block, own in self.in_order():
                self.images(block)  # only what is whole is copied
                with _unpacked(self.read(block)) as part:
                    for i in own:
                        archive.writestr(_entry(self.member(i)), part.read(self.member(i)))
            listed = [[self.member(i), label] for i, label in enumerate(self.labels)]
            archive.writestr(_entry("dataset.json"), json.dumps({"labels": listed}))

    @override
    def first_of(self, archive: zipfile.ZipFile, count: int) -> Pixels:
        return np.stack([self.image(archive, i) for i in range(count)])

    def image(self, archive: zipfile.ZipFile, number: int) -> Pixels:
        """Decode an image; DataError if its file is longer than any that `encode` makes."""
        entry = archive.getinfo(self.member(number))
        check_size(entry.file_size, "a PNG of this set", self.longest())
        return self.pixels(archive.read(entry))


def _unpacked(file: str | IO[bytes]) -> zipfile.ZipFile:
    """Open a zip of a set, which is written without packing, so that none unpacks to more.

    Raises:
        zipfile.BadZipFile: It is damaged, or packed.
    """
    archive = zipfile.ZipFile(file)
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise zipfile.BadZipFile("its members are packed, which those of a set are not")
    return archive


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name)  # dated 1980, so that equal images give equal files


def png_bytes(x: Pixels) -> bytes:
    """Encode one image (H, W, C) with 1 or 3 channels as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x).save(buffer, "PNG")
    return buffer.getvalue()
