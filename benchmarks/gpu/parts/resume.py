"""Is a run the same twice, and the same after a stop? Every saved tensor's bits."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from look import Look
from steps import TINY, assignments

from e2ediff.host.plugins import load
from e2ediff.store.checkpoint import list_checkpoints
from e2ediff.store.storage import Store
from e2ediff.train.session import train


def run(look: Look, *words: str) -> None:
    """Train twice, and once from the middle on, with and without `deterministic: true`."""
    half = 4 if look.tiny else 20
    common = [
        f"device={look.device}", f"steps={2 * half}", "precision=bfloat16", "checkpoint.keep=9",
        f"cadence={{log: 1, diagnose: {half}, preview: {2 * half}, checkpoint: {half}}}",
        "preview={rows: 1, classes: 2}", "sampler.steps=2", *(TINY if look.tiny else ()),
        *assignments(words),
    ]  # fmt: skip
    cuda = look.device == "cuda"
    for kernel in ("sdpa", "auto") if cuda else ("auto",):
        for strict in (False, True) if cuda else (True,):
            with look.attempt(kernel=kernel, deterministic_mode=strict) as row:
                given = [*common, f"backbone.attention={kernel}", f"deterministic={strict}"]
                folder = look.work / "resume" / f"{kernel}-{strict}"
                found = _three(look, given, folder)
                a, b, c = (found[key] for key in ("once", "again", "resumed"))
                look.note(
                    **row, twice_the_same=a == b, resumed_the_same=a == c, files=len(a),
                    differ=[file for file in a if a[file] != c.get(file)][:6],
                )  # fmt: skip


def _three(look: Look, given: list[str], folder: Path) -> dict[str, dict[str, str]]:
    """Return the hashes of a run, of the same once more, and of one that was resumed."""
    recipe, places = look.recipe("quickstart"), {}
    for name in ("once", "again", "resumed"):
        places[name] = folder / name
        if name != "resumed":
            train(load(), recipe, given, places[name])
    shutil.copytree(places["once"], places["resumed"])
    store = Store(str(places["resumed"]))
    shutil.rmtree(places["resumed"] / "checkpoints" / list_checkpoints(store)[-1])
    train(load(), recipe, given, places["resumed"], resume=True)
    return {name: _bits(place) for name, place in places.items()}


def _bits(run: Path) -> dict[str, str]:
    """Return hashes of the newest checkpoint's tensor files."""
    last = run / "checkpoints" / list_checkpoints(Store(str(run)))[-1]
    files = sorted(last.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
