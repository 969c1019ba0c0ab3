"""Rank scores that were measured in the same way, and refuse to rank others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from e2ediff.addresses import Address
from e2ediff.errors import E2EDiffError, UnlikeScoresError
from e2ediff.evaluate.passport import Card, Score, parse_card
from e2ediff.figure import Better
from e2ediff.limits import MAX_GRAPH
from e2ediff.store.storage import JSON, Store

FOLDER = "scores"
"""Where `e2ediff eval` leaves its files in a run's directory."""


def cards_of(run: Address) -> list[Card]:
    """Read the score files of a run, by name; unreadable ones are left out."""
    store, found = Store(run), []
    for name in store.list(FOLDER):
        if name.endswith(".json"):
            try:
                path = f"{FOLDER}/{name}"
                found.append(parse_card(store.read(path, MAX_GRAPH), store.where(path)))
            except (OSError, E2EDiffError):
                continue
    return found


def differences(cards: Sequence[Card], score: str) -> dict[str, tuple[JSON, JSON]]:
    """Return the fields in which any card's measurement differs from the first's; both values."""
    found: dict[str, tuple[JSON, JSON]] = {}
    first, *others = (c.passport.measurement(c.scores[score]) for c in cards)
    for other in others:
        for field in sorted({*first, *other}):
            if first.get(field) != other.get(field):
                found.setdefault(field, (first.get(field), other.get(field)))
    return found


def other_versions(cards: Sequence[Card]) -> dict[str, list[str]]:
    """Return every card's version of each library, and of the code, that differs between cards.

    Versions are not part of the measurement, but may change the score.
    """
    each = [_versions(card) for card in cards]
    found = {
        name: [str(one.get(name, "unknown")) for one in each]
        for name in dict.fromkeys(name for one in each for name in one)
    }
    return {name: versions for name, versions in found.items() if len(set(versions)) > 1}


def _versions(card: Card) -> dict[str, JSON]:
    machine = card.passport.machine
    found: dict[str, JSON] = {}
    for section in ("versions", "libraries"):
        own = machine.get(section)
        found |= own if isinstance(own, dict) else {}
    git = machine.get("git")
    return found | ({f"git {k}": v for k, v in git.items()} if isinstance(git, dict) else {})


def direction(cards: Sequence[Card], score: str) -> Better | None:
    """Return whether low or high is better; None if no card says so, or cards disagree."""
    found = {card.scores[score].better for card in cards} - {None}
    return found.pop() if len(found) == 1 else None


def rank(cards: Sequence[Card], score: str, *, regardless: bool = False) -> list[str]:
    """Return a ranking as lines, best first; in the given order if the direction is unknown.

    Args:
        cards: Two or more cards that have the score.
        score: Its name.
        regardless: Also rank scores measured in different ways, with a note.

    Raises:
        UnlikeScoresError: The cards measured it in different ways; the error names the fields.
    """
    apart = differences(cards, score)
    if apart and not regardless:
        raise UnlikeScoresError(
            f"{score} was not measured in the same way:\n{_listed(apart)}\n"
            "Measure again with equal settings, or rank regardless with --regardless."
        )
    better = direction(cards, score)
    order, how = cards, "not ranked: the files do not say whether a low or a high value is better"
    if better is not None:
        order = sorted(cards, key=lambda c: c.scores[score].value, reverse=better == "high")
        how = f"{'unlike measurements ranked regardless, ' if apart else ''}best first"
    lines = [f"{score}, {how}"]
    for card in order:
        own = card.scores[score]
        error = "" if own.error is None else f" +- {own.error:.2g}"
        lines.append(f"  {own.value:.6g}{error}  {card.place}")
    return [*lines, *(_listed(apart).splitlines() if apart else [])]


def shared_scores(cards: Sequence[Card]) -> list[str]:
    """Return the scores that all cards have, in the first one's order."""
    return [name for name in cards[0].scores if all(name in c.scores for c in cards[1:])]


def _listed(apart: Mapping[str, tuple[JSON, JSON]]) -> str:
    return "\n".join(f"  {field}: {a} against {b}" for field, (a, b) in apart.items())


def figures_of(cards: Sequence[Card]) -> dict[str, Score]:
    """Name scores for a report, `FID@adm-1a2b3c4d`, so that unlike measurements differ in name."""
    found = {}
    for card in cards:
        for name, score in card.scores.items():
            tag = card.passport.protocol_digest(score)[:8]
            found[f"{name}@{card.passport.protocol.get('convention')}-{tag}"] = score
    return found
