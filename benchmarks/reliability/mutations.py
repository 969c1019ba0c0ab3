"""Damage checkpoints: each is refused by name, and passed over with a message for an older one.

A run's directory is copied, its newest checkpoint (sometimes its two newest) is damaged, and it is
opened by name and without; every 100th trial resumes the run by the command instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import attrs

from benchmarks.reliability import runs
from benchmarks.reliability.trials import Suite, Trial, command

PROMISES = {
    "accepted": "no damaged checkpoint is ever used",
    "foreign": "damage is an error of e2ediff's, never a traceback",
    "fallback": "the newest whole checkpoint is used instead, and what is passed over is named",
    "intact": "no intact checkpoint is renamed, changed or deleted",
    "identical": "a run that falls back ends as the straight one, bit for bit",
}
COMMANDS = 100
"""One trial in so many resumes by the command line."""
KEPT = 3


@attrs.frozen
class Setup:
    """A finished run with three checkpoints, its recipe, and the checkpoint of another run."""

    recipe: Path
    run: Path
    stranger: Path


def prepare(place: Path) -> Setup:
    """Train two runs that differ in their seed."""
    text = runs.recipe({"checkpoint": f"{{keep: {KEPT}}}"})
    runs.warm(place, text)
    file = place / "tiny.yaml"
    file.write_text(text)
    for name, seed in (("run", "0"), ("stranger", "1")):
        words = runs.train_words(file, place / name, "--set", f"seed={seed}")
        ended = runs.fork(words, place / "log", runs.without_drawing)
        if ended.code != 0:
            raise RuntimeError(f"the straight run failed: {ended.said}")
    return Setup(file, place / "run", place / "stranger")


def content(folder: Path) -> dict[str, str]:
    """Return a hash of each file of a checkpoint; of what is no file, its kind."""
    found = {}
    for path in sorted(folder.iterdir()):
        # A link to the same bytes is no damage.
        whole = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "other"
        found[path.name] = whole
    return found


def trial(setup: Setup, trial: Trial) -> None:
    """Damage the newest checkpoint, now and then the one before it as well, and open them."""
    out, by_command = trial.place / "run", trial.number % COMMANDS == 0
    part = "" if by_command else "checkpoints"  # all that the reader reads
    shutil.copytree(setup.run / part, out / part, copy_function=shutil.copyfile)
    folder = out / "checkpoints"
    names = runs.names_of(out)
    worse = 2 if trial.chance.random() < 0.1 else 1
    damaged, older = names[-worse:], names[:-worse]
    kinds = []
    for name in damaged:
        other = folder / trial.chance.choice([n for n in names if n != name])
        if trial.chance.random() < 0.2:
            other = setup.stranger / "checkpoints" / name
        kinds.append(_mutate(folder / name, other, trial.chance))
    trial.facts.update(kind.split(" ")[0] for kind in kinds)
    story = "; ".join(kinds)
    before = {name: content(folder / name) for name in older}
    if by_command:
        _by_command(setup, trial, out, damaged, story)
    else:
        _by_reader(trial, out, damaged, older[-1], story)
    for name in older:
        if not (folder / name).is_dir() or content(folder / name) != before[name]:
            if by_command and name == older[0]:
                continue  # retired by the saves of the resumed run, as the recipe says
            trial.fail("intact", f"{name} is gone or changed ({story})")


def _by_reader(trial: Trial, out: Path, damaged: list[str], older: str, story: str) -> None:
    from e2ediff.errors import CheckpointError
    from e2ediff.store.checkpoint import open_checkpoint
    from e2ediff.store.storage import Store

    store = Store(str(out))
    for name in damaged:
        try:
            found = open_checkpoint(store, name)
            trial.fail("accepted", f"{name} ({story}) is opened as {found.name}")
        except CheckpointError as error:
            if older not in str(error):
                trial.fail("fallback", f"{error} does not name {older} ({story})")
        except Exception:
            trial.fail("foreign", f"{traceback.format_exc(limit=-2)} ({story})")
    told: list[str] = []
    try:
        found = open_checkpoint(store, warn=told.append)
    except Exception:
        trial.fail("fallback", f"{traceback.format_exc(limit=-2)} ({story})")
        return
    if found.name in damaged:
        trial.fail("accepted", f"{found.name} ({story}) is the newest")
    elif found.name != older:
        trial.fail("fallback", f"{found.name} instead of {older} ({story})")
    for name in damaged:
        if not any(name in line for line in told):
            trial.fail("fallback", f"{name} is passed over without a word ({story})")
    trial.facts["fallbacks"] += 1


def _by_command(setup: Setup, trial: Trial, out: Path, damaged: list[str], story: str) -> None:
    log = trial.place / "log"
    words = ["sample", str(out), "--checkpoint", damaged[-1], "--count", "1", "--threads", "1"]
    ended = runs.fork([*words, "--out", str(trial.place / "set")], log)
    if ended.crashed:
        trial.fail("foreign", f"sample: {ended.last} ({story})")
    elif ended.code != 6:
        trial.fail("accepted", f"sample ends with {ended.code}: {ended.last} ({story})")
    ended = runs.fork(runs.train_words(setup.recipe, out), log, runs.without_drawing)
    if ended.crashed:
        trial.fail("foreign", f"--resume: {ended.last} ({story})")
    elif ended.code != 0:
        trial.fail("fallback", f"--resume ends with {ended.code}: {ended.last} ({story})")
    else:
        if not all(name in ended.said for name in damaged):
            trial.fail("fallback", f"--resume does not name {damaged}: {ended.last} ({story})")
        if found := runs.differences(out, setup.run):
            trial.fail("identical", f"{'; '.join(found)} ({story})")
    trial.facts["resumed by command"] += 1


# Kinds of damage: each changes the folder of a checkpoint and describes what it did


def _mutate(folder: Path, other: Path, chance: random.Random) -> str:
    """Damage a checkpoint until it is no longer what it was; return how."""
    before = content(folder)
    while True:
        kind = chance.choice(KINDS)
        what = kind(folder, other, chance)
        if content(folder) != before:
            return f"{kind.__name__} {what}".strip()


def _file(folder: Path, chance: random.Random) -> Path:
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.stat().st_size)
    return chance.choice(files)


def flip(folder: Path, other: Path, chance: random.Random) -> str:
    """One bit, anywhere."""
    file = _file(folder, chance)
    data = bytearray(file.read_bytes())
    place = chance.randrange(len(data))
    data[place] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    return f"{file.name} at {place}"


def flip_header(folder: Path, other: Path, chance: random.Random) -> str:
    """One bit in the first bytes of a tensor file or of the manifest."""
    file = _file(folder, chance)
    data = bytearray(file.read_bytes())
    place = chance.randrange(min(len(data), 200))
    data[place] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    return f"{file.name} at {place}"


def truncate(folder: Path, other: Path, chance: random.Random) -> str:
    """A file that ends early, perhaps at once."""
    file = _file(folder, chance)
    data = file.read_bytes()
    size = chance.choice([0, chance.randrange(len(data)), len(data) - 1])
    file.write_bytes(data[:size])
    return f"{file.name} to {size}"


def grow(folder: Path, other: Path, chance: random.Random) -> str:
    """Bytes after the end."""
    file = _file(folder, chance)
    more = chance.choice([b"\n", b" ", b"\0", bytes(chance.randrange(1, 5000))])
    file.write_bytes(file.read_bytes() + more)
    return f"{file.name} by {len(more)}"


def zero(folder: Path, other: Path, chance: random.Random) -> str:
    """Zeros over a byte, a sector, a page or everything, as after a power cut."""
    file = _file(folder, chance)
    data = file.read_bytes()
    page = chance.choice([1, 16, 512, 4096, len(data)])
    place = chance.randrange(len(data)) // page * page
    size = len(data[place : place + page])
    file.write_bytes(data[:place] + bytes(size) + data[place + size :])
    return f"{file.name}, {size} at {place}"


def missing(folder: Path, other: Path, chance: random.Random) -> str:
    """A file that is gone."""
    file = _file(folder, chance)
    file.unlink()
    return file.name


def extra(folder: Path, other: Path, chance: random.Random) -> str:
    """A file too many: a stale shard of another checkpoint, or anything."""
    name = chance.choice(["stale.safetensors", "online-2.safetensors", ".hidden", "x.bin"])
    _copy(_file(other, chance), folder / name)
    return name


def swap(folder: Path, other: Path, chance: random.Random) -> str:
    """Two files with each other's names."""
    one, two = _file(folder, chance), _file(folder, chance)
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    return f"{one.name} and {two.name}"


def stale(folder: Path, other: Path, chance: random.Random) -> str:
    """The same file of another checkpoint: one, or all but the manifest, or all but the state."""
    left_out = chance.choice(["all", "MANIFEST.json", "state.json", "one"])
    if left_out == "state.json" and other.name == folder.name:
        return ""  # runs of one recipe share it: that would be another run's, whole
    files = sorted(other.iterdir()) if left_out != "one" else [_file(other, chance)]
    for file in files:
        if file.name != left_out and (left_out != "all" or file.name == "MANIFEST.json"):
            _copy(file, folder / file.name)
    return f"{left_out} of {other.name}"


def directory(folder: Path, other: Path, chance: random.Random) -> str:
    """Another whole checkpoint, of another number of images, under this name."""
    if other.name == folder.name:
        return ""  # whole, of another run: by its files nothing tells
    shutil.rmtree(folder)
    folder.mkdir()
    for file in other.iterdir():
        _copy(file, folder / file.name)
    return other.name


def _copy(source: Path, target: Path) -> None:
    """Copy a file, or what an earlier damage of that checkpoint has put in its place.

    A pipe or a device is made again, as reading it would never end.
    """
    if source.is_file():
        shutil.copy(source, target)
        return
    target.unlink(missing_ok=True)
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_fifo():
        os.mkfifo(target)
    else:
        target.mkdir()


def fifo(folder: Path, other: Path, chance: random.Random) -> str:
    """A pipe, whose opening waits for ever."""
    file = _file(folder, chance)
    file.unlink()
    os.mkfifo(file)
    return file.name


def link(folder: Path, other: Path, chance: random.Random) -> str:
    """A link to nothing, to itself, to a file of another checkpoint, or to a device."""
    file = _file(folder, chance)
    target = chance.choice(["nowhere", file.name, str(other / file.name), "/dev/zero", "."])
    file.unlink()
    file.symlink_to(target)
    return f"{file.name} to {target}"


def folder_for_file(folder: Path, other: Path, chance: random.Random) -> str:
    """A directory in place of a file."""
    file = _file(folder, chance)
    file.unlink()
    file.mkdir()
    return file.name


def edit(folder: Path, other: Path, chance: random.Random) -> str:
    """A value of the manifest or the state changed by hand, or a key taken away or added."""
    file = folder / chance.choice(["MANIFEST.json", "MANIFEST.json", "state.json"])
    try:
        values = json.loads(file.read_bytes())
    except ValueError:
        return ""
    if not isinstance(values, dict) or not values:
        return ""
    key = chance.choice(sorted(values))
    odd = [None, -1, 1e999, "x", [], {}, True, 2**70, float("nan"), [[[]]], "é" * 50]
    match chance.randrange(3):
        case 0:
            del values[key]
        case 1:
            values[key] = chance.choice(odd)
        case _:
            values[chance.choice(["extra", "step ", ""])] = chance.choice(odd)
    file.write_text(json.dumps(values, indent=1) + "\n")
    return f"{file.name}: {key}"


def nonsense(folder: Path, other: Path, chance: random.Random) -> str:
    """A manifest or a state that is no JSON object, or a deep or an endless one."""
    file = folder / chance.choice(["MANIFEST.json", "state.json"])
    texts = [b"", b"[]", b"null", b"{", b"[" * 100_000, b"\xff\xfe", b'{"a":' * 5000, b"0" * 9999]
    text = chance.choice(texts)
    file.write_bytes(text)
    return f"{file.name}: {text[:8]!r}"


KINDS: tuple[Callable[[Path, Path, random.Random], str], ...] = (
    *(flip, flip, flip, flip_header, truncate, truncate, grow, zero, zero, missing, extra, swap),
    *(stale, stale, directory, fifo, link, folder_for_file, edit, edit, nonsense),
)

SUITE = Suite("mutations", "Damaged checkpoints", PROMISES, prepare, trial)

if __name__ == "__main__":
    sys.exit(command(SUITE))
