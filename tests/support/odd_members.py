"""Zips and tars with members of odd names and kinds, and what is said of those not read."""

from __future__ import annotations

import io
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

SIZE = 8


def _png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(out, "PNG")
    return out.getvalue()


PNG = _png()

CLEAN = ["cat/0.png", "cat/1.png", "dog/0.png"]

LEADS_OUT, BACKSLASH = "lies outside of the archive", "has a backslash in its name"
LETTERS = "has the letters of "
CAFE, CAFE_APART = "caf\u00e9", "cafe\u0301"  # the same word, of 4 and of 5 code points

# Members beside the clean ones, and what is said of the last of them.
REFUSED: dict[str, tuple[list[str], str]] = {
    "absolute": (["/cat/2.png"], LEADS_OUT),
    "above": (["../cat/2.png"], LEADS_OUT),
    "above from within": (["cat/../../2.png"], LEADS_OUT),
    "a drive": (["C:/cat/2.png"], "begins with a drive"),
    "backslashes": (["cat\\2.png"], BACKSLASH),
    "above with backslashes": (["..\\2.png"], BACKSLASH),
    "a control character": (["cat/2\n.png"], "has a control character in its name"),
    "twice": (["cat/0.png"], "is there twice; expected each name once"),
    "twice, with a dot": (["./cat/0.png"], "is there twice; expected each name once"),
    "twice, with two slashes": (["cat//0.png"], "is there twice; expected each name once"),
    "a file in a file": (["cat/0.png/1.png"], "is a file and a folder; expected each name once"),
    "a file for a folder": (["cat"], "is a file and a folder; expected each name once"),
    "an accent in two forms": ([f"cat/{CAFE}.png", f"cat/{CAFE_APART}.png"], LETTERS),
    "a folder in two forms": ([f"{CAFE}/0.png", f"{CAFE_APART}/1.png"], LETTERS),
}

# Members beside the clean ones that count, as these paths.
READ: dict[str, tuple[list[str], list[str]]] = {
    "a dot before": (["./cat/2.png"], ["cat/2.png"]),
    "two slashes": (["cat//2.png"], ["cat/2.png"]),
    "a dot within": (["dog/./2.png"], ["dog/2.png"]),
    "entries of folders": (["cat/", "./", "dog//"], []),
    "a name twice, hidden": (["cat/._0.png", "cat/._0.png", "__MACOSX/cat\\x", ".a//b"], []),
    "another case": (["cat/0.PNG", "cat/A.png", "cat/a.png"],
                     ["cat/0.PNG", "cat/A.png", "cat/a.png"]),
    "blanks and dots at the end": (["cat/2 .png", "cat/2..png", "dog /2.png"],
                                   ["cat/2 .png", "cat/2..png", "dog /2.png"]),
    "letters": ([f"{CAFE}/0.png", "\u732b/0.png"], [f"{CAFE}/0.png", "\u732b/0.png"]),
    "letters apart": ([f"{CAFE_APART}/0.png"], [f"{CAFE_APART}/0.png"]),
    "letters of patterns": (["cat/[1]*?{a,b}#%20.png"], ["cat/[1]*?{a,b}#%20.png"]),
    "a long name": ([f"dog/{'x' * 200}.png"], [f"dog/{'x' * 200}.png"]),
}  # fmt: skip


class _RawName(zipfile.ZipInfo):
    """A member whose name is written as these bytes, and not said to be UTF-8."""

    raw = b""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.raw, self.flag_bits & ~0x800


def zip_of(path: Path, names: Sequence[str | bytes], content: bytes) -> Path:
    """A zip of members that all have this content; a name of bytes is not said to be UTF-8."""
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own, of names that are there twice
        for name in names:
            info = zipfile.ZipInfo("x") if isinstance(name, str) else _RawName("x")
            if isinstance(info, _RawName):
                assert isinstance(name, bytes)
                info.raw = name
            else:
                assert isinstance(name, str)
                info.filename = name
            file.writestr(info, b"" if name[-1:] in ("/", b"/") else content)
    return path


def tar_of(
    path: Path, names: Sequence[str], content: bytes, format: int = tarfile.PAX_FORMAT
) -> Path:
    """A tar of members that all have this content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            info.size = 0 if info.isdir() else len(content)
            tar.addfile(info, io.BytesIO(content[: info.size]))
    path.write_bytes(out.getvalue())
    return path
