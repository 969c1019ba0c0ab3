"""`e2ediff run`."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import click

from e2ediff.cli import options
from e2ediff.terminal import echo, echo_path

if TYPE_CHECKING:
    from e2ediff.distributed.signals import Stop
    from e2ediff.train.session import Outcome


class _Run(click.Command):
    """A command whose `--resume` may be followed by a mode, by a run, or by nothing."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(context, _joined(args))


def _joined(words: Sequence[str]) -> list[str]:
    """Join `--resume` with its mode; without one it means `must`.

    click would take whatever follows an option with an optional value for its value.
    """
    joined = list(words)
    options = joined[: joined.index("--")] if "--" in joined else joined
    while "--resume" in options:
        at = options.index("--resume")
        mode = joined.pop(at + 1) if joined[at + 1 : at + 2] in (["auto"], ["must"]) else "must"
        joined[at] = options[at] = f"--resume={mode}"
    return joined


@click.command("run", cls=_Run)
@click.argument("recipe", required=False, metavar="RECIPE|RUN")
@options.overrides(
    "Change one value of the recipe: --set objective=coupled --set optimizer.lr=1e-3."
)
@click.option(
    "--out", metavar="DIR", help="The run's directory or URL. Default: runs/<recipe's name>."
)
@click.option(
    "--resume",
    type=click.Choice(["must", "auto"]),
    help="Continue RUN, or the run of RECIPE in --out, or its newest. Without a word: must; auto "
    "begins it where there is none.",
)
@click.option(
    "--restart",
    is_flag=True,
    help="Start over where --resume would continue; what is there moves to attempts/.",
)
@options.trust
@click.option(
    "--allow-change",
    "allow",
    multiple=True,
    metavar="KEY",
    help="With --resume, let KEY or a block of the recipe differ from now on: optimizer.lr.",
)
@options.threads_text()
@click.option(
    "--nproc",
    metavar="N|auto",
    default="1",
    help="Processes on this machine that share the work; auto: one per GPU. Default: 1.",
)
@click.option(
    "--nnodes", type=click.IntRange(1), default=1, help="Machines; run the same command on each."
)
@click.option(
    "--rdzv", metavar="HOST:PORT", default="", help="Address at which several machines meet."
)
@click.pass_context
def command(
    context: click.Context,
    recipe: str | None,
    overrides: tuple[str, ...],
    out: str | None,
    resume: Literal["must", "auto"] | None,
    restart: bool,
    trust: bool,
    allow: tuple[str, ...],
    threads: str,
    nproc: str,
    nnodes: int,
    rdzv: str,
) -> int:
    """Train from RECIPE, a YAML file or URL; or continue RUN, the directory of a run.

    The run's directory is printed at the end, on stdout.
    Ctrl-C saves and stops; `e2ediff run --resume RUN` continues by the run's own recipe, with
    what --set changes, and `e2ediff run --restart RUN` starts it over.
    A job script that is run again and again gives RECIPE, --out and `--resume auto`.
    Under `torchrun -m e2ediff run RECIPE` each process joins the others by itself.
    """
    from e2ediff.distributed.openmp import all_threads, prepare_threads
    from e2ediff.distributed.signals import Stop

    if resume and restart:
        raise click.UsageError(
            "--resume continues a run and --restart starts it over; give only one of them"
        )
    if allow and not resume:
        raise click.UsageError("--allow-change is for a run that continues: give --resume")
    if nnodes > 1 and not rdzv:
        raise click.UsageError("--nnodes needs --rdzv HOST:PORT, the same on every machine")
    quiet = os.environ.get("RANK", "0") != "0"  # of several processes, the first one reports
    # First of all, because the imports below take seconds.
    with _leaving(quiet=quiet), Stop(at_once=True, quiet=quiet) as stop:
        number = prepare_threads(threads)
        read, place = _places(context, recipe, out, again=bool(resume) or restart)
        count = _count(nproc)
        if count * nnodes > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
            raise click.UsageError(
                "--nproc starts processes, but a launcher has already started them"
            )
        if count * nnodes > 1:
            from e2ediff.distributed.launch import launch

            share = number or max(1, all_threads() // count)
            os.environ["OMP_NUM_THREADS"] = str(share)  # each process uses its share or one
            words = ["run", *([recipe] if recipe else []), "--threads", threads]
            words += [word for change in overrides for word in ("--set", change)]
            words += ["--out", out] if out else []
            words += ["--trust"] if trust else []
            words += [f"--resume={resume}"] if resume else ["--restart"] if restart else []
            words += [word for key in allow for word in ("--allow-change", key)]
            return launch(words, count, nnodes, rdzv)
        return _train(
            read, overrides, place, stop,
            resume=resume == "must" or (resume or False), restart=restart, allow=allow,
            choose_threads=number is None, trust=trust,
        )  # fmt: skip


@contextlib.contextmanager
def _leaving(*, quiet: bool) -> Iterator[None]:
    """Pass the exit code of a stopped process to its launcher; only the first one prints."""
    from e2ediff.distributed.launch import note_end
    from e2ediff.distributed.signals import exit_code_of

    try:
        yield
    except KeyboardInterrupt as error:
        note_end(code := exit_code_of(error))
        if quiet:
            sys.exit(code)
        raise


def _places(
    context: click.Context, word: str | None, out: str | None, *, again: bool
) -> tuple[str | None, str | None]:
    """Return the recipe to read, None for that of the run itself, and the run's directory.

    Args:
        context: The command's.
        word: Its argument, which names a recipe or, with `again`, a run.
        out: Its option `--out`.
        again: Whether a run is resumed or restarted.

    Raises:
        click.UsageError: Neither is given, or a run is where a recipe is expected.
    """
    if word is None and not again:
        raise click.MissingParameter(ctx=context, param_hint="'RECIPE'", param_type="argument")
    if word is None and out is None:
        raise click.UsageError(
            "give the directory of the run, which `e2ediff run` printed at its end: "
            "e2ediff run --resume runs/NAME"
        )
    if word is None or not _names_run(word, again=again):
        return word, out
    if not again:
        quoted = shlex.quote(word)
        raise click.UsageError(
            f"{word} is a run and no recipe; to continue it: e2ediff run --resume {quoted}"
        )
    if out is not None:
        raise click.UsageError(f"{word} is the run's directory: leave out --out, or give a recipe")
    return None, word


def _names_run(word: str, *, again: bool) -> bool:
    """Return whether an argument names a run; with `again` it may be one that is missing."""
    from e2ediff.store.run_directory import is_run

    recipe = word.endswith((".yaml", ".yml"))
    if "://" in word:
        return again and (not recipe or is_run(word))
    if not again:
        return os.path.isdir(word) and is_run(word)
    return os.path.isdir(word) or not (os.path.exists(word) or recipe)


def _count(nproc: str) -> int:
    """Parse the number of processes of `--nproc`.

    Raises:
        click.UsageError: It is no number.
    """
    import torch

    if nproc == "auto":
        return max(1, torch.cuda.device_count())
    if not nproc.isdecimal() or int(nproc) < 1:
        raise click.UsageError(f"--nproc {nproc}: expected a number of processes, or auto")
    return int(nproc)


def _train(
    recipe: str | None,
    overrides: tuple[str, ...],
    out: str | None,
    stop: Stop,
    *,
    resume: bool | Literal["auto"],
    restart: bool,
    allow: tuple[str, ...],
    choose_threads: bool,
    trust: bool,
) -> int:
    """Train in this process, which may be one of several; one of them reports the outcome."""
    from e2ediff.cli import print_error
    from e2ediff.distributed.launch import note_end
    from e2ediff.distributed.signals import exit_code_of
    from e2ediff.distributed.world import World
    from e2ediff.errors import E2EDiffError
    from e2ediff.host.plugins import load
    from e2ediff.train.session import train

    with stop.by_thread():  # it may wait for minutes
        world = World.join()
    try:
        outcome = train(
            load(), recipe, overrides, out, resume=resume, restart=restart, allow=allow,
            world=world, stop=stop, choose_threads=choose_threads, trust=trust,
        )  # fmt: skip
        if world.is_leader:
            for line in _last_lines(outcome, recipe, overrides):
                echo(line, err=True)
            echo_path(outcome.path)
        code = outcome.exit_code
        note_end(code)
        world.shutdown()
    except (Exception, KeyboardInterrupt) as caught:
        if world.size == 1:
            raise
        error = world.attribute_error(caught)
        code = exit_code_of(error)
        note_end(code)

        def say() -> None:
            if isinstance(error, E2EDiffError):
                print_error(error)
            elif code == 1:
                echo("".join(traceback.format_exception(error)), err=True, lines=True, end="")
            else:
                echo(str(error) or "interrupted", err=True, lines=True)

        world.report_once(say)
    if world.size > 1:
        # Not by sys.exit: threads of the group may wait for processes that are gone, and one that
        # asks for the interpreter while it shuts down would replace the exit code by SIGABRT's.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _last_lines(outcome: Outcome, recipe: str | None, overrides: tuple[str, ...]) -> Iterator[str]:
    """Report how a run ended, and what to do next."""
    from e2ediff.train.continuation import continue_command, plugin_options

    path = outcome.path
    if outcome.exit_code:
        yield f"{path}: {outcome.reason}"
        yield f"continue with: {continue_command(path)}"
        return
    yield f"done. Curves: {path}/curves.png, samples: {path}/samples/"
    if not outcome.collapsed:
        yield f"next: {shlex.join(['e2ediff', 'sample', path, *plugin_options()])}"
        return
    yield (
        f"LATENT COLLAPSE: {outcome.collapsed}. Do not trust its samples or scores. Its signs "
        "are in docs/how-to/collapse-alarm.md, its causes in docs/explanation/collapse.md"
    )
    if outcome.advice:
        kept = [change for change in overrides if not change.startswith("objective")]
        words = ["e2ediff", "run", recipe or f"{path}/resolved.yaml"]
        words += [word for change in (*kept, outcome.advice) for word in ("--set", change)]
        words += plugin_options()
        yield f"next: {shlex.join(words)}"
    else:
        yield "next: try another objective, latent norm or learning rate"
