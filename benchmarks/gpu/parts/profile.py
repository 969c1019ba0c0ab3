"""One step under torch's profiler: the kernels that take the time, and the gaps between them."""

from __future__ import annotations

import time

import torch
from look import Look
from measuring import synchronize
from steps import assignments, random_batch, read_recipe, stepper
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

_SHARDS = 2


def run(look: Look, name: str = "dsd_in256", kind: str = "off", *words: str) -> None:
    """Note the 25 longest kernels of a step; `profile.txt` has more."""
    device, own = torch.device(look.device), assignments(words)
    whole = read_recipe(look, name)
    if not look.tiny:
        rows = whole.batch // whole.microshards
        own = [f"batch={rows * _SHARDS}", f"microshards={_SHARDS}", *own]
    recipe = read_recipe(look, name, f"compile={kind}", *own)
    step, _ = stepper(recipe, device, look.tiny)
    batch = random_batch(recipe, device)
    for i in range(3):
        step(batch, i)
    synchronize(device)
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    began = time.perf_counter()
    with profiled(activities=activities) as seen:
        step(batch, 3)
        synchronize(device)
    wall = time.perf_counter() - began
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows_of_all = seen.key_averages()
    kernels = [row for row in rows_of_all if getattr(row, key, 0) > 0]
    if cuda:  # an operation and its kernel both carry the time
        alone = [row for row in kernels if "cuda" in str(row.device_type).lower()]
        kernels = alone or kernels
    kernels.sort(key=lambda row: -float(getattr(row, key)))
    busy = sum(float(getattr(row, key)) for row in kernels)
    look.note(
        recipe=name, compile=kind, wall_ms=1e3 * wall, busy_ms=busy / 1e3,
        launches=sum(row.count for row in kernels), kinds=len(kernels),
    )  # fmt: skip
    for row in kernels[:25]:
        taken = float(getattr(row, key))
        look.note(kernel=row.key[:90], ms=taken / 1e3, share=taken / busy, calls=row.count)
    with open(look.out / "profile.txt", "a", encoding="utf-8") as file:
        file.write(f"{name} compile={kind} {' '.join(own)}\n")
        file.write(rows_of_all.table(sort_by=key, row_limit=60, max_name_column_width=90) + "\n")
