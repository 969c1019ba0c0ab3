"""The alarm: decide when signs of collapse count, and what follows.

A pure state machine over figures: it touches neither networks nor files, so that a run's
alarms can be replayed from its `metrics.jsonl`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs

from e2ediff.diagnostic import Diagnostic
from e2ediff.figure import Figure, find
from e2ediff.host.recipe import Alarm, Recipe
from e2ediff.monitor.isolation import declared
from e2ediff.store.manifest import block, count
from e2ediff.store.storage import JSON


def alarm_blind_spot(recipe: Recipe, diagnostics: Sequence[Diagnostic]) -> str:
    """Explain why this recipe's alarm cannot act on a collapse, and how to change that.

    Returns "" if it can.

    Args:
        recipe: Has the alarm and the cadence of diagnoses.
        diagnostics: The diagnostics that the run measures.
    """
    judged = any(type(d).verdict is not Diagnostic.verdict for d in diagnostics)
    if not judged and not any(figure.alarm for figure in declared(diagnostics)):
        return (
            "none of the diagnostics judges its figures, so the alarm cannot detect a collapse "
            "before every loss is close to zero; add latent_health to diagnostics"
        )
    looks, window = len(diagnosis_steps(recipe)), recipe.alarm.window
    if recipe.alarm.policy == "warn" or looks >= window:
        return ""
    return (
        f"alarm.window is {window}, but the number of diagnoses in {recipe.total_steps} steps is "
        f"{looks}, so alarm.policy {recipe.alarm.policy} acts on a complete collapse only; lower "
        "cadence.diagnose or alarm.window"
    )


def diagnosis_steps(recipe: Recipe) -> set[int]:
    """Return the steps after which diagnostics are measured, besides before the first."""
    each = recipe.cadence.diagnose
    return {*range(each, recipe.total_steps + 1, each), *survey_steps(recipe)}


def survey_steps(recipe: Recipe) -> set[int]:
    """Return the steps after which all diagnostics are measured, including costly ones."""
    each = recipe.cadence.survey_every
    return {*range(each, recipe.total_steps + 1, each), recipe.total_steps}


@attrs.frozen
class Finding:
    """Result of one diagnosis: signs in words, and whether it turned the alarm on or off."""

    signs: Sequence[str]
    change: Literal["", "collapse", "recovered"]


@attrs.define
class CollapseDetector:
    """State of the alarm of a run.

    `figures` are the declarations of the diagnostics.
    `streak` counts consecutive diagnoses with signs, `on` is whether the latents count as
    collapsed, `since` the step at which that began, `best` has the largest figures so far, `mute`
    and `still` say whether every loss, or the gradient, was next to zero at the newest logged
    step, `attempt` counts rollbacks, and `anchor` is the number of images of the checkpoint to
    roll back to. `retuned` is whether it was restored with other bounds than it was judged by.
    """

    alarm: Alarm
    figures: Sequence[Figure] = ()
    streak: int = 0
    on: bool = False
    since: int | None = None
    best: dict[str, float] = attrs.field(factory=dict)
    mute: bool = False
    still: bool = False
    attempt: int = 0
    anchor: int | None = None
    retuned: bool = False

    def record(self, values: Mapping[str, float]) -> None:
        """Record the losses and gradient norm of a logged step."""
        losses = [abs(v) for k, v in values.items() if k.startswith("loss/")]
        self.mute = bool(losses) and max(losses) < self.alarm.silence
        self.still = values.get("grad_norm", 1.0) < self.alarm.silence

    def evaluate(
        self, figures: Mapping[str, float], verdict: Sequence[str], step: int = 0
    ) -> Finding:
        """Evaluate the figures of a diagnosis.

        Args:
            figures: The figures of all diagnostics.
            verdict: Signs of collapse that the diagnostics found in them.
            step: The last step taken.
        """
        signs = [*verdict, *self._falls(figures)]
        complete = self.mute or (bool(signs) and (self.still or self._is_dead(figures)))
        if self.mute:
            signs.append(
                f"every loss is below {self.alarm.silence:g}, so nothing is left to learn"
            )
        elif self.still and signs:
            signs.append(f"the gradient norm is below {self.alarm.silence:g}")
        self.streak = self.streak + 1 if signs else 0
        if not self.on and signs and (complete or self.streak >= self.alarm.window):
            self.on, self.since = True, step
            return Finding(signs, "collapse")
        if self.on and not signs:
            self.on, self.since = False, None
            return Finding(signs, "recovered")
        return Finding(signs, "")

    def _falls(self, figures: Mapping[str, float]) -> list[str]:
        """Return signs relative to the run's past, and update the largest figures so far."""
        found = []
        for name, value in figures.items():
            figure = find(name, self.figures)
            if figure is not None and figure.alarm and math.isfinite(value):
                share = {"fall": self.alarm.fall, "shrink": self.alarm.shrink}[figure.alarm]
                best = self.best[name] = max(self.best.get(name, value), value)
                if value < share * best:
                    found.append(f"the {figure.title} fell from {best:.3g} to {value:.3g}")
        return found

    def _is_dead(self, figures: Mapping[str, float]) -> bool:
        """Return whether a figure is beyond its own bound, where waiting is pointless."""
        for name, value in figures.items():
            figure = find(name, self.figures)
            if figure is not None and (
                (figure.dead_below is not None and value < figure.dead_below)
                or (figure.dead_above is not None and value > figure.dead_above)
            ):
                return True
        return False

    @property
    def clean(self) -> bool:
        """Return whether a checkpoint of this moment is worth rolling back to."""
        return self.streak == 0

    @property
    def may_return(self) -> bool:
        """Return whether the run may roll back to its anchor once more."""
        within = self.attempt < self.alarm.attempts
        return self.alarm.policy == "rollback" and within and self.anchor is not None

    @property
    def collapsed(self) -> str:
        """Describe since when the latents are collapsed; "" if they are not."""
        since = "" if self.since is None else f" since step {self.since}"
        return f"the latents have been collapsed{since}" if self.on else ""

    def advice(self, regardless: str) -> str:
        """Return advice for an alarm that ends the run.

        Args:
            regardless: The command that continues it without the alarm.
        """
        tried = ""
        if self.attempt:
            times = {1: "once", 2: "twice"}.get(self.attempt, f"{self.attempt} times")
            tried = f"The run was rolled back {times} and collapsed again. "
        return (
            f"{tried}A checkpoint of this state was saved; change the objective, the latent norm "
            f"or the learning rate, or continue regardless: {regardless}"
        )

    def state(self) -> dict[str, JSON]:
        """Return the state for a checkpoint: all but options and declarations."""
        state = attrs.asdict(self, filter=attrs.filters.exclude("alarm", "figures", "retuned"))
        return {**state, "bounds": self._bounds}

    @property
    def _bounds(self) -> list[JSON]:
        return [self.alarm.window, self.alarm.fall, self.alarm.shrink, self.alarm.silence]

    def restore(self, state: object) -> None:
        """Restore what `state` returned; what it does not have stays as it is.

        Raises:
            TypeError, ValueError: It is nothing that `state` returns.
        """
        held = {**block(state, dict, "it")}
        self.retuned = held.pop("bounds", self._bounds) != self._bounds
        for name, value in held.items():
            if name not in _READERS:
                raise ValueError(f"{str(name)[:40]!r} is unknown, expected {', '.join(_READERS)}")
            setattr(self, name, _READERS[name](value, name))


def _best(value: object, what: str) -> dict[str, float]:
    found = block(value, dict, what)
    if not all(type(number) in (int, float) for number in found.values()):
        raise TypeError(f"{what} is not all numbers")
    return dict(found)


def _flag(value: object, what: str) -> bool:
    return block(value, bool, what)


def _count_or_none(value: object, what: str) -> int | None:
    return None if value is None else count(value, what)


_READERS: Mapping[str, Callable[[object, str], Any]] = {
    "streak": count,
    "on": _flag,
    "since": _count_or_none,
    "best": _best,
    "mute": _flag,
    "still": _flag,
    "attempt": count,
    "anchor": _count_or_none,
}
"""By part of a detector's state, what reads it from a checkpoint."""
