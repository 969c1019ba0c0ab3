"""What objectives around another objective share."""

from __future__ import annotations

from e2ediff.objective import Nets, Objective


def inner_problems(of: Objective, nets: Nets) -> list[tuple[str, str]]:
    """List what the objective inside finds, its options named as those of `objective.of`."""
    return [
        (_inside(where), what.replace("objective.", "objective.of."))
        for where, what in of.problems(nets)
    ]


def _inside(where: str) -> str:
    rest = where.removeprefix("objective.")
    return where if rest == where else f"objective.of.{rest}"
