"""Which classes a person means, and the law of the labels of a set of images."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Sequence
from typing import Literal

import torch

from e2ediff.data import ImageSpec
from e2ediff.errors import DataError
from e2ediff.run.seeds import generator

LabelLaw = Literal["repeated", "balanced", "random"]


def label_of(image: ImageSpec, text: str, option: str = "--label") -> int:
    """The class index that a user's text means: an index, a name, or `none`.

    Raises:
        DataError: There is no such class.
    """
    # isdigit takes a superscript for a digit, which int refuses, as it does thousands of them.
    if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < _classes(image):
        return int(text)
    if text == "none":
        return image.null_label
    if text in image.class_names:
        return image.class_names.index(text)
    close = difflib.get_close_matches(text, image.class_names, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    names = f" or one of {', '.join(image.class_names)}" if image.class_names else ""
    raise DataError(
        f"{option} {text}: no such class.{hint} Expected an index from 0 to "
        f"{_classes(image) - 1}{names}, or 'none'."
    )


def class_of(image: ImageSpec, label: object, option: str = "label") -> int:
    """As `label_of`, of what a program gives: text, or an integer of any kind.

    The null label is an index, too.

    Raises:
        DataError: There is no such class, or it is neither text nor an integer.
    """
    if isinstance(label, str):
        return label_of(image, label, option)
    try:
        found = operator.index(label)  # type: ignore[arg-type]  # refuses what is no integer
    except TypeError:
        found = -1
    if not 0 <= found <= image.null_label:
        names = f"one of {', '.join(image.class_names)}, " if image.class_names else ""
        raise DataError(
            f"{option} {label!r}: no such class. Expected an integer from 0 to "
            f"{_classes(image) - 1}, {names}or {image.null_label} or 'none' for no class."
        )
    return found


def _classes(image: ImageSpec) -> int:
    """How many there are; images without labels are of one."""
    return max(1, image.classes)


def labels_of(image: ImageSpec, text: str, option: str = "--labels") -> list[int]:
    """Classes from a list such as `0-9,cat,none`: indices, ranges with both ends, names, `all`.

    Raises:
        DataError: One of them is no class, or a range runs backwards.
    """
    found: list[int] = []
    for item in (part.strip() for part in text.split(",")):
        if item == "all":
            found += range(_classes(image))
        elif match := re.fullmatch(r"(\d+)-(\d+)", item):
            first, last = (label_of(image, end, option) for end in match.groups())
            if last < first:
                raise DataError(f"{option} {item}: runs backwards; write {last}-{first}.")
            found += range(first, last + 1)
        else:
            found.append(label_of(image, item, option))
    return found


def lay_out(classes: Sequence[int], images: int, law: LabelLaw, seed: int) -> list[int]:
    """Labels of `images` images of these classes, image i's at place i.

    `repeated` and `balanced` go through the classes again and again, so that every class has
    equally many images, or one more than others where they do not divide the set; `random`
    draws each label alone.

    Randomness: for `random` alone, from the seed.
    """
    if law == "random":
        g = generator(torch.device("cpu"), seed, "labels")
        drawn: list[int] = torch.randint(len(classes), (images,), generator=g).tolist()
        return [classes[i] for i in drawn]
    return [classes[i % len(classes)] for i in range(images)]
