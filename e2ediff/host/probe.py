"""The process in which plugins are looked at: `python -m e2ediff.host.probe NAME...`.

Imports and registers the named plugins one after another and writes a line of JSON before and
after each, so that whoever reads knows which one a hang or a crash belongs to.
What plugins write to the real stdout lands in a file, `print` or not.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TextIO


def main() -> None:
    """Look at the plugins that the arguments name."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 1)
        _look(sys.argv[1:], out, written.fileno())
    # A thread that a plugin started, or its atexit function, must not keep us.
    os._exit(0)


def _look(names: list[str], out: TextIO, written: int) -> None:
    # What torch makes when it is imported stays; to search it for garbage all the while takes a
    # sixth of the time.
    gc.disable()
    from e2ediff.host.plugins import load

    host = load()
    gc.freeze()
    gc.enable()
    _say(out, ready=True)
    ours = set(sys.modules)
    for name in names:
        _say(out, begin=name)
        before = os.fstat(written).st_size
        host.load_plugin(name)
        sys.stdout.flush()
        raw = os.pread(written, 200, before).decode(errors="replace").strip()
        plugin = next((p for p in host.plugins if p.name == name), None)
        error = host.errors.get(name)
        _say(
            out,
            end=name,
            broken=host.broken.get(name, ""),
            trace="".join(traceback.format_exception(error)) if error else "",
            printed=host.printed.get(name, "") or raw.partition("\n")[0][:80],
            hooks=plugin.hooks if plugin else (),
            parts={
                plural: [p.name for p in registry if p.plugin.name == name]
                for plural, registry in host.registries.items()
                if any(p.plugin.name == name for p in registry)
            },
            files=_files(set(sys.modules) - ours),
        )


def _files(modules: set[str]) -> list[str]:
    """Sources of these modules, and their folders, where another may come to lie."""
    paths = {getattr(sys.modules.get(name), "__file__", None) for name in modules}
    files = {Path(path) for path in paths if isinstance(path, str)}
    return sorted(map(str, files | {path.parent for path in files}))


def _say(out: TextIO, **message: object) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
