"""Writes the generated pages of `docs/reference`: parts, recipe, hooks, contracts.

    python docs/generate.py

A test compares them with the code, so a new part, option or hook without its line fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import attrs

from e2ediff.backbone import Backbone, Decode, Denoise, Encode, FusedBackbone, LatentSpec, Output
from e2ediff.condition import (
    ClassLabels,
    Condition,
    ConditionSpec,
    Labels,
    Tokens,
    TokenSpec,
    Vectors,
    VectorSpec,
)
from e2ediff.data import Batch, DataSource, ImageSpec
from e2ediff.denoiser import Denoiser
from e2ediff.diagnostic import Probe
from e2ediff.features import FeatureNetwork
from e2ediff.figure import Figure
from e2ediff.host import hookspecs, recipe
from e2ediff.host.listing import option_rows, summary
from e2ediff.host.plugins import Host, load
from e2ediff.host.registry import KINDS, contracts
from e2ediff.interpolant import Estimate
from e2ediff.latent import LatentContract, LatentNorm, Latents
from e2ediff.metric import FeatureSet, MetricValue, Moments
from e2ediff.objective import Draw, Nets, Terms
from e2ediff.tracker import Tracker

# What the parts build, and the values that pass between them.
BUILT = (
    Backbone,
    FusedBackbone,
    Denoiser,
    DataSource,
    Condition,
    ConditionSpec,
    Tracker,
    FeatureNetwork,
)
VALUES = (ImageSpec, Batch, ClassLabels, VectorSpec, TokenSpec, Labels, Vectors, Tokens,
          LatentSpec, LatentNorm, LatentContract, Latents, Encode, Decode, Denoise, Output, Nets,
          Draw, Terms, Estimate, Probe, FeatureSet, Moments, MetricValue, Figure)  # fmt: skip

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
    """Every hook with its arguments and documentation, after what holds for all of them."""
    lines = ["# Hooks", "", "Made by `docs/generate.py` from the code.", ""]
    lines += [inspect.cleandoc(hookspecs.__doc__ or "").partition("\n\n    ")[0], ""]
    for name, function in vars(hookspecs).items():
        if inspect.isfunction(function) and hasattr(function, "e2ediff_spec"):
            arguments = ", ".join(inspect.signature(function).parameters)
            lines += [f"## {name}({arguments})", "", inspect.cleandoc(function.__doc__ or ""), ""]
    return "\n".join(lines).rstrip() + "\n"


def contracts_page() -> str:
    """Every contract with its methods, and the values that they take and return."""
    lines = ["# Contracts", "", "Made by `docs/generate.py` from the code.", ""]
    lines += [
        "A part is a frozen attrs class below one of these.",
        "A subclass must define what is marked *required*; the rest is optional.",
        "Shapes stand in the text: B batch, C H W image, N latent tokens, D latent channels, "
        "W trunk width.",
        "",
    ]
    for plural, kind, _ in KINDS:
        cls = contracts()[plural]
        lines += [f"## {kind}: `{cls.__module__}.{cls.__name__}`", ""]
        lines += [f'Registered by `add("{plural}", NAME, CLASS)`.', ""]
        lines += ["```text", _doc(cls), "```", ""]
        lines += _methods(cls)
    lines += ["## What they take and return", ""]
    for cls in (*BUILT, *VALUES):
        lines += [f"### `{cls.__module__}.{cls.__name__}`", "", "```text", _doc(cls), "```", ""]
        if attrs.has(cls):
            own = [f"`{f.name}`" for f in attrs.fields(cls) if not f.name.startswith("_")]
            lines += [f"Fields: {', '.join(own)}.", ""] if own else []
        lines += _methods(cls)
    return "\n".join(lines).rstrip() + "\n"


def _methods(cls: type) -> list[str]:
    """Public methods and properties that the class itself defines, each with its docstring."""
    lines = []
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else member
        function = getattr(function, "__wrapped__", function)
        function = function.__func__ if isinstance(function, classmethod) else function
        if (name.startswith("_") and name not in ("__call__", "__len__")) or not (
            inspect.isfunction(function) and function.__doc__
        ):
            continue
        required = name in getattr(cls, "__abstractmethods__", ())
        arguments = "" if isinstance(member, property) else _signature(function)
        mark = " *required*" if required else ""
        lines += [f"**`{name}{arguments}`**{mark}", "", "```text"]
        lines += [inspect.cleandoc(function.__doc__), "```", ""]
    return lines


def _signature(function: Callable[..., object]) -> str:
    """Arguments with their types as written, `self` left out."""
    found = inspect.signature(function)
    kept = [p for name, p in found.parameters.items() if name not in ("self", "cls")]
    return str(found.replace(parameters=kept)).replace("'", "")


def pages() -> dict[Path, str]:
    """The generated pages by path."""
    host = load(entry_points=False)
    return {
        REFERENCE / "parts.md": parts_page(host),
        REFERENCE / "recipe.md": recipe_page(),
        REFERENCE / "hooks.md": hooks_page(),
        REFERENCE / "contracts.md": contracts_page(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.name)
