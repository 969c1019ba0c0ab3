"""Conditioning: class labels, vectors or tokens, one row an image, and their null rows.

Objectives, backbones and guidance pass a `Condition` on and ask it for its `null`; only the
source of the images, which offers a `ConditionSpec`, and the embedding that the spec builds know
its kind. A plugin may add kinds of its own.

Shapes: B batch, M rows, T tokens, K channels, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import attrs
import torch
from attrs import validators
from torch import Tensor, nn

from e2ediff.errors import DataError


class Condition(ABC):
    """A batch of conditions, one a row.

    A subclass is a frozen attrs class. Rows lie along the first axis of each of its tensors;
    fields that are no tensors hold for all rows.
    """

    @abstractmethod
    def null(self) -> Self:
        """Return as many null rows, on the same device."""

    def nulls(self) -> Tensor:
        """Return which rows are null rows, (B,), bool."""
        null = self.null().tensors()
        same = [(x == null[name]).reshape(len(x), -1) for name, x in self.tensors().items()]
        return torch.cat(same, dim=1).all(dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of each field."""
        found = {name: getattr(self, name) for name in attrs.fields_dict(type(self))}  # type: ignore[arg-type]
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return next(iter(self.tensors().values())).device

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.tensors().values())))

    def rows(self, index: slice | Tensor) -> Self:
        """Return some rows: a slice, or those at an index (M,), int64."""
        return self._each(lambda value: value[index])

    def where(self, chosen: Tensor, other: Self) -> Self:
        """Take the rows of `other` where `chosen` (B,), bool, is True, and these elsewhere."""
        theirs = other.tensors()
        found = {
            name: torch.where(chosen.reshape(-1, *[1] * (value.ndim - 1)), theirs[name], value)
            for name, value in self.tensors().items()
        }
        return attrs.evolve(self, **found)  # type: ignore[misc]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Move it to a device."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Pin its memory, as torch's loader does for copies that overlap with work."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        found = {name: change(value) for name, value in self.tensors().items()}
        return attrs.evolve(self, **found)  # type: ignore[misc]


C = TypeVar("C", bound=Condition)


def concatenate(conditions: Sequence[C]) -> C:
    """Join the rows of at least one condition, all of one kind, in order."""
    first, parts = conditions[0], [one.tensors() for one in conditions]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return attrs.evolve(first, **found)  # type: ignore[misc]


@attrs.frozen(eq=False)
class Labels(Condition):
    """Class labels, (B,), int64, of so many classes; the label `classes` is that of no class."""

    label: Tensor
    classes: int

    def null(self) -> Labels:
        """Return null labels, one per row."""
        return Labels(torch.full_like(self.label, self.classes), self.classes)


@attrs.frozen(eq=False)
class Vectors(Condition):
    """Vectors, (B, K), float; where `known` (B,), bool, is False there is none."""

    value: Tensor
    known: Tensor

    def null(self) -> Vectors:
        """Return null vectors, one per row."""
        return Vectors(torch.zeros_like(self.value), torch.zeros_like(self.known))

    def nulls(self) -> Tensor:
        """Return which rows have no vector, whatever their numbers are."""
        return ~self.known


@attrs.frozen(eq=False)
class Tokens(Condition):
    """Tokens, (B, T, K), float, of which `mask` (B, T), bool, says which are there."""

    value: Tensor
    mask: Tensor

    def null(self) -> Tokens:
        """Return null tokens, one per row."""
        return Tokens(torch.zeros_like(self.value), torch.zeros_like(self.mask))

    def nulls(self) -> Tensor:
        """Return which rows have no token, whatever their numbers are."""
        return ~self.mask.any(dim=1)


class ConditionSpec(ABC):
    """What a source of images offers as conditions: a frozen value, known before any file."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Name the kind and sizes for messages: `vectors of 3 numbers`."""

    @property
    def kinds(self) -> int | None:
        """Number of different conditions; None where they cannot be counted."""
        return None

    @abstractmethod
    def embedding(self, width: int) -> nn.Module:
        """Build the module that maps a condition, null rows included, to (B, W).

        A backbone starts it as all else: its linears by Xavier's rule, and its own parameters,
        those that lie in no module of it, from a normal distribution with std 0.02.

        Randomness: torch's global generator.
        """

    @abstractmethod
    def null(self, count: int, device: torch.device | str = "cpu") -> Condition:
        """Return `count` null rows."""

    @abstractmethod
    def example(self, count: int) -> Condition:
        """Return conditions for trying parts: several different ones, always the same."""

    def accept(self, given: Tensor | Condition, where: str) -> Condition:
        """Check that what a source or a caller gives is of this kind and shape, and return it.

        Args:
            given: A condition; for class labels also the labels alone, (B,), int64.
            where: Who gives it, for the message.

        Raises:
            DataError: It is of another kind or shape.
        """
        like = self.null(1, "meta").tensors()
        found = "class labels" if isinstance(given, Tensor) else type(given).__name__
        if isinstance(given, Condition) and type(given) is type(self.null(0)):
            shapes = {name: value.shape[1:] for name, value in given.tensors().items()}
            if shapes == {name: value.shape[1:] for name, value in like.items()}:
                return given
            found = ", ".join(f"{k} {tuple(v.shape)}" for k, v in given.tensors().items())
        raise DataError(f"{where}: gives {found}, where conditions are {self.title}")

    def in_turn(self, count: int, held_out: Condition) -> Condition:
        """Return conditions of `count` samples: those of held-out images in order, repeated."""
        index = torch.arange(count, device=held_out.device)
        return held_out.rows(index % len(held_out))


@attrs.frozen
class ClassLabels(ConditionSpec):
    """Class labels; 0 classes are images without labels."""

    classes: int

    @property
    def title(self) -> str:
        """Return a title that includes the number of classes."""
        return f"labels of {self.classes:,} classes"

    @property
    def kinds(self) -> int:
        """The classes; images without labels are of one."""
        return max(1, self.classes)

    def embedding(self, width: int) -> nn.Module:
        """Build a table with a row for each class and one for none."""
        return _ClassTable(self.classes + 1, width)

    def null(self, count: int, device: torch.device | str = "cpu") -> Labels:
        """Return the labels of no class."""
        return Labels(torch.full((count,), self.classes, device=device), self.classes)

    def example(self, count: int) -> Labels:
        """Return the classes in turn."""
        return Labels(torch.arange(count) % self.kinds, self.classes)

    def accept(self, given: Tensor | Condition, where: str) -> Condition:
        """Check it as every spec does; labels alone become `Labels`."""
        if isinstance(given, Tensor) and given.ndim == 1:
            return Labels(given, self.classes)
        if isinstance(given, Labels) and given.classes == self.classes:
            return given
        found = type(given).__name__
        if isinstance(given, Tensor):
            found = f"class labels {tuple(given.shape)}"
        elif isinstance(given, Labels):
            found = f"labels of {given.classes:,} classes"
        raise DataError(f"{where}: gives {found}, where conditions are {self.title}")

    def in_turn(self, count: int, held_out: Condition) -> Labels:
        """Return the classes in turn, whatever the held-out images are."""
        return Labels(torch.arange(count) % self.kinds, self.classes).to(held_out.device)


class _ClassTable(nn.Embedding):
    def forward(self, condition: Labels) -> Tensor:  # type: ignore[override]
        return super().forward(condition.label)


@attrs.frozen
class VectorSpec(ConditionSpec):
    """Vectors of `size` numbers."""

    size: int = attrs.field(validator=validators.ge(1))

    @property
    def title(self) -> str:
        """Return a title that includes their size."""
        return f"vectors of {self.size} numbers"

    def embedding(self, width: int) -> nn.Module:
        """Build a linear map, and a learned row for images without a vector."""
        return _VectorMap(self.size, width)

    def null(self, count: int, device: torch.device | str = "cpu") -> Vectors:
        """Return rows without a vector."""
        value = torch.zeros(count, self.size, device=device)
        return Vectors(value, torch.zeros(count, dtype=torch.bool, device=device))

    def example(self, count: int) -> Vectors:
        """Return normal numbers."""
        value = torch.randn(count, self.size, generator=torch.Generator().manual_seed(0))
        return Vectors(value, torch.ones(count, dtype=torch.bool))


class _VectorMap(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, width)
        self.null = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, condition: Vectors) -> Tensor:
        known = condition.known[:, None]  # (B, 1)
        mapped = self.linear(torch.where(known, condition.value, 0.0)).float()
        return torch.where(known, mapped, self.null)


@attrs.frozen
class TokenSpec(ConditionSpec):
    """Up to `tokens` tokens of `size` numbers, such as those of a text encoder."""

    tokens: int = attrs.field(validator=validators.ge(1))
    size: int = attrs.field(validator=validators.ge(1))

    @property
    def title(self) -> str:
        """Return a title that includes their number and size."""
        return f"up to {self.tokens} tokens of {self.size} numbers"

    def embedding(self, width: int) -> nn.Module:
        """Build a mean of a linear map of the tokens that are there; a learned row for none."""
        return _TokenMean(self.size, width)

    def null(self, count: int, device: torch.device | str = "cpu") -> Tokens:
        """Return rows without a token."""
        value = torch.zeros(count, self.tokens, self.size, device=device)
        return Tokens(value, torch.zeros(count, self.tokens, dtype=torch.bool, device=device))

    def example(self, count: int) -> Tokens:
        """Return normal numbers, of one token, two tokens and so on in turn."""
        g = torch.Generator().manual_seed(0)
        value = torch.randn(count, self.tokens, self.size, generator=g)
        there = torch.arange(count)[:, None] % self.tokens
        return Tokens(value, torch.arange(self.tokens) <= there)


class _TokenMean(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, width)
        self.null = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, condition: Tokens) -> Tensor:
        there = condition.mask[..., None]  # (B, T, 1)
        # Not by products: what lies behind the mask may be anything, NaN included.
        mapped = self.linear(torch.where(there, condition.value, 0.0)).float()
        mean = torch.where(there, mapped, 0.0).sum(dim=1) / there.sum(dim=1).clamp_min(1)
        return torch.where(condition.mask.any(dim=1)[:, None], mean, self.null)


def class_labels(condition: Condition) -> Tensor:
    """Return the labels (B,) of class labels, for what makes sense for classes only.

    Raises:
        DataError: The condition is of another kind.
    """
    if isinstance(condition, Labels):
        return condition.label
    raise DataError(f"class labels are needed, and the condition is {type(condition).__name__}")
