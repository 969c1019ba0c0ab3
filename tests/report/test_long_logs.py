"""Logs of a million lines are read in little memory, and give what short ones give."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2ediff.errors import RunDirectoryError
from e2ediff.report.gather import final_figures
from e2ediff.store.curves import Curve, Figures
from e2ediff.store.entries import parse_lines, with_specials
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store


def curve(count: int) -> list[tuple[float, float]]:
    found = Curve()
    for i in range(count):
        found.add(8 * i, math.sin(i))
    return list(found)


def test_a_curve_of_a_usual_run_is_kept_value_by_value() -> None:
    assert curve(4095) == [(8 * i, math.sin(i)) for i in range(4095)]


@pytest.mark.parametrize("count", [4096, 4097, 10_000, 100_001])
def test_a_longer_curve_is_a_mean_of_as_many_neighbours_everywhere(count: int) -> None:
    found = curve(count)
    assert len(found) < 4096
    stride = 2 ** math.ceil(math.log2((count + 1) / 4095))
    groups = [range(i, min(i + stride, count)) for i in range(0, count, stride)]
    for (x, y), numbers in zip(found, groups, strict=True):
        assert x == pytest.approx(sum(8 * i for i in numbers) / len(numbers))
        assert y == pytest.approx(sum(map(math.sin, numbers)) / len(numbers), abs=1e-9)


def test_a_value_that_is_not_finite_does_not_spoil_its_neighbours() -> None:
    found = Curve()
    for i in range(5000):
        found.add(i, math.nan if i in (6, 40, 41) else 1.0)
    values = [y for _, y in found]
    assert values[3] == 1.0
    assert math.isnan(values[20])
    assert sum(map(math.isnan, values)) == 1


def test_final_figures_of_a_long_log_are_those_of_all_its_lines() -> None:
    lines = [{"images": i, "loss/a": 1 / (i + 1), "psnr": i / 3} for i in range(30_007)]
    tail = [line["loss/a"] for line in lines[-3000:]]
    found = final_figures(Figures(iter(lines)))
    assert found == {"loss/a": sum(tail) / 3000, "psnr": lines[-1]["psnr"]}


def test_numbers_that_no_float_can_hold_are_infinite() -> None:
    figures = Figures([{"images": 10**400, "step": math.inf, "a": -(10**400), "b": 1}])
    assert final_figures(figures) == {"b": 1}
    assert (figures.images, figures.step) == (0, 0)


def lines(count: int) -> Iterator[str]:
    for i in range(count):
        yield json.dumps({"images": i, "step": i, "loss/denoising": 0.123456789, "psnr": 12.5})


ODD = [
    b'{"a": 1}, {"b": 2}', b'{"c": [{}', b"{}]}", b'{"d": "x}', b'{"e": "y"}', b"[1]", b"7", b"",
    b'{"f": {"g": 1}}', b'{"h": "}{"}', b'{"i": 1', b'"j": 2}', b'{"k": "nan", "l": "-inf"}',
    b"{", b"}", b'{"m": ' + b"[" * 100_000 + b"}", b'{"n": 1e400}', b'{"o": 1, "o": 2}', b" {} ",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_lines_that_are_parsed_together_are_those_that_are_parsed_alone(seed: int) -> None:
    """Or none of them is: whatever lies in a line, it is never completed by another one."""
    chosen = random.Random(seed).choices([*ODD, b'{"step": 1, "images": 8}', b"{}"], k=3)
    found = parse_lines(chosen)
    if found is not None:
        alone = [with_specials(json.loads(line), line) for line in chosen]
        assert str(found) == str(alone)  # nan is not equal to itself


def test_usual_lines_are_parsed_together() -> None:
    usual = [b'{"step": 1, "images": 8}', b'{"step": 2, "images": 16, "loss/a": "nan"}']
    assert (
        str(parse_lines(usual)) == "[{'step': 1, 'images': 8}, {'step': 2, 'images': 16, "
        "'loss/a': nan}]"
    )


@given(st.lists(st.floats() | st.integers() | st.text(max_size=4) | st.none() | st.booleans()))
def test_every_value_is_that_of_the_standard_library(values) -> None:
    """To the bit and the type, for integers of any length and texts that are none."""
    line = json.dumps({str(i): value for i, value in enumerate(values)}).encode()
    found = parse_lines([line, b'{"step": 1}'])
    assert found is None or str(found[0]) == str(with_specials(json.loads(line), line))


@pytest.mark.parametrize(
    "text",
    ["-0", "-0.0", "1e400", "-1e400", "1e-400", "18446744073709551616", "-9223372036854775809",
     "9" * 400, "0." + "1" * 40, "2.2250738585072011e-308", "NaN", "-Infinity", r'"\ud800"',
     "0.00012345678901234567", "1E5", "12345678901234567890.5"],
)  # fmt: skip
def test_numbers_that_parsers_read_in_different_ways_are_the_standard_library_s(text) -> None:
    (found, _) = parse_lines([b'{"a": %b}' % text.encode(), b"{}"])
    assert repr(found["a"]) == repr(json.loads(text))


def test_a_damaged_line_is_named_after_those_before_it_were_read(
    directory: RunDirectory,
) -> None:
    text = [*lines(5000), '{"step": 5000, "images": -1}']
    Path(directory.path, "metrics.jsonl").write_text("\n".join([*text, '{"step": 1}', ""]))
    found = []
    with pytest.raises(RunDirectoryError, match=r"metrics.jsonl:5001: images is -1"):
        found += directory.stream_metrics()
    assert len(found) == 5000
    assert directory.rewind(10**9) == 1
    assert len(directory.read_metrics()) == 5001


def test_what_is_no_number_leaves_the_figures_of_other_lines_as_they_are() -> None:
    rows = [{"images": i, "loss/a": float(i), "b": i} for i in range(3000)]
    odd = [{"images": 1.5, "loss/a": True, "b": 2}, {"loss/a": 7.0}, {}, {"images": None, "b": 4}]
    found = Figures(iter([*rows, *odd, *rows[:7]]))
    assert [*found.curves["b"]] == [
        *((i, i) for i in range(3000)),
        (1.5, 2),
        *((i, i) for i in range(7)),
    ]
    assert [*found.curves["loss/a"]] == [(i, i) for i in [*range(3000), *range(7)]]
    tail = [*range(2708, 3000), 7.0, *range(7)]
    assert found.tails["loss/a"].mean == sum(tail) / len(tail)
    assert (found.last["b"], found.images, found.step) == (6, 6, 0)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.create(str(tmp_path / "run"), "long", "", "", {}) as run:
        yield run


def peak(work: object) -> int:
    """The bytes that a call needs at once."""
    tracemalloc.start()
    try:
        work()  # type: ignore[operator]
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_log_of_megabytes_is_read_and_shortened_in_little_memory(
    directory: RunDirectory,
) -> None:
    path = Path(directory.path, "metrics.jsonl")
    path.write_text("\n".join([*lines(60_000), '{"images": 5, "torn']))
    size = path.stat().st_size
    assert size > 4_000_000
    assert peak(lambda: Figures(directory.stream_metrics())) < 12_000_000
    assert peak(lambda: directory.rewind(59_000)) < 12_000_000
    assert directory.read_metrics() == [json.loads(line) for line in lines(59_001)]


def test_what_is_dropped_in_the_middle_leaves_the_rest_byte_for_byte(tmp_path: Path) -> None:
    store, path = Store(str(tmp_path)), tmp_path / "log"
    kept = [b"a%d" % i for i in range(50)]
    path.write_bytes(b"".join(b"x\n%s\nx\nx\n" % one for one in kept) + b"torn")
    assert store.truncate_lines("log", lambda line: line != b"x") == 151
    assert path.read_bytes() == b"".join(one + b"\n" for one in kept)
    assert store.truncate_lines("log", lambda line: line != b"x") == 0
    assert store.truncate_lines("log") == 0


@pytest.mark.parametrize("tail", [b"", b"x", b'{"images": 1', b"x" * (5 << 20)])
def test_a_torn_line_of_any_length_is_dropped_at_the_lock(
    directory: RunDirectory, tail: bytes
) -> None:
    path = Path(directory.path, "metrics.jsonl")
    path.write_bytes(b'{"images": 1}\n' + tail)
    directory.unlock()
    directory.lock()
    assert path.read_bytes() == b'{"images": 1}\n'
    path.write_bytes(tail)
    directory.unlock()
    directory.lock()
    assert path.read_bytes() == b""


def test_a_line_of_many_megabytes_is_damaged_and_needs_no_memory(
    directory: RunDirectory,
) -> None:
    path = Path(directory.path, "metrics.jsonl")
    with open(path, "wb") as file:
        file.write(b'{"images": 1}\n{"a": "')
        for _ in range(30):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"images": 2}\n')

    def read() -> None:
        with pytest.raises(RunDirectoryError, match=r"metrics.jsonl:2: not a line of JSON"):
            Figures(directory.stream_metrics())
        assert list(directory.store.json_lines("metrics.jsonl")) == [{"images": 1}, {"images": 2}]
        assert directory.rewind(5) == 1

    assert peak(read) < 20_000_000
    assert directory.read_metrics() == [{"images": 1}, {"images": 2}]


def test_lines_are_the_same_whatever_the_size_of_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"".join(b"%s\n" % (b"ab" * (i % 7)) for i in range(40)) + b"end"
    (tmp_path / "log").write_bytes(content)
    store = Store(str(tmp_path))
    for size in (1, 2, 3, 5, 64, 1 << 22):
        monkeypatch.setattr("e2ediff.store.storage.PIECE", size)
        found = list(store.lines("log", torn=True))
        assert [line for _, line in found] == content.split(b"\n")
        assert [content[:end] for end, _ in found][-2:] == [content[:-3], content]
        (tmp_path / "copy").write_bytes(content)
        assert store.truncate_lines("copy") == 1
        assert (tmp_path / "copy").read_bytes() == content[:-3]
