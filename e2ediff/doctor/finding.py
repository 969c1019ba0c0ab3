"""What one check found."""

from __future__ import annotations

from typing import Literal

import attrs

State = Literal["ok", "warning", "problem"]


@attrs.frozen
class Finding:
    """The result of a check: its name, what was found, and for all but `ok` what to do."""

    name: str
    state: State
    what: str
    hint: str = ""
