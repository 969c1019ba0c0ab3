"""Telling plugins what happens in a run."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.run.progress import Progress


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
