"""Images in Parquet files, as Hugging Face keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
import torch
from typing_extensions import override

from e2ediff import addresses
from e2ediff.data import Recognised
from e2ediff.errors import DataError
from e2ediff.files.index import Index, column, stored_index
from e2ediff.files.listing import EncodedConfig, Listing, Names, numbered
from e2ediff.files.location import File, Location, find_files, fingerprint

_KEPT = 4  # row groups that a process keeps; ImageNet's are of 100 images, 11 MB


def _pyarrow(option: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{option}: Parquet files need pyarrow. Run: pip install pyarrow"
        ) from error
    return pyarrow


@attrs.define(eq=False)
class GroupBytes:
    """Images by number; a row group is read whole, and the last few are kept."""

    location: Location
    paths: Sequence[str]
    index: Index
    image: str
    _groups: dict[tuple[int, int], Any] = attrs.field(factory=dict)
    _files: dict[int, Any] = attrs.field(factory=dict)
    _owner: int = -1

    def __getstate__(self) -> dict[str, object]:
        names = ("location", "paths", "index", "image")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._groups, self._files, self._owner = {}, {}, -1

    def __call__(self, i: int) -> bytes:
        """The encoded image of one row."""
        if self._owner != os.getpid():
            self._groups, self._files, self._owner = {}, {}, os.getpid()
        file, group = int(self.index.file[i]), int(self.index.start[i])
        if (file, group) not in self._groups:
            while len(self._groups) >= _KEPT:
                self._groups.pop(next(iter(self._groups)))
            self._groups[file, group] = self._read(file, group)
        value = self._groups[file, group][int(self.index.size[i])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            return b""  # one row's fault, which may be skipped
        if type(data) is bytes:
            return data
        raise ValueError(f"column '{self.image}' holds no bytes in this row")

    def _read(self, file: int, group: int) -> Any:
        if file not in self._files:
            while len(self._files) >= 64:
                self._files.pop(next(iter(self._files))).close()
            arrow = _pyarrow("data.path")
            handle = self.location.fs.open(self.paths[file], "rb")
            self._files[file] = arrow.parquet.ParquetFile(handle, pre_buffer=False)
        handle = self._files[file]
        # Threads of a forked process's parent are gone: read in this one.
        table = handle.read_row_group(group, columns=[self.image], use_threads=False)
        return table.column(self.image).combine_chunks()


@attrs.frozen(kw_only=True)
class Parquet(EncodedConfig):
    """Parquet files of encoded images, as Hugging Face keeps them; needs pyarrow.

    `path` is a pattern such as `hf://datasets/ILSVRC/imagenet-1k/data/train-*.parquet`, one file
    or a folder; images are in the order of the files and of their rows.
    `image_column` names the column of images (bytes, or a struct with a field `bytes`),
    `label_column` that of class numbers or names.
    `held_out` is another pattern.
    Labels and row groups are read once and kept beside the files, or in the cache
    (`$E2EDIFF_CACHE`) where they are read-only.
    A random image costs the reading of its whole row group: `e2ediff data prepare` is faster.
    The other options are those of `image_folder`.
    """

    movable: ClassVar[tuple[str, ...]] = ("path", "held_out")

    path: str = attrs.field(converter=addresses.plain, validator=addresses.allowed)
    image_column: str = "image"
    label_column: str = "label"

    @classmethod
    def recognises(cls, address: str) -> Recognised | None:
        """A Parquet file, a pattern for some, or a folder that holds one."""
        location = Location(address, "data")
        if location.is_pattern():
            found = address.endswith(".parquet")
        elif location.is_folder():
            found = any(name.endswith(".parquet") for name in location.visible())
        else:
            found = location.is_file_named(".parquet")
        return Recognised({"path": address}) if found else None

    @override
    def listing(self, *, held_out: bool) -> Listing:
        option = self.option(held_out=held_out)
        arrow = _pyarrow(option)
        pattern = self.held_out if held_out and self.held_out else self.path
        location, files = find_files(pattern, option, ".parquet")
        key = fingerprint(files, self.image_column, self.label_column)
        sidecar = files[0].beside(f"parquet-{fingerprint(files)[:8]}.index.safetensors")
        index = stored_index(
            location, sidecar, key, lambda: self._index(arrow, location, files, option)
        )
        fetch = GroupBytes(location, [f.path for f in files], index, self.image_column)
        place = files[0].path.rpartition("/")[0]
        labels = index.labels
        return Listing(place, index.names, labels, index.classes, index.class_names, fetch)

    def _index(self, arrow: Any, location: Location, files: Sequence[File], option: str) -> Index:
        """For each row: its file, its row group (as `start`), its place there (as `size`)."""
        names: list[str] = []
        numbers: list[int] = []
        groups: list[int] = []
        rows: list[int] = []
        values: list[str] = []
        class_names: tuple[str, ...] = ()
        for number, found in enumerate(files):
            try:
                with location.fs.open(found.path, "rb") as handle:
                    file = arrow.parquet.ParquetFile(handle, pre_buffer=False)
                    self._check(file.schema_arrow.names, found.path, option)
                    counts = [
                        file.metadata.row_group(g).num_rows
                        for g in range(file.metadata.num_row_groups)
                    ]
                    if self.label_column in file.schema_arrow.names:
                        table = file.read([self.label_column], use_threads=False)
                        values += [str(v) for v in table.column(0).to_pylist()]
                        class_names = _class_names(file.schema_arrow, self.label_column)
            except (arrow.ArrowException, OSError) as error:
                raise DataError(
                    f"{option}: {found.path} cannot be read as Parquet ({error}); fetch it again"
                ) from error
            names += [f"{found.name}#{row}" for row in range(sum(counts))]
            numbers += [number] * sum(counts)
            for group, count in enumerate(counts):
                groups += [group] * count
                rows += range(count)
        if not names:
            raise DataError(f"{option}: {files[0].path} has no rows; expected one for each image")
        labels, classes, seen = self._labels(values, names, option)
        if class_names and not seen:
            classes, seen = max(classes, len(class_names)), class_names
        return Index(
            tuple(f.name for f in files),
            Names(names),
            column(numbers),
            column(groups),
            column(rows),
            labels,
            classes,
            seen,
        )

    def _labels(
        self, values: Sequence[str], names: Sequence[str], option: str
    ) -> tuple[torch.Tensor, int, tuple[str, ...]]:
        """Labels, number of classes and their names; none if no row has one."""
        # Hugging Face writes -1 where a test set's label is kept back.
        if not {*values} - {"None", "-1"}:
            return column([0] * len(names)), 0, ()
        if len(values) != len(names) or "None" in values or "-1" in values:
            raise DataError(
                f"{option}: column '{self.label_column}' has no label for some of the "
                f"{len(names)} rows; expected a class number or name in each, or "
                "`--set data.classes=0` with another `label_column`"
            )
        return numbered(values, names, option)

    def _check(self, columns: Sequence[str], path: str, option: str) -> None:
        if self.image_column not in columns:
            raise DataError(
                f"{option}: {path} has no column '{self.image_column}', it has "
                f"{', '.join(columns)}; name the column of images with "
                "`--set data.image_column=...`"
            )


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """Names of the classes that Hugging Face's datasets keep in a file's schema."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(str(n) for n in told["info"]["features"][label]["names"])
    except (KeyError, ValueError, TypeError):
        return ()
