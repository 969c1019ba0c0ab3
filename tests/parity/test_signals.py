"""Ctrl-C and termination are answered at once, whatever the run is doing, and by one process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
from PIL import Image
from processes import together
from tiny_recipe import tiny

import e2ediff
from e2ediff import hookimpl
from e2ediff.cli import main
from e2ediff.data import DataSource, SourceConfig
from e2ediff.distributed.signals import SAVING, UNSAVED, Stop, Stopped
from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.parts.sources import Synthetic
from e2ediff.store.checkpoint import list_checkpoints, open_checkpoint
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

CODES = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "preempted"),
         (signal.SIGUSR1, 75, "preempted")]  # fmt: skip
NOTHING = "stopping: there is nothing to save yet"
each_signal = pytest.mark.parametrize(
    ("number", "code", "state"), CODES, ids=["SIGINT", "SIGTERM", "SIGUSR1"]
)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny(cadence="{log: 1, diagnose: 2, preview: 100, checkpoint: 100}"))
    return str(path)


@contextlib.contextmanager
def forked(act: Callable[[], object], stderr: int) -> Iterator[int]:
    """A process that does this with its own stderr, and ends with its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(stderr, 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            act()
            code = 0
        except Stopped as error:
            code = error.exit_code
        finally:
            os._exit(code)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def read_until(file: int, word: str, seconds: float, said: str = "") -> str:
    """What is written there, up to this word."""
    deadline = time.monotonic() + seconds
    while word not in said:
        assert select.select([file], [], [], max(0, deadline - time.monotonic()))[0], said
        try:
            data = os.read(file, 1 << 16)
        except OSError:  # a terminal whose other side is gone
            data = b""
        assert data, said
        said += data.decode()
    return said


def plugin(**hooks: object) -> SimpleNamespace:
    return SimpleNamespace(
        __name__="signals", **{name: hookimpl(act) for name, act in hooks.items()}
    )


class Closing:
    """Is signalled while it is finalized."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def close_and_work(number: int, seconds: float = 30) -> None:
    closing = Closing(number)
    del closing
    time.sleep(seconds)


@each_signal
def test_a_signal_during_a_finalizer_is_answered_soon_after_it(number, code, state) -> None:
    """Python discards what is raised there."""
    since = time.monotonic()
    with pytest.raises(Stopped) as caught, Stop(at_once=True, quiet=True):
        close_and_work(number)
    assert caught.value.exit_code == code
    assert time.monotonic() - since < 10


@each_signal
def test_so_is_one_that_comes_again_while_it_is_being_discarded(
    number, code, state, monkeypatch
) -> None:
    monkeypatch.setattr("e2ediff.distributed.signals._AGAIN", 0.0)
    for _ in range(20):
        with pytest.raises(Stopped) as caught, Stop(at_once=True, quiet=True):
            close_and_work(number)
        assert caught.value.exit_code == code


@each_signal
def test_so_is_one_at_the_very_end(number, code, state) -> None:
    with pytest.raises(Stopped) as caught, Stop(at_once=True, quiet=True):
        close_and_work(number, 0)
    assert caught.value.exit_code == code


@each_signal
def test_so_is_a_second_one(number, code, state) -> None:
    since = time.monotonic()
    with Stop(quiet=True) as stop:
        signal.raise_signal(number)
        assert stop.asked
        with pytest.raises(Stopped, match=UNSAVED) as caught:
            close_and_work(number)
    assert caught.value.exit_code == code
    assert time.monotonic() - since < 10


def test_what_else_a_finalizer_raises_goes_where_it_went_before(monkeypatch) -> None:
    class Failing:
        def __del__(self) -> None:
            raise ValueError("not ours")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    before = sys.unraisablehook
    with Stop(quiet=True):
        failing = Failing()
        del failing
    assert [str(one.exc_value) for one in told] == ["not ours"]
    assert sys.unraisablehook is before


# While training


def test_the_answer_comes_before_the_step_is_finished(recipe, tmp_path) -> None:
    """On a pipe: the step still sleeps when the line is read, and then is saved."""
    reader, writer = os.pipe()

    def step_ended(run, step):
        os.write(writer, b"in the step\n")
        time.sleep(3)
        os.write(writer, b"after the step\n")

    def act() -> None:
        ended = train(load(plugin(step_ended=step_ended)), recipe, [], str(tmp_path / "run"))
        assert ended.exit_code == 130

    with forked(act, writer) as pid:
        said = read_until(reader, "in the step", 60)
        os.kill(pid, signal.SIGINT)
        said = read_until(reader, f"{SAVING}\n", 2, said)
        assert "after the step" not in said
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert open_checkpoint(Store(str(tmp_path / "run"))).step == 1


def screen(text: str, columns: int) -> list[str]:
    """The rows that a terminal of this width shows, for what rich and `interject` write."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\s\S]", text):
        if part == "\n":
            row += 1
        elif part == "\r":
            column = 0
        elif part == "\x1b[2K":
            rows[row] = ""
        elif match := re.fullmatch(r"\x1b\[(\d*)A", part):
            row -= int(match[1] or 1)
        elif not part.startswith("\x1b"):
            if column == columns:
                row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row].ljust(column)[:column] + part + rows[row][column + 1 :]
            column += 1
        rows += [""] * (row + 1 - len(rows))
        if part == "\n":
            column = 0
    return rows


@pytest.mark.parametrize("line", ["step 3/9", "step 3/9  " + "loss 0.123  " * 9], ids=len)
def test_on_a_terminal_the_answer_stays_whole_above_the_live_line(line) -> None:
    """Also where that is wrapped to several rows, whichever of its drawings comes last."""
    master, slave = pty.openpty()
    columns = 80

    def act() -> None:
        with Progress() as progress, Stop() as stop:
            stop.write = progress.interject
            progress.say("before")
            for i in range(5):
                progress.update(f"{i} {line}")
                time.sleep(0.3)
                if i == 2:
                    signal.raise_signal(signal.SIGTERM)
            progress.say("after")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("TERM", "xterm")
        with forked(act, slave) as pid:
            os.close(slave)
            said = ""
            with contextlib.suppress(AssertionError):
                said = read_until(master, "\x1b[?25h", 30)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    rows = screen(said, columns)
    words = [row.rstrip() for row in rows]
    assert words.count("before") == words.count("after") == words.count(SAVING) == 1
    assert words.index("before") < words.index(SAVING) < words.index("after")


@each_signal
def test_a_second_signal_ends_a_run_at_once_and_status_says_so(
    number, code, state, recipe, tmp_path
) -> None:
    def step_ended(run, step):
        if step == 3:
            signal.raise_signal(number)
            signal.raise_signal(number)

    out, said = str(tmp_path / "run"), io.StringIO()
    host = load(plugin(step_ended=step_ended))
    with pytest.raises(Stopped) as caught:
        train(host, recipe, ["cadence.checkpoint=2"], out, progress=Progress(said))
    assert caught.value.exit_code == code
    assert said.getvalue().count(SAVING) == 1
    status = RunDirectory.open(out).status()
    assert (status["state"], status["exit_code"]) == (state, code)
    assert status["reason"].endswith("ed a second time, without saving")
    assert str(caught.value).endswith(f"saving\ncontinue with: e2ediff run --resume {out}")
    assert list_checkpoints(Store(out)) == ["images-000000000016"]


def test_a_second_signal_after_the_save_does_not_report_a_loss(recipe, tmp_path) -> None:
    """The run may still be drawing its curves when the second one comes."""

    def step_ended(run, step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    def checkpoint_saved(run, path):
        signal.raise_signal(signal.SIGINT)

    out = str(tmp_path / "run")
    host = load(plugin(step_ended=step_ended, checkpoint_saved=checkpoint_saved))
    rarely = ["cadence.checkpoint=100"]
    with pytest.raises(Stopped, match="interrupted a second time, after saving") as caught:
        train(host, recipe, rarely, out, progress=Progress(io.StringIO()))
    assert caught.value.exit_code == 130
    status = RunDirectory.open(out).status()
    assert (status["state"], status["step"]) == ("interrupted", 3)
    assert status["reason"] == "interrupted a second time, after saving"
    assert status["last_checkpoint"] == list_checkpoints(Store(out))[-1]


# Before training


def stopping_source(number: int) -> object:
    """A data source that is being listed when the signal comes."""

    @attrs.frozen(kw_only=True)
    class Listed(Synthetic, SourceConfig):
        def open(self, *, held_out: bool = False) -> DataSource:
            signal.raise_signal(number)
            return super().open(held_out=held_out)

    return plugin(register=lambda add: add("sources", "listed", Listed))


@each_signal
def test_a_signal_while_images_are_listed_ends_the_run_before_anything_is_made(
    number, code, state, recipe, tmp_path
) -> None:
    said = io.StringIO()
    host = load(stopping_source(number))
    words = ["data={name: listed, size: 16, count: 64}"]
    with pytest.raises(Stopped, match="before training began") as caught:
        train(host, recipe, words, str(tmp_path / "run"), progress=Progress(said))
    assert caught.value.exit_code == code
    assert said.getvalue() == f"{NOTHING}\n"
    assert not (tmp_path / "run").exists()


class Interrupts(io.StringIO):
    """A stream in which a signal comes when this word is written."""

    def __init__(self, word: str, number: int) -> None:
        super().__init__()
        self.word, self.number = word, number

    def write(self, text: str) -> int:
        if self.word in text:
            self.word = "\0"
            signal.raise_signal(self.number)
        return super().write(text)


@each_signal
def test_a_signal_before_the_first_step_is_in_the_status_and_the_run_goes_on(
    number, code, state, recipe, tmp_path
) -> None:
    """Between the directory and the first step, also of a resumed run, whose step stays."""
    out = str(tmp_path / "run")
    for resume, word in ((False, "attention: "), (True, "resumed "), (True, "attention: ")):
        said = Interrupts(word, number)
        with pytest.raises(Stopped, match="before training began\ncontinue with: e2ediff"):
            train(load(), recipe, [], out, resume=resume, progress=Progress(said))
        assert said.getvalue().count(NOTHING) == 1
        status = RunDirectory.open(out).status()
        assert (status["state"], status["exit_code"]) == (state, code)
        assert status["step"] == (4 if resume else 0)
        assert status["last_checkpoint"] == ("images-000000000032" if resume else None)
        done = train(load(), recipe, [], out, resume=True, progress=Progress(io.StringIO()))
        assert done.exit_code == 0


@pytest.mark.parametrize(
    ("words", "answer", "kept"),
    [
        ("run tiny.yaml --out run", f"{NOTHING}\n", " before training began"),
        ("sample runs/tiny", "", "; what was there is kept"),
    ],
    ids=["run", "sample"],
)
@each_signal
def test_the_command_answers_and_ends_as_documented_before_it_computes(
    number, code, state, words, answer, kept, tmp_path
) -> None:
    """While it imports torch, which takes seconds, and here until the signal comes."""
    (tmp_path / "torch.py").write_text("import time\nopen('imported', 'w')\ntime.sleep(60)\n")
    paths = [str(tmp_path), str(Path(e2ediff.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "e2ediff", *words.split()]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment,
    ) as process:
        while not (tmp_path / "imported").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        out, said = process.communicate(timeout=30)
    verb = "interrupted" if number == signal.SIGINT else "terminated"
    assert (process.returncode, out) == (code, "")
    assert said == f"{answer}\n{verb}{kept}\ncontinue with: e2ediff {words}\n"
    assert not (tmp_path / "run").exists()


IN_WORK = {
    "sample": ("sample run --count 5000 --batch 8 --out set", "set/images/000007.png",
               "the stored images are kept, and the same command makes the others"),
    "reconstruct": ("reconstruct run " + "pictures " * 500 + "--out set", "set/images/000007.png",
                    "reconstructions that were written stay, and the same command makes all of "
                    "them again"),
    "eval": ("eval run --features random_projection --count 100000 --cache cache",
             "/100000 images",
             "features of references in the cache are kept, and the same command starts again"),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run, and pictures."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(tiny(steps="1"))
    train(load(), str(folder / "tiny.yaml"), [], str(folder / "run"))
    (folder / "pictures").mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"pictures/{i}.png")
    return folder


@pytest.mark.parametrize("name", IN_WORK)
@each_signal
def test_a_command_at_work_ends_as_documented_and_says_what_is_kept(
    number, code, state, name, trained, monkeypatch
) -> None:
    words, marker, kept = IN_WORK[name]
    monkeypatch.chdir(trained)
    for folder in ("set", "cache"):
        shutil.rmtree(folder, ignore_errors=True)
    words += " --threads 1"

    def act() -> None:
        try:
            main(words.split())
        except SystemExit as ended:
            os._exit(int(ended.code or 0))

    with open("said", "wb") as said, forked(act, said.fileno()) as pid:
        until = time.monotonic() + 60
        while not (Path(marker).exists() or marker in Path("said").read_text()):
            assert time.monotonic() < until, Path("said").read_text()
            time.sleep(0.02)
        os.kill(pid, number)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    verb = "interrupted" if number == signal.SIGINT else "terminated"
    end = f"\n{verb}; {kept}\ncontinue with: e2ediff {words}\n"
    assert Path("said").read_text().endswith(end)
    assert "Traceback" not in Path("said").read_text()


def test_signals_act_as_before_once_the_run_is_over(recipe, tmp_path) -> None:
    before = [signal.getsignal(number) for number, *_ in CODES]
    train(load(), recipe, [], str(tmp_path / "run"), progress=Progress(io.StringIO()))
    assert [signal.getsignal(number) for number, *_ in CODES] == before


@each_signal
def test_a_signal_to_a_fork_of_the_run_acts_there_as_without_the_run(
    number, code, state, recipe, tmp_path
) -> None:
    """A plugin's own process ends by it, says nothing, and the run goes on."""
    ends = []

    def step_ended(run, step):
        if step == 2:
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(KeyboardInterrupt):  # what Python makes of SIGINT
                    signal.raise_signal(number)
                    os._exit(1)
                os._exit(2)
            ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    said = io.StringIO()
    host = load(plugin(step_ended=step_ended))
    done = train(host, recipe, [], str(tmp_path / "run"), progress=Progress(said))
    assert ends == [2 if number == signal.SIGINT else -number]
    assert done.exit_code == 0
    assert "stopping" not in said.getvalue()


# Several processes


@pytest.mark.parametrize("to", ["first", "second", "both"])
def test_of_several_processes_one_answers(to, recipe, tmp_path) -> None:
    """Whichever is sent the signal, and when all are, as by a batch system."""
    out = str(tmp_path / "run")

    def send() -> None:
        while not Path(out, "metrics.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    def act(rank: int) -> list[object]:
        world, said = World.join(), io.StringIO()
        if to == "both" or (to == "second") == bool(rank):
            threading.Thread(target=send, daemon=True).start()
        ended = train(
            load(), recipe, ["steps=100000", "microshards=2"], out,
            progress=Progress(said), world=world,
        )  # fmt: skip
        world.shutdown()
        return [ended.exit_code, said.getvalue().count("stopping: ")]

    assert together(act) == [[75, 1], [75, 0]]
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "preempted"
