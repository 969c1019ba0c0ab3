"""Labels of images by the folders in which they lie, or by a file of labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from e2ediff.data import LeftOut, left_out_text
from e2ediff.errors import DataError
from e2ediff.files.images import SUFFIXES, is_image
from e2ediff.files.labels import LabelFile, labelled
from e2ediff.files.listing import Names, numbered

DATASET_JSON = "dataset.json"
"""Where StyleGAN and EDM keep labels."""

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


def class_folders(
    paths: Sequence[str],
    folders: Sequence[str],
    place: str,
    option: str,
    left_out: Sequence[LeftOut] = (),
    *,
    everything: bool,
) -> tuple[Names, torch.Tensor, tuple[str, ...]]:
    """Return names, labels and class names of images in class folders, sorted by path.

    With `everything` images outside of class folders are taken too, and folders may be empty.

    Raises:
        DataError: There are none, a class folder is empty, or images lie beside the folders.
    """
    images = sorted(p for p in paths if is_image(p) and (everything or "/" in p))
    if not images:
        wanted = "<name>" if everything else "<class>/<name>"
        where = "" if everything else " in class folders"
        raise DataError(
            f"{option}: {place} holds no images{where} (looked for {wanted} with "
            f"{', '.join(SUFFIXES)})" + (f"; {left_out_text(left_out)}" if left_out else "")
        )
    classes = [p.partition("/")[0] if "/" in p else "" for p in images]
    empty = sorted(set(folders) - set(classes))
    if empty and not everything:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise DataError(
            f"{option}: {len(empty)} of {len(folders)} class folders in {place} hold no images "
            f"({shown}); put images ({', '.join(SUFFIXES)}) there, or remove the folders and "
            f"`--set data.classes={len(folders) - len(empty)}`"
        )
    beside = [] if everything else sorted(p for p in paths if is_image(p) and "/" not in p)
    if beside:
        shown = ", ".join(beside[:5]) + (", ..." if len(beside) > 5 else "")
        raise DataError(
            f"{option}: {len(beside)} of {len(beside) + len(images)} images lie beside the class "
            f"folders of {place} ({shown}); nobody can tell their class: move them into one or "
            "away, or `--set data.classes=0` to take all images without classes"
        )
    if what := _too_high(images, {*classes}) if not everything else "":
        raise DataError(f"{option}: {place} {what}")
    # By name, also where the names are numbers: a folder's name is no label.
    names = sorted({*classes} - {""})
    if "" in classes:  # the names count all the same, so that images beside them are noticed
        return Names(images), torch.zeros(len(images), dtype=torch.int64), tuple(names)
    number = {name: i for i, name in enumerate(names)}
    return Names(images), torch.tensor([number[c] for c in classes]), tuple(names)


def _too_high(images: Sequence[str], classes: set[str]) -> str:
    """Return why the folders in a place are hardly its classes; empty if they may well be.

    They hold folders of images alone, and are one, as where a folder is packed with its name, or
    have the names of splits.
    """
    splits = {name.lower() for name in classes} <= _SPLITS
    if len(classes) > 1 and not splits:
        return ""
    # Folders that hold one folder alone, as in data/set/<class>, are passed on the way down.
    depth, names = 1, set[str]()
    while len(names) < 2 and all(path.count("/") > depth for path in images):
        names = {path.split("/")[depth] for path in images}
        depth += 1
    if len(names) < 2:
        return ""
    inner, above = sorted(names), "/".join(images[0].split("/")[: depth - 1])
    outer = ", ".join(sorted(classes))
    shown = ", ".join(inner[:5]) + (", ..." if len(inner) > 5 else "")
    what = f"one folder, {outer}," if len(classes) == 1 else f"the folders {outer}"
    return (
        f"holds {what} and the images are in folders below ({shown}); nobody can tell which are "
        f"the classes: give the folder that holds them, such as .../{above}, or "
        "`--set data.classes=0` to take all images without classes"
    )


def with_labels(
    paths: Sequence[str], file: LabelFile, place: str, option: str
) -> tuple[Names, torch.Tensor, int, tuple[str, ...]]:
    """Return names, labels, class count and names of images whose labels are in a file."""
    images = sorted(p for p in paths if is_image(p))
    found = labelled(images, file, place, option)
    labels, classes, names = numbered(found, images, option)
    return Names(images), labels, classes, names
