"""Images in Parquet files, as Hugging Face keeps them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import attrs
from typing_extensions import override

from e2ediff.data import Recognised
from e2ediff.errors import DataError
from e2ediff.files.index import Index, stored_index
from e2ediff.files.listing import Listing
from e2ediff.files.location import File, Location, fingerprint
from e2ediff.files.trial import tried
from e2ediff.limits import MAX_BYTES, check_memory, check_size
from e2ediff_sources.beside import files_of_one_split, left_out_with
from e2ediff_sources.columns import Columns, Rows, TableConfig, files_of_kind, no_bytes, pyarrow

_KEPT = 4  # row groups that a process keeps; ImageNet's are of 100 images, 11 MB
_REPEATED = 16  # how often an image may stand in a row group that stores it once
_WHAT = "Parquet files"


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
        if data is None and isinstance(value, dict) and value.get("path"):
            raise ValueError(no_bytes(self.image))
        return data or b""  # one row's fault, which may be skipped

    def _read(self, file: int, group: int) -> Any:
        if file not in self._files:
            while len(self._files) >= 64:
                self._files.pop(next(iter(self._files))).close()
            arrow = pyarrow("data.path", _WHAT)
            handle = self.location.fs.open(self.paths[file], "rb")
            self._files[file] = arrow.parquet.ParquetFile(handle, pre_buffer=False)
        pieces = [*_pieces(self._files[file], group, self.image)]
        return pyarrow("data.path", _WHAT).chunked_array(pieces).combine_chunks()


@attrs.frozen(kw_only=True)
class Parquet(TableConfig):
    """Parquet files of encoded images, as Hugging Face keeps them; needs pyarrow.

    `path` is a pattern such as `hf://datasets/ILSVRC/imagenet-1k/data/train-*.parquet`, one file
    or a folder; images are in the order of the files and of their rows.
    `image_column` names the column of images (bytes, or a struct with a field `bytes`),
    `label_column` that of class numbers or names. Where there is no column `image`, the only one
    that Hugging Face's metadata call images is taken, and where there is no `label` the only one
    of classes.
    `held_out` is another pattern.
    Labels and row groups are read once and kept beside the files, or in the cache
    (`$E2EDIFF_CACHE`) where they are read-only.
    A random image costs the reading of its whole row group: `e2ediff data prepare` is faster.
    The other options are those of `image_folder`.
    """

    @classmethod
    def recognises(cls, address: str) -> Recognised | None:
        """A Parquet file, a pattern for some, or a folder that holds one."""
        return files_of_kind(address, ".parquet")

    @override
    def columns(self, *, held_out: bool) -> Columns:
        return self._table(held_out)[3]

    @override
    def listing(self, *, held_out: bool) -> Listing:
        arrow, location, files, columns = self._table(held_out)
        key = fingerprint(files, columns.image, columns.label or self.label_column)
        sidecar = files[0].beside(f"parquet-{fingerprint(files)[:8]}.index.safetensors")
        index = stored_index(
            location, sidecar, key, lambda: self._index(arrow, location, files, columns)
        )
        fetch = GroupBytes(location, [f.path for f in files], index, columns.image)
        place = files[0].path.rpartition("/")[0]
        left_out = left_out_with((), self._pattern(held_out), files)
        named = (index.names, index.labels, index.classes, index.class_names)
        return Listing(place, *named, fetch, left_out=left_out)

    def _pattern(self, held_out: bool) -> str:
        return self.held_out if held_out and self.held_out else self.path

    def _table(self, held_out: bool) -> tuple[Any, Location, list[File], Columns]:
        """Pyarrow, the files, and their columns by the first of them."""
        option = self.option(held_out=held_out)
        arrow = pyarrow(option, _WHAT)
        location, files = files_of_one_split(self._pattern(held_out), option, ".parquet")
        with _opened(arrow, location, files[0]) as file:
            columns = self.chosen(arrow, file.schema_arrow, files[0].path, option)
        return arrow, location, files, columns

    def _index(
        self, arrow: Any, location: Location, files: Sequence[File], columns: Columns
    ) -> Index:
        """For each row: its file, its row group (as `start`), its place there (as `size`)."""
        rows, option = Rows(), location.option
        _refuse_crashing(arrow, location, files)
        for number, found in enumerate(files):
            with _opened(arrow, location, found) as file:
                chosen = self.chosen(arrow, file.schema_arrow, found.path, option)
                columns.check_same(chosen, found.path, files[0].path, option)
                groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
                counts = [group.num_rows for group in groups]
                _check_bytes(groups, columns.image, found.path, option)
                if (total := sum(counts)) > found.size or min(counts, default=0) < 0:
                    raise DataError(
                        f"{option}: {found.path} has {total:,} rows by its footer, and "
                        f"{found.size:,} bytes; expected an image in each. Fetch it again"
                    )
                if columns.label is not None:
                    for group in range(len(groups)):
                        for piece in _pieces(file, group, columns.label):
                            rows.values += [str(v) for v in piece.to_pylist()]
                    rows.name_classes(file.schema_arrow, columns.label, found.path, option)
            rows.names += [f"{found.name}#{row}" for row in range(sum(counts))]
            rows.file += [number] * sum(counts)
            for group, count in enumerate(counts):
                rows.start += [group] * count
                rows.size += range(count)
        return rows.index(files, columns, option)


def _refuse_crashing(arrow: Any, location: Location, files: Sequence[File]) -> None:
    """Read the footers in a process of their own: pyarrow ends the process for some damage.

    Raises:
        DataError: It did, and for which file.
    """

    def footers(*several: File) -> None:
        for found in several:
            # What can be caught is reported where the file is read.
            with suppress(DataError), _opened(arrow, location, found) as file:
                for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
                    for part in map(group.column, range(group.num_columns)):
                        _ = part.path_in_schema, part.statistics and part.statistics.null_count

    if not tried(partial(footers, *files)):
        return
    for found in files:
        if why := tried(partial(footers, found)):
            raise DataError(
                f"{location.option}: {found.path} cannot be read as Parquet (its footer: {why}); "
                "fetch it again"
            )


@contextmanager
def _opened(arrow: Any, location: Location, file: File) -> Iterator[Any]:
    """Open a Parquet file.

    Raises:
        DataError: It is none, is damaged, or cannot be read in the body.
    """
    try:
        with location.fs.open(file.path, "rb") as handle:
            yield arrow.parquet.ParquetFile(handle, pre_buffer=False)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{location.option}: {file.path} cannot be read as Parquet ({error}); fetch it again"
        ) from error


def _pieces(file: Any, group: int, column: str) -> Iterator[Any]:
    """Yield the values of a column in a row group, a few rows at once.

    A footer says how long the pages are, but not the values: rows may all stand for one entry
    of a dictionary.

    Raises:
        OversizedError: The pages do not fit into memory, or the values are far longer than them.
    """
    metadata = file.metadata.row_group(group)
    parts = [metadata.column(i) for i in range(metadata.num_columns)]
    stored = sum(
        part.total_uncompressed_size
        for part in parts
        if part.path_in_schema.partition(".")[0] == column
    )
    check_memory(stored)
    # Threads of a forked process's parent are gone: read in this one.
    batches = file.iter_batches(
        batch_size=max(1, min(1 << 16, MAX_BYTES // max(1, stored))),
        row_groups=[group],
        columns=[column],
        use_threads=False,
    )
    total = 0
    for batch in batches:
        total += batch.nbytes
        check_size(total, f"a row group of {stored:,}", max(MAX_BYTES, _REPEATED * stored))
        yield batch.column(0)


def _check_bytes(groups: Sequence[Any], image: str, path: str, option: str) -> None:
    """Refuse a file some of whose images are paths without bytes, as its footer counts them."""
    without = {"bytes": 0, "path": 0}
    for group in groups:
        for part in map(group.column, range(group.num_columns)):
            outer, _, inner = part.path_in_schema.rpartition(".")
            if outer == image and inner in without:
                known = part.statistics is not None and part.statistics.has_null_count
                # What is not counted may be all there: such a row is refused when it is read.
                none = 0 if inner == "bytes" else group.num_rows
                without[inner] += part.statistics.null_count if known else none
    if without["bytes"] > without["path"]:
        raise DataError(f"{option}: {path}: {no_bytes(image)}")
