"""Who is told what happens in a run: plugins and trackers, none of which can stop it."""

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
    """What observers see of a run: nothing they could change it by."""

    recipe: Recipe
    directory: str
    device: str
    images_seen: int


def notify(
    host: Host, view: RunView, progress: Progress, hook: str, values: Mapping[str, object]
) -> None:
    """Call a hook; what an observer raises stops neither the run nor the other observers."""
    for plugin, error in host.observe(hook, run=view, **values):
        progress.say(f"plugin {plugin!r}: {hook} failed: {type(error).__name__}: {error}")


class Trackers:
    """All trackers of a run as one."""

    def __init__(
        self, configs: Sequence[TrackerConfig], directory: RunDirectory, progress: Progress
    ) -> None:
        self.configs = configs
        self.directory = directory
        self.progress = progress
        self.trackers: list[Tracker] = []

    def open(self) -> None:
        """Open every tracker; one that is not installed is an error of the user's."""
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
        """Figures to all."""
        self._each(lambda tracker: tracker.log(images, values))

    def picture(self, images: int, name: str, x: Tensor) -> None:
        """A picture to all."""
        self._each(lambda tracker: tracker.picture(images, name, x))

    def close(self) -> None:
        """Close all."""
        self._each(lambda tracker: tracker.close())
        self.trackers.clear()
