"""The tests that are marked as needing a GPU."""

from __future__ import annotations

from look import Look
from processes import Ended, run_command

PLACES = ("tests/gpu", "tests/parity/test_attention.py")


def run(look: Look) -> None:
    """Note the outcome, and failures and skips."""
    many = () if look.tiny else ("-n", 4, "--dist", "loadfile")
    note_outcome(look, "-m gpu", pytest(look, "-m", "gpu", *PLACES, *many, "--timeout", 80))


def pytest(look: Look, *words: object) -> Ended:
    """Run pytest with the project's options, in which warnings of this torch are no errors."""
    # Each outcome is a line of its own, which is there even if pytest is cut off.
    options = ("-v", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib -ra")
    own = {"OMP_NUM_THREADS": "1"}
    return run_command(
        look, "pytest", *options, "-W", "default", *words, limit=look.limit - 5, env=own
    )


def note_outcome(look: Look, what: str, ended: Ended) -> None:
    """Note how pytest ended, then failures, then skips."""
    look.note(
        what=what, ok=ended.code == 0, code=ended.code, seconds=ended.seconds,
        last=ended.said.strip().splitlines()[-1:],
    )  # fmt: skip
    for outcome in ("FAILED", "ERROR", "E  ", "SKIPPED ["):
        for line in [text for text in ended.said.splitlines() if outcome in text][:40]:
            look.note(line=line[:260])
