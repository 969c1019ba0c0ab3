"""Parse recipes into a tree with the position of every key and value, which `--set` edits.

Scalars follow YAML 1.2 (`1e-4` is a number, `on` a word, `0777` is 777). Anchors, aliases, tags
and several documents are not supported: recipes do not need them, and without them no short text
expands to a huge value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NoReturn

import attrs
import yaml

from e2ediff.errors import Problem, RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_VALUES = 10_000

Scalar = None | bool | int | float | str

_WORDS: Mapping[str, bool | None] = MappingProxyType(
    {"": None, "~": None}
    | dict.fromkeys(("null", "Null", "NULL"))
    | dict.fromkeys(("true", "True", "TRUE"), True)
    | dict.fromkeys(("false", "False", "FALSE"), False)
)
_COLOUR = re.compile(r"[ \t]*#[0-9a-fA-F]{3,8}[ \t]*(\r?\n|$)")
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_BASED_INT = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
# Python refuses to read longer integers, and no recipe needs one.
_MAX_DIGITS = 400
# A bare text with what YAML would take for a comment.
_HASH = re.compile(r"""(?!.*:\s)(?=#|[^\n\[{"'|>&*!#][^\n]*\s#)[^\n]*""")


@attrs.define
class Node:
    """A value and its position; `keys` has the position of each key of a block.

    `reported` is set if a problem of the value is known: it is not reported again.
    """

    value: Scalar | list[Node] | dict[str, Node]
    place: str
    keys: dict[str, str] = attrs.field(factory=dict)
    reported: bool = False

    @classmethod
    def of(cls, value: Any, place: str) -> Node:
        """Make one of plain lists and mappings, all at one position."""
        if isinstance(value, Mapping):
            return cls({key: cls.of(item, place) for key, item in value.items()}, place)
        if isinstance(value, list | tuple):
            return cls([cls.of(item, place) for item in value], place)
        return cls(value, place)


def resolve(text: str) -> Scalar:
    """Resolve a plain (unquoted) scalar by YAML 1.2's core schema, with 1_000 as an int."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > _MAX_DIGITS:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _BASED_INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "") if text[-1] in "fFnN" else text)
    return text


def path_join(where: str, key: str | int) -> str:
    """Return the path of a child: `objective` and `floor` give `objective.floor`."""
    word = str(key) if str(key).isprintable() and len(str(key)) < 60 else repr(str(key)[:40])
    return word if where == "recipe" else f"{where}.{word}"


class _Loader(yaml.SafeLoader):
    """Refuses what recipes do not use, before reading on.

    Deep nesting would overflow the stack, and aliases expand a short text to a huge value.
    """

    def __init__(self, text: str, refuse: Callable[[yaml.Mark, str, str], NoReturn]) -> None:
        self.refuse = refuse
        self.values = self.depth = 0
        super().__init__(text)

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        """Check the next event, then compose it; `index` is None for keys of a block."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        at, scalar = event.start_mark, isinstance(event, yaml.ScalarEvent)
        self.values += 1
        if self.values > MAX_VALUES:
            self.refuse(at, f"contains more than {MAX_VALUES:,} values.", "Is this a recipe?")
        if self.depth > MAX_DEPTH:
            self.refuse(at, f"is nested deeper than {MAX_DEPTH} levels.", "Flatten it.")
        if event.anchor:  # an alias has one too
            self.refuse(at, "recipes have no anchors (&) or aliases (*).", "Copy the value.")
        if event.tag:
            self.refuse(at, "recipes have no tags (!).", "Quote the value if it is text.")
        if scalar and _NO_TEXT.search(event.value):
            self.refuse(
                at, "an escape sequence does not stand for a character that text can hold.", ""
            )
        if isinstance(parent, yaml.MappingNode) and index is None and not scalar:
            self.refuse(at, "a key must be a word.", "Quote it if it is meant as text.")
        self.depth += 1
        node = super().compose_node(parent, index)  # type: ignore[arg-type]
        self.depth -= 1
        return node

    def document(self) -> yaml.Node | None:
        """Return the only document; None if the text is empty."""
        try:
            root = self.get_node() if self.check_node() else None
            more = self.peek_event() if self.check_node() else None  # type: ignore[no-untyped-call]
        except yaml.MarkedYAMLError as exc:
            what = ", ".join(part for part in (exc.context, exc.problem) if part)
            tab = "'\\t'" in what
            hint = "Indent with spaces, not tabs." if tab else "Check colons, quotes and indents."
            mark = exc.problem_mark or exc.context_mark or self.get_mark()
            self.refuse(mark, f"not valid YAML: {what}.", hint)
        except (ValueError, OverflowError):
            # The scanner passes "\UFFFFFFFF" to chr() and `%YAML 9...9` to int() unchecked.
            what = "not valid YAML: a number in an escape or a directive is out of range."
            self.refuse(self.get_mark(), what, "Write the character itself.")
        if more:
            self.refuse(
                more.start_mark, "a second document starts here.", "Keep one recipe per file."
            )
        return root


def _place(mark: yaml.Mark, source: str, marks: bool) -> str:
    return f"{source}:{mark.line + 1}:{mark.column + 1}" if marks else source


@lru_cache(maxsize=16)
def _composed(text: str, source: str, marks: bool) -> yaml.Node | None:
    """Return the nodes of a text, which nobody changes; a sweep reads its run's hundreds of times.

    Raises:
        RecipeError: The text is not YAML, or uses more of YAML than recipes do.
    """

    def refuse(mark: yaml.Mark, what: str, hint: str) -> NoReturn:
        raise RecipeError(source, [Problem("recipe", what, _place(mark, source, marks), hint)])

    if len(text) > MAX_BYTES:
        start = yaml.Mark("", 0, 0, 0, None, 0)
        refuse(start, f"is longer than {MAX_BYTES:,} characters.", "Is this a recipe?")
    try:
        return _Loader(text, refuse).document()
    except yaml.reader.ReaderError as exc:
        before = text[: exc.position]
        column = exc.position - (before.rfind("\n") + 1)
        what = f"contains the character U+{ord(text[exc.position]):04X}, which YAML forbids."
        mark = yaml.Mark("", exc.position, before.count("\n"), column, None, 0)
        refuse(mark, what, "Remove it, or check whether the file is damaged.")


def parse_yaml(text: str, source: str, *, marks: bool = True) -> tuple[Node | None, list[Problem]]:
    """Return the tree of a text, `None` if it is empty, and its duplicate keys.

    Args:
        text: YAML.
        source: Prefix of positions: `recipe.yaml` gives `recipe.yaml:14:5`.
        marks: False leaves the line and column out, for a text that has only one line.

    Raises:
        RecipeError: The text is not YAML, or uses more of YAML than recipes do.
    """
    root = _composed(text, source, marks)
    problems: list[Problem] = []

    def place(mark: yaml.Mark) -> str:
        return _place(mark, source, marks)

    def tree(node: yaml.Node, where: str) -> Node:
        here = place(node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            if _COLOUR.match(text, node.end_mark.index) and not node.value and not node.style:
                what = "is empty: YAML reads what follows # as a comment."
                problems.append(Problem(where, what, here, "Put quotes around the colour."))
            return Node(resolve(node.value) if node.style is None else node.value, here)
        if isinstance(node, yaml.SequenceNode):
            return Node([tree(v, path_join(where, i)) for i, v in enumerate(node.value)], here)
        block: dict[str, Node] = {}
        keys: dict[str, str] = {}
        for key, value in node.value:
            child = tree(value, path_join(where, word := key.value))
            if word in keys:
                what = f"{word[:60]!r} is written twice, first at {keys[word]}."
                problems.append(Problem(where, what, place(key.start_mark), "Remove one of them."))
            else:
                block[word], keys[word] = child, place(key.start_mark)
        return Node(block, here, keys)

    return (None if root is None else tree(root, "recipe")), problems


def set_value(root: Node, assignment: str, place: str) -> list[Problem]:
    """Apply `a.b=c` to the tree; whether the schema has `a.b` is checked later.

    A bare name in place of a part with another name drops the options of that part; setting an
    option of a bare name turns it into a block. A `#` in a bare text begins no comment: it belongs
    to a path, or to a colour.

    Returns:
        Problems of the assignment, at `place`.
    """
    path, sign, text = assignment.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not sign or not all(keys):
        hint = "Write, for example, --set objective.floor=0.5."
        return [Problem("recipe", f"{assignment[:60]!r} is not path=value.", place, hint)]
    try:
        value, problems = parse_yaml(text, place, marks=False)
    except RecipeError as exc:
        return list(exc.problems)
    if _HASH.fullmatch(text.strip()) and not problems:
        value = Node(text.strip(), place)
    value = value or Node(None, place)
    node, where = root, "recipe"
    for key in keys[:-1]:
        child, problem = _child(node, key, where, place)
        if problem:
            return [problem]
        where = path_join(where, key)
        if child is None or child.value is None:
            child = Node({}, place)
        elif isinstance(child.value, str):
            child = Node({"name": child}, place, {"name": child.place})
        elif not isinstance(child.value, dict | list):
            return [Problem(where, f"is {child.value!r}, which has no options.", place)]
        _put(node, key, child, place)
        node = child
    old, problem = _child(node, keys[-1], where, place)
    if problem:
        return [problem]
    if not (old and _same_part(old, value)):
        _put(node, keys[-1], value, place)
    return problems


def _child(node: Node, key: str, where: str, place: str) -> tuple[Node | None, Problem | None]:
    if isinstance(node.value, dict):
        return node.value.get(key), None
    assert isinstance(node.value, list)
    if key.isdecimal() and len(key) < 6 and int(key) < len(node.value):
        return node.value[int(key)], None
    what = f"has no item {key[:60]!r}; its length is {len(node.value)}."
    return None, Problem(where, what, place, "Items are counted from 0.")


def _put(node: Node, key: str, child: Node, place: str) -> None:
    if isinstance(node.value, list):
        node.value[int(key)] = child
    elif isinstance(node.value, dict):
        if node.value.get(key) is not child:
            node.keys[key] = place
        node.value[key] = child


def _same_part(old: Node, new: Node) -> bool:
    name = old.value.get("name") if isinstance(old.value, dict) else None
    return name is not None and isinstance(new.value, str) and name.value == new.value


class _Dumper(yaml.SafeDumper):
    """Quotes only what `resolve` would not read back as text."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def resolve(
        self, kind: type[yaml.Node], value: str | None, implicit: tuple[bool, bool]
    ) -> str:
        if kind is not yaml.ScalarNode:
            return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]
        meant = resolve(value or "") if implicit[0] else ""
        return f"tag:yaml.org,2002:{'null' if meant is None else type(meant).__name__}"


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML would write U+0085 unquoted, and read it back as a line break.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_float(dumper: yaml.SafeDumper, number: float) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(number))


_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(float, _represent_float)


def dump_yaml(tree: object) -> str:
    """Format dicts, lists and scalars as YAML, which `parse_yaml` reads back as equal values."""
    return yaml.dump(
        tree,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=99,
    )
