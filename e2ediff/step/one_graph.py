"""Compile a whole step as one graph: draw first, then trace what the objective computes.

A compiler can follow neither generators nor most of what objectives do in Python. So the first
pass over images of each shape runs uncompiled and shows what the objective draws. From then on
the same is drawn beforehand, in the same order from the same generator, and what is left is a
function of tensors, which is traced by running it once on tensors without data.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping, Sequence
from traceback import extract_tb
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call

from e2ediff.condition import Condition
from e2ediff.data import Batch
from e2ediff.errors import ResourceError
from e2ediff.model.compiler import NotOneGraphError
from e2ediff.objective import Draw
from e2ediff.step.step import Step

Losses = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]
"""The weighted loss, and the losses and figures without gradients, as `Step.forward` returns."""

Request = tuple[str, tuple[int, ...]]
"""A method of `Draw`, and the shape that it was asked for."""


@attrs.define(eq=False)
class Tracing:
    """Whether a step is being traced, which its blocks must know to be computed again."""

    active: bool = False


class UnforeseenDrawError(NotOneGraphError):
    """An objective draws in a way that cannot be foreseen."""


class _Tape:
    """What an objective asked a draw for, and what it was given."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.asked: list[Request] = []
        self.given: list[Tensor] = []
        self._generator = generator
        self._state = self._now()

    def _now(self) -> Tensor | None:
        return None if self._generator is None else self._generator.get_state()

    def record(self, kind: str, shape: Sequence[int], draw: Callable[[], Tensor]) -> Tensor:
        """Draw, and keep it."""
        self.check()
        value = draw()
        self.asked.append((kind, tuple(shape)))
        self.given.append(value)
        self._state = self._now()
        return value

    def check(self) -> None:
        """Refuse draws that were made past the methods of `Draw`, which nothing could foresee.

        Raises:
            UnforeseenDrawError: The generator was used for something else.
        """
        state = self._now()
        if state is not None and self._state is not None and not torch.equal(state, self._state):
            raise UnforeseenDrawError(
                "compile: step needs an objective that draws by `draw.noise`, `draw.uniform` and "
                "`draw.again` alone, and this one uses `draw.generator`; set compile: blocks"
            )


@attrs.frozen(eq=False, kw_only=True)
class _Watched(Draw):
    """Draws as `inner` does, onto a tape."""

    inner: Draw
    tape: _Tape

    def noise(self, like: Tensor) -> Tensor:
        return self.tape.record("noise", like.shape, lambda: self.inner.noise(like))

    def uniform(self, *shape: int) -> Tensor:
        return self.tape.record("uniform", shape, lambda: self.inner.uniform(*shape))

    def further_times(self) -> Tensor:
        return self.tape.record("times", (), self.inner.further_times)


@attrs.frozen(eq=False, kw_only=True)
class _Drawn(Draw):
    """Gives what was drawn beforehand, in order."""

    asked: list[Request]
    given: list[Tensor]

    def _next(self, kind: str, shape: Sequence[int]) -> Tensor:
        expected = self.asked.pop(0) if self.asked else None
        if expected != (kind, tuple(shape)):
            raise UnforeseenDrawError(
                "compile: step needs an objective that draws the same in every step; it asked for "
                f"{kind} {tuple(shape)} where it had asked for {expected}. Set compile: blocks"
            )
        return self.given.pop(0)

    def noise(self, like: Tensor) -> Tensor:
        return self._next("noise", like.shape)

    def uniform(self, *shape: int) -> Tensor:
        return self._next("uniform", shape)

    def further_times(self) -> Tensor:
        return self._next("times", ())


def _drawn(draw: Draw, asked: Sequence[Request]) -> list[Tensor]:
    """Draw beforehand what an objective will ask for."""
    found = []
    for kind, shape in asked:
        if kind == "noise":
            found.append(draw.noise(draw.t.new_empty(()).expand(shape)))
        elif kind == "uniform":
            found.append(draw.uniform(*shape))
        else:
            found.append(draw.further_times())
    return found


class _Whole(nn.Module):
    """All that a step computes with, so that its tensors can be given by name."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step, self.frozen = step, step.nets.frozen

    def forward(self, work: Callable[[], Losses]) -> Losses:
        return work()


@attrs.frozen(eq=False)
class _Graph:
    """A compiled step for one phase and shape, and what its objective draws."""

    asked: Sequence[Request]
    compute: Callable[..., Losses]


class OneGraph:
    """Computes as `Step.forward`, by one compiled graph for each phase and shape of images."""

    def __init__(self, step: Step, tracing: Tracing, **options: Any) -> None:
        """Take a step, what its blocks learn of tracing from, and options of `torch.compile`."""
        self.step = step
        self.tracing = tracing
        self.options = options
        self._whole = _Whole(step)
        self._graphs: dict[object, _Graph] = {}
        self._failed: ResourceError | None = None

    def __call__(self, batch: Batch, draw: Draw, phase: str) -> Losses:
        """Return the weighted loss of a micro-shard, and its losses and figures.

        Raises:
            UnforeseenDrawError: The objective draws in a way that cannot be foreseen.
            NotOneGraphError: It cannot be traced, as it reads numbers of tensors for example.
        """
        key = (phase, batch.x.shape, type(draw.condition), self.step.precision)
        graph = self._graphs.get(key)
        if graph is None:
            tape = self._learn(batch, draw, phase)
            graph = _Graph(tape.asked, self._compiled(batch, draw, phase, tape.asked))
            self._graphs[key], given = graph, tape.given
        else:
            given = _drawn(draw, graph.asked)
        state = {**dict(self._whole.named_parameters()), **dict(self._whole.named_buffers())}
        conditions = batch.condition.tensors(), draw.condition.tensors()
        self._failed = None
        try:
            return graph.compute(state, batch.x, *conditions, draw.t, draw.progress, given)
        except Exception as error:
            if self._failed is None:
                raise
            # The compiler would say that what it traced returned nothing that it knows.
            raise self._failed from error

    def _learn(self, batch: Batch, draw: Draw, phase: str) -> _Tape:
        """Run the objective once, without effects, to see what it draws."""
        buffers = [(buffer, buffer.clone()) for buffer in self._whole.buffers()]
        held = dict(self._whole.named_buffers())
        tape = _Tape(draw.generator)
        watched = _Watched(**_fields(draw), generator=draw.generator, inner=draw, tape=tape)
        with torch.random.fork_rng():
            self.step.terms(batch, watched, phase)
        tape.check()
        after = dict(self._whole.named_buffers())
        if moved := [name for name, buffer in held.items() if after.get(name) is not buffer]:
            raise NotOneGraphError(
                f"compile: step: a step puts another tensor in the place of the buffer "
                f"{moved[0].removeprefix('step.')}, which the graph would not see; let it change "
                "the buffer in place, or set `compile: blocks`"
            )
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        return tape

    def _compiled(
        self, batch: Batch, draw: Draw, phase: str, asked: Sequence[Request]
    ) -> Callable[..., Losses]:
        """Return a compiled function of tensors; it keeps what is none from these arguments."""
        step, whole, tracing = self.step, self._whole, self.tracing
        times, label_drop = draw.times, draw.label_drop
        kinds = (_without_data(batch.condition), _without_data(draw.condition))

        @torch._dynamo.nonstrict_trace
        def traced(
            state: Mapping[str, Tensor],
            x: Tensor,
            shown: Mapping[str, Tensor],
            drawn: Mapping[str, Tensor],
            t: Tensor,
            progress: Tensor,
            given: Sequence[Tensor],
        ) -> Losses:
            def work() -> Losses:
                conditions = [
                    attrs.evolve(kind, **tensors)  # type: ignore[misc]
                    for kind, tensors in zip(kinds, (shown, drawn), strict=True)
                ]
                again = _Drawn(
                    t=t, condition=conditions[1], generator=None, times=times, progress=progress,
                    label_drop=label_drop, asked=[*asked], given=[*given],
                )  # fmt: skip
                return Step.forward(step, Batch(x, conditions[0]), again, phase)

            tracing.active = type(x) is not Tensor
            try:
                found: Losses = functional_call(whole, dict(state), (work,))
            except ResourceError as error:
                self._failed = error
                raise
            except Exception as error:
                if tracing.active:
                    self._failed = _untraced(error)
                raise
            finally:
                tracing.active = False
            return found

        def compute(*tensors: Any) -> Losses:
            return traced(*tensors)

        # Compiled functions are known by their code: of this one there is one for each graph.
        own = types.FunctionType(
            compute.__code__.replace(), compute.__globals__, closure=compute.__closure__
        )
        compiled: Callable[..., Losses] = torch.compile(own, fullgraph=True, **self.options)
        return compiled


def _untraced(error: Exception) -> NotOneGraphError:
    """Say what an objective did that cannot be traced, and where."""
    frames = extract_tb(error.__traceback__)
    own = [
        f for f in frames if f"{os.sep}torch{os.sep}" not in f.filename and f.filename != __file__
    ]
    place = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}: " if own else ""
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return NotOneGraphError(
        f"compile: step traces a step on tensors that hold no numbers, and this one fails there: "
        f"{place}{said[:300]}. Read no number of a tensor in a step, or set `compile: blocks`"
    )


def _fields(draw: Draw) -> dict[str, Any]:
    """Return the values of a draw, without its generator."""
    return {
        "t": draw.t, "condition": draw.condition, "times": draw.times, "progress": draw.progress,
        "label_drop": draw.label_drop,
    }  # fmt: skip


def _without_data(condition: Condition) -> Condition:
    """Return a condition whose tensors hold nothing: what remains is the same for all rows."""
    empty = {name: value.new_empty(0) for name, value in condition.tensors().items()}
    return attrs.evolve(condition, **empty)  # type: ignore[misc]
