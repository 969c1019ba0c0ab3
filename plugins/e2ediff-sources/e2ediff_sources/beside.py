"""Which files of a folder are read together, and what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Collection

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import LeftOut
from e2ediff.errors import DataError
from e2ediff.files.location import File, Location, find_files
from e2ediff.files.names import Tally

_INDEX = ".index.safetensors"  # our own
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
           "val": "val", "valid": "val", "validation": "val", "dev": "val"}  # fmt: skip


def files_of_one_split(address: Address, option: str, suffix: str) -> tuple[Location, list[File]]:
    """Find files as `find_files` does; a folder must not hold those of several splits.

    Raises:
        DataError: One of them, or any, is not there; or some are called after training and others
            after testing or validation, and a folder was named.
    """
    location, files = find_files(address, option, suffix)
    if not Location(address, option).is_folder():
        return location, files
    names: dict[str, str] = {}
    patterns: dict[str, str] = {}
    for file in files:
        words = re.finditer("[A-Za-z]+", file.name)
        word = next((one for one in words if one[0].lower() in _SPLITS), None)
        if word and (split := _SPLITS[word[0].lower()]) not in names:
            names[split] = file.name
            patterns[split] = f"{file.name[: word.end()]}*{suffix}"
    if len(names) > 1:
        pattern = inside_of(
            addresses.plain(address), patterns.get("train", min(patterns.values()))
        )
        raise DataError(
            f"{option}: {address} holds files of several splits, such as "
            f"{' and '.join(names.values())}; expected those of one. Give a pattern, such as "
            f"'{pattern}'"
        )
    return location, files


def inside_of(address: str, name: str) -> str:
    """Return the address of what lies in a folder, also in one of an archive."""
    inner, *outer = address.split("::")
    return "::".join([f"{inner.rstrip('/')}/{name}", *outer])


def left_out_with(
    found: Collection[LeftOut], address: str, files: Collection[File], more: Collection[str] = ()
) -> tuple[LeftOut, ...]:
    """Return what was left out in packed files, and beside them if a folder was named.

    Args:
        found: What was left out in the files.
        address: The folder, or a file or pattern.
        files: Those of it that are read.
        more: Names of others in the folder that are no data.
    """
    tally, location = Tally(), Location(address, "data.path")
    read = {*more, *(file.name for file in files)}
    tally.include(found)
    if location.is_folder():
        for name in location.visible():
            if name not in read and not name.endswith(_INDEX):
                tally.add_other(name)
    return tally.left_out
