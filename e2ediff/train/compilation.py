"""Choose how much of a run's step is compiled, where the recipe leaves it open, and record it."""

from __future__ import annotations

import time
from collections.abc import Callable

import attrs
import torch

from e2ediff.data import Batch
from e2ediff.host.recipe import Recipe
from e2ediff.model.compiler import is_compiler_error, missing_compiler, said_by
from e2ediff.step.assembly import Assembly
from e2ediff.step.compiling import CompileLog, Extent
from e2ediff.train.progress import duration
from e2ediff.train.recorder import Recorder

TOPIC = "compile"
"""Key under which checkpoints keep the choice, among those of kernels."""

SAVED: dict[Extent, float] = {"blocks": 0.1, "step": 0.15}
"""Share of a step's seconds that is saved at least, as measured (docs/results/performance.md)."""

COLD: dict[Extent, float] = {"blocks": 30.0, "step": 80.0}
"""Seconds that a first compilation takes, as measured there; later ones take a tenth."""

_ROUNDS = 3


@attrs.define(eq=False)
class StepCompilation:
    """Compiles a run's step as its recipe says; chooses where that is `auto`.

    The choice compares what would be saved in the steps that are left with what compiling costs.
    It is tried, compiled, on the first batch, before anything is trained: what fails or is no
    faster is dropped, and the run goes on uncompiled. If even uncompiled memory does not suffice,
    the choice waits for a step that has found how many images fit.
    `rehearse` computes a part of the next step without side effects, compiled or not, and returns
    which share of this process's step that is.
    """

    recipe: Recipe
    parts: Assembly
    recorder: Recorder
    rehearse: Callable[[Batch, bool], float]
    _log: CompileLog | None = None
    _open: bool = attrs.field(init=False)
    _waited: bool = attrs.field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        self._open = self.recipe.compile == "auto"
        if self.parts.compilation.kind != "off":
            self._log = CompileLog()

    def begin(self, batch: Batch) -> None:
        """Choose before the first step, on its batch; later calls do nothing."""
        if not self._open:
            return
        self._open = False
        before = self.parts.choices.get(TOPIC, "").partition(" ")[0]
        kept = [] if self.recipe.deterministic else [k for k in self._possible() if k == before]
        with self.recorder.clock.paused():
            for kind in kept:
                if failed := self._attempt(kind, batch):
                    self._settle("off", f"as before, {kind}, cannot be: {failed}")
            if not kept and before != "off":
                self._choose(batch)

    def done(self) -> None:
        """Record what was compiled in a step: usually all in the first, and nothing later."""
        if self._log is None or (made := self._log.new()) is None:
            return
        self.recorder.report(
            "compiled",
            f"{made}",
            graphs=made.graphs,
            breaks=made.breaks,
            seconds=round(made.seconds, 1),
            reasons=list(made.reasons),
        )

    def gives_up(self, error: Exception) -> bool:
        """Compile nothing more after an error of the compiler; return whether the step may go on.

        Of several processes each may be somewhere else in the step, which ends the run.
        """
        kind, world = self.parts.compilation.kind, self.recorder.world
        chosen = self.recipe.compile == "auto" and kind != "off"
        if not chosen or world.size > 1 or not is_compiler_error(error):
            return False
        self._settle("off", f"{kind}: {said_by(error)}")
        return True

    def _possible(self) -> list[Extent]:
        blocks, world = self.parts.nets.online.blocks(), self.recorder.world
        split = world.size > 1 and self.recipe.parallel == "fsdp2"
        possible: dict[Extent, bool] = {"blocks": bool(blocks), "step": not split}
        return [kind for kind, may in possible.items() if may]

    def _choose(self, batch: Batch) -> None:
        recorder, world = self.recorder, self.recorder.world
        if self.recipe.deterministic:
            self._settle("off", "deterministic: true leaves nothing to timing")
            return
        if not self._fits(batch):
            self._open, self._waited = not self._waited, True
            if not self._open:
                self._settle("off", "memory did not suffice to try it")
            return
        left = self.recipe.total_steps - recorder.position.step
        gains: dict[Extent, float] = {}
        for rounds in (1, _ROUNDS):  # mostly one is enough
            eager = self._seconds(batch, rounds)
            seconds = left * eager
            gains = {kind: SAVED[kind] * seconds - COLD[kind] for kind in self._possible()}
            if max(gains.values(), default=0.0) <= 0:
                why = f"the {left:,} steps left take {duration(seconds)}, too little to gain by it"
                self._settle("off", why)
                return
        missing = missing_compiler(recorder.device)
        if world.highest(int(bool(missing))):
            self._settle("off", missing or "another process finds no compiler")
            return
        tried: list[str] = []
        for kind in sorted(gains, key=gains.__getitem__, reverse=True):
            if gains[kind] <= 0:
                continue
            failed = self._attempt(kind, batch)
            if not failed:
                compiled = self._seconds(batch, _ROUNDS, compiled=True)
                text = f"{1e3 * compiled:.3g} ms in place of {1e3 * eager:.3g} ms"
                if compiled < eager:
                    self._settle(kind, "; ".join([f"{text} for gradients of a step", *tried]))
                    return
                failed = text
            tried.append(f"not {kind}: {failed}")
        self._settle("off", "; ".join(tried))

    def _attempt(self, kind: Extent, batch: Batch) -> str:
        """Compile this much, by computing with it; return what failed, "" if nothing did."""
        self._log = self._log or CompileLog()
        self.parts.compilation.use(kind)
        failed = ""
        try:
            self.rehearse(batch, True)
        except Exception as error:  # uncompiled, the same has just succeeded
            failed = said_by(error)
        if self.recorder.world.highest(int(bool(failed))):
            self.parts.compilation.use("off")
            return failed or "it failed in another process"
        return ""

    def _fits(self, batch: Batch) -> bool:
        """Compute uncompiled; return whether memory sufficed, in all processes."""
        fits = 1
        try:
            self.rehearse(batch, False)
        except torch.OutOfMemoryError:
            fits = 0
        return bool(self.recorder.world.lowest(fits))

    def _seconds(self, batch: Batch, rounds: int, *, compiled: bool = False) -> float:
        """Return the seconds of a step by the fastest rehearsal, in the slowest process."""
        device, found = self.recorder.device, []
        for _ in range(rounds):
            began = time.perf_counter()
            share = self.rehearse(batch, compiled)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append((time.perf_counter() - began) / share)
        return self.recorder.world.highest(round(1e6 * min(found))) / 1e6

    def _settle(self, kind: Extent, why: str) -> None:
        if kind == "off":
            self.parts.compilation.use("off")
        self.parts.choices[TOPIC] = f"{kind} ({why})"
        self.recorder.report("compile", f"compile: {self.parts.choices[TOPIC]}", choice=kind)
