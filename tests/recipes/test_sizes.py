"""A size is the side of squares or [height, width], and whatever else is written is refused."""

import pytest
from tiny_recipe import tiny

from e2ediff.data import HeightWidth, as_size
from e2ediff.errors import RecipeError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import dump_recipe, parse_recipe
from e2ediff.parts.sources.synthetic import Synthetic

HOST = load(entry_points=False)


def read(size):
    """The recipe with this `data.size`, as --set takes it."""
    return parse_recipe(HOST, tiny(), "r.yaml", [f"data.size={size}"])


@pytest.mark.parametrize(
    ("written", "size", "sides"),
    [
        ("[32, 48]", HeightWidth(32, 48), (32, 48)),
        ("[48,32]", HeightWidth(48, 32), (48, 32)),
        ("16", 16, (16, 16)),
        ("[16, 16]", 16, (16, 16)),
    ],
)
def test_height_comes_before_width_and_equal_sides_are_one_number(written, size, sides):
    recipe = read(written)
    assert recipe.data.size == size
    assert type(recipe.data.size) is type(size)
    assert (recipe.data.image.height, recipe.data.image.width) == sides
    dumped = dump_recipe(HOST, recipe)
    assert parse_recipe(HOST, dumped, "r.yaml") == recipe


def test_a_resolved_recipe_holds_the_size_as_it_is_written():
    assert "size: [32, 48]" in dump_recipe(HOST, read("[32, 48]"))
    assert "size: 16," in dump_recipe(HOST, read("[16, 16]"))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[32]", "data.size: expected int or [height, width], got a list of 1."),
        ("[1, 2, 3]", "data.size: expected int or [height, width], got a list of 3."),
        ("[[32, 48]]", "data.size: expected int or [height, width], got a list of 1."),
        ("32x48", "data.size: expected int or [height, width], got str '32x48'."),
        ("32.5", "data.size: expected int or [height, width], got float 32.5."),
        ("true", "data.size: expected int or [height, width], got bool True."),
        ("null", "data.size: expected int or [height, width], got nothing."),
        ("{height: 32}", "data.size: expected int or [height, width], got a block."),
        ("[32, 48.0]", "data.size.1: expected int, got float 48.0."),
        ("[0, 3]", "data.size: expected sides of at least 1 pixel, got [0, 3]"),
        ("[3, -1]", "data.size: expected sides of at least 1 pixel, got [3, -1]"),
        ("0", "data.size: expected sides of at least 1 pixel, got 0"),
    ],
)
def test_another_form_is_refused_with_what_was_expected(written, message):
    with pytest.raises(RecipeError) as caught:
        read(written)
    assert [str(problem) for problem in caught.value.problems] == [f"--set 1: {message}"]


def test_in_python_a_size_may_be_any_pair():
    assert Synthetic(size=[32, 48]) == Synthetic(size=(32, 48))
    assert as_size((8, 8)) == 8
    with pytest.raises(ValueError, match=r"expected a side or \[height, width\], got \[1, 2, 3\]"):
        Synthetic(size=(1, 2, 3))


def test_synthetic_images_vary_down_and_across_as_those_of_the_squares_of_that_side():
    tall, low, high = (Synthetic(size=s, classes=2).open() for s in ((5, 9), 5, 9))
    (across, down), labels = tall.read([0, 1])
    assert labels.tolist() == [0, 1]
    assert across.shape == (3, 5, 9)
    # The waves of class 0 run across, those of class 1 down.
    assert across.equal(high.read([0])[0][0, :, :5])
    assert across.float().std(2).min() > 1
    assert down.equal(low.read([1])[0][0].repeat(1, 1, 2)[:, :, :9])
    assert down.float().std(1).min() > 1
