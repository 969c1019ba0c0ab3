"""Networks and recipes that several benchmarks time."""

from __future__ import annotations

from e2ediff.host.plugins import load
from e2ediff.host.recipe import Recipe, load_recipe

SIZES = {
    # name: recipe and what is changed; the parameters are those of the trained network
    "quickstart": ("recipes/quickstart.yaml", ()),  # 0.44M
    "small": (
        "recipes/dsd_in256.yaml",
        ("backbone.width=384", "backbone.depth=6", "backbone.heads=6"),
    ),  # 6 blocks of 384
    "base": ("recipes/dsd_in256.yaml", ()),  # 205M
}


def read(size: str, *changes: str) -> Recipe:
    """Return a recipe by the name of its size, or by its path."""
    path, own = SIZES.get(size, (size, ()))
    return load_recipe(load(), path, [*own, *changes])
