"""Encoded images in folders and zips: listing, decoding, cropping.

Shapes: B batch, C H W image.
"""

from __future__ import annotations

import io
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import fsspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from e2ediff.data import DataSource, ImageSpec
from e2ediff.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Reader(ABC):
    """Files below one place: `place` names it in messages."""

    place: str

    @abstractmethod
    def paths(self) -> list[str]:
        """Paths of all files, relative to the place, with forward slashes."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Content of one file."""


class FolderReader(Reader):
    """A folder through fsspec; local folders are walked directly, which is much faster."""

    def __init__(self, root: str) -> None:
        self.place = root
        try:
            self.fs, self.root = fsspec.core.url_to_fs(root)
            found = self.fs.isdir(self.root)
        except (ImportError, ValueError, OSError) as error:
            raise DataError(f"data.root: cannot open {root}: {error}") from error
        if not found:
            raise DataError(
                f"data.root: no folder {root}. It must hold one folder of images for each class "
                "(for ImageNet: train/n01440764/*.JPEG, ...). Give its path or URL with "
                "`--set data.root=/path/to/train`."
            )
        self.local = isinstance(self.fs, fsspec.implementations.local.LocalFileSystem)

    def paths(self) -> list[str]:
        """Every file below the root."""
        if not self.local:
            start = len(self.root.rstrip("/")) + 1
            return [p[start:] for p in self.fs.find(self.root)]
        return [
            str(PurePosixPath(Path(folder, name).relative_to(self.root)))
            for folder, _, names in os.walk(self.root)
            for name in names
        ]

    def read(self, path: str) -> bytes:
        """Content of one file."""
        data: bytes = self.fs.cat_file(f"{self.root.rstrip('/')}/{path}")
        return data


class ZipReader(Reader):
    """A zip file through fsspec; each process opens it for itself."""

    def __init__(self, path: str, inside: str) -> None:
        self.place = f"{path}!{inside}" if inside else path
        self.path = path
        self.prefix = f"{inside}/" if inside else ""
        self._zip: zipfile.ZipFile | None = None
        self._owner = -1
        try:
            self._open()
        except FileNotFoundError as error:
            raise DataError(f"data.path: no file {path}") from error
        except (zipfile.BadZipFile, OSError, ValueError, ImportError) as error:
            raise DataError(f"data.path: {path} cannot be read as a zip: {error}") from error

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None or self._owner != os.getpid():
            self._zip = zipfile.ZipFile(fsspec.open(self.path, "rb").open())
            self._owner = os.getpid()
        return self._zip

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_zip": None, "_owner": -1}

    def paths(self) -> list[str]:
        """Every member below the folder."""
        n = len(self.prefix)
        names = self._open().namelist()
        return [m[n:] for m in names if m.startswith(self.prefix) and not m.endswith("/")]

    def read(self, path: str) -> bytes:
        """Content of one member; nothing is ever extracted to disk."""
        return self._open().read(self.prefix + path)


class EncodedImages(DataSource):
    """JPEG, PNG, WebP or BMP files, `<class>/<name>`, decoded and cropped when read."""

    def __init__(self, reader: Reader, image: ImageSpec, option: str, max_pixels: int) -> None:
        self.reader = reader
        self.image = image
        self.max_pixels = max_pixels
        files = sorted(p for p in reader.paths() if "/" in p and p.lower().endswith(SUFFIXES))
        names = sorted({p.split("/", 1)[0] for p in files})
        if not files:
            raise DataError(
                f"{option}: {reader.place} holds no images in class folders (looked for "
                f"<class>/<name> with {', '.join(SUFFIXES)})"
            )
        if len(names) != image.classes:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise DataError(
                f"{option}: {reader.place} holds {len(names)} class folders ({shown}), the recipe "
                f"says data.classes: {image.classes}; give the folder that holds the classes, or "
                f"`--set data.classes={len(names)}`"
            )
        number = {name: i for i, name in enumerate(names)}
        self.files = files
        self.labels = torch.tensor([number[p.split("/", 1)[0]] for p in files])

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Decoded and cropped images, uint8."""
        x = torch.stack([self._image(self.files[i]) for i in indices])
        return x, self.labels[torch.as_tensor(indices)]

    def _image(self, path: str) -> Tensor:
        place = f"{self.reader.place}/{path}"
        try:
            with Image.open(io.BytesIO(self.reader.read(path))) as image:
                if image.width * image.height > self.max_pixels:
                    raise DataError(
                        f"{place}: {image.width} x {image.height} pixels, more than "
                        f"data.max_pixels: {self.max_pixels}"
                    )
                mode = "L" if self.image.channels == 1 else "RGB"
                array = centre_crop(image.convert(mode), self.image.height)
        except DataError:
            raise
        except (OSError, SyntaxError, ValueError, zipfile.BadZipFile) as error:
            # Pillow raises SyntaxError for broken PNG, OSError for most other damage.
            raise DataError(f"{place}: damaged image ({error}); remove or replace it") from error
        pixels = torch.from_numpy(np.array(array))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The square of `size` pixels at the centre, after ADM's resize.

    Source: `center_crop_arr` of ADM (Dhariwal & Nichol 2021, released code), on which the
    ImageNet scores of DiT and SiT rest.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
