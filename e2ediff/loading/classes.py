"""Which classes the images of a source show, as far as that is known without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import normalize

import torch
from torch import Tensor

from e2ediff.condition import ClassLabels
from e2ediff.data import DataSource, ImageSpec
from e2ediff.errors import DataError
from e2ediff.loading.bad_images import Skipping


def known_labels(source: DataSource) -> Tensor | None:
    """Return the labels of all images, (M,), int64; None if they would have to be read for it."""
    inner = source.source if isinstance(source, Skipping) else source
    return None if type(inner).labels is DataSource.labels else inner.labels().to(torch.int64)


def other_name(before: Sequence[str], now: Sequence[str]) -> tuple[int, str, str] | None:
    """Return the first class with two names, and both; None if they agree as far as both go.

    The Unicode form of a name does not count, which file systems change.
    """
    for label, (old, new) in enumerate(zip(before, now, strict=False)):
        if normalize("NFC", old) != normalize("NFC", new):
            return label, old, new
    return None


def check_same_classes(training: DataSource, held_out: DataSource) -> None:
    """Refuse held-out images whose classes are numbered otherwise than those of training.

    Raises:
        DataError: A class has another name there.
    """
    if differ := other_name(training.class_names, held_out.class_names):
        label, ours, theirs = differ
        raise DataError(
            f"data: class {label} is {ours!r} in the training images and {theirs!r} in the "
            "held-out ones; expected the same classes in both. Name them alike, or leave "
            "`data.held_out` away"
        )


def empty_classes(source: DataSource, image: ImageSpec) -> tuple[int, ...]:
    """Return the labels of no image, in order; none where that is not known.

    Args:
        source: Images, training or held-out ones.
        image: Says how many classes there are.
    """
    labels = known_labels(source) if isinstance(image.conditioning, ClassLabels) else None
    if labels is None or image.classes == 0:
        return ()
    counts = torch.bincount(labels, minlength=image.classes)[: image.classes]
    return tuple((counts == 0).nonzero()[:, 0].tolist())
