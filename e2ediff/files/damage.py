"""What readers of files raise where these are damaged."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from tokenize import TokenError

from e2ediff.limits import OversizedError

DAMAGED = (
    OversizedError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,  # an encrypted member; NotImplementedError for an unknown compression
)
"""What Python's own readers of zip, gzip and their kin raise, besides OSError and ValueError."""

DAMAGED_ARRAY = (
    *DAMAGED,
    *(OSError, ValueError, LookupError, OverflowError, MemoryError),  # sizes and places
    *(TypeError, SyntaxError, TokenError),  # a header is parsed as Python
)
"""What NumPy raises as well, of an npy file or an npz of them."""
