"""Flatten recipes into lists of values, to compare them, and format values."""

from __future__ import annotations

import json
from collections.abc import Iterator

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
