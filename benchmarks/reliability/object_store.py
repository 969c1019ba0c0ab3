"""Runs on an object store: killed at its operations, and while it fails, lies or lags.

The store keeps each object in a file of a directory outside the process, whole or not at all, so
that it survives a kill. Where `s3fs` and `moto` are installed, one trial in ten goes through a
local S3 server instead.
"""

from __future__ import annotations

import itertools
import os
import random
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import fsspec
from fsspec.spec import AbstractFileSystem

from benchmarks.reliability import runs
from benchmarks.reliability.faults import die
from benchmarks.reliability.processes import free_port
from benchmarks.reliability.trials import Skipped, Suite, Trial, command

PROMISES = {
    "lost": "a saved checkpoint stays",
    "torn": "no checkpoint whose manifest is there is damaged",
    "traceback": "no traceback is shown; a store that keeps failing ends the run with 8 or 6",
    "wedged": "whatever a kill or a failing store leaves can be taken up",
    "identical": "the finished run equals the straight one: all tensors, state and figures",
}
KINDS = ("kill", "kill", "kill", "fail", "kill", "kill", "lie", "kill", "lag", "s3")
RATE = 0.05
"""Share of operations that fail or lie."""


@attrs.define
class Weather:
    """What befalls the operations of this process's store."""

    root: str = ""
    at: int = 0
    moment: str = "before"
    kind: str = "kill"
    chance: random.Random = attrs.field(factory=random.Random)
    numbers: Any = attrs.field(factory=lambda: itertools.count(1))
    count: int = 0

    def around(self, act: Callable[[], Any], *, writes: bool = False) -> Any:
        """Carry out one operation of the store."""
        self.count = next(self.numbers)
        mine = self.kind == "kill" and self.count == self.at
        if mine and self.moment == "before":
            die()
        if self.kind == "fail" and self.chance.random() < RATE:
            if writes and self.chance.random() < 0.5:
                act()  # it was done, and the answer was lost
            raise OSError("503 Slow Down (made up by the harness)")
        found = act()
        if mine:
            die()
        return found


NOW = Weather()


class Objects(AbstractFileSystem):  # type: ignore[misc]
    """Objects in files below a directory; a name is whole or absent."""

    protocol = "objects"
    cachable = False

    def _path(self, path: str) -> str:
        return os.path.join(NOW.root, self._strip_protocol(path).strip("/"))

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        """List objects and prefixes; a lagging store leaves out what is young."""
        return list(NOW.around(lambda: self._ls(path, detail)))

    def _ls(self, path: str, detail: bool) -> list[Any]:
        full, own = self._path(path), self._strip_protocol(path).strip("/")
        if os.path.isfile(full):
            found = [self._info(own)]
        elif os.path.isdir(full):
            names = [name for name in sorted(os.listdir(full)) if not name.startswith("~")]
            found = [self._info(f"{own}/{name}".strip("/")) for name in names]
            if NOW.kind == "lag" and NOW.chance.random() < RATE:
                found = [f for f in found if time.time() - f["created"] > 0.05]
        else:
            raise FileNotFoundError(path)
        return found if detail else [f["name"] for f in found]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Describe an object or a prefix."""
        return dict(NOW.around(lambda: self._info(self._strip_protocol(path).strip("/"))))

    def _info(self, name: str) -> dict[str, Any]:
        found = os.stat(os.path.join(NOW.root, name))
        kind = "directory" if os.path.isdir(os.path.join(NOW.root, name)) else "file"
        size = found.st_size if kind == "file" else 0
        return {"name": name, "size": size, "type": kind, "created": found.st_mtime}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            raise NotImplementedError("objects are written whole")
        return NOW.around(lambda: open(self._path(path), "rb"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        """Store an object; a lying store keeps the first half of it and reports success."""
        data = bytes(value)
        if NOW.kind == "lie" and NOW.chance.random() < RATE:
            data = data[: len(data) // 2]
        NOW.around(lambda: self._put(path, data, mode), writes=True)

    def _put(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        full = self._path(path)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        hidden = os.path.join(os.path.dirname(full), f"~{secrets.token_hex(4)}")
        Path(hidden).write_bytes(data)
        if mode == "create":
            try:
                os.link(hidden, full)
            finally:
                os.unlink(hidden)
        else:
            os.replace(hidden, full)

    def put_file(self, lpath: str, rpath: str, *given: Any, **options: Any) -> None:
        """Store the content of a local file."""
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        """Copy an object."""
        data = Path(self._path(path1)).read_bytes()
        NOW.around(lambda: self._put(path2, data), writes=True)

    def rm_file(self, path: str) -> None:
        """Delete an object, and prefixes that are empty then."""
        NOW.around(lambda: self._rm(path), writes=True)

    _rm_file = rm_file

    def _rm(self, path: str) -> None:
        full = self._path(path)
        os.unlink(full)
        while (full := os.path.dirname(full)) != NOW.root.rstrip("/"):
            try:
                os.rmdir(full)
            except OSError:
                break

    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:
        """Do nothing: prefixes come with their objects."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: prefixes come with their objects."""

    def rmdir(self, path: str) -> None:
        """Do nothing: prefixes go with their objects."""

    def created(self, path: str) -> float:
        """Return when an object was stored."""
        return float(self.info(path)["created"])

    modified = created


@attrs.frozen
class Setup:
    """The recipe, its straight run, its number of operations, and a server's address."""

    recipe: Path
    straight: Path
    operations: int
    server: str
    why_not: str


def prepare(place: Path) -> Setup:
    """Train on the store undisturbed, and count its operations; start a server if there is one."""
    text = runs.recipe({"post_hoc": "{every: 3}"})
    runs.warm(place, text)
    fsspec.register_implementation("objects", Objects, clobber=True)
    file, root, count = place / "tiny.yaml", place / "bucket", place / "count"
    file.write_text(text)
    log = place / "log"

    def act() -> int:
        _use(Weather(root=str(root)))
        code = runs.command(_words(file, root))
        count.write_text(str(NOW.count))
        return code

    ended = runs.wait(runs.begin(act, log, runs.without_drawing), log, time.monotonic(), 120)
    if ended.code != 0:
        raise RuntimeError(ended.said)
    server, why_not = "", ""
    if missing := [name for name in ("s3fs", "moto") if find_spec(name) is None]:
        why_not = f"no S3 server: {' and '.join(missing)} not installed"
    else:
        server = _serve(place)
    return Setup(file, root / "run", int(count.read_text()), server, why_not)


def _use(weather: Weather) -> None:
    global NOW
    NOW = weather


def _words(file: Path, root: Path) -> list[str]:
    words = ["run", str(file), "--out", "objects://run", "--threads", "1"]
    return [*words, "--resume"] if (root / "run").is_dir() else words


def _serve(place: Path) -> str:
    """Start moto's S3 server, which ends with this process."""
    port = free_port()
    with (place / "moto.log").open("wb") as log:
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(words, stdout=log, stderr=log)
    import atexit

    atexit.register(process.kill)
    os.environ.update(AWS_ACCESS_KEY_ID="none", AWS_SECRET_ACCESS_KEY="none")
    os.environ["AWS_ENDPOINT_URL"] = server = f"http://127.0.0.1:{port}"
    for _ in range(300):
        import urllib.request

        try:
            urllib.request.urlopen(f"{server}/moto-api/", timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return server
    raise RuntimeError((place / "moto.log").read_text())


def trial(setup: Setup, trial: Trial) -> None:
    """One or two disturbances, and then calm."""
    kind = KINDS[trial.number % len(KINDS)]
    if kind == "s3":
        if setup.why_not:
            raise Skipped(setup.why_not)
        _by_server(setup, trial)
        return
    root, log, chance = trial.place / "bucket", trial.place / "log", trial.chance
    happened = [kind]
    for turn in range(chance.choice((1, 1, 2))):
        weather = Weather(root=str(root), kind=kind, chance=random.Random(chance.random()))
        if kind == "kill":
            point = trial.number * 7 if turn == 0 else chance.randrange(setup.operations)
            weather.at = 1 + point % setup.operations
            weather.moment = chance.choice(("before", "after"))
            happened.append(f"{weather.moment} operation {weather.at}")
        ended = _train(setup, root, log, weather)
        happened.append(f"exit {ended.code}")
        story = ", ".join(happened)
        trial.facts[f"{kind}: exit {ended.code}"] += 1
        if ended.crashed:
            trial.fail("traceback", f"{ended.last} ({story})")
        elif ended.code not in ((0, 6, 8) if kind != "kill" else (0, -9)):
            trial.fail("wedged", f"{ended.last} ({story})")
        _look(trial, root / "run", kind, story)
    ended = _train(setup, root, log, Weather(root=str(root), kind="calm"))
    if ended.code != 0:
        promise = "traceback" if ended.crashed else "wedged"
        trial.fail(promise, f"exit {ended.code}: {ended.last} ({story})")
    elif found := runs.differences(root / "run", setup.straight):
        trial.fail("identical", f"{'; '.join(found)} ({story})")


def _train(setup: Setup, root: Path, log: Path, weather: Weather) -> runs.Ended:
    def act() -> int:
        _use(weather)
        return runs.command(_words(setup.recipe, root))

    since = time.monotonic()
    return runs.wait(runs.begin(act, log, runs.without_drawing), log, since, 60)


def _look(trial: Trial, out: Path, kind: str, story: str) -> None:
    whole = []
    for name in runs.names_of(out):
        folder = out / "checkpoints" / name
        if not (folder / "MANIFEST.json").exists():
            continue  # its save never finished, and it counts as absent
        if what := runs.damage(folder):
            trial.fail("torn", f"{name}: {what} ({story})")
        else:
            whole.append(name)
    newest = whole[-1] if whole else ""
    if (name := runs.committed(out)) > newest:
        trial.fail("lost", f"{name} was saved; whole are {whole} ({story})")


def _by_server(setup: Setup, trial: Trial) -> None:
    """Kill at a random moment with S3's own protocol, and compare a copy of the bucket."""
    import s3fs

    bucket = f"trial{trial.number}-{secrets.token_hex(4)}"
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    fs.mkdir(bucket)
    log, url = trial.place / "log", f"s3://{bucket}/run"
    words = ["-m", "e2ediff", "run", str(setup.recipe), "--out", url, "--threads", "1"]
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file)
        limit, lines = time.monotonic() + 60, trial.chance.randrange(6)
        while time.monotonic() < limit and process.poll() is None:
            fs.invalidate_cache()
            if len(fs.find(f"{bucket}/run/checkpoints")) > 3 * lines:
                break
            time.sleep(0.02)
        process.kill()
        process.wait()
    story = f"s3: killed with {3 * lines} objects of checkpoints"
    fs.invalidate_cache()
    begun = fs.exists(f"{bucket}/run")
    done = subprocess.run(
        [sys.executable, *words, *(["--resume"] if begun else [])],
        capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    trial.facts[f"s3: exit {done.returncode}"] += 1
    if done.returncode != 0:
        crashed = "Traceback" in done.stderr
        trial.fail("traceback" if crashed else "wedged", f"{done.stderr[-400:]} ({story})")
        return
    copy = trial.place / "copy"
    fs.invalidate_cache()
    fs.get(f"{bucket}/run/", f"{copy}/", recursive=True)
    if found := runs.differences(copy, setup.straight):
        trial.fail("identical", f"{'; '.join(found)} ({story})")
    shutil.rmtree(copy)


SUITE = Suite("object_store", "Runs on an object store", PROMISES, prepare, trial)

if __name__ == "__main__":
    # Under its own name: the file system must be the class of one module.
    from benchmarks.reliability.object_store import SUITE as _SUITE

    sys.exit(command(_SUITE))
