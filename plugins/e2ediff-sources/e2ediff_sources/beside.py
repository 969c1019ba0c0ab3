"""What lies in a folder beside the files that are read."""

from __future__ import annotations

from collections.abc import Collection

from e2ediff.data import LeftOut
from e2ediff.files.location import File, Location
from e2ediff.files.names import Tally

_INDEX = ".index.safetensors"  # our own


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
