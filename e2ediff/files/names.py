"""Which files and folders are nobody's data, by their names."""

from __future__ import annotations

from typing import Any

_LEFT_BY_SYSTEMS = {
    *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),  # NAS
    *("lost+found", "__pycache__"),
}


def is_hidden(path: str) -> bool:
    """Return whether a file or folder never counts, because of any part of its path.

    These are names that begin with a dot (AppleDouble's `._x`, `.ipynb_checkpoints`,
    `.thumbnails` among them) and what systems leave beside the user's files (`__MACOSX`,
    `@eaDir`, `Thumbs.db`, `lost+found`, ...).

    Args:
        path: Relative to what the user has named, which may itself lie in a hidden folder.
    """
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in _LEFT_BY_SYSTEMS
        for part in path.split("/")
    )


def below(root: str, path: str) -> str:
    """Return a file system's path of a file in a folder, relative to the folder."""
    return path.removeprefix(root.rstrip("/")).lstrip("/")


def files_below(fs: Any, root: str) -> list[str]:
    """List a file system's paths of a folder's files, at any depth, but hidden ones; sorted."""
    found = (str(path) for path in fs.find(root))
    return sorted(path for path in found if not is_hidden(below(root, path)))
