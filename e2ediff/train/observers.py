"""Notify plugins and trackers of what happens in a run; none of them can stop it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
from torch import Tensor

from e2ediff.errors import E2EDiffError
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.store.run_directory import RunDirectory
from e2ediff.tracker import Tracker, TrackerConfig
from e2ediff.train.progress import Progress


@attrs.frozen(eq=False)
class RunView:
    """A read-only view of a run for observers."""

    recipe: Recipe
    directory: str
    device: str
    images_seen: int


def notify(
    host: Host, view: RunView, progress: Progress, hook: str, values: Mapping[str, object]
) -> None:
    """Call a hook; an exception in one observer stops neither the run nor other observers."""
    for plugin, error in host.observe(hook, run=view, **values):
        progress.say(f"plugin {plugin!r}: {hook} failed: {type(error).__name__}: {error}")


class Trackers:
    """Sends figures and pictures to all trackers of a run."""

    def __init__(
        self, configs: Sequence[TrackerConfig], directory: RunDirectory, progress: Progress
    ) -> None:
        self.configs = configs
        self.directory = directory
        self.progress = progress
        self.trackers: list[Tracker] = []

    def open(self) -> None:
        """Open every tracker; one that is not installed raises an error for the user."""
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
            "metrics.jsonl goes on."
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
