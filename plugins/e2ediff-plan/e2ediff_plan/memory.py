"""Follow the memory of a training step, storage by storage, on fake tensors."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from e2ediff.host.recipe import Recipe
from e2ediff.step.assembly import Assembly, assemble
from e2ediff.step.shapes import Layout, Shapes
from e2ediff.train.snapshot import tensors_of
from e2ediff_plan.flops import without_weights
from e2ediff_plan.rehearsal import Passage, blank_batch, optimizer_step

_CPU = torch.device("cpu")


@attrs.frozen
class Memory:
    """Bytes of a training step on one device.

    `state` is what stays between steps: `weights`, `gradients`, each optimizer's moments, the
    averages, feature networks, and the images of the probe and of calibration.
    `passing` is the most that is alive at once in forward and backward passes, state and batch
    included, when micro-shards have `rows` images; `per_image` is its growth with each further
    image of a micro-shard; `updating` is the most that is alive while weights and averages are
    updated, which images do not change.
    `saved` is what a micro-shard's forward pass keeps for its backward pass, by phase and image.
    `checkpoint` is the size of a checkpoint's tensors.
    `optimizer_flops` is by phase and step.
    `batch` is the bytes of the device's images; `outside_blocks` those of the weights, averages
    included, that are in none of the backbone's blocks, and `largest_block` those of one block.
    """

    state: Mapping[str, int]
    rows: int
    passing: int
    updating: int
    per_image: float
    saved: Mapping[str, float]
    checkpoint: int
    optimizer_flops: Mapping[str, float]
    batch: int
    outside_blocks: int
    largest_block: int

    @property
    def peak(self) -> int:
        """Return the peak memory of a step, with micro-shards of `rows` images."""
        return max(self.passing, self.updating)

    def peak_at(self, rows: int) -> float:
        """Return the peak for micro-shards of this many images, by linear extrapolation."""
        return max(self.passing + (rows - self.rows) * self.per_image, self.updating)

    def rows_that_fit(self, usable: float) -> int:
        """Return the largest micro-shard whose peak fits into these bytes; 0 if none fits."""
        if usable < self.updating:
            return 0
        return max(0, self.rows + int((usable - self.passing) // self.per_image))


def follow(recipe: Recipe, *, gpus: int = 1, like_cuda: bool = False) -> Memory:
    """Follow the step of one of `gpus` devices, as if alone; takes seconds and no memory.

    Tensors are torch's fake ones on the CPU: shapes, types and storages are those of a real
    step, autocast included, so what is counted is what torch asks its allocator for.
    `like_cuda` saves for the backward pass of an RMS norm what CUDA's fused kernel saves.
    Memory inside a kernel and the allocator's rounding are not seen.

    Raises:
        DataError: A feature network cannot be built here.
    """
    rows = recipe.batch // recipe.microshards
    other = rows // 2 if rows > 1 else 2
    shards = min(2, max(1, recipe.microshards // gpus))
    with _fake(like_cuda=like_cuda) as live:
        # Compilers do not accept fake tensors.
        blank = attrs.evolve(recipe, objective=without_weights(recipe.objective), compile="off")
        parts = assemble(blank, _CPU)
        images = max(recipe.batch // gpus, rows * shards, other * shards)
        batch = blank_batch(recipe, images, _CPU)
        watched = recipe.probe.images + recipe.probe.calibration
        watched_images = blank_batch(recipe, watched, _CPU)  # the engine keeps them on its device
        passages: dict[int, Passage] = {}
        turns: dict[int, _Turns] = {}
        for size in (other, rows):
            turns[size] = _Turns(live)
            passages[size] = optimizer_step(recipe, parts, batch, size, shards, turns[size])
        # The first created the state of each optimizer, after the passes of its phase.
        made = [_bytes(tree_leaves([*o.state.values()])) for o in parts.optimizers.values()]
        lacking = reversed([*accumulate(reversed(made))])
        peaks = {
            other: max(p + m for p, m in zip(turns[other].passing, lacking, strict=True)),
            rows: max(turns[rows].passing),
        }
        updating = turns[rows].end()
        state = _state(parts, max(passages[rows].gradients.values()))
        state["images of the probe"] = _bytes([watched_images.x])
        files = tensors_of(parts)[0].values()
        checkpoint = _bytes(t for file in files for t in file.values())
        nets = [parts.nets.online, *(average.net for average in parts.averages.values())]
        blocks = [_bytes(block.parameters()) for net in nets for block in net.blocks()]
        outside = _bytes(parts.step.parameters()) - sum(blocks)
    apart = rows - other
    return Memory(
        state=state,
        rows=rows,
        passing=peaks[rows],
        updating=updating,
        per_image=(peaks[rows] - peaks[other]) / apart,
        saved={
            phase: (kept - passages[other].saved[phase]) / apart
            for phase, kept in passages[rows].saved.items()
        },
        checkpoint=checkpoint,
        optimizer_flops=passages[rows].optimizer_flops,
        batch=_bytes([batch.x, *batch.condition.tensors().values()]),
        outside_blocks=outside,
        largest_block=max(blocks, default=0),
    )


class _Turns:
    """The peaks of the passes of each phase, and of the updates of all."""

    def __init__(self, live: _Live) -> None:
        self.live = live
        self.passing: list[int] = []
        self.updating = 0
        live.peak = live.now

    def __call__(self, passing: bool) -> None:
        """Mark the start (True) or end of the passes."""
        if passing:
            self.updating = max(self.updating, self.live.peak)
        else:
            self.passing.append(self.live.peak)
        self.live.peak = self.live.now

    def end(self) -> int:
        """Return the peak of the updates, after the last one."""
        return max(self.updating, self.live.peak)


def _state(parts: Assembly, gradients: int) -> dict[str, int]:
    """Return what stays between steps, by kind, in bytes."""
    own = nn.ModuleList([parts.nets.online, parts.nets.heads])
    found = {
        "weights": _bytes([*own.parameters(), *own.buffers()]),
        "gradients": gradients,
    }
    for phase, optimizer in parts.optimizers.items():
        found[f"optimizer {phase}"] = _bytes(tree_leaves([*optimizer.state.values()]))
    for name, average in parts.averages.items():
        found[f"average {name}"] = _bytes([*average.net.parameters(), *average.net.buffers()])
    frozen = parts.nets.frozen
    found["feature networks"] = _bytes([*frozen.parameters(), *frozen.buffers()])
    return {name: size for name, size in found.items() if size}


def _bytes(values: Iterable[Any]) -> int:
    """Return the bytes of the distinct storages of tensors; other values are ignored."""
    storages = [v.untyped_storage() for v in values if isinstance(v, Tensor)]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages made under this mode that are still referred to, and their peak.

    What was seen before is answered by a tensor of the same layout, in a third of the time that
    the mode of fake tensors takes.
    """

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.finalize[Any, Any]] = {}
        self._fakes = fakes
        self._shapes = Shapes(_is_blank, views=True)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # called tens of thousands of times
            return args[0].fake_device
        key = self._shapes.key(func, args, kwargs)
        out = self._shapes.recall(key, partial(self._make, args)) if key else None
        if out is None:
            out = func(*args, **kwargs)
            if key:
                self._shapes.learn(key, out, args)
        if not func.is_view:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf.untyped_storage())
        return out

    def _make(self, args: Sequence[Any], layout: Layout) -> Tensor:
        with in_kernel_invocation_manager(self._fakes):
            blank = layout.blank(args[0])
        return FakeTensor(self._fakes, blank, _CPU)

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.finalize(storage, self._gone, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def _is_blank(value: object) -> bool:
    return type(value) is FakeTensor and value.constant is None


class _FakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    def __deepcopy__(self, memo: object) -> _FakeMode:
        """Return self: a model and its copy must share one fake mode."""
        return self


@contextlib.contextmanager
def _norms_of_cuda() -> Iterator[None]:
    """Save for RMS norms what CUDA's kernel saves: the input in float32 and one number a row.

    On a CPU torch composes the norm of several operations, each of which saves its input.
    The function itself is replaced: in a backward pass, where blocks may be computed again, torch
    leaves every mode that would intercept it.
    """
    usual = functional.rms_norm
    functional.rms_norm = _rms_norm
    try:
        yield
    finally:
        functional.rms_norm = usual


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    out: Tensor = _RMSNorm.apply(input.float(), weight, len(normalized_shape))
    return out


class _RMSNorm(torch.autograd.Function):
    """Shapes and storages of aten::_fused_rms_norm and its backward; the values are not used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dims: int) -> Tensor:
        rstd = x.new_empty([*x.shape[:-dims], *[1] * dims])
        ctx.save_for_backward(x, rstd, *([] if weight is None else [weight]))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, _, *weights = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weights[0]) if weights else None, None


@contextlib.contextmanager
def _fake(*, like_cuda: bool) -> Iterator[_Live]:
    """Create fake tensors inside the block: shapes and storages without values."""
    norms = _norms_of_cuda() if like_cuda else contextlib.nullcontext()
    with warnings.catch_warnings(), _FakeMode() as fakes, norms, _Live(fakes) as live:
        # Copying a fake tensor asks for its address; bfloat16 norms say which kernel they miss.
        warnings.simplefilter("ignore")
        yield live
