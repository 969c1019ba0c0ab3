"""`compare` names runs by what differs between them, and calls equal only what is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import Done, e2ediff
from tiny_recipe import tiny

from e2ediff.report.gather import gather_runs
from e2ediff.report.sheets import rows

CADENCE = "{{log: 1, diagnose: 100, preview: {}, checkpoint: 100}}"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Runs of one recipe with other objectives, lengths and cadences, in numbered directories."""
    place = tmp_path_factory.mktemp("named")
    for name, changes in {
        "tiny": {"objective": "detached"},
        "tiny-2": {"objective": "coupled"},
        "longer/tiny": {"steps": "6", "cadence": CADENCE.format(3)},
        "odd/tiny": {"steps": "5", "cadence": CADENCE.format(100)},
    }.items():
        (place / "tiny.yaml").write_text(tiny(diagnostics="[]", **changes))
        done = e2ediff("run", place / "tiny.yaml", "--out", place / name, "--threads", 1)
        assert done.code == 0, done.err
    shutil.copytree(place / "tiny", place / "copy" / "tiny")
    return place


def compared(place: Path, monkeypatch, *names: str) -> Done:
    monkeypatch.chdir(place)
    done = e2ediff("compare", *names)
    assert done.code == 0, done.err
    return done


def named(host, *places: str) -> list[str]:
    return list(gather_runs(host, places).cells)


def test_numbered_directories_are_named_by_their_objectives(place, host, monkeypatch) -> None:
    done = compared(place, monkeypatch, "tiny", "tiny-2")
    head = done.out.splitlines()[0]
    assert head.split("  ")[-2:] == ["tiny (objective=detached)", "tiny-2 (objective=coupled)"]
    assert named(host, "tiny-2", "tiny", "tiny/../tiny-2") == [
        "tiny-2 (objective=coupled)",
        "tiny (objective=detached)",
        "tiny-2 (objective=coupled) (2)",
    ]


def test_equal_names_are_told_apart_by_the_recipe_else_by_the_folder(
    place, host, monkeypatch
) -> None:
    monkeypatch.chdir(place)
    assert named(host, "tiny", "longer/tiny") == [
        "tiny (steps=4, cadence.diagnose=2, cadence.preview=2, ...)",
        "tiny (steps=6, cadence.diagnose=100, cadence.preview=3, ...)",
    ]
    assert named(host, str(place / "tiny"), "copy/tiny") == [f"tiny ({place})", "tiny (copy)"]


def test_an_attempt_is_named_with_its_run_and_a_current_folder_by_its_own_name(
    place, host, monkeypatch
) -> None:
    shutil.copytree(place / "tiny-2", place / "copy/tiny/attempts/1")
    monkeypatch.chdir(place / "copy/tiny")
    assert named(host, ".", "attempts/1/") == ["tiny", "attempts/1"]
    assert named(host, "../../tiny", "../tiny/attempts/1") == ["tiny", "tiny/attempts/1"]
    monkeypatch.chdir("attempts/1")
    assert named(host, ".", "../..") == ["tiny/attempts/1", "tiny"]


def test_names_that_tell_already_stay(place, host, monkeypatch) -> None:
    monkeypatch.chdir(place)
    shutil.copytree("tiny-2", "mine", dirs_exist_ok=True)
    assert named(host, "tiny", "mine") == ["tiny", "mine"]
    assert named(host, "tiny-2") == ["tiny-2"]


def test_pictures_are_called_of_equal_steps_only_where_they_are(place, host, monkeypatch) -> None:
    monkeypatch.chdir(place)

    def titles(*places: str) -> dict[str, list[str]]:
        found = rows(gather_runs(host, places).cells)
        return {row.title: [s.caption.split(", ")[1] for s in row.sheets] for row in found}

    same = titles("tiny", "tiny-2")
    assert same["samples at equal steps and equal compute"] == ["step 4", "step 4"]
    odd = titles("tiny", "odd/tiny")
    (title,) = [title for title in odd if title.startswith("samples")]
    assert "at the nearest steps" in title
    assert odd[title] == ["step 4", "step 5"]
    assert not any("equal steps" in title for title in odd)
