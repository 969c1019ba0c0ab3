"""Which classes a person means, and the law of the labels of a set of images."""

from __future__ import annotations

import difflib
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
    if text.isdigit() and int(text) < max(1, image.classes):
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
        f"{max(0, image.classes - 1)}{names}, or 'none'."
    )


def labels_of(image: ImageSpec, text: str, option: str = "--labels") -> list[int]:
    """Classes from a list such as `0-9,cat,none`: indices, ranges with both ends, names, `all`.

    Raises:
        DataError: One of them is no class, or a range runs backwards.
    """
    found: list[int] = []
    for item in (part.strip() for part in text.split(",")):
        if item == "all":
            found += range(max(1, image.classes))
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
