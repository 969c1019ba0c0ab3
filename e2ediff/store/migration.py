"""Checkpoints of earlier formats, brought to the present one step at a time.

A format is raised where `state.json`, the latent contracts or the names of tensors change their
meaning; the step from the format before goes into `STEPS`, and a run of that format stays in
`tests/golden`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

FORMAT_VERSION = 1


@attrs.frozen
class Body:
    """What a checkpoint says besides its tensors.

    Args:
        state: The content of `state.json`.
        latent: The latent contract of each set of weights, by file.
        names: By file, today's names of tensors that were stored under other ones.
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
    """Return the body as a checkpoint of format `to` would have it.

    Raises:
        LookupError: There is no such format.
    """
    for earlier in range(version, to):
        body = steps[earlier](body)
    return body
