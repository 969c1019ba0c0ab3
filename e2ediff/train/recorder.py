"""Record what a run produces while it trains: figures, events, pictures and its status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch

from e2ediff.distributed.world import World
from e2ediff.errors import DivergedError
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.loading.bad_images import BAD_IMAGES, BadImages, Skipped
from e2ediff.store.run_directory import RunDirectory, State
from e2ediff.store.storage import JSON
from e2ediff.train.clock import Clock
from e2ediff.train.observers import RunView, Trackers, notify
from e2ediff.train.progress import Progress


@attrs.define
class Position:
    """Position in a run: optimizer steps taken, and training images seen."""

    step: int = 0
    images: int = 0


@attrs.define(eq=False)
class Recorder:
    """Writes a run's records, shows progress, and notifies trackers and plugins.

    Only the first process notifies trackers and plugins, so that it happens once.
    """

    host: Host
    recipe: Recipe
    directory: RunDirectory
    device: torch.device
    progress: Progress
    world: World
    position: Position = attrs.field(factory=Position)
    clock: Clock = attrs.field(factory=Clock)
    last_checkpoint: str | None = None
    trackers: Trackers = attrs.field(init=False)
    bad_images: BadImages = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        trackers = self.recipe.trackers if self.world.is_leader else ()
        self.trackers = Trackers(trackers, self.directory, self.progress)
        self.bad_images = BadImages(self.directory.store)

    def figures(self, values: Mapping[str, float]) -> None:
        """Add figures to `metrics.jsonl` and to the trackers."""
        at = self.position
        self.directory.log_metrics({"step": at.step, "images": at.images, **values})
        self.trackers.log(at.images, values)

    def event(self, kind: str, **fields: JSON) -> None:
        """Add an event to `events.jsonl`, with the run's position."""
        at = self.position
        self.directory.event(kind, **{"step": at.step, "images": at.images, **fields})

    def report(self, kind: str, text: str, **fields: JSON) -> None:
        """Add an event, and show its text to the user."""
        self.event(kind, text=text, **fields)
        self.progress.say(f"step {self.position.step}: {text}")

    def notify(self, hook: str, **values: object) -> None:
        """Call a hook of the plugins."""
        if self.world.is_leader:
            view = RunView(
                self.recipe, self.directory.path, str(self.device), self.position.images
            )
            notify(self.host, view, self.progress, hook, values)

    def skipped(self, found: Sequence[Skipped]) -> None:
        """List damaged images that were not used; the first one is also shown."""
        if self.bad_images.add(found):
            place = self.directory.store.where(BAD_IMAGES)
            self.progress.say(
                f"skipped {found[0].place}: {found[0].what}. All such images are listed in {place}"
            )

    def status(
        self, state: State, collapsed: str, code: int | None = None, reason: str = ""
    ) -> None:
        """Replace `status.json` by the current status."""
        self.directory.set_status(
            state,
            code,
            reason,
            images=self.position.images,
            step=self.position.step,
            last_checkpoint=self.last_checkpoint,
            collapsed=collapsed,
        )

    def diverged(self, what: str) -> DivergedError:
        """Return the error for figures or weights that are not finite, with advice."""
        return DivergedError(
            f"step {self.position.step}: {what} The last good checkpoint is "
            f"{self.last_checkpoint or 'none yet'}. Lower the learning rate (optimizer.lr), or "
            "give optimizer.clip a smaller norm."
        )
