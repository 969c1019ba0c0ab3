"""Images in Arrow files, as `datasets.save_to_disk` of Hugging Face writes them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
from typing_extensions import override

from e2ediff.data import Recognised
from e2ediff.errors import DataError
from e2ediff.files.index import Index, RangeBytes, stored_index
from e2ediff.files.listing import Listing
from e2ediff.files.location import File, Location, find_files, fingerprint
from e2ediff.limits import json_object
from e2ediff_sources.beside import files_of_one_split, inside_of, left_out_with
from e2ediff_sources.columns import Columns, Rows, TableConfig, files_of_kind, no_bytes, pyarrow

_WHAT = "Arrow files"
_COMPRESSED = "is compressed within; expected images as they are. Save it without compression"
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_RANDOM_ACCESS = b"ARROW1\0\0"  # before the stream; its footer comes after the stream's end


@attrs.frozen(kw_only=True)
class Arrow(TableConfig):
    """Folders that `save_to_disk` of Hugging Face's datasets wrote, or Arrow files; needs pyarrow.

    `path` is such a folder, or a pattern for Arrow files, one of them or a folder of them;
    images are in the order of the files and of their rows.
    `split` is the split of a folder of several (a DatasetDict): `train`, or the only one, if
    none is named.
    `held_out` is another split of the folder, or the address of another one (`DIR/test`).
    `image_column` names the column of images (bytes, or a struct with a field `bytes`),
    `label_column` that of class numbers or names. Where there is no column `image`, the only one
    that Hugging Face's metadata call images is taken, and where there is no `label` the only one
    of classes.
    Where each image lies is read once and kept beside the files, or in the cache
    (`$E2EDIFF_CACHE`) where they are read-only; in a store, that reads all of them once.
    The other options are those of `image_folder`.
    """

    split: str | None = None

    @classmethod
    def recognises(cls, address: str) -> Recognised | None:
        """What `save_to_disk` wrote, an Arrow file, a pattern for some, or a folder with one."""
        location = Location(address, "data")
        if location.is_folder() and {_STATE, _SPLITS} & {*location.visible()}:
            return Recognised({"path": address}, "certain")
        return files_of_kind(address, ".arrow")

    @override
    def columns(self, *, held_out: bool) -> Columns:
        return self._table(held_out)[3]

    @override
    def listing(self, *, held_out: bool) -> Listing:
        arrow, location, files, columns = self._table(held_out)
        key = fingerprint(files, columns.image, columns.label)
        sidecar = files[0].beside(f"arrow-{fingerprint(files)[:8]}.index.safetensors")
        index = stored_index(
            location, sidecar, key, lambda: self._index(arrow, location, files, columns)
        )
        fetch = RangeBytes(location, [f.path for f in files], index)
        place = files[0].path.rpartition("/")[0]
        left_out = left_out_with((), self._address(held_out), files, (_STATE, _INFO))
        named = (index.names, index.labels, index.classes, index.class_names)
        return Listing(place, *named, fetch, left_out=left_out)

    def _table(self, held_out: bool) -> tuple[Any, Location, list[File], Columns]:
        """Pyarrow, the files, and their columns by the first of them."""
        option = self.option(held_out=held_out)
        arrow = pyarrow(option, _WHAT)
        location, files = _files(self._address(held_out), option)
        with _opened(arrow, location, files[0]) as (_, schema):
            columns = self.chosen(arrow, schema, files[0].path, option)
        return arrow, location, files, columns

    def _address(self, held_out: bool) -> str:
        """The folder of one dataset, or the pattern for its files."""
        option, inner = self.option(held_out=held_out), self.option(held_out=False)
        splits = _splits(Location(self.path, inner))
        if held_out and self.held_out is not None:
            here = Location(self.held_out, option)
            if self.held_out not in splits:
                return _of_split(here, _splits(here), None)
            if here.is_folder():
                raise DataError(
                    f"{option}: '{self.held_out}' is a split of {self.path}, and a folder too; "
                    f"give {inside_of(self.path, self.held_out)} or ./{self.held_out}"
                )
            return inside_of(self.path, self.held_out)
        split = "train" if self.split is None and "train" in splits else self.split
        return _of_split(Location(self.path, inner), splits, split)

    def _index(
        self, arrow: Any, location: Location, files: Sequence[File], columns: Columns
    ) -> Index:
        """The bytes of each row's image, which lie in the files as they are."""
        rows, option = Rows(), location.option
        for number, found in enumerate(files):
            place = f"{option}: {found.path}"
            before = len(rows.names)
            with _opened(arrow, location, found) as (source, schema):
                chosen = self.chosen(arrow, schema, found.path, option)
                columns.check_same(chosen, found.path, files[0].path, option)
                for batch, body in _batches(arrow, source, schema, place):
                    start, size = _ranges(arrow, batch, body, columns.image, place)
                    rows.start += (start + source.tell() - body.size).tolist()
                    rows.size += size.tolist()
                    count = len(rows.size) - before
                    rows.names += [f"{found.name}#{i}" for i in range(count - len(size), count)]
                    if columns.label is not None:
                        values = batch.column(columns.label).to_pylist()
                        rows.values += [str(value) for value in values]
                if columns.label is not None:
                    rows.name_classes(schema, columns.label, found.path, option)
            rows.file += [number] * (len(rows.names) - before)
        return rows.index(files, columns, option)


def _of_split(location: Location, splits: Sequence[str], split: str | None) -> str:
    """The address of a split of a folder, or of the folder if it has none."""
    address, option = location.url, location.option
    if split is None and not splits:
        return address
    if split is None and len(splits) == 1:
        split = splits[0]
    if split is not None and split in splits:
        return inside_of(address, split)
    if not splits:
        raise DataError(f"{option}: {address} is no folder of splits; leave out `data.split`")
    how = f"give {inside_of(address, splits[0])}, or `--set data.split={splits[0]}`"
    what = "several splits" if split is None else f"no split '{split}'"
    raise DataError(f"{option}: {address} has {what}: it has {', '.join(splits)}; {how}")


def _told(location: Location, name: str, key: str) -> list[Any] | None:
    """A list in one of the JSON files that `save_to_disk` writes; None without the file."""
    path = location.below(name)
    if not location.is_folder() or name not in location.visible():
        return None
    try:
        return [*(json_object(location.read_labels(path)).get(key) or [])]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{location.option}: {path} cannot be read: {error}; save the dataset again"
        ) from error


def _names(location: Location, name: str, values: Sequence[object]) -> list[str]:
    """Names of files or folders that a JSON file lists, which lie beside it."""
    for value in values:
        if not isinstance(value, str) or "/" in value or value in ("", ".", ".."):
            raise DataError(
                f"{location.option}: {location.below(name)} lists {value!r}; expected names of "
                "what lies beside it. Save the dataset again"
            )
    return [str(value) for value in values]


def _splits(location: Location) -> list[str]:
    return _names(location, _SPLITS, _told(location, _SPLITS, "splits") or [])


def _files(address: str, option: str) -> tuple[Location, list[File]]:
    """The files that a folder's state lists, in its order, or those of a pattern."""
    location = Location(address, option)
    listed = _told(location, _STATE, "_data_files")
    if listed is None:
        return files_of_one_split(address, option, ".arrow")
    if _told(location, _STATE, "_indices_data_files") or _told(location, _STATE, "_indices_files"):
        raise DataError(
            f"{option}: {address} chooses its rows by a list of indices, as an early version of "
            "datasets wrote it; save it again with a newer one, or call `flatten_indices()` first"
        )
    values = [entry.get("filename") if isinstance(entry, dict) else entry for entry in listed]
    names = _names(location, _STATE, values)
    if not names:
        raise DataError(f"{option}: {address} has no rows; expected one for each image")
    _, found = find_files(address, option, ".arrow")
    known = {file.name: file for file in found}
    if missing := [name for name in names if name not in known]:
        raise DataError(
            f"{option}: {address} has no file {missing[0]}, which its {_STATE} lists; fetch it "
            "again, or save the dataset again"
        )
    return location, [known[name] for name in names]


@contextmanager
def _opened(arrow: Any, location: Location, file: File) -> Iterator[tuple[Any, Any]]:
    """Open an Arrow file, mapped into memory where it is local, after its schema.

    Raises:
        DataError: It is none, is damaged, or cannot be read in the body.
    """
    try:
        with (
            arrow.memory_map(file.path)
            if location.local
            else arrow.PythonFile(location.fs.open(file.path, "rb"), mode="r")
        ) as source:
            if source.read(len(_RANDOM_ACCESS)) != _RANDOM_ACCESS:
                source.seek(0)
            message = arrow.ipc.read_message(source)
            if message.type != "schema":  # of another kind pyarrow reads it all the same, and dies
                raise OSError(f"it begins with a message of type {message.type}, not a schema")
            yield source, arrow.ipc.read_schema(message)
    except (arrow.ArrowException, OSError, EOFError, ValueError, struct.error) as error:
        said = str(error) or "it is empty"
        raise DataError(
            f"{location.option}: {file.path} cannot be read as Arrow ({said}); fetch it again"
        ) from error


def _batches(arrow: Any, source: Any, schema: Any, place: str) -> Iterator[tuple[Any, Any]]:
    """The record batches of a stream, each with the bytes that hold its columns.

    Raises:
        DataError: The stream has no end, or something other than columns of plain values.
    """
    while True:
        begin = source.tell()
        try:
            message = arrow.ipc.read_message(source)
        except EOFError:
            break
        if message.type != "record batch":
            raise DataError(
                f"{place} has columns that are encoded by a dictionary, which are not read; save "
                "it without them"
            )
        if _is_compressed(bytes(message.metadata)):
            raise DataError(f"{place} {_COMPRESSED}")
        batch = arrow.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        yield batch, message.body
    if source.tell() == begin:
        raise DataError(
            f"{place} is cut short: it ends without the mark that ends a stream; fetch it again"
        )
    end, whole = source.tell(), source.size()
    source.seek(0)
    if end != whole and source.read(len(_RANDOM_ACCESS)) != _RANDOM_ACCESS:
        raise DataError(
            f"{place} goes on after the mark that ends a stream; expected one stream a file. "
            "Write the second one to a file of its own"
        )


def _is_compressed(message: bytes) -> bool:
    """Return whether the columns of a record batch are compressed, which reading would undo.

    Source: the format's `Message.fbs`, where the batch is field 2 of a message, and what it is
    compressed with is field 3 of the batch; pyarrow has verified the message and does not tell.
    """
    (table,) = struct.unpack_from("<I", message)
    batch = _field(message, table, 2)
    return bool(batch and _field(message, batch + struct.unpack_from("<I", message, batch)[0], 3))


def _field(data: bytes, table: int, number: int) -> int:
    """Return where a field of a table of FlatBuffers lies; 0 if it is not there."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    (length,) = struct.unpack_from("<H", data, fields)
    at = 4 + 2 * number
    offset: int = struct.unpack_from("<H", data, fields + at)[0] if at < length else 0
    return table + offset if offset else 0


def _ranges(
    arrow: Any, batch: Any, body: Any, image: str, place: str
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Where each row's image begins in the bytes of a batch, and how long it is; 0 for none."""
    data = batch.column(image)
    present = data.is_valid()
    if arrow.types.is_struct(data.type):
        data, outer = data.field("bytes"), data
        present = arrow.compute.and_(present, data.is_valid())
        if outer.type.get_field_index("path") >= 0:
            only = arrow.compute.and_not(outer.field("path").is_valid(), present)
            if arrow.compute.and_(only, outer.is_valid()).true_count:
                raise DataError(f"{place}: {no_bytes(image)}")
    _, offsets, content = data.buffers()
    if not len(data) or content is None or not content.size:
        return np.zeros(len(data), np.int64), np.zeros(len(data), np.int64)
    first = content.address - body.address
    if not 0 <= first <= body.size - content.size:
        raise DataError(f"{place} {_COMPRESSED}")
    kind = np.int64 if arrow.types.is_large_binary(data.type) else np.int32
    ends = np.frombuffer(offsets, kind)[data.offset : data.offset + len(data) + 1].astype(np.int64)
    shown = present.to_numpy(zero_copy_only=False)
    return first + ends[:-1], np.where(shown, np.diff(ends), 0)
