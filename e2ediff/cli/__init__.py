"""The command line: one file for each command, imported when it is called.

Nothing here imports torch, so that `--help` answers at once.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TextIO

import click

from e2ediff import __version__
from e2ediff.distributed.parent import follow_launcher
from e2ediff.distributed.signals import Stop, Stopped, exit_code_of
from e2ediff.errors import E2EDiffError, PluginError, ResourceError, is_refusal
from e2ediff.terminal import echo, printable

# Command, its module below this package, and its line in the overview.
_COMMANDS = {
    "run": ("run", "Train from a recipe."),
    "sample": ("sample", "Generate images with a trained run."),
    "interpolate": ("interpolate", "Make a strip of images between two seeds or two images."),
    "reconstruct": ("reconstruct", "Pass images through a trained encoder and decoder."),
    "eval": ("eval", "Score a run's samples, or a folder or npz of images."),
    "check": ("check", "Check a recipe without data or GPU, and count its parameters and FLOPs."),
    "ablate": ("ablate", "Train a grid of variations with several seeds, and report on it."),
    "report": ("report", "Write one HTML page on a run or an ablation."),
    "compare": ("compare", "Compare the final figures of runs, and their recipes."),
    "ckpt": ("ckpt", "List, verify, prune, export and import checkpoints."),
    "parts": ("parts", "List the parts that a recipe can name, with their options."),
    "plugins": ("plugins", "List and inspect plugins."),
    "doctor": ("doctor", "Check this machine and installation; pack a report of a bug."),
}


class _Group(click.Group):
    """A group of built-in commands, and of those that plugins add to it.

    A command of a plugin is imported when it is looked for.
    Its registered name is that of the group, a space, and its own: `plugins check`.
    """

    prefix = ""

    def list_commands(self, context: click.Context) -> list[str]:
        from e2ediff.host.plugins import load

        names = [n.removeprefix(self.prefix) for n in load().commands if n.startswith(self.prefix)]
        return [*super().list_commands(context), *sorted(n for n in names if " " not in n)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        from e2ediff.host.plugins import load

        found = super().get_command(context, name) or load().command(self.prefix + name)
        return found and _with_plugin_files(found)

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(context, arguments)
        except click.UsageError as error:
            from e2ediff.host.plugins import load

            name, known = arguments[0], self.list_commands(context)
            advice = load().explain_unknown("commands", name, known, within=self.prefix)
            raise click.UsageError(
                f"unknown command '{self.prefix}{name}'. {advice}", context
            ) from error


class _Subgroup(_Group):
    """A built-in group below `e2ediff`, as its module defines it."""

    def __init__(self, defined: click.Group) -> None:
        super().__init__()
        vars(self).update(vars(defined))
        self.defined, self.prefix = defined, f"{defined.name} "

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        self.defined.format_commands(context, formatter)
        _write_plugins(formatter)


class _Lazy(_Group):
    """The group `e2ediff`, whose built-in commands are imported when they are called, too."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [*_COMMANDS, *super().list_commands(context)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return super().get_command(context, name)
        command = importlib.import_module(f"e2ediff.cli.{_COMMANDS[name][0]}").command
        if isinstance(command, click.Group):
            return _Subgroup(command)
        return _with_plugin_files(command)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])
        _write_plugins(formatter)


def _write_plugins(formatter: click.HelpFormatter) -> None:
    """Write a line on each installed plugin, for help.

    From their metadata: to import plugins, and torch with them, would take seconds.
    """
    from e2ediff.host.discovery import installed

    if rows := [(printable(e.name), printable(e.summary)) for e in installed() if not e.refusal()]:
        with formatter.section("Plugins (their commands: `e2ediff plugins list`)"):
            formatter.write_dl(rows)


def _with_plugin_files(command: click.Command) -> click.Command:
    """Add the option `--plugin` to a command, or to every command in a group.

    A plugin's command keeps an option of its own that has this name.
    """
    for inner in getattr(command, "commands", {}).values():
        _with_plugin_files(inner)
    known = any("--plugin" in option.opts for option in command.params)
    if not known and not isinstance(command, click.Group):
        command.params.append(
            click.Option(
                ["--plugin", "plugin_files"],
                multiple=True,
                metavar="FILE",
                expose_value=False,
                callback=_use_plugin_files,
                help="A plugin in a single Python file, which need not be installed.",
            )
        )
    return command


def _use_plugin_files(
    context: click.Context, parameter: click.Parameter, paths: tuple[str, ...]
) -> None:
    """List plugin files in the environment while the command runs, for its processes as well."""
    if paths:
        from e2ediff.host.plugin_file import giving

        context.with_resource(giving(paths))


_HELP = """Train encoder, decoder and diffusion network together, from a YAML recipe.

\b
e2ediff run recipes/quickstart.yaml
e2ediff sample runs/quickstart --label sneaker
"""


@click.group(cls=_Lazy, help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", prog_name="e2ediff")
def group() -> None:
    """Define the command group; its help text is `_HELP`."""


def print_error(error: E2EDiffError) -> None:
    """Print a user error on stderr, with E2EDIFF_TRACE=1 after the traceback of its cause."""
    if os.environ.get("E2EDIFF_TRACE") == "1" and error.__cause__ is not None:
        lines = traceback.format_exception(error.__cause__)
        echo("".join(lines), err=True, lines=True, end="")
    # Further lines are indented, so that a name from a file cannot begin a message of its own.
    first, *others = str(error).split("\n")
    rest = [line if line.startswith("  ") else f"  {line}" for line in others]
    echo("\n".join([f"error: {first}", *rest]), err=True, lines=True)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """Print a warning of a library, which may quote a file that it read."""
    text = warnings.formatwarning(message, category, filename, lineno, line)
    echo(text, err=True, to=file, lines=True, end="")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake gives one message and an exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # First of all, because the imports of a command take seconds.
    with Stop(at_once=True, when="", quiet=True):
        follow_launcher()
        sys.exit(_exit_code(words))


def _interrupted(error: BaseException, words: list[str]) -> int:
    """Print what is kept after a signal; return the exit code.

    Not where the error is caught: as a variable there it would keep itself, and processes of
    iterators that it interrupted, until the interpreter ends.
    """
    from multiprocessing import active_children

    for child in active_children():
        child.kill()
    cause = error.__cause__ or error  # click turns every KeyboardInterrupt into an Abort
    if isinstance(cause, Stopped):
        cause.repeat(words)
    echo(str(cause) or "interrupted", err=True, lines=True)
    return exit_code_of(cause) if isinstance(cause, KeyboardInterrupt) else 130


def _refused(error: Exception) -> ResourceError | None:
    """Return what to say of a file that the system refused; None for any other error."""
    if not isinstance(error, OSError) or not is_refusal(error):
        return None
    place = f"{error.filename}: " if error.filename else ""
    return ResourceError(
        f"{place}{error.strerror}. The system refused to read or write there; mend that, and give "
        "the same command again."
    )


def _failed(error: Exception) -> int:
    """Print an error that no one expected, with its traceback; return the exit code."""
    from e2ediff.host.discovery import broken_distribution

    if why := broken_distribution():
        echo(f"error: {why}", err=True)
        return PluginError.exit_code
    if refused := _refused(error):
        print_error(refused)
        return refused.exit_code
    echo("".join(traceback.format_exception(error)), err=True, lines=True, end="")
    return 1


def _exit_code(words: list[str]) -> int:
    """Run a command, and return the exit code; print what went wrong."""
    # Images have a limit of their own (`e2ediff.files.images`), whose message names the file.
    warnings.showwarning = _show_warning
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    try:
        code = group.main(words, prog_name="e2ediff", standalone_mode=False)
    except E2EDiffError as error:
        print_error(error)
        return error.exit_code
    except click.ClickException as error:
        message = io.StringIO()
        error.show(message)
        echo(message.getvalue(), err=True, lines=True, end="")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):  # click takes the end of any file for Ctrl-D
            return _failed(error.__cause__)
        return _interrupted(error, words)
    except Exception as error:
        return _failed(error)
    return code if isinstance(code, int) else 0
