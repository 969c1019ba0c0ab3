"""Files of labels: one line for each image, or StyleGAN's and EDM's dataset.json."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.errors import DataError
from e2ediff.files.images import SUFFIXES
from e2ediff.files.location import Location
from e2ediff.files.names import is_hidden

_EXPECTED = (
    "expected a line '<image> <class>' for each image, or a dataset.json with "
    '{"labels": [["<image>", <number>], ...]}'
)

_SUFFIX = "|".join(map(re.escape, SUFFIXES))
_ROW = re.compile(rf"(.+?(?:{_SUFFIX})|[^\s,]+)(?:\s*(,)\s*|\s+)(.+)", re.IGNORECASE)
_BOXES = re.compile(r"(n\d{8})(\s+\d+){4}(\s+n\d{8}(\s+\d+){4})*")


def read_labels(
    url: Address, location: Location | None = None, data: bytes | None = None
) -> dict[str, str] | None:
    """Read labels by image from a label file; None if a dataset.json says there are none.

    A text line is `<image> <class>` or `<image>,<class>`, where a class may have spaces. What
    follows another comma is ignored, and so is what follows a class number after a space, and
    the boxes of ImageNet's `LOC_val_solution.csv`, which serves as it is.

    Raises:
        DataError: The file is not there, or is neither of the two.
    """
    url = addresses.plain(url)
    if data is None:
        place = location or Location(url, "data.labels")
        try:
            data = place.read_labels(url if location else place.path)
        except (OSError, ValueError) as error:
            raise DataError(f"data.labels: cannot read {url}: {error}; {_EXPECTED}") from error
    try:
        text = data.decode("utf-8-sig")  # spreadsheets begin a file with a byte order mark
        return _from_json(json.loads(text)) if url.endswith(".json") else _from_lines(text)
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise DataError(f"data.labels: {url}: {error}; {_EXPECTED}") from error


def _from_json(value: object) -> dict[str, str] | None:
    rows = value.get("labels") if isinstance(value, dict) else None
    if rows is None:
        if isinstance(value, dict) and "labels" in value:
            return None
        raise ValueError("has no key 'labels'")
    found: dict[str, str] = {}
    for name, label in rows:
        if type(label) is not int or label < 0:
            raise ValueError(f"the label of {name} is {label!r}, no class number")
        _add(found, str(name), str(label))
    return found


def _from_lines(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, label = _row(line.strip())
        if not name or not label:
            raise ValueError(f"line {number} is {line.strip()[:60]!r}")
        if (name, number) != ("ImageId", 1):
            _add(found, name, label)
    return found


def _row(line: str) -> tuple[str, str]:
    """Return image and class of a line; both empty if it has not both."""
    if line.startswith('"'):
        name, label, *_ = [*next(csv.reader([line], skipinitialspace=True)), "", ""]
        return name.strip(), label.strip()
    match = _ROW.fullmatch(line)
    if match is None:
        return "", ""
    name, comma, rest = match.groups()
    label = next(csv.reader([rest]))[0].strip()
    first = label.split()[0] if label else ""
    return name, first if _BOXES.fullmatch(label) or (not comma and first.isdecimal()) else label


def _add(found: dict[str, str], name: str, label: str) -> None:
    if found.setdefault(name, label) != label:
        raise ValueError(f"{name} has two labels, {found[name]} and {label}")


def labelled(
    images: Sequence[str], values: dict[str, str], place: str, option: str, source: str
) -> list[str]:
    """Return the label of each image, found by its path, its name, or its name's stem.

    Raises:
        DataError: An image has no label, a label no image, or one that is not written with its
            path has several.
    """
    found, missing, used = [], [], dict[str, str]()
    for path in images:
        name = PurePosixPath(path)
        key = next((k for k in (path, name.name, name.stem) if k in values), None)
        if key is None:
            missing.append(path)
            continue
        if key in used:
            raise DataError(
                f"{option}: {source} does not match {place}: '{key}' may be {used[key]} or "
                f"{path}; expected a label for each. Write their paths, relative to {place}"
            )
        used[key] = path
        found.append(values[key])
    # A list that was made with hidden files in it names what is not looked at.
    strange = [key for key in values if key not in used and not is_hidden(key)]
    if missing or strange or not images:
        parts = []
        if missing:
            parts.append(f"{len(missing)} of {len(images)} images have no label ({missing[0]})")
        if strange:
            parts.append(f"{len(strange)} of {len(values)} labels no image ({strange[0]})")
        said = " and ".join(parts) or "there are no images"
        raise DataError(
            f"{option}: {source} does not match {place}: {said}; {_EXPECTED}, relative to {place}"
        )
    return found
