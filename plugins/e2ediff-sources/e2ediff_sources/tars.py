"""Images in tars, read in place: ImageNet's tar of class tars, and shards as WebDataset's."""

from __future__ import annotations

import posixpath
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from tarfile import TarInfo
from typing import BinaryIO, ClassVar

import attrs
from attrs.converters import optional
from typing_extensions import override

from e2ediff import addresses
from e2ediff.data import Recognised
from e2ediff.errors import DataError
from e2ediff.files.images import SUFFIXES, is_image
from e2ediff.files.index import Index, RangeBytes, column, stored_index
from e2ediff.files.labels import LabelFile, labelled, read_labels
from e2ediff.files.listing import EncodedConfig, Listing, Names, numbered
from e2ediff.files.location import File, Location, find_files, fingerprint
from e2ediff.files.names import Tally
from e2ediff.limits import json_object
from e2ediff_sources.beside import files_of_one_split, left_out_with
from e2ediff_sources.tar_members import RULES, inside, members, read_member


@attrs.define
class _Columns:
    """An index while it is built."""

    names: list[str] = attrs.field(factory=list)
    file: list[int] = attrs.field(factory=list)
    start: list[int] = attrs.field(factory=list)
    size: list[int] = attrs.field(factory=list)

    def add(self, name: str, file: int, start: int, size: int) -> None:
        self.names.append(name)
        self.file.append(file)
        self.start.append(start)
        self.size.append(size)

    def index(self, files: Sequence[str], values: Sequence[str] | None, option: str) -> Index:
        """The whole, sorted by name where the labels are still to come from the names."""
        columns = (column(self.file), column(self.start), column(self.size))
        labels, classes, class_names = numbered(
            values or ["0"] * len(self.names), self.names, option
        )
        if values is None:
            classes = 0
        names = Names(self.names)
        return Index(tuple(files), names, *columns, labels, classes, class_names)

    def sorted(self) -> _Columns:
        """By name, as class folders are."""
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        return _Columns(
            [self.names[i] for i in order],
            [self.file[i] for i in order],
            [self.start[i] for i in order],
            [self.size[i] for i in order],
        )


def _are_classes(address: str) -> bool | None:
    """Whether what lies here are class tars, by the first member; None if there is no tar.

    A class tar's images are named after it: n01440764.tar holds n01440764_10026.JPEG.
    """
    location = Location(address, "data")
    if location.is_folder():
        tars = [name for name in location.visible() if name.endswith(".tar")]
        if not tars:
            return None
        with location.opened(location.below(tars[0])) as file:
            head = next(members(file, tars[0], "data"), None)
        stem = tars[0].removesuffix(".tar")
        return head is not None and head.name.rpartition("/")[2].startswith(f"{stem}_")
    if not location.is_file_named(".tar"):
        return None
    with location.opened(location.path) as file:
        head = next(members(file, address, "data"), None)
    return head is not None and head.name.endswith(".tar")


@attrs.frozen(kw_only=True)
class ClassTars(EncodedConfig):
    """ImageNet's original tar of one tar for each class, or a folder of such class tars.

    `path` is `ILSVRC2012_img_train.tar`, its URL, or the folder; nothing is unpacked.
    A class tar's name is its class; images are in the order of class folders.
    `held_out` is another such tar, or a flat one such as `ILSVRC2012_img_val.tar`, whose labels
    are then in `held_out_labels`: a line `<image> <class>` for each image, as ImageNet's
    `LOC_val_solution.csv` has it.
    Where each image lies is read once and kept in `<tar>.index.safetensors`, or in the cache
    (`$E2EDIFF_CACHE`) where the data are read-only.
    The other options are those of `image_folder`.
    """

    movable: ClassVar[tuple[str, ...]] = ("path", "held_out", "held_out_labels")
    word: ClassVar[str] = "class tars"

    path: str = attrs.field(converter=addresses.plain, validator=addresses.allowed)
    held_out_labels: str | None = attrs.field(
        default=None, converter=optional(addresses.plain), validator=addresses.allowed
    )

    @classmethod
    def recognises(cls, address: str) -> Recognised | None:
        """A tar of tars, or tars whose images are named after them."""
        return Recognised({"path": address}) if _are_classes(address) else None

    def listing(self, *, held_out: bool) -> Listing:
        """Every image of every class tar."""
        option = self.option(held_out=held_out)
        path = self.held_out if held_out and self.held_out else self.path
        location, files = find_files(path, option, ".tar")
        key = fingerprint(files, "class tars", RULES)
        name = files[0].name if len(files) == 1 else "class-tars"
        sidecar = files[0].beside(f"{name}.index.safetensors")
        index = stored_index(location, sidecar, key, lambda: _scan(location, files))
        labels, classes, names = index.labels, index.classes, index.class_names
        if classes == 0 and held_out and self.held_out_labels:
            file = read_labels(self.held_out_labels) or LabelFile(self.held_out_labels, ())
            found = labelled(index.names, file, path, option)
            labels, classes, names = numbered(found, index.names, option)
        fetch = RangeBytes(location, [f.path for f in files], index)
        left_out = left_out_with(index.left_out, path, files)
        return Listing(path, index.names, labels, classes, names, fetch, left_out=left_out)


def _scan(location: Location, files: Sequence[File]) -> Index:
    """The index of a tar of class tars, of several class tars, or of a tar of images alone."""
    found, option, empty = _Columns(), location.option, list[str]()
    tars, beside, tally = dict[str, str](), list[str](), Tally()
    for number, outer in enumerate(files):
        before = len(found.names)
        with location.opened(outer.path) as file:
            for member in members(file, outer.path, option):
                name = f"{outer.name[:-4]}/{member.name}" if len(files) > 1 else member.name
                if is_image(member.name):
                    beside.append(name)
                    found.add(name, number, member.offset_data, member.size)
                elif not member.name.endswith(".tar"):
                    tally.add_other(name)
                else:
                    held = len(found.names)
                    whole = f"{outer.name}/{member.name}" if len(files) > 1 else member.name
                    first = tars.setdefault(PurePosixPath(member.name).stem, whole)
                    if first != whole:
                        raise DataError(
                            f"{option}: class '{PurePosixPath(member.name).stem}' has two tars, "
                            f"{first} and {whole}; expected one for each class. Pack their images "
                            "in one, or give one of the two as `data.held_out`"
                        )
                    _add_class(found, tally, number, file, member, outer, option)
                    if len(found.names) == held:
                        empty.append(member.name)
        if len(found.names) == before:
            empty.append(outer.name)
    if not found.names:
        raise DataError(
            f"{option}: {files[0].path} holds no images (looked for class tars with "
            f"{', '.join(SUFFIXES)}, such as n01440764.tar)"
        )
    if tars and beside:
        shown = ", ".join(beside[:5]) + (", ..." if len(beside) > 5 else "")
        raise DataError(
            f"{option}: {files[0].path}: {len(beside)} of {len(found.names)} images lie beside "
            f"the class tars ({shown}); nobody can tell their class: pack them into one, or leave "
            "them out"
        )
    if empty:
        place = files[0].path if len(files) == 1 else files[0].path.rpartition("/")[0]
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise DataError(
            f"{option}: class tars without images in {place}: {shown}; fetch them again, or pack "
            "without them"
        )
    found = found.sorted()
    index = found.index([f.name for f in files], None, option)
    index = attrs.evolve(index, left_out=tally.left_out)
    if not tars and len(files) == 1:
        return index
    # By name, also where the names are numbers: a tar's name is no label.
    values = [name.partition("/")[0] for name in found.names]
    names = sorted(set(values))
    label = {name: i for i, name in enumerate(names)}
    labels = column([label[value] for value in values])
    return attrs.evolve(index, labels=labels, classes=len(names), class_names=tuple(names))


def _add_class(
    found: _Columns,
    tally: Tally,
    number: int,
    file: BinaryIO,
    member: TarInfo,
    outer: File,
    option: str,
) -> None:
    """The images of a class tar that is a member of another tar."""
    label = PurePosixPath(member.name).stem
    for inner in members(inside(file, member), f"{outer.path}/{member.name}", option):
        name = f"{label}/{inner.name}"
        if is_image(inner.name):
            found.add(name, number, member.offset_data + inner.offset_data, inner.size)
        else:
            tally.add_other(name)


@attrs.frozen(kw_only=True)
class TarShards(EncodedConfig):
    """Tar shards as WebDataset names their members: `000000.jpg` beside `000000.cls`.

    `path` is a pattern such as `train-{0000..0146}.tar` or `s3://bucket/train-*.tar`, one tar or
    a folder of tars; images are in the order of the shards and of their members.
    A member's key is its name up to the first dot, its suffix the rest, in any case.
    `image_suffix` is the suffix that holds the image, such as `jpg` or `input.png`; by default
    any of the known ones or, where no sample has one, the only compound one that ends in one.
    `label` is the suffix that holds the class, by default `cls` (a number, or a name) or else
    `json`, where it is under the key `label_key`; `label.txt` is another.
    `held_out` is another pattern.
    Where each image lies is read once and kept beside the shards, or in the cache
    (`$E2EDIFF_CACHE`) where they are read-only.
    The other options are those of `image_folder`.
    """

    movable: ClassVar[tuple[str, ...]] = ("path", "held_out")

    path: str = attrs.field(converter=addresses.plain, validator=addresses.allowed)
    image_suffix: str | None = None
    label: str | None = None
    label_key: str = "label"

    @classmethod
    def recognises(cls, address: str) -> Recognised | None:
        """Tars of images, or a pattern."""
        if Location(address, "data").is_pattern():
            return Recognised(
                {"path": address}, "likely" if address.endswith(".tar") else "possible"
            )
        return Recognised({"path": address}) if _are_classes(address) is False else None

    @override
    def listing(self, *, held_out: bool) -> Listing:
        option = self.option(held_out=held_out)
        pattern = self.held_out if held_out and self.held_out else self.path
        location, files = files_of_one_split(pattern, option, ".tar")
        key = fingerprint(files, self.image_suffix, self.label, self.label_key, RULES)
        sidecar = files[0].beside(f"shards-{fingerprint(files)[:8]}.index.safetensors")

        def build() -> Index:
            with ThreadPoolExecutor(8) as pool:
                shards = list(pool.map(lambda file: self._samples(location, file), files))
            return self._index(files, shards, option)

        index = stored_index(location, sidecar, key, build)
        fetch = RangeBytes(location, [f.path for f in files], index)
        place = files[0].path.rpartition("/")[0]
        left_out = left_out_with(index.left_out, pattern, files)
        named = (index.names, index.labels, index.classes, index.class_names)
        return Listing(place, *named, fetch, left_out=left_out)

    @override
    def with_counted_classes(self) -> EncodedConfig:
        """Return it with the number of classes; folders without labels may be classes.

        Raises:
            DataError: They may be, so that nobody can tell whether there are any.
        """
        config = super().with_counted_classes()
        if config.image.classes:
            return config
        names = self.listing(held_out=False).names
        folders = sorted({name.partition("/")[2].rpartition("/")[0] for name in names})
        if len(folders) > 1 and "" not in folders:
            above = posixpath.commonpath(folders)
            shown = ", ".join(folders[:5]) + (", ..." if len(folders) > 5 else "")
            one = Location(self.path, "data.path").is_file_named(".tar")
            raise DataError(
                f"data.path: {self.path} holds images in folders ({shown}) and no labels; "
                f"expected {self._label_words()} beside each image. "
                + (f"If the folders are classes, give tar://{above}::{self.path}; " if one else "")
                + "`--set data.classes=0` takes all images without classes"
            )
        return config

    def _samples(self, location: Location, shard: File) -> dict[str, _Sample]:
        """Samples of one shard by key, in order."""
        found: dict[str, _Sample] = {}
        with location.opened(shard.path) as file:
            for member in members(file, shard.path, location.option):
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                sample, suffix = found.setdefault(f"{folder}/{stem}", _Sample()), suffix.lower()
                place = f"{shard.path}/{member.name}"
                if self._holds_image(suffix):
                    if sample.has(suffix) or (
                        self.image_suffix is None and sample.has_plain(suffix)
                    ):
                        raise DataError(
                            f"{location.option}: {place} is the second image of sample "
                            f"'{stem}'; expected one of each name: give `image_suffix`, or "
                            "pack the shard again"
                        )
                elif suffix in self._label_suffixes():
                    if sample.has(suffix):
                        raise DataError(
                            f"{location.option}: {place} is the second label of sample '{stem}'; "
                            "expected one of each suffix. Pack the shard again without one of them"
                        )
                    data = read_member(file, member, place, location.option)
                    label = self._label(data, suffix, place, location.option)
                    sample.labels += [(suffix, label)] if label else []
                sample.add(suffix, member)
        return found

    def _holds_image(self, suffix: str) -> bool:
        wanted = _suffix(self.image_suffix)
        return is_image(f".{suffix}") if wanted is None else suffix == wanted

    def _label_suffixes(self) -> tuple[str, ...]:
        """Suffixes that hold a class, the first that a sample has being taken."""
        return ("cls", "json") if self.label is None else (_suffix(self.label) or "",)

    def _label(self, data: bytes, suffix: str, place: str, option: str) -> str | None:
        """The class in a member, if any; None if its JSON has no such key and nobody asked."""
        try:
            text = data.decode("utf-8-sig").strip()
            if not suffix.endswith("json"):
                return text
            label = json_object(text).get(self.label_key)
            if label is None and self.label is None:
                return None
            if type(label) not in (int, str):
                raise ValueError(f"key '{self.label_key}' is {label!r}")
            return str(label)
        except ValueError as error:
            raise DataError(
                f"{option}: {place}: no label ({error}); expected a class number or name"
            ) from error

    def _index(
        self, files: Sequence[File], shards: Sequence[dict[str, _Sample]], option: str
    ) -> Index:
        found, values, without, tally = _Columns(), [], "", Tally()
        taken, order = self._taken(files, shards, option), self._label_suffixes()
        for number, (shard, samples) in enumerate(zip(files, shards, strict=True)):
            for sample in samples.values():
                image = next((m for m in sample.members if m[0] in taken), None)
                label = next((x for s in order for x in sample.labels if x[0] == s), None)
                read = {one[0] for one in (image, label) if image and one}
                for suffix, member, _, _ in sample.members:
                    if image is None:
                        tally.add("of samples without an image", f"{shard.name}/{member}")
                    elif suffix not in read:
                        reason = f"with suffix .{suffix}" if suffix else "without suffix"
                        tally.add(reason, f"{shard.name}/{member}")
                if image is None:
                    continue
                name = f"{shard.name}/{image[1]}"
                found.add(name, number, *image[2:])
                if label is None:
                    without = without or name
                else:
                    values.append(label[1])
        if values and without:
            raise DataError(
                f"{option}: {without} has no label, {len(values)} of {len(found.names)} images "
                f"have one; expected {self._label_words()} beside each image. Pack it again, or "
                "`--set data.classes=0` with shards that have none"
            )
        index = found.index([f.name for f in files], values or None, option)
        return attrs.evolve(index, left_out=tally.left_out)

    def _label_words(self) -> str:
        return " or ".join(f"<key>.{suffix}" for suffix in self._label_suffixes())

    def _taken(
        self, files: Sequence[File], shards: Sequence[dict[str, _Sample]], option: str
    ) -> Collection[str]:
        """The suffixes of images: the one that is named, the known ones, or the only compound.

        Raises:
            DataError: No member has one, or several compound ones could be meant.
        """
        images, others = Counter[str](), Counter[str]()
        for sample in (sample for samples in shards for sample in samples.values()):
            others.update(member[0] for member in sample.members)
        images.update({s: n for s, n in others.items() if self._holds_image(s)})
        plain = [suffix for suffix in images if f".{suffix}" in SUFFIXES]
        taken = plain if plain and self.image_suffix is None else list(images)
        if taken and (plain or self.image_suffix is not None or len(images) == 1):
            return taken
        shown = ", ".join(f"{s} ({n:,})" for s, n in (images or others).most_common(8))
        if images:
            raise DataError(
                f"{option}: {files[0].path} holds images with several suffixes after the first "
                f"dot of their names: {shown}; choose one with `--set data.image_suffix="
                f"{next(iter(images))}`, or pack the shards again if these are parts of names"
            )
        has = f"; it has the suffixes {shown}. Name one with `--set data.image_suffix=...`"
        raise DataError(
            f"{option}: {files[0].path} holds no images (looked for <key>.<suffix> with "
            f"{_suffix(self.image_suffix) or ', '.join(SUFFIXES)})" + (has if shown else "")
        )


def _suffix(text: str | None) -> str | None:
    """A suffix as members are compared by it: without a dot before, in small letters."""
    return None if text is None else text.lower().lstrip(".")


@attrs.define
class _Sample:
    """Suffix, name, first byte and size of each member; suffix and class of each label."""

    members: list[tuple[str, str, int, int]] = attrs.field(factory=list)
    labels: list[tuple[str, str]] = attrs.field(factory=list)

    def add(self, suffix: str, member: TarInfo) -> None:
        """Add a member."""
        # Millions of them have few suffixes.
        self.members.append((sys.intern(suffix), member.name, member.offset_data, member.size))

    def has(self, suffix: str) -> bool:
        """Whether a member has this suffix, perhaps in other letters."""
        return any(member[0] == suffix for member in self.members)

    def has_plain(self, suffix: str) -> bool:
        """Whether a member is an image by its whole suffix, as one of this suffix is."""
        plain = [one for one in (suffix, *(m[0] for m in self.members)) if f".{one}" in SUFFIXES]
        return plain[:1] == [suffix] and len(plain) > 1
