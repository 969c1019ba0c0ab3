"""Runs on a local server of the S3 protocol: killed, stopped, met by a second writer.

The server is moto's, in a process of its own that this suite starts on a free port and stops;
the client is s3fs. Both come with `pip install '.[reliability]'`; without them nothing is run,
and the result says so.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import attrs

from benchmarks.reliability import runs
from benchmarks.reliability.processes import free_port
from benchmarks.reliability.trials import Skipped, Suite, Trial, command

PROMISES = {
    "lost": "a saved checkpoint stays",
    "torn": "no checkpoint whose manifest is there is damaged",
    "traceback": "no traceback is shown",
    "wedged": "whatever is left can be taken up; a server that fails now and then ends no run",
    "second": "a second writer is refused with 6 while the first trains, and changes nothing",
    "identical": "the finished run equals the straight one: all tensors, state and figures",
    "leftovers": "no lease and no temporary object is left when the run is done",
}
KINDS = ("kill", "stop", "second", "kill", "fail", "lag")
_DIE_WITH_PARENT = 1


@attrs.frozen
class Setup:
    """The recipe and its straight run on the disk."""

    recipe: Path
    straight: Path


def prepare(place: Path) -> Setup:
    """Start the server, and train on the disk undisturbed."""
    if missing := [name for name in ("s3fs", "moto", "flask") if find_spec(name) is None]:
        raise Skipped(
            f"no S3 server: {', '.join(missing)} not installed; `pip install '.[reliability]'`"
        )
    text = runs.recipe({"post_hoc": "{every: 3}"})
    runs.warm(place, text)
    runs.import_all(("boto3", "s3fs"))
    file, straight = place / "tiny.yaml", place / "straight"
    file.write_text(text)
    ended = runs.fork(runs.train_words(file, straight), place / "log", runs.without_drawing)
    if ended.code != 0:
        raise RuntimeError(ended.said)
    _serve(place)
    return Setup(file, straight)


def _serve(place: Path) -> None:
    """Start the server, which ends with this process, and point clients to it."""
    port, owner = free_port(), os.getpid()
    words = [sys.executable, "-m", "benchmarks.reliability.moto_server", str(port)]
    die = ctypes.CDLL(None).prctl
    with (place / "server.log").open("wb") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, preexec_fn=lambda: die(_DIE_WITH_PARENT, signal.SIGKILL)
        )

    def end() -> None:
        if os.getpid() == owner:
            process.kill()
            process.wait()

    atexit.register(end)
    os.environ.update(AWS_ACCESS_KEY_ID="none", AWS_SECRET_ACCESS_KEY="none",
                      AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true",
                      AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")  # fmt: skip
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.1)
        else:
            return
    raise RuntimeError((place / "server.log").read_text())


class Bucket:
    """A bucket of a trial, seen by another client than the run's."""

    def __init__(self, name: str) -> None:
        import boto3

        self.name = name
        self.url = f"s3://{name}/run"
        self._client = boto3.client("s3")
        self._client.create_bucket(Bucket=name)

    def tags(self) -> dict[str, str]:
        """Return the keys of all objects below the run, with what changes with their content."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.name, Prefix="run/"
        )
        return {o["Key"]: o["ETag"] for page in pages for o in page.get("Contents", ())}

    def copy(self, place: Path) -> Path:
        """Copy the run to the disk."""
        for key in self.tags():
            path = place / key
            path.parent.mkdir(parents=True, exist_ok=True)
            body = self._client.get_object(Bucket=self.name, Key=key)["Body"]
            path.write_bytes(body.read())
        return place / "run"

    def delete(self) -> None:
        """Delete all objects, and the bucket."""
        for key in self.tags():
            self._client.delete_object(Bucket=self.name, Key=key)
        self._client.delete_bucket(Bucket=self.name)


def trial(setup: Setup, trial: Trial) -> None:
    """One or two disturbances, and then calm."""
    chance, kind = trial.chance, KINDS[trial.number % len(KINDS)]
    bucket = Bucket(f"{kind}-{trial.number}-{chance.randrange(10**9)}")
    log, happened = trial.place / "log", [kind]
    for turn in range(chance.choice((1, 1, 2)) if kind in ("kill", "stop") else 1):
        step, delay = chance.randint(1, runs.STEPS), chance.choice((0.0, chance.uniform(0, 0.3)))
        number = {"kill": signal.SIGKILL, "stop": signal.SIGTERM}.get(kind)
        if kind == "second":
            ended = _met(setup, trial, bucket, log, step)
        else:
            ended = _train(setup, bucket, log, _at(step, number, delay) if number else None)
        happened.append(f"step {step} + {delay:.2f} s: exit {ended.code}")
        story = ", ".join(happened)
        trial.facts[f"{kind}: exit {ended.code}"] += 1
        if ended.crashed:
            trial.fail("traceback", f"{ended.last} ({story})")
        elif ended.code not in {"kill": (0, -9), "stop": (0, 75)}.get(kind, (0,)):
            trial.fail("wedged", f"exit {ended.code}: {ended.last} ({story})")
        copy = bucket.copy(trial.place / f"copy{turn}")
        whole = []
        for name in runs.names_of(copy):
            if not (copy / "checkpoints" / name / "MANIFEST.json").exists():
                continue  # its save never finished, and it counts as absent
            if what := runs.damage(copy / "checkpoints" / name):
                trial.fail("torn", f"{name}: {what} ({story})")
            else:
                whole.append(name)
        if (name := runs.committed(copy)) > (whole[-1] if whole else ""):
            trial.fail("lost", f"{name} was saved; whole are {whole} ({story})")
    ended = _train(setup, bucket, log)
    if ended.code != 0:
        promise = "traceback" if ended.crashed else "wedged"
        trial.fail(promise, f"exit {ended.code}: {ended.last} ({story})")
        return
    copy = bucket.copy(trial.place / "copy")
    if found := runs.differences(copy, setup.straight):
        trial.fail("identical", f"{'; '.join(found)} ({story})")
    if left := [*runs.leftovers(copy), *(key for key in bucket.tags() if key.endswith(".lock"))]:
        trial.fail("leftovers", f"{left} ({story})")
    bucket.delete()


Hook = Callable[[int], None]


def _at(step: int, number: int, delay: float) -> Hook:
    """Return what sends this process a signal some time after a step."""

    def act(now: int) -> None:
        if now == step:
            send = threading.Timer(delay, os.kill, (os.getpid(), number))
            send.daemon = True
            send.start()

    return act


def _begin(setup: Setup, bucket: Bucket, log: Path, hook: Hook | None = None) -> int:
    resume = bool(bucket.tags())

    def act() -> int:
        from e2ediff import hookimpl
        from e2ediff.errors import E2EDiffError
        from e2ediff.host.plugins import load
        from e2ediff.train.session import train

        @hookimpl
        def step_ended(run: object, step: int) -> None:
            if hook:
                hook(step)

        host = load(SimpleNamespace(__name__="disturber", step_ended=step_ended))
        try:
            return train(host, str(setup.recipe), (), bucket.url, resume=resume).exit_code
        except E2EDiffError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code

    return runs.begin(act, log, runs.without_drawing)


def _train(setup: Setup, bucket: Bucket, log: Path, hook: Hook | None = None) -> runs.Ended:
    since = time.monotonic()
    return runs.wait(_begin(setup, bucket, log, hook), log, since, 90)


def _met(setup: Setup, trial: Trial, bucket: Bucket, log: Path, step: int) -> runs.Ended:
    """Let a second writer try while the first one waits after a step; return the first's end."""
    there, go = trial.place / "there", trial.place / "go"

    def pause(now: int) -> None:
        if now == step:
            there.touch()
            while not go.exists():
                time.sleep(0.01)

    since = time.monotonic()
    pid = _begin(setup, bucket, log, pause)
    while not there.exists() and time.monotonic() - since < 60:
        time.sleep(0.01)
    before = _settled(bucket)
    second = _train(setup, bucket, trial.place / "second")
    changed = sorted({k for k, _ in before.items() ^ bucket.tags().items()})
    go.touch()
    trial.facts[f"second writer: exit {second.code}"] += 1
    if second.code != 6 or "is training in it" not in second.said:
        trial.fail("second", f"exit {second.code}: {second.last}")
    if changed:
        trial.fail("second", f"changed are {changed}")
    return runs.wait(pid, log, since, 90)


def _settled(bucket: Bucket) -> dict[str, str]:
    """Wait until a save that was begun is over, and return what is there."""
    before: dict[str, str] = {}
    limit = time.monotonic() + 30
    while before != (now := bucket.tags()) and time.monotonic() < limit:
        before = now
        time.sleep(2)
    return now


SUITE = Suite("s3_server", "Runs on a local S3 server", PROMISES, prepare, trial, seconds=400)

if __name__ == "__main__":
    sys.exit(command(SUITE))
