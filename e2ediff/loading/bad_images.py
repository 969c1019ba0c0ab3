"""Replace images that cannot be read by others of their class, and list them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from e2ediff.condition import ClassLabels, Condition, concatenate
from e2ediff.data import DataSource, LeftOut, Original, SourceConfig
from e2ediff.errors import BadImageError, DataError
from e2ediff.store.storage import Store

BAD_IMAGES = "bad_images.jsonl"

ALWAYS = 10
"""Damaged images that never end a run that skips them, as one in a tiny set is a large share."""


class Skipped(NamedTuple):
    """An image that was not used, `what` is wrong with it, and the image used `instead`."""

    number: int
    place: str
    what: str
    instead: int


class Skipping(DataSource):
    """A source whose damaged images are replaced.

    A damaged image is replaced by the next readable one of its class, counting from its index
    and wrapping around: labels and all other images keep their indices, in every process and
    after every resume. Without `classes` it is the next readable image of all, with its own
    condition.
    """

    def __init__(self, source: DataSource, *, classes: bool = True) -> None:
        self.source = source
        self.classes = classes
        self._labels: Tensor | None = None
        self._instead: dict[int, int] = {}
        self._new: list[Skipped] = []

    def __len__(self) -> int:
        return len(self.source)

    @override
    def labels(self) -> Tensor:
        if self._labels is None:
            self._labels = self.source.labels()
        return self._labels

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    @override
    def left_out(self) -> Sequence[LeftOut]:
        return self.source.left_out

    def path_of(self, index: int) -> str:
        """Return the source's path."""
        return self.source.path_of(index)

    def original(self, index: int) -> Original:
        """Return the source's description, damaged images included."""
        return self.source.original(index)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | Condition]:
        """Read these images, replacing damaged ones by others of their classes.

        Raises:
            DataError: No image of a class can be read, or the storage cannot be read, which is not
                the fault of an image and never skipped.
        """
        known = [self._instead.get(i, i) for i in indices]
        try:
            return self.source.read(known)
        except BadImageError:
            parts = [self._one(i) for i in indices]
        return torch.cat([x for x, _ in parts]), _joined([given for _, given in parts])

    def take(self) -> tuple[Skipped, ...]:
        """Return images skipped for the first time since the last call, in this process."""
        new, self._new = tuple(self._new), []
        return new

    def _one(self, i: int) -> tuple[Tensor, Tensor | Condition]:
        try:
            return self.source.read([self._instead.get(i, i)])
        except BadImageError as error:
            first = error
        same = torch.arange(len(self.source))
        if self.classes:
            same = (self.labels() == self.labels()[i]).nonzero()[:, 0]
        after = int((same <= i).sum())
        for other in torch.cat([same[after:], same[: after - 1]]).tolist():
            try:
                read = self.source.read([other])
            except BadImageError:
                continue
            self._instead[i] = other
            self._new.append(Skipped(i, first.place, first.what, other))
            return read
        raise DataError(
            f"{first.place}: {first.what}, and none of the {len(same)} images "
            f"{'of its class ' * self.classes}can be used instead"
        )


def _joined(given: Sequence[Tensor | Condition]) -> Tensor | Condition:
    """Join the labels or conditions of single images into those of a batch."""
    labels = [one for one in given if isinstance(one, Tensor)]
    conditions = [one for one in given if isinstance(one, Condition)]
    return torch.cat(labels) if labels else concatenate(conditions)


def open_source(config: SourceConfig, *, held_out: bool = False) -> DataSource:
    """Open the images of a recipe's data block, with its policy for damaged ones.

    Raises:
        DataError: The data are missing or not what the block says.
    """
    source = config.open(held_out=held_out)
    if config.on_bad_image != "skip":
        return source
    return Skipping(source, classes=isinstance(config.image.conditioning, ClassLabels))


def newly_skipped(source: DataSource) -> tuple[Skipped, ...]:
    """Return what a source skipped since the last call; empty if it stops at damaged images."""
    return source.take() if isinstance(source, Skipping) else ()


class BadImages:
    """The list of damaged images in a run's directory, one line for each.

    Several processes of a run may add to it.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._met: set[str] = set()

    def add(self, found: Iterable[Skipped], seen: int = 0) -> bool:
        """Add images not yet listed; return whether they include the first one of the run.

        `seen` is the number of images in all batches up to theirs; 0 for others than those that
        are trained on.
        """
        new = {s.place: s for s in found if s.place not in self._met}
        if not new:
            return False
        listed = self.listed()
        for skipped in (s for place, s in new.items() if place not in listed):
            entry = {"image": skipped.place, "index": skipped.number, "what": skipped.what}
            # Start a new line, even after one that a crash cut short.
            there = self.store.read(BAD_IMAGES) if self.store.exists(BAD_IMAGES) else b"\n"
            apart = "" if there.endswith(b"\n") else "\n"
            line = json.dumps({**entry, "instead": skipped.instead, "seen": seen})
            self.store.append(BAD_IMAGES, apart + line)
        self._met |= set(new)
        return not listed

    def refuse_too_many(self, fraction: float, seen: int, images: int) -> None:
        """Refuse a training set of which too large a share is damaged.

        Images count from the batch on in which they were first met, so that a run that goes on
        ends at the step at which it would have ended without an interruption.

        Args:
            fraction: The largest share that is accepted.
            seen: Images in all batches so far.
            images: Images of the set, which are seen again after so many.

        Raises:
            DataError: More than this share of the images seen so far is damaged, and more than
                `ALWAYS` images are.
        """
        met = (entry.get("seen") for entry in self.store.json_lines(BAD_IMAGES))
        bad = sum(isinstance(at, int) and 0 < at <= seen for at in met)
        different = min(seen, images)
        if bad > max(ALWAYS, fraction * different):
            raise DataError(
                f"{bad:,} of the first {different:,} training images are damaged or too large: "
                f"{bad / different:.2%}, and data.max_bad_fraction accepts {fraction:.2%}. They "
                f"are listed in {self.store.where(BAD_IMAGES)}: repair or remove them, or accept "
                "more with a larger data.max_bad_fraction"
            )

    def listed(self) -> set[str]:
        """Return the paths in the list, including those of earlier runs and other processes."""
        lines = self.store.json_lines(BAD_IMAGES)
        return {str(entry["image"]) for entry in lines if "image" in entry}
