"""Parse the grid of an ablation: `--vary PATH=A,B` gives named cells with assignments."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import attrs

from e2ediff.addresses import Address
from e2ediff.errors import E2EDiffError, RecipeError
from e2ediff.host.registry import did_you_mean
from e2ediff.host.yaml import Node, parse_yaml

_PATH = re.compile(r"\s*[A-Za-z_]\w*(\.\w+)*\s*")
_COMPANION = re.compile(r"\s*[A-Za-z_]\w*(\.\w+)*\s*=")
_NAME_LENGTH = 80


class GridError(E2EDiffError):
    """An option of an ablation or of a report is wrong: `--vary`, `--seeds`, `--baseline`, ..."""

    exit_code = 2


@attrs.frozen
class Assignment:
    """A change of the recipe, `path=text` as for `--set`, and the option that it came from."""

    path: str
    text: str
    origin: str

    def __str__(self) -> str:
        return f"{self.path}={self.text}"


@attrs.frozen
class Value:
    """One value of an axis with its accompanying settings, and words to name it."""

    assignments: tuple[Assignment, ...]
    words: tuple[str, ...]
    further_words: tuple[str, ...]


@attrs.frozen
class Axis:
    """The path and values of one `--vary`."""

    path: str
    values: tuple[Value, ...]


@attrs.frozen
class Cell:
    """One combination of values; `name` is a valid directory name.

    `recipe` is the recipe to change, if it is not that of the ablation.
    """

    name: str
    assignments: tuple[Assignment, ...]
    recipe: Address | None = None


def split_top(text: str, at: Callable[[str, int], bool]) -> list[str]:
    """Split where `at(text, i)` holds, outside of brackets and quotes.

    Raises:
        GridError: A bracket or a quote is unbalanced.
    """
    parts, start, quote = [], 0, ""
    open_: list[str] = []
    for i, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote and text[i - 1] != "\\" else quote
        elif sign in "'\"" and re.search(r"(^|[,\[{:=+])\s*$", text[:i]):
            quote = sign  # elsewhere it is an apostrophe
        elif sign in "[{":
            open_.append("]" if sign == "[" else "}")
        elif sign in "]}":
            if not open_ or open_.pop() != sign:
                raise GridError(f"{text!r}: '{sign}' closes nothing.")
        elif not open_ and at(text, i):
            parts.append(text[start:i])
            start = i + 1
    if quote or open_:
        missing = quote or open_[-1]
        raise GridError(f"{text!r}: a {missing} is missing. Quote --vary for your shell.")
    return [*parts, text[start:]]


def parse_axis(text: str) -> Axis:
    """Parse an axis, `PATH=A,B,...` or `PATH=[A, B, ...]`.

    A value may have accompanying settings: `objective=two_stage+backbone.trunks=apart`.

    Raises:
        GridError: It does not have that form, or has no value, an empty or a repeated one.
    """
    path, sign, rest = text.partition("=")
    path = path.strip()
    if not sign or not _PATH.fullmatch(path):
        raise GridError(f"--vary {text!r}: write PATH=VALUE,VALUE, as in --vary objective=a,b.")
    if path == "seed":
        raise GridError(f"--vary {text!r}: seeds are given with --seeds.")
    try:
        words = [word.strip() for word in split_top(rest, lambda t, i: t[i] == ",")]
        if len(words) == 1 and words[0].startswith("[") and words[0].endswith("]"):
            inner = split_top(words[0][1:-1], lambda t, i: t[i] == ",")
            words = [word.strip() for word in inner]
            if len(words) > 1 and not words[-1]:
                words.pop()  # YAML allows a comma at the end of a list
        if words == [""]:
            raise GridError("there is no value.")
        if "" in words:
            number = words.index("") + 1
            raise GridError(f"value {number} is empty; write null if that is meant.")
        values = tuple(_distinct([_value(path, word) for word in words]))
    except GridError as error:
        raise GridError(f"--vary {path}: {error}") from error
    twice = [word for word, number in Counter(words).items() if number > 1]
    if twice:
        raise GridError(f"--vary {path}: {twice[0]} is given twice.")
    return Axis(path, values)


def _value(path: str, word: str) -> Value:
    def companion(text: str, i: int) -> bool:
        return text[i] == "+" and bool(_COMPANION.match(text, i + 1))

    own, *others = split_top(word, companion)
    if not own.strip():
        raise GridError(f"{word!r} has settings, but no value before them.")
    origin = f"--vary {path}={word}"
    assignments = [Assignment(path, own.strip(), origin)]
    for other in others:
        where, _, text = other.partition("=")
        assignments.append(Assignment(where.strip(), text.strip(), origin))
    settings = [word for a in assignments[1:] for word in _called(a.path, a.text)]
    return Value(tuple(assignments), tuple(_called(path, own.strip())), tuple(settings))


def _distinct(values: Sequence[Value]) -> list[Value]:
    """Remove words that all values have in common."""
    shared = set.intersection(*({*value.words} for value in values))
    found = []
    for value in values:
        words = tuple(word for word in value.words if word not in shared)
        found.append(attrs.evolve(value, words=words or value.words))
    return found


def _called(path: str, text: str) -> list[str]:
    """Name a value `coupled`, `latent_dim=4` or `spread-weight=0.5`: short, without the path."""
    key = path.rpartition(".")[2]
    try:
        node, _ = parse_yaml(text, "--vary", marks=False)
    except RecipeError:
        node = None  # reported with the cell's other problems
    return [_slug(word) for word in _words(key, node or Node(text, ""), text)]


def _words(key: str, node: Node, text: str) -> Iterator[str]:
    if isinstance(node.value, dict) and node.value:
        for inner, child in node.value.items():
            if inner == "name" and isinstance(child.value, str):
                yield child.value
            else:
                yield from _words(inner, child, str(child.value))
    elif isinstance(node.value, list | dict):
        items = node.value if isinstance(node.value, list) else []
        inside = [item.value for item in items]
        plain = all(not isinstance(v, list | dict) for v in inside)
        yield f"{key}={'_'.join(map(str, inside)) if plain else text}"
    elif isinstance(node.value, str):
        yield node.value
    else:
        yield f"{key}={text}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.=") or "value"


def cells(axes: Sequence[Axis]) -> list[Cell]:
    """Return the product of the axes, the first one changing slowest, with unique names.

    Raises:
        GridError: There is no axis, or one is given twice.
    """
    if not axes:
        raise GridError("Nothing varies: give --vary PATH=VALUE,VALUE at least once.")
    paths = [axis.path for axis in axes]
    for path in paths:
        if paths.count(path) > 1:
            raise GridError(f"--vary {path} is given twice; give all its values at once.")
    products = list(itertools.product(*(axis.values for axis in axes)))
    short = [_limited("-".join(word for v in values for word in v.words)) for values in products]
    shared = {n for n, number in Counter(n.casefold() for n in short).items() if number > 1}
    found: list[Cell] = []
    taken: set[str] = set()
    for name, values in zip(short, products, strict=True):
        if name.casefold() in shared:
            name = _limited(
                "-".join(word for v in values for word in (*v.words, *v.further_words))
            )
        base, number = name, 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        found.append(Cell(name, tuple(a for value in values for a in value.assignments)))
    return found


def _limited(name: str) -> str:
    if len(name) <= _NAME_LENGTH:
        return name
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: _NAME_LENGTH - 9].rstrip('-.=')}-{mark}"


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse seeds such as `0,1,2`.

    Raises:
        GridError: A seed is not a number of at least 0, or is repeated.
    """
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not re.fullmatch(r"[0-9]{1,18}", word):
            raise GridError(f"--seeds {text!r}: {word!r} is not a seed. Write for example 0,1,2.")
    seeds = tuple(int(word) for word in words)
    if len(set(seeds)) < len(seeds):
        raise GridError(f"--seeds {text!r}: a seed is given twice.")
    return seeds


def find_cell(name: str | None, grid: Sequence[Cell]) -> Cell:
    """Return the cell of this name, by default the first one.

    Raises:
        GridError: There is no such cell.
    """
    for cell in grid:
        if name is None or cell.name == name:
            return cell
    known = did_you_mean(str(name), [cell.name for cell in grid], "Cells")
    raise GridError(f"--baseline {name!r}: no such cell. {known}")
