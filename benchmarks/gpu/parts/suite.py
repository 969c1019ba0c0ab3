"""Ordinary tests, many at once: what takes `device: auto` computes on the GPU here."""

from __future__ import annotations

from look import Look, cores

from parts.tests import note_outcome, pytest

_PLACES = (
    *("tests/parity", "tests/contracts", "tests/laws"),
    *(f"plugins/e2ediff-{name}/tests" for name in ("dsd", "unite", "jit")),
)


def run(look: Look, *places: str) -> None:
    """Note the outcome and the first failures."""
    chosen = places or (("tests/laws/test_latents.py",) if look.tiny else _PLACES)
    many = () if look.tiny else ("-n", max(2, cores() - 2), "--dist", "loadfile")
    ended = pytest(look, *chosen, *many, "-m", "not slow", "--timeout", 100, "--tb=line")
    note_outcome(look, " ".join(chosen), ended)
