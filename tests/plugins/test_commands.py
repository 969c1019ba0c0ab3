"""Commands of plugins: called, helped and refused as those of e2ediff itself."""

from __future__ import annotations

import pytest
from command_line import e2ediff

SOURCE = """
import click
from e2ediff import hookimpl
from e2ediff.errors import DataError


@click.group("greet")
def group():
    '''Greet.'''


@group.command("parts")
def parts():
    '''List objectives.'''
    from e2ediff.host.plugins import load

    click.echo(" ".join(load().registries["objectives"].names()))


@click.command("ends")
@click.argument("how")
@click.option("--count", type=int)
def ends(how, count):
    '''End in some way.'''
    if how == "data":
        raise DataError("there are no images")
    if how == "usage":
        raise click.UsageError("give --count")
    if how == "interrupt":
        raise KeyboardInterrupt("stopped; the scores stay")
    return count


@click.command("own")
@click.option("--plugin", "file")
def own(file):
    '''Use an option of its own that has this name.'''
    click.echo(file)


@hookimpl
def register(add):
    for name, command in (("greet", group), ("ends", ends), ("own", own)):
        add("commands", name, command)
"""

OBJECTIVE = """
from e2ediff import hookimpl
from e2ediff.parts.objectives.controls import Detached


@hookimpl
def register(add):
    add("objectives", "mine", "e2ediff.parts.objectives.controls:Detached")
"""


@pytest.fixture(autouse=True)
def plugin(inside):
    inside.install("greeter", SOURCE)
    (inside.cwd / "my_objective.py").write_text(OBJECTIVE)


def test_a_command_of_a_plugin_takes_plugin_files_as_ours_do() -> None:
    assert "mine" not in e2ediff("greet", "parts").out.split()
    done = e2ediff("greet", "parts", "--plugin", "my_objective.py")
    assert (done.code, "mine" in done.out.split()) == (0, True), done.err
    for words in (("greet", "parts"), ("ends",), ("run",)):
        assert e2ediff(*words, "--help").out.count("--plugin FILE") == 1
    done = e2ediff("ends", "well", "--plugin", "gone.py")
    assert (done.code, done.err) == (4, "error: --plugin gone.py: there is no such file\n")


def test_an_option_plugin_of_its_own_stays_its_own() -> None:
    assert e2ediff("own", "--plugin", "gone.py").out == "gone.py\n"


@pytest.mark.parametrize(
    ("words", "code", "last"),
    [
        (("data",), 5, "error: there are no images"),
        (("usage",), 2, "Error: give --count"),
        (("interrupt",), 130, "stopped; the scores stay"),
        (("well", "--count", "x"), 2, "Error: Invalid value for '--count': 'x' is not a valid "
         "integer."),
        (("well", "--count", "3"), 3, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_how_a_command_of_a_plugin_ends_is_said_as_of_ours(words, code, last) -> None:
    """Nothing is raised past `main`, and its result is the exit code."""
    done = e2ediff("ends", *words)
    assert (done.code, done.out) == (code, "")
    assert done.err.splitlines()[-1:] == ([last] if last else [])


def test_an_unknown_command_names_the_plugin_that_would_bring_it(inside, monkeypatch) -> None:
    """One that was not loaded, or one that lies beside and is not installed."""
    assert "Did you mean 'greet'" in e2ediff("gret").err
    monkeypatch.setenv("E2EDIFF_BLOCK", "greeter")
    done = e2ediff("greet")
    assert done.code == 2
    assert "Error: unknown command 'greet'. " in done.err
    assert " Plugin 'greeter' was not loaded (blocked by E2EDIFF_BLOCK)." in done.err
    folder = inside.cwd / "plugins" / "e2ediff-farewell"
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "e2ediff-farewell"\n[project.entry-points.e2ediff]\nbye = "bye"\n'
    )
    (folder / "bye.py").write_text(
        'def register(add):\n    add("commands", "farewell", "bye:command")\n'
    )
    done = e2ediff("farewell")
    assert done.code == 2
    assert done.err.endswith(
        " e2ediff-farewell provides it but is not installed. Run: pip install "
        "plugins/e2ediff-farewell\n"
    )


def test_a_plugin_of_commands_alone_is_checked_and_shown(inside) -> None:
    inside.install("careless", SOURCE.partition("@hookimpl")[0] + """
@hookimpl
def register(add):
    add("commands", "lost", "nowhere:command")
""", requires="e2ediff>=0.1,<0.2")  # fmt: skip
    done = e2ediff("plugins", "check", "careless")
    assert done.code == 4
    assert done.out == (
        "FAIL  command lost  contract: command 'lost' of plugin 'careless' (careless 1.2): "
        "ModuleNotFoundError: No module named 'nowhere'\n"
    )
    done = e2ediff("plugins", "check", "greeter", "--part", "ends")
    assert "ok    command ends  contract\n" in done.out
    assert "command own" not in done.out
    shown = e2ediff("plugins", "info", "greeter").out.splitlines()
    assert [line.split() for line in shown[-3:]] == [
        ["command", "greet"], ["command", "ends"], ["command", "own"],
    ]  # fmt: skip
