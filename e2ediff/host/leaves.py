"""Flatten recipes into lists of values, to compare them, and format values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import attrs

from e2ediff.host.registry import options
from e2ediff.host.yaml import Node, parse_yaml


def leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield path and value of every leaf in a tree of blocks."""
    if not isinstance(tree, dict) or not tree:
        yield path, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def leaves_of(text: str, source: str) -> dict[str, str]:
    """Return path and text of every leaf of a YAML text.

    Raises:
        RecipeError: It is not YAML.
    """
    root, _ = parse_yaml(text, source)
    return {path: text_of(value) for path, value in leaves(_plain(root))} if root else {}


def _plain(node: Node) -> object:
    if isinstance(node.value, list):
        return [_plain(item) for item in node.value]
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    return node.value


def texts_in(text: str) -> set[str]:
    """Return the texts in a YAML value, at any depth; the text itself where it is no YAML."""
    root, problems = parse_yaml(f"value: {text}", "value")
    return {text} if problems or root is None else {text, *_texts(_plain(root))}


def _texts(tree: object) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    for item in (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    ):
        yield from _texts(item)


def addresses_in(part: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and value of every option of a part, at any depth, that is an address."""
    if attrs.has(cls := type(part)):
        for option in options(cls).values():
            value, where = getattr(part, option.attribute), f"{path}.{option.name}".lstrip(".")
            if isinstance(value, str) and option.address:
                yield from [(where, value)] if value else []
            else:
                yield from addresses_in(value, where)
    items = part.items() if isinstance(part, Mapping) else ()
    numbered = enumerate(part) if isinstance(part, list | tuple) else ()
    for key, item in (*items, *numbered):
        yield from addresses_in(item, f"{path}.{key}")


def text_of(value: object) -> str:
    """Format a value, or a block of options, on one line as in a recipe."""
    if attrs.has(type(value)):
        named = options(type(value)).values()
        value = {option.name: getattr(value, option.attribute) for option in named}
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {text_of(v)}' for k, v in value.items())}}}"
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)
