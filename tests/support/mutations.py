"""Random damage to files, by bytes and by the structure of JSON."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e2ediff.errors import E2EDiffError

_NUMBERS = (0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
_ODD: tuple[Any, ...] = (
    *(None, True, -1, 1e308, float("inf"), float("nan"), 2**70, 10**400, "", "x" * 50),
    *([], {}, [[]], {"a": 1}),
)


def damaged(data: bytes, g: random.Random) -> bytes:
    """Flip bits, cut, blank, move or insert bytes, most of them near the beginning or the end."""
    found = bytearray(data)
    for _ in range(g.choice((1, 1, 1, 2, 4, 16))):
        n = len(found)
        if not n:
            break
        at = g.choice((g.randrange(n), g.randrange(min(n, 600)), n - 1 - g.randrange(min(n, 900))))
        kind = g.randrange(7)
        if kind == 0:
            found[at] ^= 1 << g.randrange(8)
        elif kind == 1:
            found[at] = g.choice((0, 255, 127, 128, g.randrange(256)))
        elif kind == 2:
            del found[at:]
        elif kind == 3:
            found[at : at + 512] = bytes(len(found[at : at + 512]))
        elif kind == 4:
            width, order = g.choice((2, 4, 8)), g.choice(("little", "big"))
            number = g.choice(_NUMBERS) % (1 << 8 * width)
            found[at : at + width] = number.to_bytes(width, order)
        elif kind == 5:
            del found[at : at + g.randrange(1, 16)]
        else:
            found[at:at] = g.randbytes(g.randrange(1, 8))
    return bytes(found)


def damaged_json(data: bytes, g: random.Random) -> bytes:
    """Take a value of JSON away, or put another one in its place."""
    whole = json.loads(data)
    node = whole
    while True:
        key = g.choice(list(node)) if isinstance(node, dict) else g.randrange(len(node))
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner or g.random() < 0.35:
            break
        node = inner
    if g.random() < 0.25:
        del node[key]
    else:
        node[key] = g.choice(_ODD)
    return json.dumps(whole).encode()


def damaged_member(data: bytes, g: random.Random) -> bytes:
    """Damage the beginnings of the members of a zip, which is sound itself."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, damaged(content[:400], g) + content[400:])
    return out.getvalue()


def outcomes(
    seed: bytes,
    place: Path,
    read: Callable[[str], object],
    count: int,
    *ways: Callable[[bytes, random.Random], bytes],
) -> tuple[int, int]:
    """Read damaged copies of a file; how many were read and refused, each with an error of ours.

    The file itself must be read, else nothing would be proved.
    """
    g, refused = random.Random(place.name), 0
    place.write_bytes(seed)
    read(str(place))
    for _ in range(count):
        place.write_bytes(g.choice(ways or (damaged,))(seed, g))
        try:
            read(str(place))
        except E2EDiffError:
            refused += 1
    return count - refused, refused
