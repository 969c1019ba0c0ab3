"""Migrate checkpoints of earlier formats to the present one, one step at a time.

The format number is raised when `state.json`, the latent contracts or the names of tensors change
their meaning; the step from the previous format is added to `STEPS`, and a run of that format is
kept in `tests/golden`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

FORMAT_VERSION = 1


@attrs.frozen
class Body:
    """The content of a checkpoint besides its tensors.

    Args:
        state: The content of `state.json`.
        latent: The latent contract of each set of weights, by file.
        names: By file, the present names of tensors that were stored under other names.
    """

    state: Mapping[str, Any]
    latent: Mapping[str, Mapping[str, Any]]
    names: Mapping[str, Mapping[str, str]] = attrs.field(factory=dict)


Step = Callable[[Body], Body]

STEPS: Mapping[int, Step] = {}
"""By format, what brings a body of it to the next one; formats begin with 1."""


def migrate(
    body: Body, version: int, steps: Mapping[int, Step] = STEPS, to: int = FORMAT_VERSION
) -> Body:
    """Return the body converted to format `to`.

    Raises:
        LookupError: There is no such format.
    """
    for earlier in range(version, to):
        body = steps[earlier](body)
    return body
