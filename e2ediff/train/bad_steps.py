"""Follow the recipe's `guards`: record steps that made no update, and decide what comes after."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import attrs
import torch

from e2ediff.data import DataSource
from e2ediff.errors import DivergedError
from e2ediff.host.recipe import Recipe
from e2ediff.loading.batches import order_of
from e2ediff.loading.order import Order
from e2ediff.step.guard import Guard, Judged
from e2ediff.store.manifest import block, count
from e2ediff.store.storage import JSON
from e2ediff.train.continuation import continue_command
from e2ediff.train.recorder import Recorder

_SPAN = 1000  # steps of which `guards.share` counts


class RewindError(Exception):
    """A bad step sends the run back to a checkpoint."""


@attrs.define(eq=False)
class BadSteps:
    """The steps of a run that made no update; steps count from 1.

    `last` is the newest of them and `count` the number of all. `streak` is the number of bad ones
    in a row up to it, `recent` has the bad ones of the last 1,000 steps, `returns` is the number
    of rollbacks because of them, and `known` has those that led to one, which make no update when
    they come again and then do not count as bad.
    """

    recipe: Recipe
    recorder: Recorder
    guard: Guard
    source: DataSource
    last: int = 0
    streak: int = 0
    recent: list[int] = attrs.field(factory=list)
    count: int = 0
    returns: int = 0
    known: list[int] = attrs.field(factory=list)
    _order: Order | None = None

    @property
    def is_last(self) -> bool:
        """Return whether the step that was just taken made no update, as far as is settled."""
        return self.last == self.recorder.position.step > 0

    def settle(self) -> None:
        """Record what was judged since the last call, and act on it; a collective call.

        Raises:
            DivergedError: The policy is to stop, or too many steps were bad.
            RewindError: The policy is to rewind.
        """
        bad = self.guard.take()
        rewound = ""
        for judged in bad:
            what, kind = self._record(judged)
            step = self._step(judged)
            self._count(step, bad=not judged.forced)
            if judged.forced:
                continue
            policy = getattr(self.recipe.guards, kind)
            if policy == "stop":
                raise self._stopped(step, what, kind)
            if policy == "rewind":
                rewound = rewound or what
                self.known = sorted({*self.known, step})
            else:
                self._refuse_many(step, what)
        if rewound:
            self._rewind(rewound)

    def _step(self, judged: Judged) -> int:
        return judged.images // self.recipe.batch + 1

    def _count(self, step: int, *, bad: bool) -> None:
        """Count a step that made no update, because it was bad or because it was known."""
        if step == self.last:
            return  # another phase of the same step
        self.streak = (self.streak if step == self.last + 1 else 0) + bad
        self.last, self.count = step, self.count + 1
        self.recent = [one for one in self.recent if one > step - _SPAN] + [step] * bad

    def _refuse_many(self, step: int, what: str) -> None:
        """End the run if more steps were bad than its guards accept."""
        guards = self.recipe.guards
        if self.streak > guards.limit:
            many = f"{self.streak} steps in a row" if self.streak > 1 else "the step"
            more = f"more than guards.limit ({guards.limit})"
        elif len(self.recent) > guards.share * _SPAN:
            many = f"{len(self.recent)} of the last {_SPAN:,} steps"
            more = f"more than guards.share ({guards.share:g})"
        else:
            return
        made = "made no update" if self.streak == 1 else "made no updates"
        raise self._diverged(step, f"{many} {made}, {more}; in the last one {what}.")

    def _rewind(self, what: str) -> None:
        """Ask for a return, or end the run if there were as many as its guards accept."""
        limit = self.recipe.guards.limit
        if self.returns >= limit:
            times = f"the run was rolled back {self.returns} times, guards.limit, and again "
            raise self._diverged(self.last, f"{times * (limit > 0)}{what}.")
        self.returns += 1
        raise RewindError(f"rollback {self.returns} of at most {limit} because {what}")

    def _stopped(self, step: int, what: str, kind: str) -> DivergedError:
        skip = self._resume(f"guards.{kind}=skip")
        return self.recorder.diverged(f"{what}.", step, f"To skip such steps: `{skip}`. ")

    def _diverged(self, step: int, what: str) -> DivergedError:
        change = f"{self._resume('KEY=VALUE')} --allow-change KEY"
        listed = "The images of these steps are in events.jsonl (skipped_step). "
        way_out = f"{listed}To continue with a change of the optimizer: `{change}`. "
        return self.recorder.diverged(what, step, way_out)

    def _resume(self, change: str) -> str:
        return continue_command(self.recorder.directory.path, change)

    # What is recorded

    def _record(self, judged: Judged) -> tuple[str, str]:
        """Record a phase of a step that made no update; return why, and the policy's name."""
        loss, norm = judged.seen.tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        losses, shards = self._not_finite(judged)
        step, batch = self._step(judged), self.recipe.batch
        if not finite:
            names = [f"loss/{name}" for name in losses]
            names = names or ["the gradient norm" if math.isfinite(loss) else "the weighted loss"]
            what = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not finite"
            kind = "non_finite"
        elif judged.forced:
            what, kind = "the run came to it again after a rollback", "known"
        else:
            found, kind = [], "spike"
            for name, value, bound in zip(
                ("loss", "gradient norm"), (loss, norm), judged.bounds.tolist(), strict=True
            ):
                if abs(value) > bound:
                    found.append(f"the {name} is {value:.4g}, above {bound:.4g}")
            what = " and ".join(found)
        fields: dict[str, JSON] = {"loss": loss, "grad_norm": norm, "losses": losses}
        if len(self.recipe.objective.phases) > 1:
            fields["phase"] = judged.phase
        order = self._in_order().indices(judged.images, batch)
        if shards:
            each, per = batch // self.recipe.microshards, self._shards
            order = [i for shard in shards for i in order[shard * each : (shard + 1) * each]]
            fields["microshards"], fields["processes"] = shards, sorted({s // per for s in shards})
        why = "known" if judged.forced else kind
        fields["samples"] = order
        self.recorder.event(
            "skipped_step", step=step, images=judged.images + batch, why=why, text=what, **fields
        )
        self.recorder.progress.say(
            f"step {step}: made no update, because {what}; its images are in events.jsonl"
        )
        return what, kind

    @property
    def _shards(self) -> int:
        """Return the number of micro-shards of a process."""
        return self.recipe.microshards // self.recorder.world.size

    def _in_order(self) -> Order:
        r = self.recipe
        self._order = self._order or order_of(self.source, r.seed, r.data.sampling)
        return self._order

    def _not_finite(self, judged: Judged) -> tuple[list[str], list[int]]:
        """Return the losses and the micro-shards that are not finite, of all processes."""
        r, names = self.recipe, [*judged.shares[0].losses]
        table = torch.zeros(r.microshards, len(names) + 1)
        row, each = 0, r.batch // r.microshards
        for share in judged.shares:
            shard = self.recorder.world.rank * self._shards + row // each
            values = [share.losses[name] for name in names] + [share.loss]
            table[shard] += torch.stack([value.float() for value in values]).cpu()
            row += share.rows
        bad = ~self.recorder.world.total(table).isfinite()
        shards = bad.any(dim=1).nonzero()[:, 0].tolist()
        return [n for n, one in zip(names, bad.any(dim=0).tolist(), strict=False) if one], shards

    # Checkpoints

    def state(self) -> dict[str, JSON]:
        """Return the state for a checkpoint."""
        kept = ("last", "streak", "recent", "count", "returns", "known")
        windows: dict[str, JSON] = {**self.guard.state()}
        return {**{name: getattr(self, name) for name in kept}, "windows": windows}

    def restore(self, state: object) -> None:
        """Restore what `state` returned; nothing was bad in checkpoints from before the guards.

        Raises:
            TypeError, ValueError: It is nothing that `state` returns.
        """
        held = {**_NONE, **block(state, dict, "it")}
        windows = held.pop("windows", {})
        for name, value in held.items():
            if name not in _NONE:
                raise ValueError(f"{str(name)[:40]!r} is unknown, expected {', '.join(_NONE)}")
            read = _counts if isinstance(_NONE[name], list) else count
            setattr(self, name, read(value, name))
        self.guard.restore(windows)

    @contextlib.contextmanager
    def remembered(self) -> Iterator[None]:
        """Keep the returns, and the steps that led to them, over a rollback."""
        returns, known = self.returns, self.known
        yield
        self.returns, self.known = returns, known


_NONE: dict[str, Any] = {
    "last": 0,
    "streak": 0,
    "recent": [],
    "count": 0,
    "returns": 0,
    "known": [],
}


def _counts(value: object, what: str) -> list[int]:
    return [count(one, what) for one in block(value, list, what)]
