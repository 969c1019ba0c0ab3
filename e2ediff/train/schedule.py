"""Report learning rates that a phase never reaches, and what another length does to schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from e2ediff.host.recipe import Recipe
from e2ediff.step.update import active_phases, learning_rates, rate_name
from e2ediff.train.recorder import Recorder

_HINT = (
    "A schedule that falls over the whole length starts its fall anew when the length changes. "
    "For runs to be lengthened use optimizer.schedule: constant, or wsd and lengthen them before "
    "its fall"
)


def unreached_rates(recipe: Recipe) -> list[str]:
    """Explain for each later phase that its learning rate stays far below its peak.

    A phase's schedule begins with the phase, and its warm-up is counted in images, so that one
    meant for the whole training can be longer than a phase at its end.
    """
    found = []
    for phase in recipe.objective.phases:
        start, end = (round(share * recipe.total_images) for share in recipe.objective.span(phase))
        if start <= 0 or end <= start:
            continue
        own = phase in recipe.optimizers
        config = recipe.optimizers[phase] if own else recipe.optimizer
        each = max(recipe.batch, (end - start) // 1000)  # a thousand places are enough
        peak = max(config.group_factor("", at, end - start) for at in range(0, end - start, each))
        if peak < 0.5:
            block = f"optimizers.{phase}" if own else "optimizer"
            instead = "" if own else f" of its own in optimizers.{phase}"
            found.append(
                f"phase {phase} lasts {end - start:,} images, in which the schedule of {block} "
                f"begins anew and its learning rate reaches {peak:.0%} of lr at most; give the "
                f"phase a schedule{instead} with a shorter warm-up"
            )
    return found


def report_schedule(
    recorder: Recorder, before: Recipe, optimizers: Mapping[str, torch.optim.Optimizer]
) -> None:
    """Report what a change of the recipe does to learning rates and phases at this position.

    Says nothing if the next step is the one that the run would have taken without the change.

    Args:
        recorder: Has the run's recipe and position.
        before: The recipe of the run so far.
        optimizers: Those of the run, by phase.
    """
    recipe, at = recorder.recipe, recorder.position
    if at.step >= recipe.total_steps:
        if at.step > recipe.total_steps:
            text = f"nothing to train: the recipe now has {recipe.total_steps} steps"
            recorder.report("schedule", text)
        return
    # A run that was finished, or longer than its recipe, has no next step; the phase of its last
    # one counts.
    last = max(0, min(at.images, before.total_images) - before.batch)
    usual = active_phases(before, at.images) or active_phases(before, last)
    phases = active_phases(recipe, at.images)
    texts = []
    if phases != usual:
        texts.append(
            f"it is in phase {', '.join(phases)} instead of {', '.join(usual)}, as phases are "
            "shares of the length"
        )
    rates: dict[str, tuple[float, float]] = {}
    falls_anew = False
    for phase in (phase for phase in phases if phase in usual):
        optimizer = optimizers[phase]
        # The last step may have been taken with another recipe than the one before this.
        groups = optimizer.param_groups
        taken, without, new = (
            dict(zip(map(rate_name, groups), values, strict=True))
            for values in (
                [group["lr"] for group in groups],
                learning_rates(before, phase, optimizer, at.images),
                learning_rates(recipe, phase, optimizer, at.images),
            )
        )
        for name, rate in new.items():
            if math.isclose(rate, without[name], rel_tol=1e-9):
                continue
            label = name if len(phases) == 1 else f"{name} of phase {phase}"
            rates[label] = (taken[name], rate)
            which = "" if label == "lr" else f" ({label})"
            texts.append(
                f"the learning rate{which} was {taken[name]:.4g} in the last step and is "
                f"{rate:.4g} in the next"
            )
            falls_anew = falls_anew or rate > taken[name]
    if texts:
        lengths = recipe.total_steps, before.total_steps
        length = (
            "" if lengths[0] == lengths[1] else "with {} steps instead of {} ".format(*lengths)
        )
        text = length + "; ".join(texts) + (f". {_HINT}" if falls_anew and length else "")
        named = {name: list(pair) for name, pair in rates.items()}
        recorder.report("schedule", text, rates=named, phases=[usual, phases])
