"""Each source of the plugin keeps its contract, and a recipe that names it reads back equal."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import e2ediff_testing as testing
import numpy as np
import pytest
from pictures import as_arrow, as_class_tars, as_npz, as_parquet, as_shards, as_zip, write_tree
from tiny_recipe import tiny

from e2ediff.host.plugins import load
from e2ediff.host.recipe import dump_recipe, parse_recipe
from e2ediff.host.registry import options

HOST = load()
NAMES = ["archive", "arrays", "arrow", "class_tars", "parquet", "tar_shards"]
README = Path(__file__).parents[1] / "README.md"


def config_of(name: str, place: Path) -> object:
    """A source of six images of two classes."""
    if name in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    tree = write_tree(place / "tree", [3, 3], size=(40, 17))
    x = np.random.default_rng(0).integers(256, size=(6, 20, 17, 3), dtype=np.uint8)
    made = {
        "archive": lambda: as_zip(tree, place / "pictures.zip"),
        "class_tars": lambda: as_class_tars(tree, place / "train.tar"),
        "tar_shards": lambda: as_shards(tree, place / "shards", each=4),
        "parquet": lambda: as_parquet(tree, place / "parquet"),
        "arrow": lambda: as_arrow(tree, place / "saved"),
        "arrays": lambda: as_npz(x, np.arange(6) % 2, place / "x.npz"),
    }[name]
    option = "images" if name == "arrays" else "path"
    part = HOST.registries["sources"].get(name)
    return part(**{option: str(made())}, size=16, classes=2)


def test_the_plugin_registers_its_sources_and_nothing_else() -> None:
    own = [
        (plural, part.name)
        for plural, registry in HOST.registries.items()
        for part in registry
        if part.plugin.distribution == "e2ediff-sources"
    ]
    assert own == [("sources", name) for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_a_source_keeps_its_contract(name: str, tmp_path: Path) -> None:
    testing.check_source(config_of(name, tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_that_names_a_source_is_dumped_and_read_back_equal(
    name: str, tmp_path: Path
) -> None:
    config = config_of(name, tmp_path)
    recipe = attrs.evolve(parse_recipe(HOST, tiny(), "tiny"), data=config)
    text = dump_recipe(HOST, recipe)
    assert parse_recipe(HOST, text, "dumped") == recipe
    assert all(f"{option}:" in text for option in options(type(config)))


def test_the_readme_lists_every_source_with_its_options() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", README.read_text("utf-8"), re.MULTILINE)
    shared = re.search(r"All but `arrays` have (.*) of `image_folder`", README.read_text("utf-8"))
    common = {*re.findall(r"`(\w+)`", shared[1])}
    assert sorted(name for name, _ in rows) == NAMES
    for name, told in rows:
        listed = {*re.findall(r"`(\w+)`", told)} | (common if name != "arrays" else set())
        assert listed == {*options(HOST.registries["sources"].get(name))}, name
