"""Every error that a user can cause, one class for each thing that can be done wrong.

The command line prints these without a traceback and exits with the class's `exit_code`.
An OSError by which the system refuses a file ends as a ResourceError does (`is_refusal`). Any
other error is a bug of e2ediff and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import ClassVar

import attrs


class E2EDiffError(Exception):
    """What a user did wrong, or what the machine refused; the text says what to do about it."""

    exit_code: ClassVar[int] = 2


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of another library says, or its kind."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@attrs.frozen
class Problem:
    """One thing that is wrong in a recipe.

    `where` is the path of the value inside the recipe (`objective.floor`), `line` its place
    (`quickstart.yaml:14:5`, or `--set 2`), `what` the complaint and `hint` the way out.
    """

    where: str
    what: str
    line: str = ""
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.line}: " if self.line else ""
        hint = f" {self.hint}" if self.hint else ""
        return f"{place}{self.where}: {self.what}{hint}"


class RecipeError(E2EDiffError):
    """A recipe is wrong; carries all of its problems, not only the first."""

    exit_code = 3

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem" + ("" if len(self.problems) == 1 else "s")
        super().__init__("\n".join([f"{source}: {count}", *(f"  {p}" for p in self.problems)]))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[str, tuple[Problem, ...]]]:
        return RecipeError, (self.source, self.problems)  # else it could not cross processes


class PluginError(E2EDiffError):
    """A plugin is missing, broken, or of another version than a recipe asks for."""

    exit_code = 4


class DuplicateNameError(PluginError):
    """Two plugins register the same name in one registry."""


class ShapeError(E2EDiffError):
    """A tensor that crosses a contract has another shape than the contract says."""

    exit_code = 4


class DataError(E2EDiffError):
    """A data set is missing, empty, damaged, or not what the recipe describes."""

    exit_code = 5


class AbsentDataError(DataError):
    """A file or package that a recipe names is not on this machine; it may be on another."""


class BadImageError(DataError):
    """One image is damaged or too large; a recipe may have such images skipped.

    `place` is its path, `what` the complaint; the text is both, and the way out.
    """

    def __init__(self, place: str, what: str) -> None:
        self.place = place
        self.what = what
        way_out = "remove or replace it, or set `data.on_bad_image: skip`"
        super().__init__(f"{place}: {what}; {way_out}")


class CheckpointError(E2EDiffError):
    """A checkpoint is damaged, incomplete, or does not fit the recipe."""

    exit_code = 6


class LatentError(CheckpointError):
    """Latents of one set of weights were given to another, to which they mean something else."""


class RunDirectoryError(E2EDiffError):
    """A run directory is missing, taken, locked, or not a run directory."""

    exit_code = 6


class DivergedError(E2EDiffError):
    """A loss, a gradient, a weight or a sampled image is not finite."""

    exit_code = 7


class CollapseError(E2EDiffError):
    """Training was stopped by the alarm: the latents have collapsed, or nothing is learned."""

    exit_code = 7


class UnlikeScoresError(E2EDiffError):
    """Scores were to be ranked that were not measured in the same way."""

    exit_code = 9


class ResourceError(E2EDiffError):
    """The machine refused: no such device, no space on the disk, not enough memory."""

    exit_code = 8


class KernelError(ResourceError):
    """A kernel that a recipe asks for by name does not run on this machine.

    `what` is the complaint; the text is that and the way out.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"{what}. Set backbone.attention: auto")


_REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN),
    *(errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ENOMEM),
}


def is_refusal(error: BaseException) -> bool:
    """Return whether the system refused a file for a reason that lies in the machine."""
    return isinstance(error, OSError) and error.errno in _REFUSALS
