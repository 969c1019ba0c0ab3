"""Lines of progress: of work that cannot say how far it is, and of work that is done."""

from __future__ import annotations

import io
import time

import pytest

from e2ediff.train.progress import Progress


def test_long_work_that_reports_nothing_is_shown_and_short_work_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("e2ediff.train.progress._SILENCE", 0.04)
    stream = io.StringIO()
    with Progress(stream, plain_seconds=0.0) as progress:
        with progress.doing("counting"):
            pass
        assert stream.getvalue() == ""
        with progress.doing("counting"):
            for _ in range(100):
                if stream.getvalue():
                    break
                time.sleep(0.02)
        written = stream.getvalue()
        assert written.startswith("counting: 0s\n")
        time.sleep(0.1)
    assert stream.getvalue() == written  # it ended with the work


def test_an_empty_line_removes_the_one_before() -> None:
    stream = io.StringIO()
    with Progress(stream, plain_seconds=60.0) as progress:
        progress.update("first")
        progress.update("second")
        progress.update("")
    assert stream.getvalue() == "first\n"
