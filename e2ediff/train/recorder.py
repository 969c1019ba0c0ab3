"""Record what a run produces while it trains: figures, events, pictures and its status.

Plugins and trackers are notified of it; none of them can stop the run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from e2ediff.distributed.world import World
from e2ediff.errors import DivergedError, E2EDiffError
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.loading.bad_images import BAD_IMAGES, BadImages, Skipped
from e2ediff.store.run_directory import RunDirectory, State
from e2ediff.store.storage import JSON
from e2ediff.tracker import Tracker, TrackerConfig
from e2ediff.train.progress import Progress


@attrs.frozen(eq=False)
class RunView:
    """A read-only view of a run for observers."""

    recipe: Recipe
    directory: str
    device: str
    images_seen: int


@attrs.define(eq=False)
class Trackers:
    """Sends figures and pictures to all trackers of a run."""

    configs: Sequence[TrackerConfig]
    directory: RunDirectory
    progress: Progress
    trackers: list[Tracker] = attrs.field(factory=list)

    def open(self) -> None:
        """Open every tracker; one that fails is switched off, unless its error is for the user."""
        path = self.directory.store.local_path() or self.directory.path
        for config in self.configs:
            try:
                self.trackers.append(config.open(path))
            except E2EDiffError:
                raise
            except Exception as error:
                self._say(config, error)

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                act(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                self._say(tracker, error)

    def _say(self, tracker: object, error: Exception) -> None:
        name = type(tracker).__name__
        self.progress.say(
            f"tracker {name} is switched off: {type(error).__name__}: {error}. "
            "Figures are still written to metrics.jsonl."
        )
        self.directory.event("tracker_off", tracker=name, error=str(error))

    def log(self, images: int, values: Mapping[str, float]) -> None:
        """Send figures to all trackers."""
        self._each(lambda tracker: tracker.log(images, values))

    def picture(self, images: int, name: str, x: Tensor) -> None:
        """Send a picture to all trackers."""
        self._each(lambda tracker: tracker.picture(images, name, x))

    def close(self) -> None:
        """Close all trackers."""
        self._each(lambda tracker: tracker.close())
        self.trackers.clear()


class Clock:
    """Counts steps and the seconds they took, without diagnoses and saving."""

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.start(0)

    def start(self, step: int) -> None:
        """Start counting at this step, now."""
        self._since, self._first = time.perf_counter(), step

    def rate(self, step: int, batch: int) -> float:
        """Return images per second since the start."""
        seconds = time.perf_counter() - self._since
        return (step - self._first) * batch / max(seconds, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside, in which this process may work alone for long."""
        began = time.perf_counter()
        try:
            with self.world.long():
                yield
        finally:
            self._since += time.perf_counter() - began


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
    clock: Clock = attrs.field(init=False)
    last_checkpoint: str | None = None
    settle_save: Callable[[], None] = lambda: None  # waits for a save in flight, and records it
    trackers: Trackers = attrs.field(init=False)
    bad_images: BadImages = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.clock = Clock(self.world)
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
        """Call a hook; an exception in one plugin stops neither the run nor other plugins."""
        if not (self.world.is_leader and self.host.observers(hook)):
            return
        view = RunView(self.recipe, self.directory.path, str(self.device), self.position.images)
        with self.world.long():  # the others wait for what plugins do
            failed = list(self.host.observe(hook, run=view, **values))
        for plugin, error in failed:
            text = f"{hook} failed: {type(error).__name__}: {error}"
            self.progress.say(f"plugin {plugin!r}: {text}")

    def skipped(self, found: Sequence[Skipped], seen: int = 0) -> None:
        """List damaged images that were not used; the first one is also shown.

        `seen` is as for `BadImages.add`.
        """
        if self.bad_images.add(found, seen):
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

    def diverged(self, what: str, step: int | None = None, way_out: str = "") -> DivergedError:
        """Return the error for figures or weights that are not finite, with advice.

        `step` is that of the position where it is not given; `way_out` ends with a space.
        """
        self.settle_save()
        last = self.last_checkpoint
        good = f"The last good checkpoint is {last}." if last else "There is no checkpoint yet."
        at = self.position.step if step is None else step
        advice = (
            "Lower the learning rate (optimizer.lr), or give optimizer.clip a smaller norm."
            if at > 0
            else "No step has been taken, so the learning rate is not the cause: look at the "
            "scales in interpolant, objective and its feature networks."
        )
        return DivergedError(f"step {at}: {what} {good} {way_out}{advice}")
