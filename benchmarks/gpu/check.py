"""One scripted look at e2ediff on a CUDA device: what runs, how fast, how exactly, what it makes.

    python benchmarks/gpu/check.py --root . --out DIR --plan first --budget 335
    python benchmarks/gpu/check.py --out DIR --plan all --device cpu --tiny      # a rehearsal

Parts run one after another, each in a process of its own with its own time limit, and each writes
down what it has found at once: neither a crash nor a time limit loses what is known by then.
DIR gets results.json, results.md, log.txt and some pictures, eight files at most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from look import short
from plans import PARTS, PLANS
from report import Entry, write

_LEAST = 8.0  # seconds with which a part is begun at all
_LOG = 4_000_000  # bytes of the log that are kept


def main() -> int:
    """Carry out the parts that were asked for; 1 if one did not end whole."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", default=".", help="the project's checkout")
    parser.add_argument("--out", default="gpu-look", help="where findings are written")
    parser.add_argument("--kit", help="what was carried to this machine; by default ROOT/.gpu")
    parser.add_argument("--work", help="scratch; by default a folder of its own in /tmp")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--plan", choices=[*PLANS, "all"])
    parser.add_argument("--parts", default="", help="as environment,throughput:dsd_in256:blocks")
    parser.add_argument("--budget", type=float, default=335.0, help="seconds for all")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to rehearse on a CPU")
    parser.add_argument("--list", action="store_true", help="name the parts and plans")
    given = parser.parse_args()
    if given.list:
        for name, part in PARTS.items():
            print(f"{name:12} {part.limit:4} s  {part.about}")
        for name, parts in PLANS.items():
            print(f"plan {name}: {', '.join(parts)}")
        return 0
    plans = PLANS.values() if given.plan == "all" else [PLANS.get(given.plan, ())]
    names = [name for plan in plans for name in plan]
    names += [name for name in given.parts.split(",") if name]
    if unknown := [name for name in names if name.partition(":")[0] not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; --list names them")
    if not names:
        parser.error("give --plan or --parts")
    entries = carry_out(given, names)
    return int(any(entry.end != "whole" for entry in entries))


def carry_out(given: argparse.Namespace, names: Sequence[str]) -> list[Entry]:
    """Run the parts in order, as long as there is time."""
    began = time.monotonic()
    out, root = Path(given.out).resolve(), Path(given.root).resolve()
    work = Path(given.work or tempfile.mkdtemp(prefix="gpu-check-")).resolve()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    look = {
        "root": str(root), "kit": str(Path(given.kit or root / ".gpu").resolve()),
        "out": str(out), "work": str(work), "device": given.device, "tiny": given.tiny,
    }  # fmt: skip
    entries: list[Entry] = []
    with open(out / "log.txt", "a", encoding="utf-8") as log:
        for number, name in enumerate(names):
            part = PARTS[name.partition(":")[0]]
            entry = Entry(name, part.about)
            entries.append(entry)
            left = given.budget - (time.monotonic() - began)
            if left >= _LEAST:
                limit = min(3 * part.limit if given.tiny else part.limit, left - 3)
                notes = work / f"notes-{number}.jsonl"
                _run(entry, {**look, "notes": str(notes), "limit": limit}, log)
            write(out, entries)
    _shrink(out / "log.txt")
    print(f"all in {time.monotonic() - began:.0f} s; see {out}/results.md")
    return entries


def _run(entry: Entry, look: dict[str, object], log: TextIO) -> None:
    """Run a part in a process of its own, and collect what it found."""
    limit, began = float(str(look["limit"])), time.monotonic()
    print(f"{entry.part} (at most {limit:.0f} s)", flush=True)
    log.write(f"\n===== {entry.part}\n")
    log.flush()
    words = [sys.executable, str(Path(__file__).with_name("part.py")), entry.part]
    process = subprocess.Popen(
        [*words, json.dumps(look)], stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True, env=_surroundings(entry.part, look),
    )  # fmt: skip
    try:
        code = process.wait(limit)
        entry.end = "whole" if code == 0 else f"ended with code {code}"
    except subprocess.TimeoutExpired:
        entry.end = f"cut off after {limit:.0f} s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # and what it may have left
    process.wait()
    entry.seconds = time.monotonic() - began
    notes = Path(str(look["notes"]))
    for line in notes.read_text(encoding="utf-8").splitlines() if notes.exists() else ():
        with contextlib.suppress(ValueError):  # the last one may be cut
            entry.rows.append(json.loads(line))
    print(f"  {entry.end}, {entry.seconds:.1f} s, {len(entry.rows)} findings", flush=True)
    for row in entry.failures[:12]:
        print("  FAILED " + "  ".join(f"{k}={short(v)[:160]}" for k, v in row.items()), flush=True)


def _surroundings(part: str, look: dict[str, object]) -> dict[str, str]:
    """Return the environment of a part."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(str(look["work"]), "inductor")))
    env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # `deterministic: true` needs it from the start
    if look["tiny"]:
        env["OMP_NUM_THREADS"] = "1"
    return env


def _shrink(file: Path) -> None:
    data = file.read_bytes()
    if len(data) > _LOG:
        file.write_bytes(data[: _LOG // 2] + b"\n...\n" + data[-_LOG // 2 :])


if __name__ == "__main__":
    sys.exit(main())
