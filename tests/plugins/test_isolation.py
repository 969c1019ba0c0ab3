"""A plugin that is broken is named with its cause in one line, and hurts nobody else."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys

import attrs
import pytest
from command_line import e2ediff

from e2ediff.errors import DuplicateNameError
from e2ediff.host.discovery import installed
from e2ediff.host.plugins import load
from e2ediff.host.recipe import dump_recipe, parse_recipe
from e2ediff.host.survey import survey

OURS = "dsd,unite,jit,rivals,varfloor"  # the plugins of this repository

GOOD = """
import attrs
from e2ediff import hookimpl
from e2ediff.parts.objectives.controls import Detached

@attrs.frozen(kw_only=True)
class Mine(Detached):
    "An objective."

@hookimpl
def register_objectives(add):
    add({name!r}, Mine)
"""
# What is wrong with each, and what `plugins list` says of it.
BAD = {
    "bad-raises": ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    "bad-exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "bad-missing": ("import not_a_module", "ModuleNotFoundError: No module named 'not_a_module'"),
    "bad-hangs": ("while True: pass", "took longer than 1 s, and was stopped"),
    "bad-hangs-in-c": (
        "import signal, time\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "time.sleep(600)",
        "took longer than 1 s, and was stopped",
    ),
    "bad-dies": ("import os; os._exit(3)", "ended its process with exit code 3"),
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
        requires = "e2ediff>=99" if name == "bad-version" else ""
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
        assert rows[name] == (state, why)
    for name, (_, _, file, why) in DAMAGED.items():
        state, what = rows[name if file == "METADATA" else name.replace("-", "_")]
        place = crowd.path / f"{name.replace('-', '_')}-1.2.dist-info" / file
        assert (state, what) == (
            "refused",
            f"{place} cannot be read ({why}); reinstall its distribution or remove it",
        )
    assert rows["bad-prints"] == ("prints", "objectives: chatty  (to stdout, at import: 'hello')")
    assert rows["good-one"] == ("ok", "objectives: one")
    # The second is required, so that no other is even looked at.
    for name, requires in (("one", "[]"), ("two", "['good-two>=1']")):
        done = e2ediff(
            "run", "tiny.yaml", "--set", f"objective={name}", "--set", "steps=2",
            "--set", f"requires={requires}", "--out", name,
        )  # fmt: skip
        assert (done.code, done.out) == (0, f"{name}\n"), done.err
        assert "bad-" not in done.err
        record = json.loads((crowd.cwd / name / "run.json").read_text())
        assert set(record["plugins"]) == {"e2ediff", f"good-{name}"}, "no other was imported"


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
    site.damage("bad-line", NAMED, b"[e2ediff]\nfoo\n")
    site.install("good-one", GOOD.format(name="one"))
    done = site.e2ediff("plugins", "list", E2EDIFF_BLOCK=OURS)
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "refused" in rows["bad_line"], done.stderr
    assert "torch cannot be imported: " in rows["good-one"]


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
    assert host.unmet("bad-latin").startswith(f"{file} cannot be read (UnicodeDecodeError: ")
    assert "InvalidVersion: " in host.unmet("bad-number>1")
    assert [(e.name, e.version) for e in host.entries if e.name == "good-one"] == [
        ("good-one", "1.2")
    ]


def test_help_and_check_of_a_recipe_that_needs_no_plugin_import_none(inside, tiny_text) -> None:
    """Nor does a recipe that requires another plugin, which is imported and nobody else asked."""
    inside.install("leaves-a-mark", "open('imported', 'w').close()\n" + GOOD.format(name="x"))
    inside.install("good-one", GOOD.format(name="one"))
    (inside.cwd / "tiny.yaml").write_text(tiny_text)
    check = ["check", "tiny.yaml", "--set", "objective=one"]
    for words in (["--help"], check[:2], [*check, "--set", "requires=[good-one]"]):
        done = e2ediff(*words)
        assert done.code == 0, done.err
        assert not (inside.cwd / "imported").exists()
    assert e2ediff(*check[:2], "--set", "objective=x").code == 0
    assert (inside.cwd / "imported").exists()


def test_what_a_survey_keeps_is_dropped_when_a_file_changes(inside) -> None:
    """The plugin's own or a module's that it imports."""
    inside.install("good-one", "import beside\n" + GOOD.format(name="one"))
    (inside.path / "beside.py").write_text("")
    for path in inside.path.rglob("*"):
        os.utime(path, (1e9, 1e9))  # else they are as young as the survey, and not believed
    entries = installed()
    assert not survey(entries)["good-one"].kept
    found = survey(entries)["good-one"]
    assert (found.kept, found.parts) == (True, {"objectives": ["one"]})
    assert not survey(entries, fresh=True)["good-one"].kept
    (inside.path / "beside.py").write_text("raise RuntimeError('changed')")
    assert survey(entries)["good-one"].broken == "RuntimeError: changed"


@pytest.mark.parametrize("state", ["damaged", "unwritable"])
def test_a_cache_that_is_of_no_use_only_costs_time(inside, monkeypatch, state) -> None:
    inside.install("good-one", GOOD.format(name="one"))
    if state == "damaged":
        (inside.cache / "e2ediff").mkdir()
        (inside.cache / "e2ediff/plugins.json").write_text('{"surroundings": 3, "plugins": []}')
    else:
        (inside.cache / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(inside.cache / "file"))
    assert survey(installed())["good-one"].parts == {"objectives": ["one"]}


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
    inside, monkeypatch
) -> None:
    monkeypatch.setenv("E2EDIFF_PLUGIN_TIMEOUT", "0.2")
    inside.install("bad-hangs", "import time\ntry: time.sleep(60)\nexcept Exception: pass")
    handler = signal.getsignal(signal.SIGALRM)
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    host = load(builtins=False)
    host.load_plugin("bad-hangs")
    assert host.broken["bad-hangs"] == "took longer than 0.2 s, and was stopped"
    assert signal.getsignal(signal.SIGALRM) is handler
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (left > 0)
    assert "bad_hangs" not in sys.modules


def test_a_name_that_a_kept_finding_lacks_is_looked_for_anew(
    inside, monkeypatch, tiny_text
) -> None:
    """Which parts a plugin has may hang on what no cache can see, here a variable."""
    name = "import os\nNAME = os.environ.get('PART', 'one')\n"
    inside.install("good-one", name + GOOD.replace("{name!r}", "NAME"))
    for path in inside.path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert load().survey()["good-one"].parts == {"objectives": ["one"]}
    monkeypatch.setenv("PART", "two")
    host = load()
    recipe = parse_recipe(host, tiny_text, "tiny", ["objective=two"])
    assert "name: two" in dump_recipe(host, recipe)


def test_help_and_a_list_of_thirty_known_plugins_import_nothing_slow(site) -> None:
    """Which is what keeps them under a quarter of a second and under one: torch takes longer."""
    for i in range(30):
        site.install(f"plug-{i}", GOOD.format(name=f"part_{i}"))
    for path in site.path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    first = site.python("-P", "-m", "e2ediff", "plugins", "list", E2EDIFF_BLOCK=OURS)
    assert first.stdout.count("  ok  ") == 31, first.stdout
    program = (
        "import sys, time, resource\n"
        "from e2ediff.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'plug_1'} & {*sys.modules}\n"
        "children = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "seconds = time.process_time() + children.ru_utime + children.ru_stime\n"
        "sys.stderr.write(str(seconds))\n"
    )
    for words, limit in ((["--help"], 0.25), (["plugins", "list"], 1.0)):
        done = site.python("-P", "-c", program, *words, E2EDIFF_BLOCK=OURS)
        assert done.returncode == 0, done.stderr
        assert float(done.stderr) < limit, "CPU seconds; another program's load does not count"
    assert done.stdout == first.stdout
