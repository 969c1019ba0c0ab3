"""The command line in this process: its exit code and what it writes."""

from __future__ import annotations

import contextlib
import io
from importlib.util import find_spec

import attrs
import pytest

from e2ediff.cli import main

needs_dsd = pytest.mark.skipif(
    find_spec("e2ediff_dsd") is None, reason="needs `pip install plugins/e2ediff-dsd`"
)


@attrs.frozen
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def e2ediff(*words: object) -> Done:
    """Run a command; an exception that a user would see as a traceback is raised here."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())
