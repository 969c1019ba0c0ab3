"""A run has a checkpoint after a minute of training, whatever its cadence; the numbers stay."""

from __future__ import annotations

import hashlib
import io
import json
import math
from pathlib import Path

import pytest
from processes import together
from tiny_recipe import tiny

from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.store.checkpoint import list_checkpoints, open_checkpoint
from e2ediff.store.storage import Store
from e2ediff.train import engine
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

RARELY = ("cadence.checkpoint=100", "cadence.preview=100", "microshards=2")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "tiny.yaml").write_text(tiny(steps="6"))
    return str(tmp_path / "tiny.yaml")


def run(recipe: str, out: Path, *changes: str, **options) -> str:
    """Train; return where."""
    progress = Progress(io.StringIO())
    done = train(load(), recipe, [*RARELY, *changes], str(out), progress=progress, **options)
    assert done.exit_code == 0
    return done.path


def saved(out: object) -> list[int]:
    """The steps at which a run saved."""
    lines = Path(str(out), "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [event["step"] for event in events if event["kind"] == "committed"]


def weights(out: object) -> dict[str, str]:
    """Hashes of all tensors of the newest checkpoint."""
    found = open_checkpoint(Store(str(out)))
    return {
        f"{file}:{name}": hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()
        for file in found.files
        for name, t in found.tensors(file).items()
    }


def test_a_minute_is_the_limit() -> None:
    assert engine.FIRST_SAVE <= 60


def test_a_run_that_trains_for_long_saves_once_early_and_computes_the_same(
    recipe, tmp_path, monkeypatch
) -> None:
    run(recipe, tmp_path / "quick")
    assert saved(tmp_path / "quick") == [6], "it took no minute"
    monkeypatch.setattr(engine, "FIRST_SAVE", 0.0)
    run(recipe, tmp_path / "slow")
    assert saved(tmp_path / "slow") == [1, 6], "and not at every step from then on"
    run(recipe, tmp_path / "often", "cadence.checkpoint=1")
    assert saved(tmp_path / "often") == [1, 2, 3, 4, 5, 6], "once a step, also where both are due"
    assert weights(tmp_path / "slow") == weights(tmp_path / "quick")
    assert len(list_checkpoints(Store(str(tmp_path / "slow")))) == 2
    run(recipe, tmp_path / "slow", "checkpoint.keep=1", "steps=8", resume=True)
    assert saved(tmp_path / "slow") == [1, 6, 8], "a resumed run has one already"
    assert list_checkpoints(Store(str(tmp_path / "slow"))) == ["images-000000000064"]


def test_a_run_that_is_rolled_back_by_its_alarm_has_its_first_checkpoint_at_the_start(
    recipe, tmp_path, monkeypatch
) -> None:
    """A further one must not be what it returns to."""
    monkeypatch.setattr(engine, "FIRST_SAVE", 0.0)
    run(recipe, tmp_path / "run", "alarm.policy=rollback")
    assert saved(tmp_path / "run") == [0, 6]


def test_of_several_processes_the_first_one_decides_when(recipe, tmp_path) -> None:
    """Their clocks differ; a save of one alone would wait for the others for ever."""

    def act(rank: int) -> int:
        world = World.join()
        engine.FIRST_SAVE = 0.0 if rank == 0 else math.inf
        run(recipe, tmp_path / "first", world=world)
        engine.FIRST_SAVE = math.inf if rank == 0 else 0.0
        run(recipe, tmp_path / "second", world=world)
        world.shutdown()
        return 0

    assert together(act) == [0, 0]
    assert saved(tmp_path / "first") == [1, 6]
    assert saved(tmp_path / "second") == [6]
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
