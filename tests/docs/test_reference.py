"""The documentation tells the truth: generated pages, links, tables, and the README's code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

import e2ediff.errors
from e2ediff import hookimpl
from e2ediff.backbone import Decode
from e2ediff.errors import E2EDiffError
from e2ediff.host.plugins import load
from e2ediff.losses import PixelLoss, mean_clean_loss, noise_levels
from e2ediff.objective import Objective, Terms, sg

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "plugins").glob("*/README.md")),
]


def _generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_those_of_the_code():
    for path, text in _generator().pages().items():
        assert path.read_text(encoding="utf-8") == text, (
            f"run python docs/generate.py: {path.name}"
        )


def _headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    titles = re.findall(r"^#+ (.+)$", re.sub(r"\]\([^)]*\)", "]", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        target, _, heading = link.partition("#")
        if not target.startswith("http"):
            place = page.parent / target if target else page
            assert place.exists(), f"{page.name} links to {link}"
            assert not heading or heading in _headings(place), f"{page.name} links to {link}"


def test_every_picture_and_data_file_of_the_pages_is_named_by_one():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown = [*(ROOT / "docs/images").iterdir(), *(ROOT / "docs/results/data").iterdir()]
    assert not [file.name for file in shown if f"/{file.name}" not in text]


def test_every_exit_code_of_an_error_is_documented():
    text = (ROOT / "docs/reference/exit-codes.md").read_text(encoding="utf-8")
    documented = set(map(int, re.findall(r"^\| (\d+) \|", text, re.MULTILINE)))
    classes = [c for c in vars(e2ediff.errors).values() if isinstance(c, type)]
    codes = {c.exit_code for c in classes if issubclass(c, E2EDiffError)}
    assert codes <= documented


def test_every_command_in_the_readme_exists():
    """Built in, or of a plugin of this repository, installed or not."""
    from e2ediff.cli import group
    from e2ediff.host.checkout import uninstalled_plugins

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(
        re.findall(
            r"e2ediff (run|sample|parts|check|\w+) ",
            " ".join(line for line in text.splitlines() if line.startswith("$")),
        )
    )
    known = set(group.list_commands(None))
    for plugin in uninstalled_plugins([str(ROOT / "README.md")]):
        known |= {name.partition(" ")[0] for name in plugin.parts("commands")}
    assert commands - {"plugins"} <= known
    for recipe in re.findall(r"recipes/\w+\.yaml", text):
        assert (ROOT / recipe).exists()


def test_the_objective_in_the_readme_works_as_printed():
    from e2ediff_testing import check_objective

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    given = (attrs, torch, nn, hookimpl, Decode, PixelLoss, mean_clean_loss, noise_levels)
    names = {getattr(v, "__name__", "hookimpl"): v for v in (*given, Objective, Terms, sg)}
    names["hookimpl"] = hookimpl
    exec(compile(code, "README.md", "exec"), names)
    check_objective(names["VarianceFloor"]())


def test_every_convention_is_documented_with_its_rules():
    from e2ediff.evaluate.conventions import CONVENTIONS

    text = (ROOT / "docs/explanation/scores.md").read_text(encoding="utf-8")
    row = r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \| (\w+)[^|]* \| ([\d,]+) \|"
    rows = {name: cells for name, *cells in re.findall(row, text, re.MULTILINE)}
    words = {"nearest": "nearest", "half_up": "floor", "down": "down"}
    resizes = {"network": "network's", "pil_bicubic": "Pillow"}
    assert set(rows) == set(CONVENTIONS)
    for name, one in CONVENTIONS.items():
        rounding, resize, labels, count = rows[name]
        assert rounding.startswith(words[one.rounding]), name
        assert resize.startswith(resizes[one.resize]), name
        assert (labels, int(count.replace(",", ""))) == (one.labels, one.count), name
        assert one.sources, name


def test_every_part_says_in_its_first_line_what_it_is():
    for registry in load(entry_points=False).registries.values():
        for part in registry:
            first = (part.cls.__doc__ or "").strip().split("\n")[0]
            assert first.endswith((".", ":")), part.name


def test_every_option_of_a_part_is_named_in_its_documentation():
    for registry in load(entry_points=False).registries.values():
        for part in registry:
            text = " ".join(c.__doc__ or "" for c in part.cls.__mro__ if c is not object)
            for field in attrs.fields(part.cls):
                assert f"`{field.name}`" in text, f"{part.name}: `{field.name}` is not described"
