"""Commands of plugins: called, helped and refused as those of e2ediff itself."""

from __future__ import annotations

import click
import pytest
from command_line import e2ediff

from e2ediff.cli import group
from e2ediff.host.plugins import GROUPS, load

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
from e2ediff.parts.objectives import Detached


@hookimpl
def register(add):
    add("objectives", "mine", "e2ediff.parts.objectives:Detached")
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


# Subcommands of built-in groups


WITHIN = (
    SOURCE.partition("@hookimpl")[0]
    + """
@hookimpl
def register(add):
    add("commands", "plugins kinds", parts)
    add("commands", "plugins lost", "nowhere:command")
"""
)


def test_a_command_of_a_plugin_stands_in_a_built_in_group_as_ours_do(inside) -> None:
    """Called, explained and suggested; not at the top."""
    inside.install("within", WITHIN)
    done = e2ediff("plugins", "kinds", "--plugin", "my_objective.py")
    assert (done.code, "mine" in done.out.split()) == (0, True), done.err
    assert e2ediff("plugins", "kinds", "--help").out.startswith("Usage: e2ediff plugins kinds [")
    assert e2ediff("plugins", "kinds", "--help").out.count("--plugin FILE") == 1
    done = e2ediff("plugins", "kind")
    assert done.code == 2
    assert (
        "unknown command 'plugins kind'. Did you mean 'kinds'? Known: info, kinds, list, lost. "
        in done.err
    )
    done = e2ediff("kinds")
    assert (done.code, "unknown command 'kinds'. " in done.err) == (2, True)
    assert "plugins kinds" not in done.err


def test_a_broken_command_leaves_the_others_of_its_group_alone(inside) -> None:
    inside.install("within", WITHIN)
    for words in (("plugins", "--help"), ("plugins", "info", "--help"), ("plugins", "kinds")):
        assert e2ediff(*words).code == 0
    done = e2ediff("plugins", "lost")
    assert (done.code, "No module named 'nowhere'" in done.err) == (4, True)


def test_the_help_of_a_group_lists_plugins_as_that_of_the_whole_does(inside) -> None:
    """By what their metadata say, as none is imported."""
    inside.install("within", "1 / 0")
    info = inside.path / "within-1.2.dist-info" / "METADATA"
    info.write_text(f"{info.read_text()}Summary: The command plugins kinds\n")
    for words in ((), ("plugins",)):
        _, _, listed = e2ediff(*words, "--help").out.partition("Plugins (their commands: ")
        assert "\n  within   The command plugins kinds\n" in listed


@pytest.mark.parametrize("name", ["run kinds", "greet kinds", "plugins kinds all", " kinds"])
def test_a_command_of_a_group_that_is_not_there_is_refused(inside, name) -> None:
    """Nor can a plugin add to the group of another."""
    inside.install("within", WITHIN.replace("plugins kinds", name))
    within = name.rpartition(" ")[0]
    assert str(load().broken["within"]).endswith(
        f"command {name!r}: there is no group {within!r}. "
        + ("Did you mean 'plugins'? " if "plugins" in within else "") + "Groups: ckpt, plugins."
    )  # fmt: skip
    assert "within" not in {plugin.name for _, plugin in load().commands.values()}


def test_plugins_may_add_to_every_built_in_group() -> None:
    context, added = click.Context(group), load().commands
    ours = {n: group.get_command(context, n) for n in group.list_commands(context)}
    found = [n for n, c in ours.items() if isinstance(c, click.Group) and n not in added]
    assert found == [*GROUPS]


def test_an_unknown_subcommand_names_the_plugin_that_would_bring_it(inside, monkeypatch) -> None:
    folder = inside.cwd / "plugins" / "e2ediff-further"
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "e2ediff-further"\n[project.entry-points.e2ediff]\nmore = "more"\n'
    )
    (folder / "more.py").write_text(
        'def register(add):\n    add("commands", "plugins further", "more:command")\n'
    )
    done = e2ediff("plugins", "further")
    assert done.code == 2
    assert done.err.endswith(
        " e2ediff-further provides it but is not installed. Run: pip install "
        "plugins/e2ediff-further\n"
    )


# What `plugins` shows of them


def test_a_plugin_of_commands_alone_is_shown() -> None:
    shown = e2ediff("plugins", "info", "greeter").out.splitlines()
    assert [line.split() for line in shown[-3:]] == [
        ["command", "greet"], ["command", "ends"], ["command", "own"],
    ]  # fmt: skip
