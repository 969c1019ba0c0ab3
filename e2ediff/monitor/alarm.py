"""The alarm: when signs of collapse count, and what follows.

A pure state machine over figures: it touches neither networks nor files, so that a run's
alarms can be replayed from its `metrics.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs

from e2ediff.diagnostic import Diagnostic
from e2ediff.figure import Figure, find
from e2ediff.host.recipe import Alarm, Recipe
from e2ediff.monitor.isolation import declared
from e2ediff.store.storage import JSON


def alarm_blind_spot(recipe: Recipe, diagnostics: Sequence[Diagnostic]) -> str:
    """Explain why this recipe's alarm cannot act on a collapse, and how to change that.

    Returns "" if it can.

    Args:
        recipe: With its alarm, and how often diagnostics are measured.
        diagnostics: Those that the run measures.
    """
    judged = any(type(d).verdict is not Diagnostic.verdict for d in diagnostics)
    if not judged and not any(figure.alarm for figure in declared(diagnostics)):
        return (
            "none of the diagnostics judges its figures, so the alarm hears of no collapse until "
            "every loss is next to nothing; add latent_health to diagnostics"
        )
    looks, window = len(diagnosis_steps(recipe)), recipe.alarm.window
    if recipe.alarm.policy == "warn" or looks >= window:
        return ""
    return (
        f"alarm.window {window} is more than the number of diagnoses in {recipe.total_steps} "
        f"steps, {looks}, so alarm.policy {recipe.alarm.policy} acts on a complete collapse only; "
        "lower cadence.diagnose or alarm.window"
    )


def diagnosis_steps(recipe: Recipe) -> set[int]:
    """The steps after which diagnostics are measured; they also are before the first step."""
    each = recipe.cadence.diagnose
    return {*range(each, recipe.total_steps + 1, each), *survey_steps(recipe)}


def survey_steps(recipe: Recipe) -> set[int]:
    """The steps after which all diagnostics are measured, the costly ones too."""
    each = recipe.cadence.survey_every
    return {*range(each, recipe.total_steps + 1, each), recipe.total_steps}


@attrs.frozen
class Finding:
    """What one diagnosis means: signs in words, and whether the alarm went on or off by it."""

    signs: Sequence[str]
    change: Literal["", "collapse", "recovered"]


@attrs.define
class Watch:
    """What the alarm remembers of a run.

    `figures` is what the diagnostics declare of their figures.
    `streak` counts diagnoses in a row with signs, `on` is whether the latents count as
    collapsed, `since` the step at which they began to, `best` has the largest figures so far,
    `mute` and `still` say of the newest logged step that every loss or the gradient was next to
    nothing, `attempt` counts returns to a checkpoint, and `anchor` is the images count of the
    checkpoint to return to.
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

    def record(self, values: Mapping[str, float]) -> None:
        """Note the losses and gradient norm of a logged step."""
        losses = [abs(v) for k, v in values.items() if k.startswith("loss/")]
        self.mute = bool(losses) and max(losses) < self.alarm.silence
        self.still = values.get("grad_norm", 1.0) < self.alarm.silence

    def evaluate(
        self, figures: Mapping[str, float], verdict: Sequence[str], step: int = 0
    ) -> Finding:
        """Judge the figures of a diagnosis.

        Args:
            figures: Those of all diagnostics.
            verdict: Signs of collapse that the diagnostics themselves found in them.
            step: The step that was taken last.
        """
        signs = [*verdict, *self._falls(figures)]
        complete = self.mute or (bool(signs) and (self.still or self._is_dead(figures)))
        if self.mute:
            signs.append(f"every loss is below {self.alarm.silence:g}: nothing is left to learn")
        elif self.still and signs:
            signs.append(f"the gradient's norm is below {self.alarm.silence:g}")
        self.streak = self.streak + 1 if signs else 0
        if not self.on and signs and (complete or self.streak >= self.alarm.window):
            self.on, self.since = True, step
            return Finding(signs, "collapse")
        if self.on and not signs:
            self.on, self.since = False, None
            return Finding(signs, "recovered")
        return Finding(signs, "")

    def _falls(self, figures: Mapping[str, float]) -> list[str]:
        """Signs against the run's own past; raises the marks that figures are held against."""
        found = []
        for name, value in figures.items():
            figure = find(name, self.figures)
            if figure is not None and figure.alarm:
                share = {"fall": self.alarm.fall, "shrink": self.alarm.shrink}[figure.alarm]
                best = self.best[name] = max(self.best.get(name, value), value)
                if value < share * best:
                    found.append(f"the {figure.title} fell from {best:.3g} to {value:.3g}")
        return found

    def _is_dead(self, figures: Mapping[str, float]) -> bool:
        """Whether a figure is beyond a bound of its own, where nothing is left to wait for."""
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
        """Whether a checkpoint of this moment is worth returning to."""
        return self.streak == 0

    @property
    def may_return(self) -> bool:
        """Whether the run may go back to its anchor once more."""
        within = self.attempt < self.alarm.attempts
        return self.alarm.policy == "rollback" and within and self.anchor is not None

    @property
    def collapsed(self) -> str:
        """That the latents have collapsed, and since when, in words; "" if they have not."""
        since = "" if self.since is None else f" since step {self.since}"
        return f"the latents have been collapsed{since}" if self.on else ""

    def advice(self) -> str:
        """What to do about an alarm that ends the run."""
        tried = ""
        if self.attempt:
            times = {1: "once", 2: "twice"}.get(self.attempt, f"{self.attempt} times")
            tried = f"The run went back {times} and collapsed again. "
        return (
            f"{tried}A saved checkpoint has this state; change the objective, the latent norm or "
            "the learning rate, or go on regardless with --resume --set alarm.policy=warn."
        )

    def state(self) -> dict[str, JSON]:
        """All but the options and what the figures are, for a checkpoint."""
        state = attrs.asdict(self, filter=attrs.filters.exclude("alarm", "figures"))
        return dict(state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        for name, value in state.items():
            setattr(self, name, dict(value) if isinstance(value, dict) else value)
