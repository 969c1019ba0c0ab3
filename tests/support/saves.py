"""Waiting for a save, which is made beside training and ends when it ends."""

from __future__ import annotations

import time

from e2ediff.store.checkpoint import list_checkpoints
from e2ediff.store.storage import Store


def await_checkpoint(out: object, name: str) -> None:
    """Return when the checkpoint of this name is complete, within a minute."""
    until = time.monotonic() + 60
    while name not in list_checkpoints(Store(str(out)), finished=True):
        assert time.monotonic() < until, f"{out}: {name} was not saved"
        time.sleep(0.01)
