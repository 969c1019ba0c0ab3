"""Shards that `e2ediff data prepare` writes: cropped images, an index, and hashes.

A folder of them holds

- `shard-00000.tar`, ...: images as PNG or JPEG, named as WebDataset does (`00000000.png` beside
  `00000000.cls`), or `shard-00000.npy`: an array (images, H, W, C) of bytes;
- `index.safetensors`: names, labels and byte ranges of all images, as `index.Index` writes it;
- `prepared.json`: what they are, with the size and SHA-256 of every other file; written last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import attrs
from typing_extensions import override

from e2ediff import addresses
from e2ediff.data import Recognised, SourceConfig, as_size, height_width, size_text
from e2ediff.errors import DataError
from e2ediff.files.index import Index, RangeBytes
from e2ediff.files.listing import EncodedConfig, Listing
from e2ediff.files.location import File, Location, SidecarFile, find_files, fingerprint
from e2ediff.limits import json_object

PREPARED = "prepared.json"
INDEX = "index.safetensors"
VERIFIED = "verified.txt"
VERSION = 1
_AGAIN = "Run `e2ediff data prepare` again: it rewrites what is damaged or missing"


@attrs.frozen(kw_only=True)
class Shards(EncodedConfig):
    """Shards of cropped images that `e2ediff data prepare` wrote: the fastest source.

    `path` is their folder or URL, `held_out` another such folder.
    Their size in pixels must be `size`, and their channels `channels`.
    With `verify` their hashes are compared once, when they are first opened in a place; that they
    agree is kept beside them, or in the cache (`$E2EDIFF_CACHE`), until one of them changes or
    they are copied. The index's hash is compared whenever they are opened.
    The other options are those of `image_folder`.
    """

    movable: ClassVar[tuple[str, ...]] = ("path", "held_out")
    harmless: ClassVar[tuple[str, ...]] = (*SourceConfig.harmless, "verify")

    path: str = attrs.field(converter=addresses.plain, validator=addresses.allowed)
    verify: bool = True

    @classmethod
    def recognises(cls, address: str) -> Recognised | None:
        """A folder that has what `e2ediff data prepare` writes last."""
        location = Location(address, "data")
        if not (location.is_folder() and PREPARED in location.visible()):
            return None
        told = read_prepared(location)
        options = {key: told[key] for key in ("size", "channels", "classes")}
        return Recognised({"path": address, **options}, "certain")

    @override
    def listing(self, *, held_out: bool) -> Listing:
        option = self.option(held_out=held_out)
        path = self.held_out if held_out and self.held_out else self.path
        location = Location(path, option)
        told = read_prepared(location)
        size = height_width(as_size(told["size"]))
        for key, wanted, found in (
            ("size", size_text(self.size), size_text(as_size(told["size"]))),
            ("channels", self.channels, told["channels"]),
        ):
            if found != wanted:
                raise DataError(
                    f"{option}: {path} was prepared with {key} {found}, the recipe says "
                    f"data.{key}: {wanted}; `--set 'data.{key}={found}'`, or prepare it again"
                )
        files = check_shards(location, told, verify=self.verify)
        index = _read_index(location, told["files"][INDEX]["sha256"])
        if index is None or len(index.files) != len(files):
            raise DataError(f"{option}: {path}/{INDEX} is damaged. {_AGAIN}.")
        raw = (*size, told["channels"]) if told["format"] == "raw" else None
        fetch = RangeBytes(location, [f.path for f in files], index)
        names = index.class_names
        return Listing(path, index.names, index.labels, index.classes, names, fetch, raw)


def read_prepared(location: Location) -> dict[str, Any]:
    """What `prepared.json` says.

    Raises:
        DataError: There is none, or it is not one that this version can read.
    """
    option, path = location.option, location.url
    try:
        told = json_object(location.read(location.below(PREPARED)))
        version = told["e2ediff"]
        complete = _complete(told)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{option}: {path} holds no {PREPARED}. It must be a folder that `e2ediff data "
            "prepare` finished; run it, or run it again if it was interrupted."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{option}: {path}/{PREPARED} cannot be read: {error}") from error
    if version != VERSION:
        raise DataError(
            f"{option}: {path}/{PREPARED} is of version {version}; this e2ediff reads {VERSION}"
        )
    if not complete:
        raise DataError(f"{option}: {path}/{PREPARED} is damaged. {_AGAIN}.")
    return told


def _complete(told: dict[str, Any]) -> bool:
    """Whether all is there that is asked of it, in the form in which it is written."""
    files = told.get("files")
    numbers = [told.get(key) for key in ("channels", "classes", "images")]
    size = told.get("size")
    numbers += size if isinstance(size, list) and len(size) == 2 else [size]
    return (
        isinstance(files, dict)
        and INDEX in files
        and all(isinstance(f, dict) for f in files.values())
        and all(type(f.get("bytes")) is int for f in files.values())
        and all(type(f.get("sha256")) is str for f in files.values())
        and all(type(number) is int for number in numbers)
        and told.get("format") in ("png", "jpeg", "raw")
    )


def _read_index(location: Location, digest: str) -> Index | None:
    """The index of all shards; None if it is damaged, or not the one of this digest."""
    try:
        data = location.read(location.below(INDEX))
        return Index.loads(data) if hashlib.sha256(data).hexdigest() == digest else None
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        what = "is missing" if missing else f"cannot be read: {error}"
        raise DataError(f"{location.option}: {location.url}/{INDEX} {what}. {_AGAIN}.") from error


def check_shards(location: Location, told: dict[str, Any], *, verify: bool) -> list[File]:
    """The shards in order, after their sizes and, once, their hashes were compared.

    Raises:
        DataError: One is missing, of another size, or of other content.
    """
    option, path, wanted = location.option, location.url, told["files"]
    shards = [name for name in wanted if name != INDEX]
    try:
        _, found = find_files(path, option, ".npy" if told["format"] == "raw" else ".tar")
    except DataError:
        found = []
    known = {file.name: file for file in found}
    for name in shards:
        file = known.get(name)
        what = "is missing"
        if file is not None:
            what = f"has {file.size} bytes, expected {wanted[name]['bytes']}"
        if file is None or file.size != wanted[name]["bytes"]:
            raise DataError(f"{option}: {path}/{name} {what}. {_AGAIN}.")
    files = [known[name] for name in shards]
    if verify:
        sidecar = SidecarFile(location, location.below(VERIFIED))
        key = verified_key(told, files)
        if key not in sidecar.read():
            verify_hashes(location, told)
            sidecar.write(key)
    return files


def verified_key(told: dict[str, Any], files: Sequence[File]) -> bytes:
    """What is kept once the hashes agreed: it changes when a shard is written again or copied."""
    hashes = sorted((n, f["sha256"]) for n, f in told["files"].items())
    return fingerprint(files, hashes, [f.arrived for f in files]).encode()


def verify_hashes(location: Location, told: dict[str, Any]) -> None:
    """Compare the hashes of all files.

    Raises:
        DataError: Some differ; names them.
    """

    def differs(name: str) -> bool:
        try:
            return bool(sha256(location, location.below(name)) != told["files"][name]["sha256"])
        except OSError as error:
            raise DataError(f"{location.url}/{name}: cannot be read: {error}") from error

    with ThreadPoolExecutor(8) as pool:
        names = list(told["files"])
        bad = [n for n, other in zip(names, pool.map(differs, names), strict=True) if other]
    if bad:
        shown = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise DataError(
            f"{location.option}: {location.url}: {len(bad)} of {len(names)} files have another "
            f"SHA-256 than {PREPARED} says ({shown}): they are damaged. {_AGAIN}."
        )


def sha256(location: Location, path: str) -> str:
    """The hash of a file, read in pieces."""
    digest = hashlib.sha256()
    with location.fs.open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
