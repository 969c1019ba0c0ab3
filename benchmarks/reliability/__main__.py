"""All suites one after the other: `python -m benchmarks.reliability all --quick --json DIR`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

SUITES = {
    # name: (trials of --quick, trials of --long; 0: each kind once)
    "kills": (60, 8000),  # about 1.3 kills each
    "mutations": (600, 10_000),
    "resume_cuts": (36, 0),
    "returns": (30, 0),
    "full_disk": (24, 300),
    "signals": (24, 500),
    "command_signals": (24, 500),
    "two_ranks": (12, 250),
    "object_store": (40, 1000),
    "s3_server": (12, 250),
    "fuzz": (800, 10_000),
    "files": (136, 3000),
}


def main(words: list[str] | None = None) -> int:
    """Carry out the suites, each as a command of its own; 1 if any promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    parser.add_argument("all", choices=["all"])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="some minutes (the default)")
    length.add_argument("--long", action="store_true", help="some hours")
    parser.add_argument("--json", metavar="DIR", required=True, help="for results and journals")
    parser.add_argument("--minutes", type=float, default=0, help="stop after about so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args(words)
    until = time.monotonic() + 60 * given.minutes
    failed = []
    for number, (name, counts) in enumerate(SUITES.items()):
        command = [sys.executable, "-m", f"{__package__}.{name}", "--seed", str(given.seed)]
        command += ["--count", str(counts[given.long]), "--jobs", str(given.jobs)]
        command += ["--json", str(Path(given.json, f"{name}.json"))]
        if given.minutes:
            # A share of what is left: what a quick suite does not need, later ones have.
            share = (until - time.monotonic()) / 60 / (len(SUITES) - number)
            command += ["--minutes", f"{max(share, 0.01):.2f}"]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed) or 'none'}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
