"""What readers of files raise where these are damaged."""

from __future__ import annotations

import lzma
import zipfile
import zlib

DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,  # an encrypted member; NotImplementedError for an unknown compression
)
"""What Python's own readers of zip, gzip and their kin raise, besides OSError and ValueError."""
