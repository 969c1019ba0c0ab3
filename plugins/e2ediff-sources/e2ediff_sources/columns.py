"""Which columns of a table hold images and labels, for Parquet files and for Arrow files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import attrs
import torch
from typing_extensions import override

from e2ediff import addresses
from e2ediff.data import Recognised
from e2ediff.errors import DataError
from e2ediff.files.index import Index, column
from e2ediff.files.listing import EncodedConfig, Names, numbered
from e2ediff.files.location import File, Location
from e2ediff.limits import json_object

IMAGE, LABEL = "image", "label"
_PLAIN = ("", "Value", "ClassLabel")  # types of columns that no list of columns needs to name


def pyarrow(option: str, what: str) -> Any:
    """Import pyarrow, with its modules for Parquet and for Arrow's own files.

    Args:
        option: The recipe's key of the data, for messages.
        what: Which files need it, for messages.

    Raises:
        DataError: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{option}: {what} need pyarrow. Run: pip install pyarrow") from error
    return pyarrow


def files_of_kind(address: str, suffix: str) -> Recognised | None:
    """Recognise a file of a suffix, a pattern for some, or a folder that holds one."""
    location = Location(address, "data")
    if location.is_pattern():
        found = address.endswith(suffix)
    elif location.is_folder():
        found = any(name.endswith(suffix) for name in location.visible())
    else:
        found = location.is_file_named(suffix)
    return Recognised({"path": address}) if found else None


def no_bytes(image: str) -> str:
    """Say that the images of a column lie elsewhere, and what to do."""
    return (
        f"column '{image}' has the paths of images without their bytes; expected the encoded "
        "images themselves. Write them with `dataset.save_to_disk(...)` or "
        "`dataset.push_to_hub(...)` of Hugging Face's datasets, which put them in"
    )


@attrs.frozen
class Columns:
    """Columns of a table: of images, of labels if there is one, all that hold classes, and all."""

    image: str
    label: str | None
    classes: tuple[str, ...]
    known: tuple[str, ...]

    def check_same(self, other: Columns, path: str, first: str, option: str) -> None:
        """Refuse another file of a table whose columns of images or labels are not these."""
        for mine, its in ((self.image, other.image), (self.label, other.label)):
            if mine != its:
                raise DataError(
                    f"{option}: {path} has the columns {', '.join(other.known)}, and {first} "
                    f"{', '.join(self.known)}; expected '{mine or its}' in both"
                )


@attrs.define
class Rows:
    """The index of a table while it is built: for each row, three numbers that say where it is."""

    names: list[str] = attrs.field(factory=list)
    file: list[int] = attrs.field(factory=list)
    start: list[int] = attrs.field(factory=list)
    size: list[int] = attrs.field(factory=list)
    values: list[str] = attrs.field(factory=list)
    class_names: tuple[str, ...] = ()
    named_by: str = ""

    def name_classes(self, schema: Any, label: str, path: str, option: str) -> None:
        """Take the class names in a file's schema, which must be those of the files before."""
        told = _features(schema).get(label)
        names = told.get("names") if isinstance(told, dict) else None
        found = tuple(str(name) for name in names) if isinstance(names, list) else ()
        if self.named_by and found != self.class_names:
            raise DataError(
                f"{option}: the classes of column '{label}' have other names in {path} than in "
                f"{self.named_by}, so that a number would stand for two of them; write both "
                "files from one dataset"
            )
        self.class_names, self.named_by = found, path

    def index(self, files: Sequence[File], columns: Columns, option: str) -> Index:
        """The whole, with labels from the values of the column."""
        if not self.names:
            raise DataError(f"{option}: {files[0].path} has no rows; expected one for each image")
        labels, classes, seen = self._labels(columns.label, option)
        if self.class_names and not seen:
            classes, seen = max(classes, len(self.class_names)), self.class_names
        where = (column(self.file), column(self.start), column(self.size))
        names = Names(self.names)
        return Index(tuple(f.name for f in files), names, *where, labels, classes, seen)

    def _labels(self, label: str | None, option: str) -> tuple[torch.Tensor, int, tuple[str, ...]]:
        """Labels, number of classes and their names; none if no row has one."""
        # Hugging Face writes -1 where a test set's label is kept back.
        if not {*self.values} - {"None", "-1"}:
            return column([0] * len(self.names)), 0, ()
        if len(self.values) != len(self.names) or {"None", "-1"} & {*self.values}:
            raise DataError(
                f"{option}: column '{label}' has no label for some of the {len(self.names)} "
                "rows; expected a class number or name in each, or `--set data.classes=0` with "
                "another `label_column`"
            )
        return numbered(self.values, self.names, option)


@attrs.frozen(kw_only=True)
class TableConfig(EncodedConfig):
    """Options of sources that read a column of images and one of labels."""

    movable: ClassVar[tuple[str, ...]] = ("path", "held_out")

    path: str = attrs.field(converter=addresses.plain, validator=addresses.allowed)
    image_column: str = IMAGE
    label_column: str = LABEL

    @override
    def with_counted_classes(self) -> Self:
        """Return it with the columns that are read, and the number of classes in them."""
        plain = attrs.evolve(self, classes=0)
        columns, option = plain.columns(held_out=False), self.option(held_out=False)
        if columns.label is None and len(columns.classes) > 1:
            raise DataError(
                f"{option}: {self.path} has several columns of classes, "
                f"{', '.join(columns.classes)}; choose with `--set data.label_column="
                f"{columns.classes[0]}`, or leave all of them out with `--set data.classes=0`"
            )
        return attrs.evolve(
            self,
            classes=plain.listing(held_out=False).classes,
            image_column=columns.image,
            label_column=columns.label or self.label_column,
        )

    @abstractmethod
    def columns(self, *, held_out: bool) -> Columns:
        """Choose the columns by the schema of the first file.

        Raises:
            DataError: There is no file, or none of its columns can be told to hold images.
        """

    def chosen(self, arrow: Any, schema: Any, place: str, option: str) -> Columns:
        """Choose the columns of a schema; those that are named are taken or missed.

        Where there is no column `image`, the only one of images is taken, and where there is no
        column `label` the only one of classes, as Hugging Face's metadata tell.

        Raises:
            DataError: There is no such column of images or of labels, or it holds something else.
        """
        known, features = tuple(schema.names), _features(schema)
        images = _of_type("Image", schema, features)
        classes = _of_type("ClassLabel", schema, features)
        image, label = self.image_column, self.label_column
        if image == IMAGE and image not in known and len(images) == 1:
            image = images[0]
        if label == LABEL and label not in known and len(classes) == 1:
            label = classes[0]
        found = Columns(image, label if label in known else None, classes, known)
        shown = [
            f"{name} ({kind})" if (kind := _type(features, name)) not in _PLAIN else name
            for name in known
        ]
        if image not in known:
            raise DataError(
                f"{option}: {place} has no column '{image}', it has {', '.join(shown)}; name the "
                "column of images with `--set data.image_column=...`"
            )
        if found.label is None and self.classes:
            raise DataError(
                f"{option}: {place} holds no labels, the recipe says data.classes: "
                f"{self.classes}; it has no column '{label}', but {', '.join(known)}. Name the "
                "column of labels with `--set data.label_column=...`, or `--set data.classes=0` "
                "to train without classes"
            )
        wanted = "encoded images: bytes, or a struct with a field `bytes`"
        for key, name, holds, what in (
            ("image_column", image, _holds_images, wanted),
            ("label_column", found.label, _holds_labels, "class numbers or names"),
        ):
            if name is not None and known.count(name) > 1:
                raise DataError(f"{option}: {place} has two columns '{name}'; rename one of them")
            if name is not None and not holds(arrow, type_ := schema.field(name).type):
                raise DataError(
                    f"{option}: column '{name}' of {place} holds "
                    f"{_type(features, name) or type_}, expected {what}; it has "
                    f"{', '.join(shown)}. Name another one with `--set data.{key}=...`"
                )
        return found


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's datasets tell of the columns in a file's schema."""
    try:
        told = json_object((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return told if isinstance(told, dict) else {}


def _type(features: dict[str, Any], name: str) -> str:
    told = features.get(name)
    return str(told.get("_type", "")) if isinstance(told, dict) else ""


def _of_type(kind: str, schema: Any, features: dict[str, Any]) -> tuple[str, ...]:
    """Columns of a type of Hugging Face's datasets, such as `Image`."""
    return tuple(name for name in schema.names if _type(features, name) == kind)


def _holds_images(arrow: Any, type_: Any) -> bool:
    if arrow.types.is_struct(type_) and type_.get_field_index("bytes") >= 0:
        type_ = type_.field("bytes").type
    return bool(arrow.types.is_binary(type_) or arrow.types.is_large_binary(type_))


def _holds_labels(arrow: Any, type_: Any) -> bool:
    types = arrow.types
    if types.is_dictionary(type_):
        type_ = type_.value_type
    kinds = (types.is_integer, types.is_floating, types.is_boolean, types.is_null)
    texts = (types.is_string, types.is_large_string)
    return any(holds(type_) for holds in (*kinds, *texts))
