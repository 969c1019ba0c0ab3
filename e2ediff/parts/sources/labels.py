"""Files of labels: one line for each image, or StyleGAN's and EDM's dataset.json."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from e2ediff.errors import DataError
from e2ediff.parts.sources.location import Location

_EXPECTED = (
    "expected a line '<image> <class>' for each image, or a dataset.json with "
    '{"labels": [["<image>", <number>], ...]}'
)


def read_labels(
    url: str, location: Location | None = None, data: bytes | None = None
) -> dict[str, str] | None:
    """Label by image of a label file; None if a dataset.json says that there are none.

    A text line is `<image> <class>` or `<image>,<class>`; what follows in it is ignored, so
    that ImageNet's `LOC_val_solution.csv` serves as it is.

    Raises:
        DataError: The file is not there, or is neither of the two.
    """
    if data is None:
        place = location or Location(url, "data.labels")
        try:
            data = place.read(url if location else place.path)
        except (OSError, ValueError) as error:
            raise DataError(f"data.labels: cannot read {url}: {error}; {_EXPECTED}") from error
    try:
        text = data.decode()
        return _from_json(json.loads(text)) if url.endswith(".json") else _from_lines(text)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"data.labels: {url}: {error}; {_EXPECTED}") from error


def _from_json(value: object) -> dict[str, str] | None:
    rows = value.get("labels") if isinstance(value, dict) else None
    if rows is None:
        if isinstance(value, dict) and "labels" in value:
            return None
        raise ValueError("has no key 'labels'")
    found = {}
    for name, label in rows:
        if type(label) is not int or label < 0:
            raise ValueError(f"the label of {name} is {label!r}, no class number")
        found[str(name)] = str(label)
    return found


def _from_lines(text: str) -> dict[str, str]:
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, *rest = re.split(r"\s*,\s*|\s+", line.strip())
        if not rest or not rest[0]:
            raise ValueError(f"line {number} is {line.strip()[:60]!r}")
        if (name, number) != ("ImageId", 1):
            found[name] = rest[0]
    return found


def labelled(
    images: Sequence[str], values: dict[str, str], place: str, option: str, source: str
) -> list[str]:
    """The label of each image, found by its path, its name, or its name without suffix.

    Raises:
        DataError: An image has no label, or a label no image.
    """
    found, missing, used = [], [], set()
    for path in images:
        name = PurePosixPath(path)
        key = next((k for k in (path, name.name, name.stem) if k in values), None)
        if key is None:
            missing.append(path)
        else:
            used.add(key)
            found.append(values[key])
    strange = [key for key in values if key not in used]
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
