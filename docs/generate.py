"""Writes the generated pages of `docs/reference`: parts, recipe, hooks.

    python docs/generate.py

A test compares them with the code, so a new part, option or hook without its line fails.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import attrs

from e2ediff.host import hookspecs, recipe
from e2ediff.host.listing import option_rows, summary
from e2ediff.host.plugins import Host, load

REFERENCE = Path(__file__).parent / "reference"


def _table(cls: type) -> list[str]:
    rows = [f"| `{name}` | {kind} | `{default}` |" for name, kind, default in option_rows(cls)]
    return ["| option | type | default |", "|---|---|---|", *rows, ""] if rows else []


def _doc(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


def parts_page(host: Host) -> str:
    """Every built-in part with its options and documentation."""
    lines = ["# Parts", "", "Made by `docs/generate.py` from the code.", ""]
    for registry in host.registries.values():
        lines += [f"## {registry.plural}", ""]
        known = sorted(registry, key=lambda part: part.name)
        lines += [f"- `{part.name}`: {summary(part)}" for part in known] + [""]
        for part in known:
            lines += [f"### {part.name}", "", "```text", _doc(part.cls), "```", ""]
            lines += _table(part.cls)
    return "\n".join(lines).rstrip() + "\n"


def recipe_page() -> str:
    """Every key of a recipe and of its blocks."""
    lines = ["# Recipe", "", "Made by `docs/generate.py` from the code.", ""]
    blocks = [recipe.Recipe] + [
        cls
        for name, cls in vars(recipe).items()
        if attrs.has(cls) and cls.__module__ == recipe.__name__ and cls is not recipe.Recipe
    ]
    for cls in blocks:
        lines += [f"## {cls.__name__}", "", "```text", _doc(cls), "```", "", *_table(cls)]
    return "\n".join(lines).rstrip() + "\n"


def hooks_page() -> str:
    """Every hook with its arguments and documentation."""
    lines = ["# Hooks", "", "Made by `docs/generate.py` from the code.", ""]
    for name, function in vars(hookspecs).items():
        if inspect.isfunction(function) and hasattr(function, "e2ediff_spec"):
            arguments = ", ".join(inspect.signature(function).parameters)
            lines += [f"## {name}({arguments})", "", inspect.cleandoc(function.__doc__ or ""), ""]
    return "\n".join(lines).rstrip() + "\n"


def pages() -> dict[Path, str]:
    """The generated pages by path."""
    host = load(entry_points=False)
    return {
        REFERENCE / "parts.md": parts_page(host),
        REFERENCE / "recipe.md": recipe_page(),
        REFERENCE / "hooks.md": hooks_page(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.name)
