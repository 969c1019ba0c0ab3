"""Conditions of every kind: what objectives and guidance may do with one without knowing its kind.

A row is a row: every operation acts on all tensors of a condition along their first axis.
"""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from e2ediff.condition import (
    ClassLabels,
    Condition,
    ConditionSpec,
    Labels,
    Tokens,
    TokenSpec,
    Vectors,
    VectorSpec,
    class_labels,
    concatenate,
)
from e2ediff.data import DataSource, ImageSpec
from e2ediff.errors import DataError

SPECS: list[ConditionSpec] = [ClassLabels(5), ClassLabels(0), VectorSpec(3), TokenSpec(4, 3)]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.title)
specs = st.sampled_from(SPECS)
counts = st.integers(1, 9)


def same(a: Condition, b: Condition) -> bool:
    """Of one kind, with equal tensors of equal types."""
    x, y = a.tensors(), b.tensors()
    equal = all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
    return type(a) is type(b) and x.keys() == y.keys() and equal


# Rows


@given(spec=specs, count=counts, start=st.integers(0, 9), stop=st.integers(0, 9))
def test_a_slice_of_rows_is_the_same_rows_by_index(spec, count, start, stop) -> None:
    condition, rows = spec.example(count), slice(start, stop)
    index = torch.arange(count)[rows]
    assert len(condition) == count
    assert len(condition.rows(rows)) == len(index)
    assert same(condition.rows(rows), condition.rows(index))


@given(spec=specs, count=counts, cut=st.integers(0, 9))
def test_parts_put_together_are_the_whole(spec, count, cut) -> None:
    condition = spec.example(count)
    parts = [condition.rows(slice(cut)), condition.rows(slice(cut, None))]
    assert same(concatenate(parts), condition)


@given(spec=specs, bits=st.lists(st.booleans(), min_size=1, max_size=9))
def test_rows_are_replaced_where_they_are_chosen_and_nowhere_else(spec, bits) -> None:
    condition, chosen = spec.example(len(bits)), torch.tensor(bits)
    mixed = condition.where(chosen, condition.null())
    for i, bit in enumerate(bits):
        source = condition.null() if bit else condition
        assert same(mixed.rows(slice(i, i + 1)), source.rows(slice(i, i + 1)))


@each_spec
def test_a_condition_crosses_processes_and_devices(spec) -> None:
    condition = spec.example(3)
    assert same(pickle.loads(pickle.dumps(condition)), condition)
    assert same(condition.to("cpu"), condition)
    meta = condition.to("meta")
    assert meta.device.type == meta.null().device.type == "meta"
    assert len(meta.where(torch.zeros(3, dtype=torch.bool, device="meta"), meta.null())) == 3


# Nothing


@given(spec=specs, count=counts)
def test_null_rows_are_those_that_the_source_offers_whatever_was_known(spec, count) -> None:
    null = spec.example(count).null()
    assert len(null) == count
    assert same(null, spec.null(count))
    assert same(null.null(), null)


@each_spec
def test_null_rows_are_known_from_others(spec) -> None:
    known, chosen = spec.example(6), torch.tensor([True, False, False, True, False, True])
    some = known.where(chosen, known.null())
    expected = torch.ones_like(chosen) if spec == ClassLabels(0) else chosen
    assert torch.equal(some.nulls(), expected)
    assert Condition.nulls(some).tolist() == some.nulls().tolist(), "kinds of plugins have this"


def test_a_row_that_is_not_there_is_null_whatever_lies_behind_its_mask() -> None:
    off, value = torch.tensor([False, True]), torch.ones(2, 3)
    assert Vectors(value, off).nulls().tolist() == [True, False]
    tokens = Tokens(value[:, None].expand(2, 4, 3), off[:, None].expand(2, 4))
    assert tokens.nulls().tolist() == [True, False]


def test_null_means_no_class_no_vector_and_no_token() -> None:
    assert Labels(torch.tensor([0, 3]), 5).null().label.tolist() == [5, 5]
    assert not Vectors(torch.ones(2, 3), torch.ones(2, dtype=torch.bool)).null().known.any()
    assert not Tokens(torch.ones(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)).null().mask.any()


# Embeddings


def shaken(spec: ConditionSpec) -> nn.Module:
    torch.manual_seed(0)
    return spec.embedding(8)


@each_spec
def test_an_embedding_has_a_row_for_each_and_one_answer_for_none(spec) -> None:
    embedding, condition = shaken(spec), spec.example(6)
    found, nothing = embedding(condition), embedding(condition.null())
    assert found.shape == nothing.shape == (6, 8)
    assert torch.equal(nothing, nothing[:1].expand(6, 8))
    mixed = embedding(condition.where(torch.arange(6) % 2 == 0, condition.null()))
    assert torch.equal(mixed[0::2], nothing[0::2])
    torch.testing.assert_close(mixed[1::2], found[1::2])
    if spec != ClassLabels(0):
        assert (found - nothing).abs().sum(dim=1).min() > 1e-3


@each_spec
def test_an_embedding_has_parameters_that_a_backbone_starts_itself(spec) -> None:
    assert [*shaken(spec).parameters(recurse=False)]


def test_class_labels_are_embedded_by_torchs_own_table() -> None:
    """Names and values of weights are those of runs from before there were other kinds."""
    torch.manual_seed(0)
    table = nn.Embedding(6, 8)
    ours = shaken(ClassLabels(5))
    assert [name for name, _ in ours.named_parameters()] == ["weight"]
    assert torch.equal(ours.weight, table.weight)
    label = torch.tensor([0, 4, 5])
    assert torch.equal(ours(Labels(label, 5)), table(label))


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("spec", [VectorSpec(3), TokenSpec(4, 3)], ids=lambda spec: spec.title)
def test_what_lies_behind_a_mask_reaches_neither_values_nor_weights(spec, rubbish) -> None:
    embedding, clean = shaken(spec), spec.example(4).where(torch.arange(4) < 2, spec.null(4))
    there = clean.known[:, None] if isinstance(clean, Vectors) else clean.mask[..., None]
    dirty = type(clean)(clean.value.masked_fill(~there, rubbish), there[..., 0])
    assert torch.equal(embedding(dirty), embedding(clean))
    found = []
    for one in (dirty, clean):
        embedding.zero_grad()
        embedding(one).square().sum().backward()
        found.append([p.grad.clone() for p in embedding.parameters()])
    assert all(map(torch.equal, *found))


def test_tokens_are_averaged_whatever_their_order_and_number() -> None:
    embedding, value = shaken(TokenSpec(4, 3)), torch.randn(1, 4, 3)
    first, every = torch.arange(4)[None] < 1, torch.ones(1, 4, dtype=torch.bool)
    whole = embedding(Tokens(value, every))
    torch.testing.assert_close(whole, embedding(Tokens(value.flip(1), every)))
    same_thrice = embedding(Tokens(value[:, :1].expand(1, 4, 3), every))
    torch.testing.assert_close(same_thrice, embedding(Tokens(value, first)))
    assert (whole - same_thrice).abs().max() > 1e-3


# What a source may give


def test_labels_alone_become_a_condition_of_their_classes() -> None:
    found = ClassLabels(5).accept(torch.tensor([1, 2]), "data")
    assert same(found, Labels(torch.tensor([1, 2]), 5))
    assert class_labels(found).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("spec", "given", "said"),
    [
        (VectorSpec(3), torch.tensor([1]), "data: gives class labels, where conditions are "
         "vectors of 3 numbers"),
        (VectorSpec(3), VectorSpec(2).example(1), r"data: gives value \(1, 2\), known \(1,\)"),
        (TokenSpec(4, 3), VectorSpec(3).example(1), "data: gives Vectors, where conditions are up "
         "to 4 tokens of 3 numbers"),
        (ClassLabels(5), VectorSpec(3).example(1), "labels of 5 classes"),
        (ClassLabels(5), torch.zeros(2, 2), r"gives class labels \(2, 2\)"),
        (ClassLabels(5), ClassLabels(4).example(1), "gives labels of 4 classes"),
    ],
)  # fmt: skip
def test_another_kind_or_shape_is_refused_in_words(spec, given, said) -> None:
    with pytest.raises(DataError, match=said):
        spec.accept(given, "data")


def test_what_needs_classes_says_so() -> None:
    with pytest.raises(DataError, match="class labels are needed, and the condition is Vectors"):
        class_labels(VectorSpec(3).example(2))


def test_a_shape_of_images_names_one_kind_alone() -> None:
    assert ImageSpec(3, 8, 8, 5).conditioning == ClassLabels(5)
    assert ImageSpec(3, 8, 8, 0, conditioning=VectorSpec(3)).conditioning == VectorSpec(3)
    for classes, conditioning in ((5, VectorSpec(3)), (5, ClassLabels(4)), (0, ClassLabels(4))):
        with pytest.raises(ValueError, match=rf"{classes} classes, and conditions are"):
            ImageSpec(3, 8, 8, classes, conditioning=conditioning)


def test_a_source_of_vectors_has_no_labels() -> None:
    class Source(DataSource):
        def __len__(self):
            return 2

        def read(self, indices):
            x = torch.zeros(len(indices), 3, 8, 8, dtype=torch.uint8)
            return x, VectorSpec(3).example(len(indices))

    with pytest.raises(DataError, match="class labels are needed"):
        Source().labels()


# What samples are conditioned on


@given(count=st.integers(1, 20))
def test_samples_go_through_all_classes_or_all_held_out_images_in_turn(count) -> None:
    held_out = VectorSpec(3).example(7)
    found = VectorSpec(3).in_turn(count, held_out)
    assert same(found, held_out.rows(torch.arange(count) % 7))
    of_classes = ClassLabels(5).in_turn(count, Labels(torch.tensor([4, 4]), 5))
    assert of_classes.label.tolist() == [i % 5 for i in range(count)]
