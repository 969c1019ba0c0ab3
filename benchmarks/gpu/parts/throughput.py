"""Images a second of a recipe's real step, on random images that lie on the device."""

from __future__ import annotations

import json
import statistics
import time

import torch
from look import Look
from measuring import ceiling, forget_peak, gib, peak, synchronize, waits_of
from steps import assignments, random_batch, read_recipe, stepper

from e2ediff.model.build import DTYPES
from e2ediff.step.count import count
from parts.forecast import FILE, key_of

_SHARDS = 4  # of the recipe's own size: enough for a rate


def run(look: Look, name: str = "dsd_in256", kind: str = "off", *words: str) -> None:
    """Note compilation, speed, share of the ceiling, peak, and where the step waits."""
    device, own = torch.device(look.device), assignments(words)
    whole = read_recipe(look, name)
    rows = whole.batch // whole.microshards
    if not look.tiny:
        own = [f"batch={rows * _SHARDS}", f"microshards={_SHARDS}", *own]
    recipe = read_recipe(look, name, f"compile={kind}", *own)
    row: dict[str, object] = {
        "recipe": name, "compile": kind, "rows": recipe.batch // recipe.microshards,
        "shards": recipe.microshards, "set": " ".join(own),
    }  # fmt: skip
    flops = count(recipe).flops[recipe.objective.phases[0]]
    best = ceiling(device, DTYPES[recipe.precision], 256 if look.tiny else 8192)
    step, parts = stepper(recipe, device, look.tiny)
    batch = random_batch(recipe, device)
    kernel = dict(parts.choices).get("attention")
    look.note(**row, kernel=kernel, gflop_per_image=flops / 1e9)

    taken, hosts = [], []
    for i in range(6 if look.tiny else 11):
        if i == 3:
            forget_peak(device)
        synchronize(device)
        began = time.perf_counter()
        step(batch, i)
        hosts.append(time.perf_counter() - began)
        synchronize(device)
        taken.append(time.perf_counter() - began)
        if i == 0:
            look.note(**row, first_step_seconds=taken[0])
    seconds = statistics.median(taken[3:])
    speed = recipe.batch / seconds
    look.note(
        **row, images_per_second=speed, tflops=speed * flops / 1e12, ceiling_tflops=best / 1e12,
        share_of_ceiling=speed * flops / best, step_ms=1e3 * seconds,
        host_ms=1e3 * statistics.median(hosts[3:]),
    )  # fmt: skip
    found, known = gib(peak(device)), look.kit / FILE
    if found is not None:
        held = torch.cuda.max_memory_reserved(device)
        look.note(**row, peak_gib=found, reserved_gib=gib(held))
    if known.exists():
        planned = json.loads(known.read_text(encoding="utf-8")).get(key_of(recipe))
        share = planned / found if planned and found else None
        look.note(**row, forecast_gib=planned, forecast_of_peak=share)
    with look.attempt(**row, what="waits"):
        where = waits_of(lambda: step(batch, 20), device)
        if where is not None:
            look.note(**row, waits_a_step=sum(where.values()), where=dict(where.most_common(8)))
    if kind != "off":
        from torch._dynamo.utils import counters

        look.note(
            **row, graphs=counters["stats"].get("unique_graphs"), frames=dict(counters["frames"]),
            breaks=sum(counters["graph_break"].values()),
        )  # fmt: skip
