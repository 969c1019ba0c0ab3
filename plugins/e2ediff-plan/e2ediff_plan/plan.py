"""Estimate time, memory and disk of a recipe on a device, from counted costs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch

from e2ediff.errors import Problem, RecipeError
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.loading.shared_memory import divide
from e2ediff.model.build import averagings, build_nets, tracked
from e2ediff.model.inference import ROWS
from e2ediff.monitor.probe import GRADIENT_IMAGES, chosen_diagnostics, preview_columns
from e2ediff.step.count import Count, count
from e2ediff_plan.devices import GPUS, Device, cpu
from e2ediff_plan.flops import (
    PhaseCost,
    count_features,
    count_inference,
    count_latent_gradients,
    count_passes,
)
from e2ediff_plan.measure import Measured, measured_device, measured_step
from e2ediff_plan.memory import Memory, follow
from e2ediff_plan.sampling import Calls, count_calls
from e2ediff_plan.spread import spread

EVALUATED = 50_000
"""Images of an evaluation, as the papers' FID has it."""
_RECONSTRUCTIONS = 20


@attrs.frozen
class Look:
    """Work besides training: how often it happens, and FLOPs each time.

    It is done in the recipe's precision, or in float32 whatever that is.
    """

    times: int
    flops: float
    float32: bool = False


@attrs.frozen
class Plan:
    """What a recipe costs on `gpus` devices.

    Rates are images a second over all devices; seconds are of wall time; FLOPs, unless they are
    called a step's, are of one image.
    `fraction` is the assumed or, with `measured`, measured share of the device's peak rate.
    """

    recipe: Recipe
    device: Device
    gpus: int
    fraction: float
    count: Count
    phases: Mapping[str, PhaseCost]
    inference: Mapping[str, float]
    memory: Memory
    calls: Calls
    looks: Mapping[str, Look]
    measured: Measured | None

    @property
    def flops(self) -> float:
        """Return FLOPs of an image in training, averaged over the phases."""
        return sum(cost.per_image.total * self._share(p) for p, cost in self.phases.items())

    @property
    def optimizer_flops(self) -> float:
        """Return FLOPs of the optimizer in a step, averaged over the phases."""
        return sum(f * self._share(p) for p, f in self.memory.optimizer_flops.items())

    def _share(self, phase: str) -> float:
        start, end = self.recipe.objective.span(phase)
        return end - start

    @property
    def pace(self) -> float:
        """Return FLOP/s of one device: the peak rate times the fraction."""
        return self.device.flops[self.recipe.precision] * self.fraction

    @property
    def step_seconds(self) -> float:
        """Return seconds of an optimizer step of the whole batch."""
        return (self.flops * self.recipe.batch / self.gpus + self.optimizer_flops) / self.pace

    @property
    def images_per_second(self) -> float:
        """Return training images per second, over all devices."""
        return self.recipe.batch / self.step_seconds

    @property
    def training_seconds(self) -> float:
        """Return seconds of all optimizer steps."""
        return self.step_seconds * self.recipe.total_steps

    @property
    def looking_seconds(self) -> float:
        """Return seconds of diagnoses, scores and calibrations, during which others wait."""
        return sum(map(self.seconds_of, self.looks.values()))

    def seconds_of(self, look: Look) -> float:
        """Return seconds of one kind of work besides training."""
        flops = self.device.flops
        rate = flops.get("float32", self.pace / self.fraction) if look.float32 else None
        return look.times * look.flops / (self.pace if rate is None else rate * self.fraction)

    @property
    def seconds(self) -> float:
        """Return seconds of the whole recipe."""
        return self.training_seconds + self.looking_seconds

    @property
    def sample_flops(self) -> float:
        """Return FLOPs of one sampled image."""
        return (
            self.calls.denoise * self.inference["denoise"]
            + self.calls.decode * self.inference["decode"]
        )

    @property
    def evaluation_seconds(self) -> float:
        """Return seconds of sampling an evaluation's images on one device."""
        return EVALUATED * self.sample_flops / self.pace

    @property
    def rows_that_fit(self) -> int:
        """Return the largest micro-shard, in images, that fits into the device's memory."""
        local = self.recipe.batch // self.gpus
        return min(local, self.memory.rows_that_fit(self.device.usable))

    @property
    def microshards_that_fit(self) -> int | None:
        """Return the fewest micro-shards that divide over the devices and fit; None if none do."""
        batch = self.recipe.batch
        for shards in range(self.gpus, batch + 1, self.gpus):
            if batch % shards == 0 and batch // shards <= self.rows_that_fit:
                return shards
        return None

    @property
    def shared_memory(self) -> int:
        """Return bytes of shared memory that the data workers of all devices need together."""
        r = self.recipe
        return divide(r.data.image, r.batch, r.microshards, r.data.workers, self.gpus).needed

    @property
    def checkpoints(self) -> int:
        """Return the number of checkpoints on the disk, including the one being written."""
        spare = self.recipe.alarm.policy == "rollback"
        return self.recipe.checkpoint.keep + 1 + spare

    @property
    def snapshot_bytes(self) -> float:
        """Return the final bytes on the disk of the snapshots of `post_hoc`."""
        r = self.recipe
        if r.post_hoc is None:
            return 0.0
        taken = (r.total_steps - 1) // r.snapshot_steps
        each = sum(self.memory.state[f"average {name}"] for name in tracked(r))
        share = 0.5 if r.post_hoc.precision == "float16" else 1.0
        return min(taken, r.post_hoc.keep or taken) * each * share


def make_plan(
    host: Host,
    recipe: Recipe,
    source: str,
    *,
    device: str = "h200",
    gpus: int = 1,
    fraction: float = 0.35,
) -> Plan:
    """Count a recipe and estimate its cost.

    Args:
        host: Knows the parts.
        recipe: A recipe whose parts fit one another.
        source: Address of the recipe, for messages.
        device: A key of `devices.GPUS`, `cpu`, or `measured` for the machine at hand.
        gpus: Devices, each of which takes an equal share of the micro-shards.
        fraction: Share of the peak rate that is reached, unless the device is measured.

    Raises:
        RecipeError: The micro-shards do not divide over the devices.
        DataError: A feature network cannot be built here.
        ResourceError: The device to be measured is not available.
    """
    if recipe.microshards % gpus:
        what = (
            f"{recipe.microshards} do not divide over {gpus} devices; choose a multiple of {gpus} "
            f"that divides the batch of {recipe.batch}"
        )
        raise RecipeError(source, [Problem("microshards", what)])
    phases, inference = count_passes(recipe), count_inference(recipe)
    known = measured_device(recipe) if device == "measured" else GPUS.get(device) or cpu()
    on_cuda = device in GPUS or not known.name.startswith("cpu")
    plan = Plan(
        recipe=recipe,
        device=known,
        gpus=gpus,
        fraction=fraction,
        count=count(recipe),
        phases=phases,
        inference=inference,
        memory=spread(follow(recipe, gpus=gpus, like_cuda=on_cuda), recipe, gpus),
        calls=count_calls(recipe),
        looks={},
        measured=None,
    )
    plan = attrs.evolve(plan, looks=_looks(host, plan))
    if device != "measured":
        return plan
    step = measured_step(recipe, known, plan.flops)
    # The FLOPs of consecutive phases, as the step ran them.
    done = sum(cost.per_image.total for cost in phases.values()) * step.rows
    done += sum(plan.memory.optimizer_flops.values())
    reached = done / step.seconds / known.flops[recipe.precision]
    return attrs.evolve(plan, measured=step, fraction=reached)


def _looks(host: Host, plan: Plan) -> dict[str, Look]:
    """Return the work of the monitor, and calibrations of batch statistics before saving."""
    r, cost = plan.recipe, plan.inference
    online = build_nets(r, torch.device("meta"))[0].online
    statistics = online.latent_norm.has_statistics
    calibration = r.probe.calibration * cost["encode"] if statistics else 0.0
    trained = r.probe.trained * cost["encode"] if online.latent.learned else 0.0
    both = cost["encode"] + cost["decode"]
    sheet = r.preview.rows * preview_columns(r)
    preview = sheet * plan.sample_flops + _RECONSTRUCTIONS * both + 2 * calibration
    weights = 1 + len(averagings(r))  # online and the averages
    every = r.cadence.survey_every
    found = {
        "diagnose": Look(
            _diagnoses(r, every), _glance(r) * cost["encode"] + trained, float32=True
        ),
        # and at first
        "survey": Look(_times(r, every) + 1, _survey(host, plan) + trained, float32=True),
        "preview": Look(_times(r, r.cadence.preview), preview),
        "checkpoint": Look(_times(r, r.cadence.checkpoint), weights * calibration, float32=True),
    }
    if r.scores is not None:
        features = count_features(r.scores.features, r.data.image)
        tiled = -(-r.scores.images // ROWS) * ROWS
        made = tiled * (both + plan.sample_flops)
        made += 2 * r.scores.images * features + calibration
        found["scores"] = Look(_scorings(r), made)
        found["scores' reference"] = Look(1, r.scores.images * features)
    return found


def _glance(recipe: Recipe) -> int:
    return min(recipe.probe.glance, recipe.probe.images)


def _diagnoses(recipe: Recipe, survey: int) -> int:
    """Return the number of diagnoses that are not surveys, between first and last step."""
    steps, every = recipe.total_steps - 1, recipe.cadence.diagnose
    return steps // every - steps // math.lcm(every, survey)


def _survey(host: Host, plan: Plan) -> float:
    """Return the FLOPs of the fields that all diagnostics together ask for."""
    r, cost, few = plan.recipe, plan.inference, _glance(plan.recipe)
    asked = {what for d in chosen_diagnostics(host, r) for what in d.asks}
    flops = (r.probe.images if "many" in asked else few) * cost["encode"]
    if "x_hat" in asked:
        flops += few * cost["decode"]
    if "denoised" in asked:
        flops += few * len(r.probe.times) * cost["denoise"]
    if "gradients" in asked:
        flops += min(GRADIENT_IMAGES, r.probe.images) * count_latent_gradients(r)
    return flops


def _scorings(recipe: Recipe) -> int:
    """Return how often a run is scored: at multiples of `scores.every` images, and at the end."""
    assert recipe.scores is not None
    every, seen = recipe.scores.every, recipe.total_steps * recipe.batch
    before = seen - recipe.batch  # at the last but one step
    return min(recipe.total_steps - 1, before // every) + 1


def _times(recipe: Recipe, every: int) -> int:
    """Return how often something happens that also happens at the end."""
    return -(-recipe.total_steps // every)
