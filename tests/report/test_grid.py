"""`--vary`, `--seeds` and `--baseline`: what they mean, and what is refused."""

from __future__ import annotations

import pytest

from e2ediff.ablate.grid import GridError, cells, find_cell, parse_axis, parse_seeds


def values(text: str) -> list[list[str]]:
    """The assignments of each value of an axis."""
    return [[str(a) for a in value.assignments] for value in parse_axis(text).values]


def names(*axes: str) -> list[str]:
    return [cell.name for cell in cells([parse_axis(text) for text in axes])]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("objective=a,b", ["a", "b"]),
        ("objective = a , b ", ["a", "b"]),
        ("objective={name: x, weight: 0},b", ["{name: x, weight: 0}", "b"]),
        (
            "objective={name: x, in: {a: 1, b: [2, 3]}},b",
            ["{name: x, in: {a: 1, b: [2, 3]}}", "b"],
        ),
        ("lr=[1e-3, 1e-4]", ["1e-3", "1e-4"]),
        ("lr=[1e-3, 1e-4,]", ["1e-3", "1e-4"]),
        ("objective=[{name: x, a: 1}, y]", ["{name: x, a: 1}", "y"]),
        ("probe.times=[0.5],[0.3, 0.7]", ["[0.5]", "[0.3, 0.7]"]),
        ("probe.times=[[0.5]]", ["[0.5]"]),
        ("data.root='a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("data.root=it's,b", ["it's", "b"]),
        ('data.root="a]b",c', ['"a]b"', "c"]),
        ("lr=1e+3,+2", ["1e+3", "+2"]),
        ("guidance=null,{name: a}", ["null", "{name: a}"]),
        ("a=x=1,y", ["x=1", "y"]),
    ],
)
def test_commas_split_at_the_top_only(text, found):
    path = text.partition("=")[0].strip()
    assert values(text) == [[f"{path}={value}"] for value in found]


def test_a_value_brings_settings_of_its_own():
    assert values("objective=a,two+backbone.trunks=apart+ema=[{name: x}, {name: y}],c") == [
        ["objective=a"],
        ["objective=two", "backbone.trunks=apart", "ema=[{name: x}, {name: y}]"],
        ["objective=c"],
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("objective", "write PATH=VALUE,VALUE"),
        ("=a", "write PATH=VALUE,VALUE"),
        ("a..b=1", "write PATH=VALUE,VALUE"),
        ("objective=", "there is no value"),
        ("objective=[]", "there is no value"),
        ("objective=a,,b", "value 2 is empty"),
        ("objective=a,", "value 2 is empty"),
        ("objective=a,b,a", "a is given twice"),
        ("objective={name: a", "a } is missing"),
        ("objective=a}", "'}' closes nothing"),
        ("objective='a", "a ' is missing"),
        ("objective=+backbone.trunks=x", "no value before them"),
        ("seed=0,1", "--seeds"),
    ],
)
def test_an_axis_that_is_none_is_refused(text, complaint):
    with pytest.raises(GridError, match=complaint.replace("{", r"\{").replace("}", r"\}")) as told:
        parse_axis(text)
    assert told.value.exit_code == 2
    assert str(told.value).startswith("--vary")


def test_cells_are_the_product_and_their_names_say_what_they_are():
    assert names("objective=coupled,detached", "backbone.latent_dim=4,8") == [
        "coupled-latent_dim=4",
        "coupled-latent_dim=8",
        "detached-latent_dim=4",
        "detached-latent_dim=8",
    ]


@pytest.mark.parametrize(
    ("axis", "found"),
    [
        ("objective={name: x, weight: 0},{name: x, weight: 1}", ["weight=0", "weight=1"]),
        ("objective=a,a+b.c=1", ["a", "a-c=1"]),
        ("objective=a,A", ["a", "A-2"]),
        ("data.root=/x/<y>,/x z", ["x-y", "x-z"]),
        ("probe.times=[0.5],[0.3]", ["times=0.5", "times=0.3"]),
    ],
)
def test_names_differ_and_are_fit_for_directories(axis, found):
    assert names(axis) == found


def test_long_names_are_cut_and_still_differ():
    first, second = names(f"data.root={'x' * 200}1,{'x' * 200}2")
    assert first != second
    assert max(len(first), len(second)) <= 80


def test_no_axis_and_the_same_axis_twice_are_refused():
    with pytest.raises(GridError, match="Nothing varies"):
        cells([])
    with pytest.raises(GridError, match="--vary a is given twice"):
        names("a=1", "a=2")


def test_seeds_and_baseline():
    assert parse_seeds("0, 2,1") == (0, 2, 1)
    for text in ("", "a", "0,,1", "-1", "1.5", "0,0"):
        with pytest.raises(GridError, match="--seeds"):
            parse_seeds(text)
    grid = cells([parse_axis("objective=coupled,detached")])
    assert find_cell(None, grid).name == "coupled"
    assert find_cell("detached", grid).name == "detached"
    with pytest.raises(GridError, match="Did you mean 'coupled'"):
        find_cell("couple", grid)
