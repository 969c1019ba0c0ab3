"""Text that leaves for a terminal: the one place where stdout and stderr are written to.

Names, labels and messages come from files of any origin, and a terminal obeys characters in
them: they would move its cursor, hide text, or turn the order of letters around.
"""

from __future__ import annotations

import logging
import os
import sys
import unicodedata
from typing import TextIO

_JOINERS = "\u200c\u200d"  # parts of words and of emoji, which change nothing around them
_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return a text in which characters that a terminal would obey are shown as `\x1b`.

    These are control characters (C0, DEL, C1), marks that change the direction of text or are
    invisible, separators of lines and paragraphs, lone surrogates, and what Unicode does not
    define. Applied a second time, it changes nothing.

    Args:
        text: The text.
        lines: Whether it may have newlines and tabs; else they are shown as `\n` and `\t` too.
    """
    if text.isprintable():
        return text
    kept = _JOINERS + "\n\t" if lines else _JOINERS
    return "".join(
        ascii(c)[1:-1] if c not in kept and unicodedata.category(c) in _CATEGORIES else c
        for c in text
    )


def echo(
    text: object = "",
    *,
    err: bool = False,
    to: TextIO | None = None,
    lines: bool = False,
    end: str = "\n",
    bold: bool = False,
) -> None:
    """Print a line, without any character that a terminal would obey.

    Args:
        text: The line, or anything else, as `str` writes it.
        err: Whether it goes to stderr instead of stdout.
        to: Another stream.
        lines: Whether the text has several lines; else a newline in it is shown as an escape, so
            that a name from a file cannot begin a line of its own.
        end: What follows.
        bold: Whether a terminal shows it in bold.
    """
    stream = to or (sys.stderr if err else sys.stdout)
    shown = printable(str(text), lines=lines)
    if encoding := getattr(stream, "encoding", None):
        shown = shown.encode(encoding, "backslashreplace").decode(encoding)
    if bold and stream.isatty():
        shown = f"\x1b[1m{shown}\x1b[0m"
    print(shown, end=end, file=stream, flush=True)


def echo_path(path: str | os.PathLike[str]) -> None:
    """Print the address of a result on stdout: exactly, unless it is a terminal that shows it."""
    text, buffer = os.fspath(path), getattr(sys.stdout, "buffer", None)
    if buffer is None or sys.stdout.isatty():
        echo(text)
        return
    sys.stdout.flush()
    buffer.write(os.fsencode(text) + b"\n")
    buffer.flush()


def warn(text: str) -> None:
    """Log a warning of the package; without a handler, Python prints it on stderr."""
    logging.getLogger("e2ediff").warning("%s", printable(text, lines=True))
