"""The source `shards` as a part of a plugin: registered, documented, and written in recipes."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
from e2ediff_data.shards import Shards
from tiny_recipe import tiny

from e2ediff.host.plugins import load
from e2ediff.host.recipe import dump_recipe, parse_recipe
from e2ediff.host.registry import options

HOST = load()
README = Path(__file__).parents[1] / "README.md"


def test_the_plugin_registers_its_source_and_no_other_part() -> None:
    own = [
        (plural, part.name, part.cls)
        for plural, registry in HOST.registries.items()
        for part in registry
        if part.plugin.distribution == "e2ediff-data"
    ]
    assert own == [("sources", "shards", Shards)]


def test_a_recipe_that_names_it_is_dumped_and_read_back_equal() -> None:
    config = Shards(path="prepared", size=16, classes=2)
    recipe = attrs.evolve(parse_recipe(HOST, tiny(), "tiny"), data=config)
    text = dump_recipe(HOST, recipe)
    assert "name: shards" in text
    assert parse_recipe(HOST, text, "dumped") == recipe
    assert all(f"{option}:" in text for option in options(Shards))


def test_the_readme_lists_it_with_its_options() -> None:
    text = README.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", text, re.MULTILINE)
    ((name, told),) = rows
    shared = re.search(r"The source also has (.*) of `image_folder`", text)
    assert name == "shards"
    assert {*re.findall(r"`(\w+)`", told + shared[1])} == {*options(Shards)}
