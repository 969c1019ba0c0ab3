"""Which files and folders are nobody's data, by their names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

import attrs

from e2ediff.data import LeftOut
from e2ediff.files.images import is_image

_LEFT_BY_SYSTEMS = {
    *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),  # NAS
    *("lost+found", "__pycache__"),
}
_MOST_REASONS = 8


def is_hidden(path: str) -> bool:
    """Return whether a file or folder never counts, because of any part of its path.

    These are names that begin with a dot (AppleDouble's `._x`, `.ipynb_checkpoints`,
    `.thumbnails` among them), the copies that editors keep (`x~`, `#x#`), and what systems leave
    beside the user's files (`__MACOSX`, `@eaDir`, `Thumbs.db`, `lost+found`, ...).

    Args:
        path: Relative to what the user has named, which may itself lie in a hidden folder.
    """
    return any(
        (part.startswith(".") and part not in (".", ".."))
        or (len(part) > 1 and (part.endswith("~") or part[0] == part[-1] == "#"))
        or part.lower() in _LEFT_BY_SYSTEMS
        for part in path.split("/")
    )


def below(root: str, path: str) -> str:
    """Return a file system's path of a file in a folder, relative to the folder."""
    return path.removeprefix(root.rstrip("/")).lstrip("/")


def is_readable(path: str) -> bool:
    """Return whether a path is text: file systems also have names that are no UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


@attrs.define
class Tally:
    """Counts of what is left out, by reason."""

    _found: dict[str, LeftOut] = attrs.field(factory=dict)

    def add(self, reason: str, path: str, count: int = 1) -> None:
        """Count one more, or several of which this is the first."""
        before = self._found.get(reason)
        if before:
            self._found[reason] = attrs.evolve(before, count=before.count + count)
        else:
            shown = path.encode(errors="backslashreplace").decode()
            self._found[reason] = LeftOut(reason, count, shown)

    def include(self, others: Iterable[LeftOut]) -> None:
        """Count what was left out elsewhere."""
        for other in others:
            self.add(other.reason, other.first, other.count)

    def add_other(self, path: str) -> None:
        """Count a file that is no image by its name."""
        suffix = PurePosixPath(path).suffix.lower()
        self.add(f"with suffix {suffix}" if suffix else "without suffix", path)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Return the counts, the largest first; of many reasons the rarest as one."""
        found = sorted(self._found.values(), key=lambda one: (-one.count, one.reason))
        if len(found) <= _MOST_REASONS:
            return tuple(found)
        rest = found[_MOST_REASONS - 1 :]
        other = LeftOut("with other suffixes", sum(one.count for one in rest), rest[0].first)
        return (*found[: _MOST_REASONS - 1], other)


def images_of(
    paths: Iterable[str], also_read: Iterable[str] = ()
) -> tuple[list[str], tuple[LeftOut, ...]]:
    """Return the images among files, sorted, and what is left out.

    Args:
        paths: Of files, none of them hidden.
        also_read: Those that are no images and are read too, as labels are.
    """
    images, tally, known = list[str](), Tally(), {*also_read}
    for path in sorted(paths):
        if not is_readable(path):
            tally.add("with a name that is no UTF-8", path)
        elif is_image(path):
            images.append(path)
        elif path not in known:
            tally.add_other(path)
    return images, tally.left_out
