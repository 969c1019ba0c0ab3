"""The ladder's rungs are the quickstart with the assignments of the how-to, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest
from command_line import needs_dsd

from e2ediff.host.plugins import Host
from e2ediff.host.recipe import load_recipe
from e2ediff.model.build import check_fits

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "ladder"
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
PAGE = ROOT / "docs" / "how-to" / "swap-an-objective.md"
ROW = re.compile(r"^\| \[`(\w+)`\]\(\S+\) \| [^|]+ \| (.+) \|$", re.MULTILINE)
RUNGS = {
    name: re.findall(r"(?:objective\.\S+?|predicts)=[^\s`]+", cell)
    for name, cell in ROW.findall(PAGE.read_text(encoding="utf-8"))
}

pytestmark = needs_dsd


def test_the_page_lists_every_rung_and_no_other() -> None:
    assert sorted(RUNGS) == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert len(RUNGS) == 13


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_is_the_quickstart_with_its_assignments_and_fits_together(
    host: Host, name: str
) -> None:
    rung = load_recipe(host, FOLDER / f"{name}.yaml")
    assert rung.name == name
    assert rung == attrs.evolve(load_recipe(host, QUICKSTART, RUNGS[name]), name=name)
    check_fits(rung, name)


@pytest.mark.parametrize("name", RUNGS)
def test_rungs_differ_in_name_objective_prediction_and_comments_alone(name: str) -> None:
    def rest(path: Path) -> list[str]:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        start = lines.index("objective:")
        end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith(" "))
        kept = lines[:start] + lines[end:]
        return [line for line in kept if not line.startswith(("name:", "predicts:"))]

    assert rest(FOLDER / f"{name}.yaml") == rest(QUICKSTART)


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_says_what_it_is_what_is_expected_and_whose_that_is(name: str) -> None:
    head = (FOLDER / f"{name}.yaml").read_text().partition("e2ediff: 1")[0]
    assert re.match(r"# [LU]\d[abc]?, ", head)
    assert "Expected:" in head
    assert re.search(r"Derived:|Ours:", head)


def test_the_wrong_form_is_the_second_rung_with_clean_answers(host: Host) -> None:
    wrong, second = (
        load_recipe(host, FOLDER / f"{name}.yaml")
        for name in ("u2_wrong_form", "l2_stop_gradient")
    )
    assert wrong.objective == second.objective
    assert (wrong.predicts, second.predicts) == ("x0", "v")
