"""What comes from files of any origin is printed without characters that a terminal would obey."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_line import Done, e2ediff, trained
from safetensors.torch import load_file
from tiny_recipe import tiny

from e2ediff import terminal
from e2ediff.store import checkpoint as ck
from e2ediff.store.storage import Store
from e2ediff.terminal import echo, echo_path, printable
from e2ediff.train.progress import Progress

pytestmark = pytest.mark.usefixtures("drawn")  # titles of charts too
HOSTILE = "\x1b[31m\x1b]0;x\x07 \x9b2J \x7f \r \u202egnp \u2066 \u2028 \u200b"
LONE = "\udcff"
FORGED = f"{HOSTILE}\nFORGED: all is well"


def clean(done: Done, shown: str = r"\x1b[31m") -> Done:
    """The same, once it is sure that a terminal obeys nothing of it, and that it was shown."""
    for text in (done.out, done.err):
        assert text == printable(text, lines=True)
        assert not re.search(r"(?m)^FORGED", text), text
    assert shown in done.out + done.err
    return done


# The rule


def test_what_a_terminal_obeys_is_shown_as_an_escape() -> None:
    assert printable("a\x1b[2Jb\x00\x7f\x85\u202e\u2029\udcff\U000e0041") == (
        r"a\x1b[2Jb\x00\x7f\x85\u202e\u2029\udcff\U000e0041"
    )
    everything = "".join(map(chr, [*range(0x3100), *range(0xD800, 0x10000, 64), 0xE0041]))
    shown = printable(everything)
    assert printable(shown) == shown
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\ud800-\udfff]", shown)


def test_letters_of_every_language_stay() -> None:
    plain = "dé 猫 кот คน می\u200cشود 👩\u200d👧 a\u00a0b\u3000c e\u0301"
    assert printable(plain) == plain


def test_newlines_stay_only_where_a_text_has_lines() -> None:
    assert printable("a\tb\nc") == r"a\tb\nc"
    assert printable("a\tb\nc\r", lines=True) == "a\tb\nc\\r"


def test_a_stream_that_cannot_hold_a_letter_gets_its_escape() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    echo("猫 \x1b", to=stream)
    assert stream.buffer.getvalue() == b"\\u732b \\x1b\n"


def test_an_address_is_printed_exactly_for_a_script_and_safely_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, stream = f"runs/{HOSTILE}{LONE}", io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    echo_path(path)
    assert stream.buffer.getvalue() == path.encode("utf-8", "surrogateescape") + b"\n"
    monkeypatch.setattr(stream, "isatty", lambda: True)
    echo_path(path)
    assert stream.buffer.getvalue().splitlines()[-1] == printable(path).encode()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_lines_obey_the_rule(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal  # type: ignore[method-assign]
    with Progress(stream, plain_seconds=0.0) as progress:
        progress.update(f"step {HOSTILE}")
        progress.say(f"warning: {HOSTILE}")
        progress.interject(f"stopping {HOSTILE}")
    text = stream.getvalue()
    assert r"\x1b[31m" in text
    assert not {"\x1b[31m", "\x07", "\x9b", "\u202e", "\u2066", "\u200b"} & {
        *re.findall(r"\x1b\[\d*m|[^\x1b]", text)
    }


def test_a_warning_obeys_the_rule(caplog: pytest.LogCaptureFixture) -> None:
    terminal.warn(f"class {HOSTILE}")
    assert caplog.messages == [printable(f"class {HOSTILE}")]


# The commands


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tiny(cadence="{log: 2, diagnose: 4, preview: 4, checkpoint: 4}")
    return trained(tmp_path_factory.mktemp("original"), recipe)


@pytest.fixture
def run(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, every record of which a stranger has written anew."""
    monkeypatch.chdir(tmp_path)
    path = shutil.copytree(original, tmp_path / "run")
    known = json.loads((path / "run.json").read_text())
    versions = {f"lib {FORGED}": FORGED}
    names = [f"class {i} {FORGED} {LONE}" for i in range(10)]
    known |= {"name": FORGED, "argv": ["e2ediff", FORGED], "class_names": names, "git": versions}
    (path / "run.json").write_text(json.dumps(known))
    status = json.loads((path / "status.json").read_text())
    (path / "status.json").write_text(
        json.dumps({**status, "state": "failed", "reason": FORGED, "collapsed": FORGED})
    )
    with open(path / "metrics.jsonl", "a") as metrics:
        metrics.write(json.dumps({"images": 33, "step": 5, f"loss/{FORGED}": 1.0, FORGED: 2.0}))
        metrics.write("\n")
    figures = json.loads((path / "figures.json").read_text())
    one = {**next(iter(figures.values())), "name": FORGED, "title": FORGED, "short": FORGED}
    one |= {"shown_on": ["table", "charts"], "panel": FORGED}
    (path / "figures.json").write_text(json.dumps({**figures, FORGED: one}))
    with open(path / "events.jsonl", "a") as events:
        event = {"kind": "collapse", "time": FORGED, "step": FORGED, "signs": [FORGED, LONE]}
        events.write(json.dumps(event) + "\n")
    return path


def test_reports_and_comparisons_of_a_strangers_runs(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    text = (other / "resolved.yaml").read_text()
    (other / "resolved.yaml").write_text(
        text.replace("name: tiny", f"name: {json.dumps(FORGED)}").replace("seed: 0", "seed: 1")
    )
    done = clean(e2ediff("compare", run, other))
    assert done.code == 0
    assert r"\nFORGED" in done.out
    assert e2ediff("report", run).code == 0
    clean(e2ediff("report", other), "")


def test_a_strangers_run_that_is_sampled_or_resumed(run: Path) -> None:
    clean(e2ediff("sample", run, "--label", HOSTILE, "--out", "set"))
    clean(e2ediff("sample", run, "--checkpoint", HOSTILE, "--out", "set"))
    clean(e2ediff("sample", run, "--weights", FORGED, "--out", "set"))
    clean(e2ediff("eval", f"nowhere{HOSTILE}"), "")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "last_checkpoint": FORGED}))
    shutil.rmtree(run / "checkpoints")
    clean(e2ediff("run", "--resume", run), "")
    (run / "run.json").write_text(f'{{"{HOSTILE}"')
    clean(e2ediff("sample", run), "")
    (run / ".lock").write_text(f"12 {HOSTILE}\n")
    clean(e2ediff("run", "--resume", run), "")


def test_a_strangers_checkpoint(run: Path) -> None:
    """Names of tensors, of files, and what a manifest says."""
    (old,) = (run / "checkpoints").iterdir()
    tensors = load_file(old / "target.safetensors")
    tensors[f"x{FORGED}"] = torch.ones(1)
    shutil.rmtree(run / "checkpoints")
    ck.save(Store(str(run)), 32, 4, {"target": tensors}, {}, 3)
    assert clean(e2ediff("sample", run, "--weights", "target")).code == 6
    (place,) = (run / "checkpoints").iterdir()
    (place / f"stale{HOSTILE}").touch()
    assert clean(e2ediff("sample", run, "--checkpoint", place.name)).code == 6
    (place / "MANIFEST.json").write_text(json.dumps({FORGED: FORGED}))
    clean(e2ediff("sample", run, "--checkpoint", place.name), "")


def test_a_strangers_recipe(run: Path) -> None:
    for place, text in {
        "keys": tiny(**{json.dumps(FORGED): "1"}),
        "values": tiny(objective=json.dumps(FORGED)),
        "root": tiny(data=f"{{name: image_folder, root: {json.dumps(HOSTILE)}, size: 16}}"),
        "name": tiny(name=json.dumps(FORGED)),
        "raw": tiny(name="a\u202eb"),
        "plugins": tiny(plugins=json.dumps({f"x{FORGED}": FORGED})),
    }.items():
        Path(f"{place}.yaml").write_text(text)
        assert clean(e2ediff("check", f"{place}.yaml"), "").code == 3, place
        clean(e2ediff("run", f"{place}.yaml"), "")
    clean(e2ediff("check", "values.yaml", "--set", f"steps={HOSTILE}"), "")
    clean(e2ediff("check", f"{HOSTILE}.yaml"))
    clean(e2ediff(f"no{HOSTILE}"), r"\x07")
    clean(e2ediff("sample", run, f"--{HOSTILE}"), r"\x07")


def test_scores_of_strangers(run: Path) -> None:
    protocol = {"convention": FORGED, "network": FORGED, "images": 1, FORGED: FORGED}
    for name, machine in {"a": "1", "b": FORGED}.items():
        passport = {"protocol": protocol, "subject": {FORGED: name}, "machine": {"torch": machine}}
        score = {"value": 1.0, "error": None, "warnings": [FORGED], "metric": {}, "better": "low"}
        card = {"e2ediff_scores": 1, "passport": passport, "scores": {FORGED: score}}
        Path(f"{name}.json").write_text(json.dumps(card))
    assert clean(e2ediff("compare", "a.json", "b.json")).code == 0
    protocol[f"more {FORGED}"] = FORGED
    Path("a.json").write_text(Path("b.json").read_text().replace('"images": 1', '"images": 2'))
    assert clean(e2ediff("compare", "a.json", "b.json"), "").code == 9
    Path("a.json").write_text(json.dumps({FORGED: FORGED}))
    clean(e2ediff("compare", "a.json", "b.json"), "")


def test_plugins_that_describe_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "odd-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: odd\nVersion: 1.0{HOSTILE}\nSummary: good {HOSTILE}\n"
        f"Requires-Dist: x{HOSTILE}\n"
    )
    (info / "entry_points.txt").write_text(f"[e2ediff]\nodd = odd_{HOSTILE}:x\n".replace("\r", ""))
    monkeypatch.syspath_prepend(tmp_path)
    for words in (["plugins", "list"], ["plugins", "info", "odd"], ["--help"], ["parts"]):
        clean(e2ediff(*words), "")


def test_a_plugin_that_prints_and_fails(tmp_path: Path) -> None:
    plugin = tmp_path / "loud.py"
    plugin.write_text(f"print({HOSTILE!r})\nraise ValueError({FORGED!r})\n")
    assert clean(e2ediff("parts", "--plugin", plugin)).code == 4


@pytest.mark.parametrize("error", ["RuntimeError", "EOFError"])
def test_an_unexpected_error_obeys_the_rule(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one, the end of a file, is not taken for Ctrl-D."""
    plugin = tmp_path / "broken.py"
    plugin.write_text(
        "import click\nfrom e2ediff import hookimpl\n"
        "@click.command()\n"
        f"def command():\n    raise {error}({HOSTILE!r})\n"
        "@hookimpl\ndef register(add):\n    add('commands', 'break', command)\n"
    )
    monkeypatch.setenv("E2EDIFF_PLUGIN_FILES", str(plugin))
    done = clean(e2ediff("break"))
    assert done.code == 1
    assert "Traceback" in done.err
    assert error in done.err
    assert "interrupted" not in done.err
