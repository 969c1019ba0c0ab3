"""Files of labels: one line for each image, or StyleGAN's and EDM's dataset.json."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import attrs

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.errors import DataError
from e2ediff.files.images import SUFFIXES
from e2ediff.files.location import Location
from e2ediff.files.names import is_hidden
from e2ediff.limits import json_object
from e2ediff.terminal import printable

_EXPECTED = (
    "expected a line '<image> <class>' for each image, or a dataset.json with "
    '{"labels": [["<image>", <number>], ...]}'
)

_SEPARATORS = ("\t", ";", ",")
_SUFFIX = "|".join(map(re.escape, SUFFIXES))
_NAMES_IMAGE = re.compile(rf"(?:{_SUFFIX})(?=[ \t,;\"]|$)", re.IGNORECASE)
_BY_SPACE = re.compile(
    rf'("(?:[^"]|"")*"|.+?(?:{_SUFFIX})|[^ \t]+)[ \t]+(.+)', re.IGNORECASE | re.DOTALL
)
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")
_BOXES = re.compile(r"(n\d{8})(\s+\d+){4}(\s+n\d{8}(\s+\d+){4})*")
_IMAGE_COLUMN = re.compile(
    r"(image|img|file|photo|picture)s?(file)?(id|name|path)?|path|name|id|fname"
)
_CLASS_COLUMN = re.compile(
    r"(label|class|category|target)(s|es)?(id|name|label|index)?|y|predictionstring"
)


@attrs.frozen
class LabelRow:
    """What a file says of one image; `line` counts from 1, and in JSON it counts the entries."""

    image: str
    label: str
    line: int


@attrs.frozen
class LabelFile:
    """The rows of a file of labels, no two of the same text for an image.

    `place` is its address, `unit` what its rows are called in messages, `header` a first line
    that names the columns and is no row.
    """

    place: str
    rows: tuple[LabelRow, ...]
    unit: str = "line"
    header: LabelRow | None = None


def read_labels(
    url: Address, location: Location | None = None, data: bytes | None = None
) -> LabelFile | None:
    """Read a file of labels; None if a dataset.json says that there are none.

    A line is read as CSV, separated by commas, semicolons or tabs and quoted as spreadsheets do,
    or else it is an image, spaces, and a class, which may have spaces itself. Further columns are
    ignored, and so are numbers that follow a class number after a space, and the boxes of
    ImageNet's `LOC_val_solution.csv`, which serves as it is. A first line that names the columns,
    such as `filename,label`, is left out.

    Raises:
        DataError: The file is not there, is neither of the two, or one of its lines is unclear.
    """
    url = addresses.plain(url)
    if data is None:
        place = location or Location(url, "data.labels")
        try:
            data = place.read_labels(url if location else place.path)
        except (OSError, ValueError) as error:
            raise DataError(f"data.labels: cannot read {url}: {error}; {_EXPECTED}") from error
    try:
        text = _decoded(data)
        if url.lower().endswith(".json"):
            return _from_json(url, text)
        return _from_lines(url, text)
    except ValueError as error:
        raise DataError(f"data.labels: {url}: {error}; {_EXPECTED}") from error


def _decoded(data: bytes) -> str:
    """Return the text of UTF-8, with or without the byte order mark of spreadsheets."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        raise ValueError("is UTF-16 or UTF-32; save it as UTF-8 ('CSV UTF-8' in a spreadsheet)")
    if (at := data.find(b"\0")) >= 0:
        raise ValueError(f"line {_line_at(data, at)} has a zero byte; save the file as UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The position is that in what follows the mark.
        mark = len(data) - len(error.object)
        at = error.start + mark
        raise ValueError(
            f"line {_line_at(data, at)} is not UTF-8 (byte {data[at]:#04x}); save the file as "
            "UTF-8 ('CSV UTF-8' in a spreadsheet)"
        ) from error


def _line_at(data: bytes, at: int) -> int:
    return len(re.findall(rb"\r\n|\n|\r", data[:at])) + 1


def _from_json(url: str, text: str) -> LabelFile | None:
    value = json_object(text, pairs=_without_twins)
    if "labels" not in value:
        raise ValueError("has no key 'labels'")
    listed = value["labels"]
    if listed is None:
        return None
    if isinstance(listed, list):
        return LabelFile(url, _entries(listed), "entry")
    raise ValueError(f"the value of 'labels' is {_shown(json.dumps(listed))}, no list")


def _entries(listed: Sequence[object]) -> tuple[LabelRow, ...]:
    rows = dict[str, LabelRow]()
    for number, entry in enumerate(listed, 1):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f"entry {number} is {_shown(json.dumps(entry))}")
        name, label = entry
        if type(label) is not int or label < 0:
            shown = _shown(json.dumps(label))
            raise ValueError(f"the label of {name} (entry {number}) is {shown}, no class number")
        _add(rows, LabelRow(name, str(label), number), "entry")
    return tuple(rows.values())


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a key that is there twice, of which Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"has the key {twice!r} twice")
    return found


def _from_lines(url: str, text: str) -> LabelFile:
    rows, header = dict[str, LabelRow](), None
    start: tuple[int, Sequence[str]] | None = None  # the first row as CSV, and its line
    # Not by str.splitlines, to which a form feed or U+2028 in a name is the end of a line.
    lines = enumerate(re.split(r"\r\n|\n|\r", text), 1)
    for first, (number, line) in enumerate((n, one.strip()) for n, one in lines if one.strip()):
        fields, separated = _fields(line, number)
        row = LabelRow(fields[0], _label(fields[1], separated=separated), number)
        if first == 0 and _is_header(fields, separated=separated):
            header = row
            continue
        if not row.image or not row.label:
            raise ValueError(f"line {number} is '{_shown(line)}'")
        if separated:
            start = start or (number, fields)
            _check_columns(number, fields, *start)
        _add(rows, row, "line")
    return LabelFile(url, tuple(rows.values()), header=header)


def _fields(line: str, number: int) -> tuple[list[str], bool]:
    """Return the columns of a line, two at least, and whether they were separated as CSV.

    Where it names an image by its suffix, the first column ends there: a separator before or
    behind that belongs to a name.
    """
    named, unclosed = _NAMES_IMAGE.search(line), None
    for separator in _SEPARATORS:
        if separator not in line:
            continue
        try:
            (fields,) = csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True)
        except csv.Error as error:
            unclosed = error
            continue
        fields = [field.strip() for field in fields]
        if len(fields) > 1 and (not named or not fields[0] or _ends_as_image(fields[0])):
            return fields, True
    match = _BY_SPACE.fullmatch(line)
    fields = [_unquoted(part) for part in match.groups()] if match else [""]
    if not match or (named and not _ends_as_image(fields[0])):
        why = f" ({unclosed})" if unclosed else ""
        raise ValueError(f"line {number} is '{_shown(line)}'{why}")
    return fields, False


def _ends_as_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return text[1:-1].replace('""', '"').strip() if quoted else text.strip()


def _label(text: str, *, separated: bool) -> str:
    """Return the class alone, without ImageNet's boxes or numbers behind a class number."""
    first, *rest = text.split() or [""]
    counted = not separated and first.isdecimal() and all(map(_NUMBER.fullmatch, rest))
    return first if counted or _BOXES.fullmatch(text) else text


def _is_header(fields: Sequence[str], *, separated: bool) -> bool:
    """Return whether a first line names the columns.

    Raises:
        ValueError: It does, and the class is not in the second one.
    """
    columns = fields if separated else [fields[0], *fields[1].split()]
    names = [re.sub(r"[\W_]", "", column).lower() for column in columns]
    images = [bool(_IMAGE_COLUMN.fullmatch(name)) for name in names]
    classes = [bool(_CLASS_COLUMN.fullmatch(name)) for name in names]
    if images[0] and classes[1]:
        return True
    if (images[0] or classes[0]) and any(images) and any(classes):
        shown = ", ".join(f"'{_shown(column)}'" for column in columns)
        raise ValueError(
            f"the first line names the columns {shown}; the image must be in the first and its "
            "class in the second"
        )
    return False


def _check_columns(
    number: int, fields: Sequence[str], first: int, expected: Sequence[str]
) -> None:
    """Refuse a line with more or fewer columns, as one has whose class has a comma unquoted.

    Spreadsheets leave empty columns out at the end of some lines.
    """
    if len(fields) != len(expected) and _filled(fields) != _filled(expected):
        raise ValueError(
            f"line {number} has {len(fields)} columns, line {first} has {len(expected)}; put "
            "quotes around a name or class that contains the separator"
        )


def _filled(fields: Sequence[str]) -> int:
    """Return the number of columns up to the last that is not empty."""
    return max((number for number, field in enumerate(fields, 1) if field), default=0)


def _add(rows: dict[str, LabelRow], row: LabelRow, unit: str) -> None:
    before = rows.setdefault(row.image, row)
    if before.label != row.label:
        raise ValueError(_two_labels(row.image, before, row, unit))


def _two_labels(image: str, one: LabelRow, other: LabelRow, unit: str) -> str:
    where = f"{'entries' if unit == 'entry' else 'lines'} {one.line} and {other.line}"
    labels = f"{_shown(one.label)} and {_shown(other.label)}"
    return f"{_shown(image)} has two labels, {labels} ({where})"


def _shown(text: str) -> str:
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return printable(text)


def labelled(images: Sequence[str], file: LabelFile, place: str, option: str) -> list[str]:
    """Return the label of each image, found by its path, its name, or its name's stem.

    A text that names no image exactly is compared once more without `./`, with slashes for
    backslashes, and in Unicode's composed form (NFC), as systems write one name in several ways.

    Args:
        images: Paths, relative to what the user has named.
        file: The file of labels.
        place: Where the images are, for messages.
        option: The recipe's key of the images, for messages.

    Raises:
        DataError: An image has no label or two, a label no image, or one that is not written with
            its path has several.
    """
    found, strange = dict[int, LabelRow](), list[LabelRow]()
    why = f"{option}: {file.place} does not match {place}"
    for header, fits in _fitting(images, [file.header] if file.header else []):
        if fits:
            raise DataError(
                f"{why}: line {header.line} ('{header.image}', '{header.label}') may name columns "
                f"or label {_shown(images[fits[0]])}; expected one of the two. Write the image's "
                f"path, relative to {place}"
            )
    for row, fits in _fitting(images, file.rows):
        free = [i for i in fits if i not in found]
        if len(free) > 1:
            raise DataError(
                f"{why}: '{_shown(row.image)}' may be {_shown(images[free[0]])} or "
                f"{_shown(images[free[1]])} ({file.unit} {row.line}); expected a label for each. "
                f"Write their paths, relative to {place}"
            )
        if free:
            found[free[0]] = row
        elif not fits:
            strange.append(row)
        elif all(found[i].label != row.label for i in fits):
            said = _two_labels(images[fits[0]], found[fits[0]], row, file.unit)
            raise DataError(f"{why}: {said}; expected one label for each image")
    # A list that was made with hidden files in it names what is not looked at.
    strange = [row for row in strange if not is_hidden(_plain(row.image))]
    missing = [path for i, path in enumerate(images) if i not in found]
    if missing or strange or not images:
        said = " and ".join(_unmatched(missing, len(images), strange, file))
        raise DataError(
            f"{why}: {said or 'there are no images'}; {_EXPECTED}, relative to {place}"
        )
    return [found[i].label for i in range(len(images))]


def _fitting(
    images: Sequence[str], rows: Sequence[LabelRow]
) -> Iterator[tuple[LabelRow, Sequence[int]]]:
    """Yield each row with the images that its text may name, those of whole paths first."""
    for part in (str, _name, _stem):
        for form in (str, _plain):
            if not rows:
                return
            known = defaultdict[str, list[int]](list)
            for i, path in enumerate(images):
                known[part(form(path))].append(i)
            for row in rows:
                if fits := known.get(form(row.image)):
                    yield row, fits
            rows = [row for row in rows if form(row.image) not in known]
    for row in rows:
        yield row, ()


def _plain(path: str) -> str:
    """Return a path as all systems agree to write it."""
    parts = unicodedata.normalize("NFC", path.replace("\\", "/")).split("/")
    return "/".join(part.strip() for part in parts if part.strip() not in ("", "."))


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(path: str) -> str:
    name = _name(path)
    return (name.rpartition(".")[0] or name).strip()


def _unmatched(
    missing: Sequence[str], images: int, strange: Sequence[LabelRow], file: LabelFile
) -> Iterator[str]:
    """Describe images without a label and labels without an image."""
    if missing:
        yield f"{len(missing)} of {images} images have no label ({_shown(missing[0])})"
    if strange:
        row, hint = strange[0], ""
        alike = {_plain(path).casefold(): path for path in missing}
        if path := alike.get(_plain(row.image).casefold()):
            hint = f"; {_shown(path)} is written otherwise"
        elif row is file.rows[0] and file.unit == "line":
            hint = "; columns are named as in 'filename,label', if at all"
        where = f"{_shown(row.image)}, {file.unit} {row.line}{hint}"
        yield f"{len(strange)} of {len(file.rows)} labels no image ({where})"
