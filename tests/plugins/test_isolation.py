"""A plugin that is broken is named with its cause in one line, and hurts nobody else."""

from __future__ import annotations

import gc
import json
import re
import shutil
import signal
import sys
import time

import attrs
import pytest
from command_line import OURS, e2ediff

from e2ediff.errors import DuplicateNameError
from e2ediff.host.discovery import installed
from e2ediff.host.plugins import load
from e2ediff.host.recipe import dump_recipe, parse_recipe

GOOD = """
import attrs
from e2ediff import hookimpl
from e2ediff.parts.objectives import Detached

@attrs.frozen(kw_only=True)
class Mine(Detached):
    "An objective."

@hookimpl
def register(add):
    add("objectives", {name!r}, Mine)
"""
# What is wrong with each, and what `plugins list` says of it.
BAD = {
    "bad-raises": ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    "bad-exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "bad-missing": ("import not_a_module", "ModuleNotFoundError: No module named 'not_a_module'"),
    "bad-hangs": (
        "while True: pass",
        "takes longer than 1 s; leave it out with E2EDIFF_BLOCK=bad-hangs",
    ),
    "bad-kind": (
        GOOD.format(name="k").replace('"objectives"', '"objective"'),
        "add('objective', 'k', ...): unknown kind 'objective'. Did you mean 'objectives'? Kinds: ",
    ),
    "bad-needs": (
        GOOD.format(name="n"),
        "needs not-there>=2, which is not installed; run: pip install 'not-there>=2'",
    ),
    "bad-type": (
        GOOD.format(name="x").replace("Mine)", "int)"),
        "objective 'x' of plugin 'bad-type' (bad-type 1.2): expected a subclass of "
        "e2ediff.objective.Objective, got <class 'int'>",
    ),
    "bad-hook": (
        GOOD.format(name="y") + "\n@hookimpl\ndef run_startd(run): pass\n",
        "unknown hook 'run_startd'. Did you mean 'run_started'? See docs/reference/hooks.md.",
    ),
    "bad-version": (GOOD.format(name="z"), "needs e2ediff>=99, this is e2ediff 0.1.0"),
    "bad-takes-our-name": (
        GOOD.format(name="coupled"),
        "objective 'coupled' is registered by both 'e2ediff' (e2ediff 0.1.0) and "
        "'bad-takes-our-name' (bad-takes-our-name 1.2); register one of them under another name",
    ),
}
# Of each the bytes of METADATA, those of entry_points.txt, and what `plugins list` says of it.
NAMED = b"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n"
ENTRY = b"[e2ediff]\n{name} = nowhere\n"
DAMAGED = {
    "bad-nameless": (
        b"Metadata-Version: 2.1\n",
        ENTRY,
        "METADATA",
        "ValueError: there is no Name",
    ),
    "bad-bare": (None, ENTRY, "METADATA", "ValueError: there is no Name"),
    "bad-latin": (
        NAMED + b"Summary: \xff\n",
        ENTRY,
        "METADATA",
        "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 60: "
        "invalid start byte",
    ),
    "bad-twice": (
        NAMED,
        ENTRY + ENTRY[10:],
        "entry_points.txt",
        "ValueError: two entry points have one name",
    ),
}
PRINTS = "import os\nprint('hello')\nos.write(1, b'raw')\n" + GOOD.format(name="chatty")


@pytest.fixture
def crowd(inside, tiny_text, monkeypatch):
    """Fourteen bad plugins, one that prints, and two good ones."""
    monkeypatch.setenv("E2EDIFF_PLUGIN_TIMEOUT", "1")
    for name, (source, _) in BAD.items():
        requires = {"bad-version": "e2ediff>=99", "bad-needs": "not-there>=2"}.get(name, "")
        inside.install(name, source, requires=requires)
    for name, (about, entries, _, _) in DAMAGED.items():
        inside.damage(name, about, entries)
    inside.install("bad-prints", PRINTS)
    inside.install("good-one", GOOD.format(name="one"))
    inside.install("good-two", GOOD.format(name="two"))
    (inside.cwd / "tiny.yaml").write_text(tiny_text)
    return inside


def test_fourteen_bad_plugins_are_each_named_once_and_two_good_ones_train(crowd) -> None:
    done = e2ediff("plugins", "list")
    assert done.code == 0, done.err
    lines = [re.split("  +", line, maxsplit=3) for line in done.out.splitlines()]
    rows = {name: (state, what) for name, state, _, what in lines}
    assert len(rows) == len(lines), "a line each"
    for name, (_, why) in BAD.items():
        state = "refused" if name == "bad-version" else "broken"
        assert rows[name][0] == state
        assert rows[name][1].startswith(why), rows[name]
    for name, (_, _, file, why) in DAMAGED.items():
        state, what = rows[name if file == "METADATA" else name.replace("-", "_")]
        place = crowd.path / f"{name.replace('-', '_')}-1.2.dist-info" / file
        assert (state, what) == (
            "refused",
            f"{place} cannot be read ({why}); reinstall its distribution or remove it",
        )
    assert rows["bad-prints"] == ("prints", "objectives: chatty  (to stdout, at import: 'hello')")
    assert rows["good-one"] == ("ok", "objectives: one")
    for name, requires in (("one", "[]"), ("two", "['good-two>=1']")):
        done = e2ediff(
            "run", "tiny.yaml", "--set", f"objective={name}", "--set", "steps=2",
            "--set", f"requires={requires}", "--out", name,
        )  # fmt: skip
        assert (done.code, done.out) == (0, f"{name}\n"), done.err
        assert done.err.count("bad-") == 2, "the one that hangs, and the way to leave it out"
        record = json.loads((crowd.cwd / name / "run.json").read_text())
        assert set(record["plugins"]) == {"e2ediff", f"good-{name}"}, "no other counts for the run"


def test_metadata_that_torch_cannot_read_either_ends_in_one_line(site) -> None:
    """Any distribution's: `import torch` reads all entry points, and nothing goes without it."""
    (site.cwd / "empty.yaml").write_text("")
    for name, entries, why in (
        ("bad-line", b"[console_scripts]\nfoo\n", "TypeError: "),
        ("bad-bytes", b"[e2ediff]\nfoo = f\xff\n", "UnicodeDecodeError: "),
    ):
        folder = site.damage(name, NAMED, entries)
        done = site.e2ediff("check", "empty.yaml")
        start = (
            f"error: torch cannot be imported: {folder / 'entry_points.txt'} cannot be read ({why}"
        )
        assert (done.returncode, done.stderr[: len(start)]) == (4, start)
        assert done.stderr.count("\n") == 1
        shutil.rmtree(folder)


def test_a_recipe_that_requires_a_damaged_distribution_is_told_so(inside) -> None:
    """And of two distributions of one name, the one that Python would import counts."""
    folder = inside.damage("bad-latin", *DAMAGED["bad-latin"][:2])
    inside.damage("bad-number", NAMED.replace(b"1.2", b"x.y"), ENTRY)
    later = inside.path / "later"
    later.mkdir()
    inside.install("good-one", GOOD.format(name="one"))
    attrs.evolve(inside, path=later).install("good-one", "raise RuntimeError", version="2")
    sys.path.append(str(later))
    try:
        host = load()
    finally:
        sys.path.remove(str(later))
    file = folder / "METADATA"
    assert host.missing_requirement("bad-latin").startswith(
        f"{file} cannot be read (UnicodeDecodeError: "
    )
    assert "InvalidVersion: " in host.missing_requirement("bad-number>1")
    assert [(e.name, e.version) for e in host.entries if e.name == "good-one"] == [
        ("good-one", "1.2")
    ]


def test_help_imports_no_plugin_and_a_class_given_as_text_waits_until_it_is_named(
    inside, tiny_text
) -> None:
    """A plugin that gives the class itself is imported whole, as is the list of commands."""
    lazy = """
from e2ediff import hookimpl

@hookimpl
def register(add):
    add("objectives", "x", "leaves_a_mark_module:Mine")
"""
    inside.install("leaves-a-mark", lazy)
    module = inside.path / "leaves_a_mark_module.py"
    module.write_text("open('imported', 'w').close()\n" + GOOD.partition("@hookimpl")[0])
    (inside.cwd / "tiny.yaml").write_text(tiny_text)
    check = ["check", "tiny.yaml"]
    for words in (
        ["--help"],
        ["plugins", "list"],
        check,
        [*check, "--set", "requires=[leaves-a-mark]"],
    ):
        done = e2ediff(*words)
        assert done.code == 0, done.err
        assert not (inside.cwd / "imported").exists(), words
    assert e2ediff(*check, "--set", "objective=x").code == 0
    assert (inside.cwd / "imported").exists()
    sys.modules.pop("leaves_a_mark_module")
    module.write_text("import not_a_module\n")
    done = e2ediff(*check, "--set", "objective=x")
    assert done.code == 3
    assert (
        "--set 1: objective: objective 'x' of plugin 'leaves-a-mark' (leaves-a-mark 1.2) cannot "
        "be imported from leaves_a_mark_module:Mine (ModuleNotFoundError: No module named "
        "'not_a_module')."
    ) in done.err


def test_two_distributions_with_one_name_are_an_error_that_names_the_ways_out(
    inside, monkeypatch, tiny_text
) -> None:
    inside.install("good-one", GOOD.format(name="same"))
    inside.install("good-two", GOOD.format(name="same"))

    def resolved(*overrides, text=tiny_text):
        host = load()
        return dump_recipe(host, parse_recipe(host, text, "tiny", overrides))

    with pytest.raises(DuplicateNameError) as caught:
        resolved("objective=same")
    assert str(caught.value) == (
        "--set 1: objective: objective 'same' is registered by both 'good-one' (good-one 1.2) "
        "and 'good-two' (good-two 1.2); choose by writing 'good-one:same' or 'good-two:same', "
        "or block one with E2EDIFF_BLOCK=good-two"
    )
    lines = e2ediff("plugins", "list").out.splitlines()
    assert lines[-1] == (
        "objectives: 'same' is registered by both 'good-one' (good-one 1.2) and 'good-two' "
        "(good-two 1.2); write 'good-one:same' or 'good-two:same' in a recipe, or block one with "
        "E2EDIFF_BLOCK=good-two"
    )
    for name, others in (("good-one:same", []), ("same", ["requires=[good-one]"])):
        text = resolved(f"objective={name}", *others)
        assert f"name: {name}\n" in text.replace('"', "")
        assert resolved(text=text) == text
    monkeypatch.setenv("E2EDIFF_BLOCK", f"{OURS},good_two")
    assert "name: same\n" in resolved("objective=same")


def test_observers_are_called_for_a_recipe_that_requires_them_or_by_e2ediff_load(
    inside, monkeypatch, tiny_text
) -> None:
    """Two observers implement one hook; the first raises, and the second is called."""
    observer = """
from e2ediff import hookimpl
@hookimpl
def step_ended(run, step):
    print({name!r}, step)
    {end}
"""
    inside.install("watch-one", observer.format(name="one", end="raise RuntimeError('no')"))
    inside.install("watch-two", observer.format(name="two", end="raise SystemExit"))
    (inside.cwd / "tiny.yaml").write_text(tiny_text)
    run = ["run", "tiny.yaml", "--set", "steps=1", "--out"]
    silent = e2ediff(*run, "silent")
    assert (silent.code, silent.out, "one 1" in silent.err) == (0, "silent\n", False)
    for out, words, variable in (
        ("required", ["--set", "requires=[watch-one, watch-two]"], ""),
        ("listed", [], "watch-one,watch_two"),
    ):
        monkeypatch.setenv("E2EDIFF_LOAD", variable)
        done = e2ediff(*run, out, *words)
        assert (done.code, done.out) == (0, f"{out}\n"), done.err
        assert "one 1\n" in done.err
        assert "two 1\n" in done.err
        assert "plugin 'watch-one': step_ended failed: RuntimeError: no\n" in done.err
    monkeypatch.setenv("E2EDIFF_LOAD", "watch-on")
    done = e2ediff(*run, "x")
    assert done.code == 4
    assert "E2EDIFF_LOAD: there is no plugin 'watch-on'. Did you mean 'watch-one'" in done.err


def test_a_hang_in_this_process_ends_and_leaves_the_alarm_of_others_alone(
    inside, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("E2EDIFF_PLUGIN_TIMEOUT", "0.2")
    inside.install("bad-hangs", "import time\ntry: time.sleep(60)\nexcept Exception: pass")
    handler = signal.getsignal(signal.SIGALRM)
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    host = load(builtins=False)
    why = "takes longer than 0.2 s; leave it out with E2EDIFF_BLOCK=bad-hangs"
    assert str(host.broken["bad-hangs"]) == why
    assert f"plugin 'bad-hangs' {why}\n" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGALRM) is handler
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (left > 0)
    assert "bad_hangs" not in sys.modules


def test_a_time_limit_that_is_none_is_refused_once(inside, monkeypatch) -> None:
    inside.install("good-one", GOOD.format(name="one"))
    monkeypatch.setenv("E2EDIFF_PLUGIN_TIMEOUT", "soon")
    done = e2ediff("plugins", "list")
    assert (done.code, done.err) == (
        4,
        "error: E2EDIFF_PLUGIN_TIMEOUT=soon: expected a number of seconds above 0\n",
    )


def test_a_plugin_that_is_the_first_to_import_torch_is_not_blamed_for_a_slow_disk(
    inside, monkeypatch
) -> None:
    monkeypatch.setenv("E2EDIFF_PLUGIN_TIMEOUT", "0.2")
    slow = "import time, torch\ntorch.__spec__._initializing = True\ntime.sleep(0.5)\n"
    inside.install(
        "slow-disk", slow + "torch.__spec__._initializing = False\n" + GOOD.format(name="one")
    )
    host = load(builtins=False)
    assert "slow-disk" not in host.broken
    inside.install("bad-slow", "import time\ntime.sleep(5)\n" + GOOD.format(name="two"))
    assert "takes longer than 0.2 s" in str(load(builtins=False).broken["bad-slow"])


def test_garbage_of_others_that_takes_long_to_free_is_no_hang_of_a_plugin(
    inside, monkeypatch, capsys
) -> None:
    """As an abandoned loader does, whose workers are waited for."""
    freed = []

    class Slow:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            freed.append(time.sleep(1.5))

    monkeypatch.setenv("E2EDIFF_PLUGIN_TIMEOUT", "0.5")
    busy = "kept = [[] for _ in range(100_000)]\n"  # enough for a collection
    inside.install("good-one", busy + GOOD.format(name="mine"))
    gc.collect()
    Slow()
    host = load()
    assert "good-one" not in host.broken
    assert "good-one" not in capsys.readouterr().err
    assert "mine" in host.registries["objectives"].names()
    gc.collect()
    assert freed == [None], "freed once, after the plugin was loaded"
    assert gc.isenabled()


def test_a_hang_that_no_signal_ends_is_named_while_it_lasts(site) -> None:
    """As in a C function that waits: the user reads whose it is, and how to leave it out."""
    site.install(
        "bad-hangs-in-c",
        "import signal, time\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "time.sleep(4)\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])\n" + GOOD.format(name="c"),
    )
    done = site.e2ediff("plugins", "list", E2EDIFF_BLOCK=OURS, E2EDIFF_PLUGIN_TIMEOUT="1")
    line = "plugin 'bad-hangs-in-c' takes longer than 1 s; leave it out with E2EDIFF_BLOCK="
    assert done.stderr.startswith(line), done.stderr
    assert "broken" in done.stdout.splitlines()[1]


def test_help_and_a_list_of_thirty_plugins_import_nothing_slow(site) -> None:
    """Which keeps them under a quarter of a second and under one: torch takes longer."""
    lazy = """
from e2ediff import hookimpl

@hookimpl
def register(add):
    add("objectives", {name!r}, "nowhere:Mine")
"""
    for i in range(30):
        site.install(f"plug-{i}", lazy.format(name=f"part_{i}"))
    program = (
        "import sys, time\n"
        "from e2ediff.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'nowhere'} & {*sys.modules}\n"
        "sys.stderr.write(str(time.process_time()))\n"
    )
    for words, limit in ((["--help"], 0.25), (["plugins", "list"], 1.0)):
        spent: list[float] = []
        while not spent or (min(spent) >= limit and len(spent) < 5):
            done = site.python("-P", "-c", program, *words, E2EDIFF_BLOCK=OURS)
            assert done.returncode == 0, done.stderr
            spent.append(float(done.stderr))
        assert min(spent) < limit, f"CPU seconds; others on the cores only ever add: {spent}"
    assert done.stdout.count("  ok  ") == 31, done.stdout


def test_info_shows_parts_with_options_and_of_a_broken_plugin_the_traceback(inside) -> None:
    inside.install("good-one", GOOD.format(name="mine"))
    inside.install("bad-one", "def f():\n    raise RuntimeError('why')\nf()")
    assert {e.name for e in installed()} >= {"good-one", "bad-one"}
    done = e2ediff("plugins", "info", "good-one")
    assert "\n  objectives\n    mine  [good-one]  An objective." in done.out
    assert "\n        denoising_weight: float = 1.0\n" in done.out
    done = e2ediff("plugins", "info", "bad-one")
    assert (done.code, "broken    RuntimeError: why\n" in done.out) == (0, True)
    assert "bad_one.py" in done.out
    done = e2ediff("plugins", "info", "no-such-plugin")
    assert done.code == 4
    assert "there is no plugin and no folder 'no-such-plugin'." in done.err
