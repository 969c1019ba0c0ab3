"""Format a plan as text and as JSON, including its assumptions."""

from __future__ import annotations

from collections.abc import Iterator

from e2ediff.store.storage import JSON
from e2ediff_plan.devices import RESERVE
from e2ediff_plan.plan import EVALUATED, Plan
from e2ediff_plan.spread import BLOCKS

_GB = 1e9


def lines(plan: Plan) -> Iterator[str]:
    """Yield the plan, line by line."""
    r, memory = plan.recipe, plan.memory
    yield f"recipe      {r.name}: {r.total_images:,} images, {r.total_steps:,} steps of {r.batch}"
    yield f"on          {plan.gpus} x {plan.device.name}, {r.precision}"
    yield f"parameters  {plan.count.parameters:,}"
    for name, size in plan.count.modules.items():
        yield f"  {name:<30} {size:>14,}  {size / plan.count.parameters:6.1%}"
    yield from _flops(plan)
    yield from _memory(plan)
    yield from _time(plan)
    each = memory.checkpoint / _GB
    yield (
        f"disk        {plan.checkpoints * each:.2f} GB: {r.checkpoint.keep} checkpoints kept and "
        f"{plan.checkpoints - r.checkpoint.keep} more at times, {each:.2f} GB each"
    )
    if plan.snapshot_bytes:
        yield f"            {plan.snapshot_bytes / _GB:.2f} GB: snapshots of post_hoc"
    workers = f"{r.data.workers}" + f" for each of {plan.gpus} devices" * (plan.gpus > 1)
    need = f", which need up to {plan.shared_memory / _GB:.2f} GB of shared memory, /dev/shm"
    yield f"workers     {workers}{need * (r.data.workers > 0)}"
    yield "assumptions"
    for i, text in enumerate(assumptions(plan), start=1):
        yield f"  {i:>2}. {text}"


def _flops(plan: Plan) -> Iterator[str]:
    yield "GFLOP an image                   forward     backward        total"
    for phase, cost in plan.phases.items():
        if len(plan.phases) > 1:
            yield f" phase {phase}"
        rows = [*cost.passes.items(), ("all", cost.per_image)]
        for name, one in rows:
            figures = (f"{x / 1e9:12,.4g}" for x in (one.forward, one.backward, one.total))
            yield f"  {name:<26} {' '.join(figures)}"
    yield (
        f"step        {plan.flops * plan.recipe.batch / 1e12:,.4g} TFLOP of {plan.recipe.batch} "
        f"images, and {plan.optimizer_flops / 1e12:,.4g} in the optimizer on every device"
    )


def _memory(plan: Plan) -> Iterator[str]:
    memory, r = plan.memory, plan.recipe
    yield f"memory      GB on each device, of {plan.device.usable / _GB:.1f} usable"
    for name, size in memory.state.items():
        yield f"  {name:<30} {size / _GB:10.3f}"
    for phase, kept in memory.saved.items():
        name = "saved for backward" + (f" in {phase}" if len(memory.saved) > 1 else "")
        yield f"  {name:<30} {kept / _GB:10.4f}  for each image of a micro-shard"
    peak, fits = memory.peak, memory.peak <= plan.device.usable
    yield (
        f"  {'peak':<30} {peak / _GB:10.3f}  with the recipe's {r.microshards} micro-shards of "
        f"{memory.rows} images: {'fits' if fits else 'DOES NOT FIT'}"
    )
    yield f"  {'largest micro-shard':<30} {plan.rows_that_fit:>10,}  images"
    fewest = plan.microshards_that_fit
    if fewest is None:
        yield "  no number of micro-shards fits: choose a larger device or a smaller network"
    else:
        yield f"  {'fewest micro-shards':<30} {fewest:>10,}  --set microshards={fewest}"
    if plan.measured and plan.measured.peak is not None:
        found, rows = plan.measured.peak, plan.measured.rows
        ratio = memory.peak_at(rows) / found
        yield (
            f"  {'measured peak':<30} {found / _GB:10.3f}  with {rows} images; the forecast is "
            f"{ratio:.2f} of it"
        )


def _time(plan: Plan) -> Iterator[str]:
    yield (
        f"speed       {plan.images_per_second:,.1f} images/s at {plan.fraction:.0%} of "
        f"{plan.gpus} x {plan.device.flops[plan.recipe.precision] / 1e12:,.4g} TFLOP/s"
    )
    hours = plan.seconds / 3600
    yield f"time        {duration(plan.seconds)}, {hours * plan.gpus:,.2f} device hours"
    yield f"  {'training':<30} {duration(plan.training_seconds):>10}"
    for name, look in plan.looks.items():
        if look.flops:
            spent, each = duration(plan.seconds_of(look)), look.flops / 1e12
            wide = ", in float32" * (look.float32 and plan.recipe.precision != "float32")
            yield f"  {name:<30} {spent:>10}  {look.times} times, {each:,.4g} TFLOP each{wide}"
    yield (
        f"sampling    {plan.calls.denoise} network calls and {plan.calls.decode} decoding an "
        f"image, {plan.sample_flops / 1e9:,.4g} GFLOP; "
        f"{plan.pace / plan.sample_flops:,.1f} images/s on one device"
    )
    yield f"evaluation  {EVALUATED:,} samples: {duration(plan.evaluation_seconds)} on one device"


def duration(seconds: float) -> str:
    """Format seconds in a readable unit."""
    for unit, size, below in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 72)):
        if seconds / size < below:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


_PARALLEL = {
    "ddp": "Under DDP each device holds everything; gradients lie in buckets from the first pass "
    "on.",
    "fsdp2": "Under FSDP2 weights, averages, gradients and optimizer state are split evenly over "
    f"the devices; weights outside of blocks are whole during passes, of blocks {BLOCKS} times "
    "the largest, and gradients too where a device has several micro-shards.",
}


def assumptions(plan: Plan) -> list[str]:
    """List everything that was assumed rather than counted, with its source."""
    rate = plan.device.flops[plan.recipe.precision] / 1e12
    reached = (
        f"{plan.fraction:.1%} of it is what a real step of {plan.measured.rows} images reached "
        f"just now, in {plan.measured.seconds:.3f} s"
        if plan.measured
        else f"{plan.fraction:.0%} of it is assumed to be reached (--fraction); `--device "
        "measured` finds the share of the machine at hand"
    )
    found = [
        f"A device multiplies matrices at {rate:,.4g} TFLOP/s in {plan.recipe.precision}: "
        f"{plan.device.source}.",
        f"Of that ceiling, {reached}. Sampling and evaluation reach the same, in this precision "
        "(`--precision`); work in float32 reaches this share of float32's ceiling.",
        "FLOPs are those of matrix products, convolutions and attention, counted by torch's "
        "FlopCounterMode, two a multiply-add, without recomputation; all other work is in the "
        "share above.",
        "Memory is what torch's allocator is asked for, followed through a step of fake tensors, "
        "activation checkpointing included and torch.compile left out, which keeps less; "
        "attention keeps no matrix of scores, as flash kernels do.",
        "The device's share of the batch lies on it in float32.",
        "Waiting for data and for the disk is left out, and so are validation runs of your own.",
        "What diagnostics and metrics compute from latents and features is left out, and so is an "
        "evaluation's feature network; a solver that chooses its steps is counted "
        "on a denoiser that answers zero.",
    ]
    if plan.device.usable < plan.device.memory:
        what = (
            f"{RESERVE:.0%} of {plan.device.memory / _GB:.0f} GB are left to the context, "
            "libraries and fragmentation: our choice."
        )
        found.append(what)
    if plan.gpus > 1:
        what = (
            f"{plan.gpus} devices are {plan.gpus} times as fast: gradients travel during the "
            "backward pass. Diagnoses, previews and scores are made on one while "
            "the others wait."
        )
        found.append(what)
        found.append(_PARALLEL[plan.recipe.parallel])
    if plan.recipe.compile == "auto":
        what = (
            "`compile: auto` compiles where a compiler is found and a forecast says that it pays; "
            "what it gains is not in these figures."
        )
        found.append(what)
    if plan.recipe.checkpoint_activations:
        what = (
            "Blocks are computed once more in the backward pass, which is in the memory and not "
            "in the FLOPs: a step takes up to a third longer than is said here."
        )
        found.append(what)
    return found


def as_json(plan: Plan) -> dict[str, JSON]:
    """Return the plan as JSON, in bytes, seconds and FLOPs."""
    r, memory = plan.recipe, plan.memory
    return {
        "recipe": r.name,
        "device": plan.device.name,
        "gpus": plan.gpus,
        "precision": r.precision,
        "flops_ceiling": plan.device.flops[r.precision],
        "fraction": plan.fraction,
        "images": r.total_images,
        "steps": r.total_steps,
        "batch": r.batch,
        "microshards": r.microshards,
        "parameters": plan.count.parameters,
        "modules": dict(plan.count.modules),
        "flops_per_image": {
            phase: {
                name: {"forward": one.forward, "backward": one.backward}
                for name, one in [*cost.passes.items(), ("all", cost.per_image)]
            }
            for phase, cost in plan.phases.items()
        },
        "optimizer_flops_per_step": plan.optimizer_flops,
        "state_bytes": dict(memory.state),
        "saved_bytes_per_image": dict(memory.saved),
        "peak_bytes": memory.peak,
        "peak_bytes_per_image": memory.per_image,
        "usable_bytes": plan.device.usable,
        "largest_microshard": plan.rows_that_fit,
        "fewest_microshards": plan.microshards_that_fit,
        "images_per_second": plan.images_per_second,
        "training_seconds": plan.training_seconds,
        "looking_seconds": plan.looking_seconds,
        "seconds": plan.seconds,
        "device_hours": plan.seconds / 3600 * plan.gpus,
        "looks": {
            n: {"times": x.times, "flops": x.flops, "seconds": plan.seconds_of(x)}
            for n, x in plan.looks.items()
        },
        "network_calls_per_sample": plan.calls.denoise,
        "flops_per_sample": plan.sample_flops,
        "evaluation_seconds": plan.evaluation_seconds,
        "checkpoint_bytes": memory.checkpoint,
        "disk_bytes": memory.checkpoint * plan.checkpoints + plan.snapshot_bytes,
        "shared_memory_bytes": plan.shared_memory,
        "measured": None
        if plan.measured is None
        else {
            "images": plan.measured.rows,
            "seconds": plan.measured.seconds,
            "peak_bytes": plan.measured.peak,
        },
        "assumptions": list(assumptions(plan)),
    }
