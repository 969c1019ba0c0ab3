"""What a recipe's author reads when something is wrong; a message is an interface."""

from __future__ import annotations

from typing import Literal

import attrs
import pytest
from tiny_parts import part, plugin

from e2ediff import addresses
from e2ediff.data import Size, as_size, positive_size
from e2ediff.errors import RecipeError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe, parse_recipe
from e2ediff.host.yaml import parse_yaml
from e2ediff.parts.averages import Constant


def must_be_kind(instance, field, value):
    raise KeyError("no such table")


HOST = load(
    plugin(
        "tiny",
        backbones=[("net", part("backbones", width=(int, 8)))],
        interpolants=[("linear", part("interpolants"))],
        time_samplers=[("uniform", part("time_samplers"))],
        objectives=[
            (
                "variance_floor",
                part(
                    "objectives",
                    floor=(float, attrs.field(default=1.0, validator=attrs.validators.gt(0))),
                    roof=(float, attrs.field(default=2.0, validator=attrs.validators.lt(9))),
                    shape=(
                        str,
                        attrs.field(default="a", validator=attrs.validators.in_(("a", "b"))),
                    ),
                    kind=(Literal["hinge", "square"], "hinge"),
                ),
            )
        ],
        sources=[
            ("shapes", part("sources")),
            (
                "sized",
                part(
                    "sources",
                    path=(str, attrs.field(converter=addresses.plain)),
                    size=(Size, attrs.field(converter=as_size, validator=positive_size)),
                    count=(int, attrs.field(default=1, validator=attrs.validators.gt(0))),
                ),
            ),
        ],
        optimizers=[("sgd", part("optimizers", lr=(float, attrs.field())))],
        samplers=[("euler", part("samplers", steps=(int, 10)))],
        averages=[("constant", Constant)],
        trackers=[
            (
                "odd",
                part("trackers", x=(int, attrs.field(default=1, validator=must_be_kind))),
            )
        ],
    ),
    entry_points=False,
    builtins=False,
)

TEXT = """\
e2ediff: 1
name: tiny
steps: 100
batch: 16
data: shapes
backbone: net
interpolant: linear
times: uniform
objective: variance_floor
optimizer: {name: sgd, lr: 0.1}
sampler: euler
"""


def lines(text=TEXT, *overrides, host=HOST):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(host, text, "r.yaml", overrides)
    return [line.strip() for line in str(caught.value).splitlines()]


def swap(old, new):
    assert old in TEXT
    return TEXT.replace(old, new)


def test_all_problems_are_reported_at_once_in_the_order_of_the_file():
    text = (
        TEXT.replace("steps: 100", "steps: 3.7")
        .replace("interpolant: linear", "interpolant: liner")
        .replace("objective: variance_floor", "objective: {name: variance_floor, flor: 0.5}")
    )
    assert lines(text) == [
        "r.yaml: 3 problems",
        "r.yaml:3:8: steps: expected int, got float 3.7.",
        "r.yaml:7:14: interpolant: unknown interpolant 'liner'. "
        "Did you mean 'linear'? Known: linear.",
        "r.yaml:9:35: objective: unknown option 'flor'. "
        "Did you mean 'floor'? Options: floor, kind, roof, shape.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            swap("batch: 16\n", ""),
            "r.yaml:1:1: recipe: 'batch' is missing. Add `batch:` with int.",
        ),
        (swap("batch: 16", "batch:"), "r.yaml:4:7: batch: expected int, got nothing."),
        (swap("batch: 16", "batch: 0"), "r.yaml:4:8: batch: 'batch' must be > 0: 0"),
        (
            swap("sampler: euler", "sampler: [euler]"),
            "r.yaml:11:10: sampler: expected the name of one of the samplers, got a list of 1.",
        ),
        (
            swap("sampler: euler", "sampler: {steps: 3}"),
            "r.yaml:11:10: sampler: 'name' is missing. Add `name:` with one of euler.",
        ),
        (
            swap("sampler: euler", "sampler: {nam: euler}"),
            "r.yaml:11:11: sampler: unknown option 'nam'. Did you mean 'name'?",
        ),
        (
            swap("{name: sgd, lr: 0.1}", "sgd"),
            "r.yaml:10:12: optimizer: 'lr' is missing. Add `lr:` with float.",
        ),
        (
            swap("batch: 16", "batch: 16\nbatch: 17"),
            "r.yaml:5:1: recipe: 'batch' is written twice, first at r.yaml:4:1. "
            "Remove one of them.",
        ),
        (
            TEXT + "cadence: {log: on}\n",
            "r.yaml:12:16: cadence.log: expected int, got str 'on'.",
        ),
        (
            TEXT + "predicts: V\n",
            "r.yaml:12:11: predicts: expected one of 'x0', 'eps', 'v', 'score', got str 'V'. "
            "Did you mean 'v'?",
        ),
        (
            TEXT + "images: 5\n",
            "r.yaml:3:8: steps: give either 'steps' or 'images'; both are given.",
        ),
        (
            swap("steps: 100\n", ""),
            "r.yaml:1:1: steps: give either 'steps' or 'images'; neither is given.",
        ),
        (
            TEXT + "microshards: 3\n",
            "r.yaml:12:14: microshards: 3 microshards do not divide a batch of 16 images.",
        ),
        (
            TEXT + "ema: [{name: target, decay: 0.5}]\n",
            "r.yaml:12:14: ema.0.name: 'target' is the name of weights that every run has.",
        ),
        (
            TEXT + "ema: [{nmae: slow, decay: 0.5}]\n",
            "r.yaml:12:8: ema.0: unknown option 'nmae'. Did you mean 'name'? "
            "Options: decay, kind, name, warmup.",
        ),
        (
            TEXT + "target: {knid: constant}\n",
            "r.yaml:12:10: target: unknown option 'knid'. Did you mean 'kind'? "
            "Options: decay, kind, warmup.",
        ),
        (
            TEXT + "ema: [{name: slow, kind: constnat, decay: 0.5}]\n",
            "r.yaml:12:26: ema.0: unknown average 'constnat'. Did you mean 'constant'? "
            "Known: constant.",
        ),
        (
            TEXT + "ema: [{name: a, decay: 0.5}, {name: a, decay: 0.6}]\n",
            "r.yaml:12:6: ema: the names a, a are not all different.",
        ),
        (
            swap("name: tiny", "name: Tiny Run"),
            "r.yaml:2:7: name: 'Tiny Run' cannot name a directory or file: at most 100 "
            "lower-case letters, digits, '-' and '_', the first one a letter or digit.",
        ),
        (
            swap("e2ediff: 1", "e2ediff: 2"),
            "r.yaml:1:10: e2ediff: is schema 2, and this e2ediff reads schema 1. Upgrade e2ediff.",
        ),
        (
            TEXT + "trackers: [odd]\n",
            "r.yaml:12:12: trackers.0.x: KeyError: no such table",
        ),
        (
            swap("batch: 16", "\tbatch: 16"),
            "r.yaml:4:1: recipe: not valid YAML: while scanning for the next token, found "
            "character '\\t' that cannot start any token. Indent with spaces, not tabs.",
        ),
        (
            swap("batch: 16", "batch: 16: 17"),
            "r.yaml:4:10: recipe: not valid YAML: mapping values are not allowed here. "
            "Check colons, quotes and indents.",
        ),
        (
            "# only a comment\n",
            "r.yaml:1:1: recipe: is empty. Start from a file in recipes/.",
        ),
        (
            "- a\n- b\n",
            "r.yaml:1:1: recipe: expected 'key: value' lines, got a list of 2. "
            "Start from a file in recipes/.",
        ),
        (
            "a: \x07",
            "r.yaml:1:4: recipe: contains the character U+0007, which YAML forbids. "
            "Remove it, or check whether the file is damaged.",
        ),
    ],
)
def test_a_problem_says_where_what_and_what_to_do(text, message):
    assert lines(text) == ["r.yaml: 1 problem", message]


def test_every_refused_option_of_a_part_is_named_in_plain_words():
    part = "{name: variance_floor, floor: -1, roof: 10, shape: c}"
    assert lines(swap("objective: variance_floor", f"objective: {part}"))[1:] == [
        "r.yaml:9:42: objective.floor: 'floor' must be > 0: -1.0",
        "r.yaml:9:52: objective.roof: 'roof' must be < 9: 10.0",
        "r.yaml:9:63: objective.shape: 'shape' must be in ('a', 'b') (got 'c')",
    ]


def test_one_wrong_option_of_a_block_hides_no_other_one():
    """Neither one of a wrong type, nor an unknown, a missing or a misspelt one."""
    text = (
        swap("batch: 16", "batch: many\nmicroshards: 0\nseed: -1")
        .replace("optimizer: {name: sgd, lr: 0.1}", "optimizer: sgd")
        .replace("variance_floor", "{name: variance_floor, floor: -1, kind: round, roof: 10}")
    )
    text += "guards: {non_finite: never, limit: -1, facto: 0.5, window: 0}\n"
    text += "ema: [{name: A b, kind: other}, {name: ok, decay: 3, warmup: 1}]\n"
    text += "data: {name: sized, path: 5, size: [0, 8], count: -1}\n"
    found = [line.split(": ")[1] for line in lines(text.replace("data: shapes\n", ""))[1:]]
    assert found == [
        *("batch", "microshards", "seed", "objective.floor", "objective.kind", "objective.roof"),
        *("optimizer", "guards.non_finite", "guards.limit", "guards", "guards.window"),
        *("ema.0.name", "ema.0", "ema.1.decay", "ema.1.warmup"),
        *("data.path", "data.size", "data.count"),
    ]


def test_a_length_that_cannot_be_read_is_not_called_missing_too():
    assert lines(swap("steps: 100", "steps: many"))[0] == "r.yaml: 1 problem"
    assert lines(swap("steps: 100", "step: 100"))[0] == "r.yaml: 1 problem"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objectiv.floor=1", "recipe: unknown option 'objectiv'. Did you mean 'objective'? "),
        ("objective.flor=1", "objective: unknown option 'flor'. Did you mean 'floor'? "),
        (
            "objective=variance",
            "objective: unknown objective 'variance'. Did you mean 'variance_fl",
        ),
        ("objective.floor", "recipe: 'objective.floor' is not path=value. Write, for example, "),
        ("objective.floor=[", "recipe: not valid YAML: while parsing a flow node"),
        ("batch.size=3", "batch: is 16, which has no options."),
        ("trackers.0.x=3", "trackers: expected a list of trackers, got a block."),
    ],
)
def test_a_problem_in_an_override_names_its_number(override, message):
    found = lines(TEXT, "seed=1", override)[1]
    assert found.startswith("--set 2: ")
    assert message in found


def test_problems_of_overrides_come_after_those_of_the_file_and_in_their_order():
    found = lines(TEXT + "guards: {limit: x}\n", "seed=-1", "batch=x", "guards.window=0")
    assert [line.split(": ")[0] for line in found[1:]] == [
        "r.yaml:12:17", "--set 1", "--set 2", "--set 3"
    ]  # fmt: skip


def test_an_item_that_a_list_lacks_is_counted_from_0():
    text = TEXT + "trackers: [odd]\n"
    assert "--set 1: trackers: has no item '3'; its length is 1. Items are counted from 0." in (
        lines(text, "trackers.3.x=3")
    )


def test_a_missing_distribution_is_said_first_and_its_names_are_not_complained_about():
    text = TEXT.replace("objective: variance_floor", "objective: {name: dsd, stop: true}")
    text += 'requires: ["e2ediff-not-there>=0.1"]\n'
    assert lines(text) == [
        "r.yaml: 1 problem",
        "r.yaml:12:12: requires.0: e2ediff-not-there is not installed. "
        "Run: pip install ./e2ediff-not-there in the folder that contains it; plugins of e2ediff "
        "itself are in plugins/ of its repository, and on no package index",
    ]


def test_a_distribution_of_another_version_is_named_with_the_installed_one():
    found = lines(TEXT + 'requires: ["attrs<1"]\n')[1]
    assert found.startswith(f"r.yaml:12:12: requires.0: attrs {attrs.__version__} is installed, ")
    assert found.endswith("not attrs<1. Run: pip install 'attrs<1'")


def test_a_requirement_that_is_none_says_what_one_looks_like():
    found = lines(TEXT + "requires: ['e2ediff dsd']\n")[1]
    assert "'e2ediff dsd' is not a valid requirement such as 'numpy>=2'" in found


def test_an_unknown_name_tells_of_plugins_that_were_not_loaded():
    host = attrs.evolve(HOST, broken={"dsd": "ModuleNotFoundError: No module named 'x'"})
    assert lines(swap("objective: variance_floor", "objective: dsd"), host=host)[1] == (
        "r.yaml:9:12: objective: unknown objective 'dsd'. Known: variance_floor. "
        "Plugin 'dsd' was not loaded (ModuleNotFoundError: No module named 'x')."
    )


def test_a_missing_file_is_named():
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: recipe: there is no such file\."):
        load_recipe(HOST, "nowhere.yaml")


def test_a_file_that_is_no_text_is_named_with_the_place(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"name: tiny\nx: \xff\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2:4: recipe: is not UTF-8 text"):
        load_recipe(HOST, path)


def test_long_values_are_cut_in_messages():
    assert len(lines(swap("batch: 16", f"batch: {'x' * 5000}"))[1]) < 120
    assert len(lines(TEXT + f"{'y' * 900}: 1\n")[1]) < 600


@pytest.mark.parametrize("value", ["#808080", "#fff", "  #204060  "])
def test_a_colour_that_yaml_takes_for_a_comment_is_refused(value: str) -> None:
    _, problems = parse_yaml(f"data:\n  background: {value}\n  root: x\n", "r.yaml")
    (problem,) = problems
    assert "what follows # as a comment" in problem.what
    assert "Put quotes around the colour" in problem.hint
    sound_texts = (f"a: '{value}'\n", "a: # none\nb: 1\n", "a:  # set\n  b: 1\n", f"a: 1 {value}")
    for sound in sound_texts:
        assert parse_yaml(sound, "r.yaml")[1] == []
