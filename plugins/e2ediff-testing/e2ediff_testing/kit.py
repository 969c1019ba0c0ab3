"""The conformance kit: every check that applies to a plugin's parts, one verdict each."""

from __future__ import annotations

import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs

from e2ediff.errors import E2EDiffError, PluginError
from e2ediff.host.guard import cause
from e2ediff.host.plugins import Host
from e2ediff.host.registry import Part
from e2ediff_testing.kinds import KINDS, kind_of
from e2ediff_testing.parallel import two_processes
from e2ediff_testing.source import Source
from e2ediff_testing.trials import (
    Trial,
    compiled,
    contract,
    documentation,
    half_precision,
    latent_contract,
    round_trip,
    save_and_resume,
)


@attrs.frozen
class Verdict:
    """How one check of one part ended; `problem` says what to change, "" if nothing."""

    part: str
    check: str
    problem: str = ""


# Title, check, and what to change where an exception does not say it itself.
_ALWAYS: tuple[tuple[str, Callable[[Trial], None], str], ...] = (
    (
        "documentation",
        documentation,
        "give the class a docstring: a sentence on what it is for, and every option by name",
    ),
    (
        "contract",
        contract,
        "it is called as docs/reference/contracts.md says: take those arguments, return those "
        "shapes and types",
    ),
    (
        "recipe round trip",
        round_trip,
        "make it a frozen attrs class whose options alone, as YAML has them, make it equal",
    ),
    (
        "save and resume",
        save_and_resume,
        "it must train for four steps and go on from a checkpoint",
    ),
    ("latent contract", latent_contract, "a trained run must encode, decode and sample"),
    (
        "bfloat16",
        half_precision,
        "under autocast matrix products are bfloat16: take losses in float32, with .float()",
    ),
)
_TRAINED = (
    (
        "compile",
        compiled,
        "torch.compile must be able to trace blocks and heads, and give what an untraced step "
        "gives",
    ),
)


def check_plugin(
    host: Host,
    plugin: str,
    overrides: Sequence[str] = (),
    *,
    source: Source | None = None,
    only: str = "",
) -> Iterator[Verdict]:
    """Run all checks that apply to a plugin's parts, and import its commands.

    Each part is tried in a small recipe (`e2ediff_testing.trials.RECIPE`), in the place of the
    part that is there and with the changes that its class attribute `trial` lists; the checks
    train there for a few steps.

    Args:
        host: What knows the plugin.
        plugin: Its name; it must be loaded.
        overrides: Further changes to that recipe, as `--set` takes them.
        source: Its folder, where it is not installed.
        only: The name of one part or command, to leave out the others.
    """
    for row in KINDS:
        for part in host.registries[row.plural]:
            if part.plugin.name == plugin and only in ("", part.name):
                yield from _part(host, row.plural, part, overrides, source)
    for name, (_, owner) in host.commands.items():
        if owner.name == plugin and only in ("", name):
            problem = ""
            try:
                host.command(name)
            except PluginError as error:
                problem = str(error)
            yield Verdict(f"command {name}", "contract", problem)


def _part(
    host: Host, plural: str, part: Part, overrides: Sequence[str], source: Source | None
) -> Iterator[Verdict]:
    title = f"{host.registries[plural].kind} {part.name}"
    with tempfile.TemporaryDirectory(prefix="e2ediff-check-") as folder:
        try:
            trial = Trial.prepare(host, plural, part, overrides, Path(folder))
        except E2EDiffError as error:
            what = " ".join(str(error).split())
            yield Verdict(
                title, "fits a recipe", f"{what} Give what it needs in its `trial`, or with --set."
            )
            return
        checks = [*_ALWAYS, *(_TRAINED if kind_of(plural).trained else ())]
        for name, check, advice in checks:
            yield Verdict(title, name, _problem(lambda c=check: c(trial), advice))  # type: ignore[misc]
        if kind_of(plural).trained:
            advice = "every process must take the same passes in the same order"
            problem = _problem(lambda: two_processes(trial, source), advice)
            yield Verdict(title, "two processes", problem)


def _problem(check: Callable[[], None], advice: str) -> str:
    """Return what a check complains of, in one line."""
    try:
        with warnings.catch_warnings():
            # torch's, of kernels that are slow on this machine, are not the plugin's doing.
            warnings.simplefilter("ignore")
            check()
    except KeyboardInterrupt:
        raise
    except AssertionError as error:
        if str(error):
            return " ".join(str(error).split())
        return f"AssertionError at {_place(error)}; {advice}"
    except BaseException as error:  # the plugin boundary
        place = "" if isinstance(error, E2EDiffError) else f" at {_place(error)}"
        return f"{cause(error)}{place}; {advice}"
    return ""


def _place(error: BaseException) -> str:
    """Return the file and line of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
