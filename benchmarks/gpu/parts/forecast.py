"""The peaks that `plan` forecasts, kept for `throughput`, as computing them takes minutes."""

from __future__ import annotations

import json

from e2ediff_plan.memory import follow
from look import Look
from steps import read_recipe

from e2ediff.host.recipe import Recipe

FILE = "forecast.json"


def run(look: Look) -> None:
    """Write the peaks of the recipes of the plans into the kit."""
    found: dict[str, float] = {}
    look.kit.mkdir(exist_ok=True)
    for name in ("dsd_in256",) if look.tiny else ("dsd_in256", "dsd_in256_m", "dsd_in256_s"):
        whole = read_recipe(look, name)
        rows = whole.batch // whole.microshards
        own = [] if look.tiny else [f"batch={4 * rows}", "microshards=4"]
        recipe = read_recipe(look, name, *own)
        found[key_of(recipe)] = follow(recipe, like_cuda=True).peak / 2**30
        look.note(recipe=name, rows=rows, forecast_gib=found[key_of(recipe)])
        (look.kit / FILE).write_text(json.dumps(found), encoding="utf-8")


def key_of(recipe: Recipe) -> str:
    """Name a recipe at one number and size of micro-shards."""
    rows = recipe.batch // recipe.microshards
    again = ":recomputed" if recipe.checkpoint_activations else ""
    return f"{recipe.name}:{rows}:{recipe.microshards}{again}"
