"""Recipes as flat lists of values, to compare them."""

from __future__ import annotations

import json

from e2ediff.host.yaml import Node, parse_yaml


def leaves(node: Node, path: str = "") -> dict[str, str]:
    """Path and text of every value of a tree that is no block."""
    if isinstance(node.value, dict) and node.value:
        found: dict[str, str] = {}
        for key, child in node.value.items():
            found |= leaves(child, f"{path}.{key}" if path else key)
        return found
    return {path: _text(node)}


def leaves_of(text: str, source: str) -> dict[str, str]:
    """`leaves` of a YAML text.

    Raises:
        RecipeError: It is no YAML.
    """
    root, _ = parse_yaml(text, source)
    return leaves(root) if root else {}


def _text(node: Node) -> str:
    if isinstance(node.value, list):
        return f"[{', '.join(_text(item) for item in node.value)}]"
    if isinstance(node.value, dict):
        return f"{{{', '.join(f'{k}: {_text(v)}' for k, v in node.value.items())}}}"
    if isinstance(node.value, bool) or node.value is None:
        return json.dumps(node.value)
    return str(node.value)
