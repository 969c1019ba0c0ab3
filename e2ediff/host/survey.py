"""What each installed plugin brings, found out in a process of its own.

Neither a crash nor a hang there is felt here, whatever the plugin does.
A sound result is kept on disk until a file that the import read, a folder in which Python looks
for modules, or e2ediff itself has changed; a plugin that failed is looked at again every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import attrs

import e2ediff
from e2ediff.host.discovery import Entry, spoiled
from e2ediff.host.guard import time_limit

START_LIMIT = 180.0
"""Seconds in which the other process must have imported e2ediff."""

_GRACE = 2.0  # the plugin's own deadline rings first, and says more


@attrs.frozen
class Finding:
    """What was found of one plugin.

    `broken` is why it cannot be used, in one line, "" if it can; `trace` the traceback.
    `printed` is the first line that it wrote to stdout, and `parts` has the names of its parts
    by the plural of their kind.
    `kept` says that it was found earlier and read from disk.
    """

    broken: str = ""
    trace: str = ""
    printed: str = ""
    hooks: tuple[str, ...] = ()
    parts: Mapping[str, Sequence[str]] = attrs.field(factory=dict)
    kept: bool = False


def survey(entries: Sequence[Entry], *, fresh: bool = False) -> dict[str, Finding]:
    """Look at plugins, those that are refused anyway left out.

    Args:
        entries: What is installed.
        fresh: Look at all of them now, whatever is on disk.
    """
    wanted = {e.name: e for e in entries if not e.refusal()}
    if not wanted:
        return {}
    surroundings = _surroundings()
    kept = {} if fresh else _read_kept(surroundings, wanted)
    rest = [name for name in wanted if name not in kept]
    if not rest:
        return {name: kept[name] for name in wanted}
    started = time.time_ns()
    seen, files = _look(rest)
    sound = {
        name: found
        for name, found in seen.items()
        if not found.broken and not any(_changed_since(started, path) for path in files[name])
    }
    _keep(surroundings, {name: wanted[name] for name in sound}, sound, files)
    return {name: seen.get(name) or kept[name] for name in wanted}


# Looking


def _look(names: list[str]) -> tuple[dict[str, Finding], dict[str, list[str]]]:
    """Findings, and the files that each import read; a new process after each that died."""
    found: dict[str, Finding] = {}
    files: dict[str, list[str]] = {}
    while rest := [name for name in names if name not in found]:
        for message in _messages(rest):
            name = message.pop("end")
            files[name] = message.pop("files", [])
            message["hooks"] = tuple(message.get("hooks", ()))
            found[name] = Finding(**message)
    return found, files


def _messages(names: Sequence[str]) -> Sequence[dict[str, Any]]:
    """What one process says of plugins, until it ends; the last may be of its death."""
    limit, current = time_limit(), ""
    ends: list[dict[str, Any]] = []
    with _process(names) as (process, lines):
        while True:
            try:
                line = lines.get(timeout=limit + _GRACE if current else START_LIMIT)
            except queue.Empty:
                why = f"took longer than {limit:g} s, and was stopped"
                break
            if not line:
                why = _death(process.wait())
                break
            message = json.loads(line)
            current = message.get("begin", "")
            if "end" in message:
                ends.append(message)
                if len(ends) == len(names):
                    return ends
    if not current and not ends:
        # No fault of these; each says so, and nobody waits for ever.
        why = spoiled() or f"the process that looks at it {why}"
        return [{"end": name, "broken": why} for name in names]
    if current:
        ends.append({"end": current, "broken": why})
    return ends


@contextlib.contextmanager
def _process(names: Sequence[str]) -> Any:
    """A process that looks at these plugins, and the lines that it writes; "" is the last."""
    path = os.pathsep.join(os.path.abspath(entry or ".") for entry in sys.path)
    with subprocess.Popen(  # noqa: S603 - our own module, and names of entry points
        [sys.executable, "-P", "-m", "e2ediff.host.probe", *names],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    ) as process:
        lines: queue.Queue[str] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
        try:
            yield process, lines
        finally:
            process.kill()


def _pump(stream: IO[str], lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _death(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"ended its process by {signal.Signals(-code).name}"
    return f"ended its process with exit code {code}"


# Keeping


def _store() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "e2ediff" / "plugins.json"


def _surroundings() -> str:
    """Hash of what every import depends on: Python, e2ediff, and where modules are looked for."""
    own = Path(e2ediff.__file__).parent
    sources = sorted(path for path in own.rglob("*.py"))
    state = [sys.version, sys.executable, e2ediff.__version__]
    state += [f"{path} {_stamp(path)}" for path in sys.path if path]
    state += [f"{path} {_stamp(path)}" for path in sources]
    return hashlib.sha256("\n".join(state).encode()).hexdigest()


def _stamp(path: str | Path) -> str:
    """Size and time of a file; of a folder the names in it, without what an import adds."""
    try:
        found = os.stat(path)
        if not stat.S_ISDIR(found.st_mode):
            return f"{found.st_size} {found.st_mtime_ns}"
        names = sorted(name for name in os.listdir(path) if name != "__pycache__")
    except OSError:
        return ""
    return hashlib.sha256("\n".join(names).encode(errors="replace")).hexdigest()


def _changed_since(moment: int, path: str) -> bool:
    """Whether a file may have been written after it was read."""
    try:
        found = os.stat(path)
    except OSError:
        return True
    return found.st_mtime_ns >= moment and not stat.S_ISDIR(found.st_mode)


def _read_kept(surroundings: str, entries: Mapping[str, Entry]) -> dict[str, Finding]:
    """Kept findings of which nothing has changed since."""
    body = _body(surroundings)
    found = {}
    for name, entry in entries.items():
        try:
            kept = body[name]
            if kept["entry"] != repr(entry):
                continue
            if any(_stamp(path) != stamp for path, stamp in kept["files"].items()):
                continue
            parts, hooks = dict(kept["parts"]), tuple(kept["hooks"])
            said = str(kept["printed"])
            found[name] = Finding(printed=said, hooks=hooks, parts=parts, kept=True)
        except (LookupError, TypeError, AttributeError, ValueError):
            continue  # absent, or written by another version
    return found


def _body(surroundings: str) -> dict[str, Any]:
    try:
        kept = json.loads(_store().read_text(encoding="utf-8"))
        if kept["surroundings"] == surroundings and isinstance(kept["plugins"], dict):
            return dict(kept["plugins"])
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return {}


def _keep(
    surroundings: str,
    entries: Mapping[str, Entry],
    findings: Mapping[str, Finding],
    files: Mapping[str, Sequence[str]],
) -> None:
    """Write sound findings, atomically; where that is not possible they are looked for again."""
    body = _body(surroundings)
    for name, found in findings.items():
        body[name] = {
            "entry": repr(entries[name]),
            "files": {path: _stamp(path) for path in files[name]},
            "printed": found.printed,
            "hooks": list(found.hooks),
            "parts": {plural: list(names) for plural, names in found.parts.items()},
        }
    store = _store()
    with contextlib.suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=store.parent, prefix=".plugins-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"surroundings": surroundings, "plugins": body}, file)
        os.replace(path, store)
