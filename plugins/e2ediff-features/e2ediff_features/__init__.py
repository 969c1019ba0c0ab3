"""Feature networks for scores and losses, whose weights a user supplies: DINOv2, CLIP, any other.

The files are read as data: nothing in them is unpickled but tensors, or executed.
"""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register(add: Callable[[str, str, str], None]) -> None:
    """Name the parts; a class is imported when a recipe names it."""
    add("features", "dinov2", "e2ediff_features.foundation:DINOv2")
    add("features", "clip", "e2ediff_features.foundation:CLIP")
    add("features", "exported", "e2ediff_features.exported:Exported")
