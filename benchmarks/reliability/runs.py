"""Tiny runs in forks of a warm process, and the comparison of two of them.

The command line is called as a user calls it; nothing here counts on how a run writes its files,
but for the layout that `docs/reference/run-directory.md` describes.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import attrs

INTERVAL = 2
STEPS = 6
LINES = {
    "e2ediff": "1",
    "name": "tiny",
    "steps": f"{STEPS}",
    "batch": "4",
    "data": "{name: synthetic, size: 8, count: 16, classes: 2}",
    "backbone": "{name: vit, width: 8, depth: 1, heads: 1, patch: 4, latent_dim: 3}",
    "interpolant": "linear",
    "times": "uniform",
    "objective": "detached",
    "optimizer": "{name: adamw, lr: 0.01}",
    "sampler": "{name: euler, steps: 2}",
    "diagnostics": "[]",
    "cadence": f"{{log: 1, diagnose: 1000, preview: 1000, checkpoint: {INTERVAL}}}",
    "probe": "{images: 4, times: [0.5], calibration: 4}",
    "preview": "{rows: 1, classes: 1}",
    "device": "cpu",
}
FULL = {
    "backbone": "{name: vit, width: 8, depth: 1, heads: 1, patch: 4, latent_dim: 3, "
    "latent_norm: batch}",
    "objective": "coupled",
    "microshards": "2",
    "ema": "[{name: slow, decay: 0.9}]",
    "post_hoc": "{every: 2}",
    "diagnostics": "[latent_health]",
    "cadence": f"{{log: 1, diagnose: 3, preview: 3, checkpoint: {INTERVAL}}}",
    "checkpoint": "{keep: 1}",
}
"""Changes that add what the lean recipe has not: pictures, diagnoses, averages, snapshots."""


def recipe(changes: Mapping[str, str] | None = None) -> str:
    """Return the smallest recipe that trains, with these values instead."""
    return "".join(f"{key}: {value}\n" for key, value in {**LINES, **(changes or {})}.items())


@attrs.frozen
class Ended:
    """How a command in a fork ended: its exit code, what it said, and its seconds.

    The code is negative for the signal that killed it, and None if it had to be given up.
    """

    code: int | None
    said: str
    seconds: float

    @property
    def last(self) -> str:
        """The end of what it said, on one line."""
        return " / ".join(self.said.strip().splitlines()[-3:])[-400:]

    @property
    def crashed(self) -> bool:
        """Whether a user saw a traceback."""
        return "Traceback (most recent call last)" in self.said or self.code == 1


Act = Callable[[], object]


def command(words: Sequence[str]) -> int:
    """Call the command line in this process, and return its exit code."""
    from e2ediff.cli import main

    try:
        main(list(words))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0


def without_drawing() -> None:
    """Write an empty picture in place of drawn curves, which take most of a tiny run's time."""
    from matplotlib.figure import Figure

    draw = Figure.savefig

    def savefig(self: Figure, file: Any, *given: Any, **options: Any) -> None:
        if options.get("format") == "svg":  # of reports, which read it
            draw(self, file, *given, **options)
        else:
            file.write(b"curves")

    Figure.savefig = savefig  # type: ignore[assignment, method-assign]


def begin(act: Callable[[], int], log: Path, first: Act | None = None) -> int:
    """Fork, call `first` and then `act` there, with output in `log`; return the pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        pid = os.fork()
    if pid == 0:
        _child(act, log, first)
    return pid


def _child(act: Callable[[], int], log: Path, first: Act | None) -> NoReturn:
    code = 1
    try:
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(number, 1)
        os.dup2(number, 2)
        os.close(number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (the test runner replaced them)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        for received in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(received, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.simplefilter("ignore")
        if first:
            first()
        code = act()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, log: Path, since: float, seconds: float) -> Ended:
    """Wait for a fork; one that takes too long is killed."""
    limit = time.monotonic() + seconds
    pause = 0.0005
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code: int | None = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() > limit:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            code = None
            break
        time.sleep(pause)
        pause = min(pause * 1.3, 0.01)
    said = log.read_text(errors="replace") if log.exists() else ""
    return Ended(code, said, time.monotonic() - since)


def fork(
    words: Sequence[object], log: Path, first: Act | None = None, seconds: float = 60
) -> Ended:
    """Run one command in a fork and wait for its end."""
    since = time.monotonic()
    texts = [str(word) for word in words]
    return wait(begin(lambda: command(texts), log, first), log, since, seconds)


_WARM: set[str] = set()
"""Lines of recipes, without their numbers, whose modules this process has."""


def warm(place: Path, *recipes: str) -> None:
    """Import what runs of these recipes import, so that no fork has to.

    A fork trains and lists its modules; nothing is trained in this process, which must stay
    without threads.
    """
    import torch

    torch.set_num_threads(1)
    place.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(recipes):
        lines = {*re.sub(r"\d", "", text).splitlines()}
        if lines <= _WARM:
            continue
        _WARM.update(lines)
        file, names = place / f"warm{number}.yaml", place / "modules"
        file.write_text(text)
        out = place / f"warm{number}"

        def act(file: Path = file, out: Path = out, names: Path = names) -> int:
            words = ("run", file, "--out", out, "--threads", "1")
            code = command([str(word) for word in words])
            code = code or command(
                ["sample", str(out), "--count", "1", "--label", "0", "--threads", "1"]
            )
            names.write_text("\n".join(sys.modules))
            return code

        log = place / "warm.log"
        ended = wait(begin(act, log), log, time.monotonic(), 120)
        if ended.code != 0:
            raise RuntimeError(f"the recipe does not train: {ended.said}")
        import_all(names.read_text().splitlines())
        shutil.rmtree(out)
    from e2ediff.host.plugins import load

    load()
    _warm_registries()
    gc.collect()
    gc.freeze()  # so that collections in forks do not copy the pages of all that was imported


def import_all(names: Sequence[str]) -> None:
    """Import what a fork has imported, so that the next one need not."""
    for name in names:
        if name not in sys.modules and name != "__main__":
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)


def _warm_registries() -> None:
    from e2ediff.host.plugins import load
    from e2ediff.host.recipe import parse_recipe

    parse_recipe(load(), recipe(), "tiny.yaml")


def train_words(file: Path, out: Path, *more: str) -> list[str]:
    """Return the command that begins a run in `out`, or continues what is there."""
    begun = out.is_dir() and any(out.iterdir())
    words = ["run", str(file), "--out", str(out), "--threads", "1", *more]
    return [*words, "--resume"] if begun else words


# What a run's directory holds


def names_of(out: Path) -> list[str]:
    """Return the names of the checkpoints in a run's directory, oldest first."""
    folder = out / "checkpoints"
    found = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [name for name in found if name.startswith("images-")]


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint by its own manifest; "" if it is whole.

    Written without e2ediff's reader, which must agree.
    """
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_bytes())
        files = manifest["files"]
        for name, told in files.items():
            data = (folder / name).read_bytes()
            if len(data) != told["bytes"]:
                return f"{name} has {len(data)} bytes instead of {told['bytes']}"
            if hashlib.sha256(data).hexdigest() != told["sha256"]:
                return f"{name} has another hash"
        extra = {*os.listdir(folder)} - {*files, "MANIFEST.json"}
        return f"unknown files: {sorted(extra)}" if extra else ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def tensors(folder: Path) -> dict[str, bytes]:
    """Return every tensor of a checkpoint: dtype, shape and bytes."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, told in header.items():
            start, end = told["data_offsets"]
            kind = f"{told['dtype']} {told['shape']}".encode()
            found[f"{path.stem}:{name}"] = kind + data[8 + size + start : 8 + size + end]
    return found


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def figures(out: Path) -> list[dict[str, Any]]:
    """Return all logged figures but times."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [_timeless(json.loads(line)) for line in lines]


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith("wall_")}


def differences(out: Path, straight: Path) -> list[str]:
    """Return what differs between two finished runs: tensors, state and figures."""
    try:
        mine, other = names_of(out), names_of(straight)
        if mine[-1:] != other[-1:]:
            return [f"the newest checkpoint is {mine[-1:]} instead of {other[-1:]}"]
        newest, expected = (o / "checkpoints" / other[-1] for o in (out, straight))
        if what := damage(newest):
            return [f"the newest checkpoint is damaged: {what}"]
        found = []
        ours, theirs = tensors(newest), tensors(expected)
        wrong = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if wrong:
            found.append(f"{len(wrong)} of {len(theirs)} tensors differ, as {wrong[0]}")
        states = [
            _timeless(json.loads((d / "state.json").read_text())) for d in (newest, expected)
        ]
        keys = states[0].keys() | states[1].keys()
        found += [f"state.json: {k}" for k in keys if states[0].get(k) != states[1].get(k)]
        if figures(out) != figures(straight):
            steps = [[line.get("step") for line in figures(o)] for o in (out, straight)]
            found.append(f"metrics.jsonl differs: steps {steps[0]}, straight {steps[1]}")
    except (OSError, ValueError, KeyError) as error:
        return [f"cannot be compared: {type(error).__name__}: {error}"]
    return found


def leftovers(place: Path) -> list[str]:
    """Return the temporary files below a directory."""
    found = [p for p in place.rglob("*") if p.name.startswith((".tmp-", ".trash-"))]
    return [str(path.relative_to(place)) for path in found]


def committed(out: Path) -> str:
    """Return the newest checkpoint that a run's records call saved; "" for none."""
    name = ""
    for event in json_lines(out / "events.jsonl"):
        if event.get("kind") in ("saved", "committed"):
            name = str(event.get("name", ""))
        elif event.get("kind") in ("rewound", "lost"):
            name = str(event.get("to", ""))
    return name


def losses(out: Path, interval: int, batch: int) -> list[str]:
    """Return what a killed run has lost: a checkpoint that was saved, or more steps than may be.

    Where saves take place beside training, one may be in flight, and two intervals may be lost.
    """
    folder = out / "checkpoints"
    whole = [name for name in names_of(out) if not damage(folder / name)]
    newest = int(whole[-1].split("-")[1]) // batch if whole else 0
    found = []
    if (name := committed(out)) and name > (whole[-1] if whole else ""):
        found.append(f"{name} was saved; whole are {whole}")
    step = max((int(line.get("step", 0)) for line in json_lines(out / "metrics.jsonl")), default=0)
    staged = any(e.get("kind") == "staged" for e in json_lines(out / "events.jsonl"))
    if step - newest > (2 * interval if staged else interval) + 1:
        found.append(f"step {step} was reached, and the newest whole checkpoint is of {newest}")
    return found
