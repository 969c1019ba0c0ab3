"""Judge a step's loss and gradient before its update, and make none if they are bad.

On a GPU the verdict stays on the device, where the optimizer reads it: a step waits for nothing.

Shapes: P phases of a step, W updates of the window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from e2ediff.distributed.world import World
from e2ediff.host.recipe import Recipe


@attrs.frozen(eq=False)
class Share:
    """What some images of a step, `rows` in number, contribute to its loss, and their losses."""

    rows: int
    loss: Tensor
    losses: Mapping[str, Tensor]


@attrs.frozen(eq=False)
class Judged:
    """One phase of a step, as it was judged; `images` were seen before the step.

    `bad` is 1 where the update was not made, else 0. `seen` (2,) are the weighted loss and the
    gradient norm of the whole step, `bounds` (2,) those above which they are spikes, NaN where
    there are none. `shares` are those of this process, in order. `forced` means that no update was
    wanted.
    """

    phase: str
    images: int
    shares: Sequence[Share]
    bad: Tensor
    seen: Tensor
    bounds: Tensor
    forced: bool


class Guard:
    """Makes the updates whose numbers are sound, and keeps what it judged until it is `taken`.

    `waits` says whether verdicts are read at once: on a CPU, where reading costs nothing.
    `sound` is what `update` returns where it was read that an update was made.
    """

    def __init__(self, recipe: Recipe, world: World, device: torch.device) -> None:
        self.guards = recipe.guards
        self.world = world
        self.device = device
        self.waits = device.type == "cpu"
        self._judged: list[Judged] = []
        self._windows: dict[str, Tensor] = {}
        self.sound = torch.zeros((), device=device)

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        phase: str,
        images: int,
        shares: Sequence[Share],
        norm: Tensor,
        *,
        skip: bool = False,
    ) -> Tensor:
        """Have an optimizer make its update, unless the step's numbers are bad.

        Returns:
            1 if it made none, else 0; on the device.

        Args:
            optimizer: That of the phase.
            phase: The phase of the objective.
            images: Images seen before the step.
            shares: This process's part of the loss.
            norm: The norm of the gradient, the same in all processes.
            skip: Make no update whatever the numbers are.
        """
        if self._plainly_sound(shares, norm) and not skip:
            optimizer.step()
            return self.sound
        loss = torch.stack([share.loss for share in shares]).double().sum()
        # All processes decide by the same sums, to the bit.
        seen = self.world.total(torch.stack([loss, norm.double() / self.world.size]))
        bad, bounds = ~seen.isfinite().all(), torch.full_like(seen, torch.nan)
        if self.guards.spike != "off":
            bad, bounds = self._compared(phase, seen, bad, skip=skip)
        flag = bad.float()
        judged = Judged(phase, images, shares, flag, seen, bounds, skip)
        if skip:
            self._judged.append(judged)
            flag = torch.ones_like(flag)
        elif self.waits or not takes_flag(optimizer):
            if bool(bad):
                self._judged.append(judged)
            else:
                optimizer.step()
        else:
            self._judged.append(judged)
            # As torch's GradScaler does.
            optimizer.grad_scale, optimizer.found_inf = None, flag  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        return flag

    def _plainly_sound(self, shares: Sequence[Share], norm: Tensor) -> bool:
        """Return whether a step of one process is sound by its own numbers, if that can be read.

        A dozen operations on single numbers, which would say the same, take longer than all else
        that the engine does in a step.
        """
        if not self.waits or self.world.size > 1 or self.guards.spike != "off":
            return False
        return math.isfinite(sum(float(share.loss) for share in shares) + float(norm))

    def _compared(
        self, phase: str, seen: Tensor, bad: Tensor, *, skip: bool
    ) -> tuple[Tensor, Tensor]:
        """Compare a step with the last updates of its phase; it joins them unless it is bad."""
        window = self._window(phase)
        sizes = seen.abs()
        # The median of a window that is not full is NaN, and nothing is above it.
        middle = window.sort(dim=0).values[(len(window) - 1) // 2]
        bounds = self.guards.factor * middle.where(~window.isnan().any(dim=0), torch.nan)
        bad = bad | (sizes > bounds).any()
        if not skip:
            self._windows[phase] = torch.where(bad, window, torch.cat([window[1:], sizes[None]]))
        return bad, bounds

    def _window(self, phase: str) -> Tensor:
        """Return the loss and gradient norm of a phase's last updates (W, 2), NaN before those."""
        if phase not in self._windows:
            shape = (self.guards.window, 2)
            empty = torch.full(shape, torch.nan, dtype=torch.float64, device=self.device)
            self._windows[phase] = empty
        return self._windows[phase]

    def take(self) -> list[Judged]:
        """Return the phases that made no update since the last call, in order; waits for them."""
        judged, self._judged = self._judged, []
        if not judged:
            return []
        flags = torch.stack([one.bad for one in judged]).tolist()
        return [one for one, bad in zip(judged, flags, strict=True) if bad or one.forced]

    @property
    def pending(self) -> bool:
        """Return whether there is something to take."""
        return bool(self._judged)

    def state(self) -> dict[str, list[list[float]]]:
        """Return the windows for a checkpoint, by phase."""
        return {
            phase: window[~window.isnan().any(dim=1)].tolist()
            for phase, window in self._windows.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned, and drop what was not taken.

        Raises:
            TypeError, ValueError: It is nothing that `state` returns.
        """
        self._judged.clear()
        self._windows.clear()
        if self.guards.spike == "off":
            return
        for phase, rows in state.items():
            window = self._window(phase)
            if rows := rows[-len(window) :]:
                found = torch.tensor(rows, dtype=window.dtype)
                if found.shape[1:] != window.shape[1:] or not (found >= 0).all():
                    raise ValueError(f"windows: {phase!r} is not pairs of numbers from 0 on")
                window[-len(rows) :] = found


def takes_flag(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer can be told on the device to make no update.

    It can if it keeps to the protocol of torch's `GradScaler`, as the fused ones of torch do.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    # In its first update torch's fused SGD leaves the momentum unset if it is told to make none.
    return all(
        p in optimizer.state
        for group in optimizer.param_groups
        if group.get("momentum")
        for p in group["params"]
        if p.grad is not None
    )
