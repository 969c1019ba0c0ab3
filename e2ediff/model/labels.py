"""Parse the classes that a user names, and lay out the labels of a set of images."""

from __future__ import annotations

import difflib
import operator
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from e2ediff.condition import ClassLabels
from e2ediff.data import ImageSpec
from e2ediff.errors import DataError
from e2ediff.seeds import generator
from e2ediff.terminal import printable

LabelLaw = Literal["balanced", "uniform"]
"""The classes in turn, or independent draws of which each class is equally likely."""

_MOST = 20  # number of names that a message lists


def label_of(image: ImageSpec, text: str, option: str = "--label") -> int:
    """Return the class index that a user's text means: an index, a name, or `none`.

    `name:2` is the class named 2, and `index:2` the class of this index; where these differ, a
    bare 2 is refused, as is any number that is the index of a class named by another number.

    Raises:
        DataError: There is no such class, the text is ambiguous, or the images have no classes
            but conditions of another kind.
    """
    _refuse_others(image, option)
    means = _meanings(image, text)
    number = _number(text)
    other = number is not None and _called_otherwise(image, range(number, number + 1))
    if len({*means.values()}) > 1 or (means and other and text not in image.class_names):
        ways = [f"{way} for {_called(image, label)}" for way, label in means.items()]
        raise _ambiguous(option, text, ways)
    for label in means.values():
        return label
    raise _unknown(image, text, option)


def _refuse_others(image: ImageSpec, option: str) -> None:
    if not isinstance(image.conditioning, ClassLabels):
        raise DataError(
            f"{option}: the run is conditioned on {image.conditioning.title}, not on classes; "
            "leave it out"
        )


def _meanings(image: ImageSpec, text: str) -> dict[str, int]:
    """Return the labels that a text may mean, each by an unambiguous text."""
    kind, _, rest = text.partition(":")
    found: dict[str, int] = {}
    for name in (text, rest) if kind == "name" else (text,):
        known = enumerate(image.class_names[: _classes(image)])
        same = [label for label, own in known if _composed(own) == _composed(name)]
        found |= {f"name:{name}" if len(same) == 1 else f"index:{k}": k for k in same}
    index = rest if kind == "index" else text
    if (label := _index(image, index)) is not None:
        found[f"index:{label}"] = label
    if index == "none":
        found["index:none"] = image.null_label
    return found


def _index(image: ImageSpec, text: str) -> int | None:
    """Return the class of this index; None if there is none, or the text is not a number."""
    number = _number(text)
    return number if number is not None and number < _classes(image) else None


def class_of(image: ImageSpec, label: object, option: str = "label") -> int:
    """Return the class index of a program's argument: text as for `label_of`, or any integer.

    An integer is always an index; the null label is one, too.

    Raises:
        DataError: There is no such class, the text is ambiguous, or it is neither text nor an
            integer.
    """
    if isinstance(label, str):
        return label_of(image, label, option)
    try:
        found = operator.index(label)  # type: ignore[arg-type]  # refuses what is no integer
    except TypeError:
        found = -1
    if not 0 <= found <= image.null_label:
        names = f"one of {_listed(image)}, " if image.class_names else ""
        raise DataError(
            f"{option} {label!r}: no such class. Expected an integer from 0 to "
            f"{_classes(image) - 1}, {names}or {image.null_label} or 'none' for no class."
        )
    return found


def _classes(image: ImageSpec) -> int:
    """Return the number of classes; images without labels have one."""
    return max(1, image.classes)


def labels_of(image: ImageSpec, text: str, option: str = "--labels") -> list[int]:
    """Parse classes from a list such as `0-9,cat,none`: indices, ranges of them, names, `all`.

    A range includes both ends; `index:0-9` also works where classes are named by numbers.

    Raises:
        DataError: One of them is no class or ambiguous, or a range runs backwards.
    """
    _refuse_others(image, option)
    found: list[int] = []
    for item in (part.strip() for part in text.split(",")):
        every = item == "all"
        span = re.fullmatch(r"(index:)?(\d{1,9})-(\d{1,9})", item)
        if item in image.class_names and (every or span):
            one = f"name:{item} for {_called(image, image.class_names.index(item))}"
            several = f"index:0-{_classes(image) - 1} for all" if every else f"index:{item}"
            raise _ambiguous(option, item, [one, several])
        if every:
            found += range(_classes(image))
        elif span:
            found += _span(image, span, option)
        else:
            found.append(label_of(image, item, option))
    return found


def _span(image: ImageSpec, span: re.Match[str], option: str) -> range:
    """Return the classes of a range."""
    first, last = int(span[2]), int(span[3])
    found = range(first, last + 1)
    if not span[1] and _called_otherwise(image, found):
        raise _ambiguous(option, span[0], ["index:FIRST-LAST for indices", "the names"])
    for end in span.groups()[1:]:
        if _index(image, end) is None:
            raise _unknown(image, end, option)
    if last < first:
        raise DataError(f"{option} {span[0]}: runs backwards; write {last}-{first}.")
    return found


def _called_otherwise(image: ImageSpec, numbers: range) -> bool:
    """Return whether the classes named by these numbers differ from those of these indices."""
    own = [_number(name) for name in image.class_names[: _classes(image)]]
    called = [label for label, number in enumerate(own) if number in numbers]
    return called != [k for k in numbers[: len(own)] if k < len(own) and own[k] is not None]


def _composed(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), as it looks alike in any form."""
    return unicodedata.normalize("NFC", name)


def _number(name: str) -> int | None:
    # isdigit accepts superscripts, which int refuses, as it does thousands of digits.
    return int(name) if name.isascii() and name.isdecimal() and len(name) < 10 else None


def _ambiguous(option: str, text: str, ways: Sequence[str]) -> DataError:
    meant = printable(" or ".join(ways))
    return DataError(f"{option} {printable(text)}: is ambiguous. Write {meant}.")


def _unknown(image: ImageSpec, text: str, option: str) -> DataError:
    close = difflib.get_close_matches(text, image.class_names, n=1)
    hint = f" Did you mean '{printable(close[0])}'?" if close and close[0] != text else ""
    names = f" or one of {_listed(image)}" if image.class_names else ""
    return DataError(
        f"{option} {printable(text)}: no such class.{hint} Expected an index from 0 to "
        f"{_classes(image) - 1}{names}, or 'none'."
    )


def without_images(image: ImageSpec, labels: Iterable[object]) -> str:
    """Describe which of these classes no training image shows; "" if none is known to be empty."""
    empty = sorted({*image.empty_classes} & {*labels})
    if not empty:
        return ""
    return f"{called(image, empty)} {'have' if len(empty) > 1 else 'has'} no training images"


def called(image: ImageSpec, labels: Sequence[int]) -> str:
    """List classes by index and name, or the first of many."""
    shown = ", ".join(printable(_called(image, label)) for label in labels[:_MOST])
    return shown + (f", ... ({len(labels):,} in all)" if len(labels) > _MOST else "")


def _called(image: ImageSpec, label: int) -> str:
    if label == image.null_label:
        return "no class"
    names = image.class_names[label : label + 1]
    return " ".join([f"class {label}", *(f"({name})" for name in names)])


def _listed(image: ImageSpec) -> str:
    """List the classes' names, or the first of many."""
    names = image.class_names
    more = f", ... ({len(names):,} in all)" if len(names) > _MOST else ""
    return ", ".join(map(printable, names[:_MOST])) + more


def lay_out(classes: Sequence[int], images: int, law: LabelLaw, seed: int) -> list[int]:
    """Return labels for `images` images of these classes; entry i belongs to image i.

    `balanced` cycles through the classes, so that their numbers of images differ by at most one;
    `uniform` draws each label independently.

    Randomness: for `uniform` alone, from the seed.
    """
    if law == "uniform":
        g = generator(torch.device("cpu"), seed, "labels")
        drawn: list[int] = torch.randint(len(classes), (images,), generator=g).tolist()
        return [classes[i] for i in drawn]
    return [classes[i % len(classes)] for i in range(images)]
