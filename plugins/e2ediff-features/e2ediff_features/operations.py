"""The operations that a network in a file may call, and what their arguments may be.

Each is a function of tensors and numbers alone, whose kernel checks every index, size and stride
that it is given. Left out are, among many others: what takes strides, lengths or pointers as they
are (`as_strided`, `set_`, `segment_reduce`, `max_unpool2d`), what makes as much as the data say
(`repeat_interleave`, `nonzero`, `one_hot`), what divides whole numbers, what draws at random, and
what changes the state of the process (`manual_seed`, `set_grad_enabled`).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Grouped by what they do; each is an overload of torch.ops.aten.
_NAMES = """
abs.default acos.default asin.default atan.default atan2.default ceil.default clamp.default
clamp.Tensor clamp_max.default clamp_min.default cos.default cosh.default erf.default exp.default
exp2.default expm1.default floor.default frac.default log.default log10.default log1p.default
log2.default maximum.default minimum.default neg.default pow.Scalar pow.Tensor_Scalar
pow.Tensor_Tensor reciprocal.default round.default rsqrt.default sign.default sin.default
sinh.default sqrt.default square.default tan.default tanh.default trunc.default lerp.Scalar
lerp.Tensor nan_to_num.default isnan.default isinf.default isfinite.default

add.Scalar add.Tensor add_.Scalar add_.Tensor sub.Scalar sub.Tensor sub_.Scalar sub_.Tensor
rsub.Scalar rsub.Tensor mul.Scalar mul.Tensor mul_.Scalar mul_.Tensor div.Scalar div.Tensor
div_.Scalar div_.Tensor addcmul.default addcdiv.default

eq.Scalar eq.Tensor ne.Scalar ne.Tensor ge.Scalar ge.Tensor gt.Scalar gt.Tensor le.Scalar
le.Tensor lt.Scalar lt.Tensor bitwise_and.Tensor bitwise_not.default bitwise_or.Tensor
bitwise_xor.Tensor logical_and.default logical_not.default logical_or.default logical_xor.default
where.self where.ScalarSelf where.ScalarOther where.Scalar masked_fill.Scalar masked_fill.Tensor
masked_fill_.Scalar masked_fill_.Tensor

celu.default elu.default elu_.default gelu.default gelu_.default glu.default hardsigmoid.default
hardsigmoid_.default hardswish.default hardswish_.default hardtanh.default hardtanh_.default
leaky_relu.default leaky_relu_.default log_sigmoid.default log_softmax.int mish.default
mish_.default prelu.default relu.default relu_.default relu6.default relu6_.default selu.default
selu_.default sigmoid.default sigmoid_.default silu.default silu_.default softmax.int
softplus.default tanh_.default dropout.default dropout_.default feature_dropout.default

linear.default matmul.default mm.default bmm.default mv.default dot.default addmm.default
baddbmm.default einsum.default outer.default scaled_dot_product_attention.default
conv1d.default conv2d.default conv2d.padding conv_transpose2d.input
batch_norm.default group_norm.default instance_norm.default layer_norm.default rms_norm.default

adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_max_pool2d.default
avg_pool1d.default avg_pool2d.default max_pool1d.default max_pool2d.default
pixel_shuffle.default pixel_unshuffle.default channel_shuffle.default pad.default
constant_pad_nd.default reflection_pad2d.default replication_pad2d.default
upsample_bicubic2d.vec upsample_bilinear2d.vec upsample_nearest2d.vec
_upsample_bicubic2d_aa.vec _upsample_bilinear2d_aa.vec _upsample_nearest_exact2d.vec

all.default all.dim any.default any.dim amax.default amin.default argmax.default argmin.default
argsort.default cumsum.default linalg_vector_norm.default logsumexp.default max.default max.dim
mean.default mean.dim min.default min.dim norm.ScalarOpt_dim prod.default prod.dim_int
sort.default std.correction std.dim sum.default sum.dim_IntList topk.default var.correction
var.dim var_mean.correction var_mean.dim

alias.default broadcast_to.default cat.default chunk.default clone.default concat.default
contiguous.default detach.default detach_.default diagonal.default expand.default
expand_as.default flatten.using_ints flip.default hstack.default lift_fresh_copy.default
matrix_H.default meshgrid.default meshgrid.indexing movedim.int movedim.intlist mT.default
narrow.default numpy_T.default permute.default ravel.default repeat.default reshape.default
reshape_as.default roll.default select.int slice.Tensor split.Tensor split.sizes
split_with_sizes.default squeeze.default squeeze.dim squeeze.dims stack.default swapaxes.default
swapdims.default t.default tile.default transpose.int tril.default triu.default unbind.int
unflatten.int unsqueeze.default view.default view_as.default vstack.default _unsafe_view.default

embedding.default gather.default index.Tensor index_select.default copy_.default fill_.Scalar
fill_.Tensor zero_.default

arange.default arange.start arange.start_step full.default full_like.default linspace.default
new_full.default new_ones.default new_zeros.default ones.default ones_like.default
scalar_tensor.default zeros.default zeros_like.default

to.dtype to.dtype_layout to.device to.other type_as.default _to_copy.default
_assert_tensor_metadata.default sym_size.int
"""
OPERATIONS = frozenset(f"torch.ops.aten.{name}" for name in _NAMES.split())

# What tracing writes about sizes that depend on the batch.
_SIZES = frozenset({"add", "sub", "mul", "floordiv", "mod", "neg"})
_MOST = (1 << 31) - 1  # of a number that says how many, how far or how large
_END = (1 << 63) - 1  # "to the end", in a slice
_MOST_LETTERS = 64
MOST_ITEMS = 4096
"""Items of a list that a graph has as an argument, or that an operation returns."""
# Where an operation says that it draws at random or changes its arguments, and what it should say.
_STILL = {
    "batch_norm": ("training", 5),
    "dropout": ("train", 2),
    "dropout_": ("train", 2),
    "feature_dropout": ("train", 2),
    "scaled_dot_product_attention": ("dropout_p", 4),
}


def operation(target: str) -> Callable[..., Any]:
    """Return what a graph's text for an operation stands for.

    Raises:
        ValueError: It is none of those that are run here.
    """
    family, _, name = target.partition(".")
    if family == "_operator" and name in _SIZES:
        return _of_sizes(getattr(operator, name))
    if target not in OPERATIONS:
        raise ValueError(
            f"its graph calls {target[:80]}, which is not among the operations run here"
        )
    packet, overload = target.removeprefix("torch.ops.aten.").split(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    return found


def makes_tensors(call: Callable[..., Any]) -> bool:
    """Return whether an operation is told by name on which device its result is to be."""
    schema = getattr(call, "_schema", None)
    return any(a.name == "device" and a.kwarg_only for a in getattr(schema, "arguments", ()))


def writes(target: str) -> bool:
    """Return whether an operation changes its first argument."""
    return bool(re.fullmatch(r"torch\.ops\.aten\.\w+_\.\w+", target))


def _of_sizes(call: Callable[..., Any]) -> Callable[..., int]:
    """Return arithmetic that takes and returns whole numbers alone, and no large ones."""

    def checked(*sizes: Any) -> int:
        for size in sizes:
            if type(size) is not int:
                raise ValueError(f"it computes a size from {type(size).__name__}")
        try:
            found = call(*sizes)
        except ZeroDivisionError as error:
            raise ValueError("it divides a size by zero") from error
        check_number(found)
        return int(found)

    return checked


def check_number(value: Any) -> None:
    """Refuse a whole number that is larger than any size.

    Raises:
        ValueError: It is.
    """
    if isinstance(value, int) and abs(value) > _MOST and value != _END:
        raise ValueError(f"it has the number {value:.3g}, larger than any size")


def check_written(kind: str, value: Any) -> None:
    """Refuse an argument that is written out in a graph, if it is of no sensible size.

    Args:
        kind: What the graph calls it, such as `as_ints`.
        value: Its value.

    Raises:
        ValueError: It is a large number, a long text or a long list, or not of its kind.
    """
    items = value if isinstance(value, list) else [value]
    wanted = {"int": (int,), "float": (float, int, str), "bool": (bool,), "string": (str,)}
    kinds = wanted[kind.removeprefix("as_").removesuffix("s")]
    if len(items) > MOST_ITEMS:
        raise ValueError(f"it has an argument of {len(items):,} items")
    for item in items:
        if type(item) not in kinds:
            raise ValueError(f"it has {item!r:.40} where its graph says {kind}")
        if isinstance(item, str) and len(item) > _MOST_LETTERS:
            raise ValueError(f"it has a text of {len(item):,} letters")
        check_number(item)


def check_call(target: str, args: Sequence[Any], named: dict[str, Any]) -> None:
    """Refuse arguments that a kernel of torch takes without a look.

    Raises:
        ValueError: They are such.
    """
    name = target.split(".")[-2]
    option, place = _STILL.get(name, ("", len(args)))
    if args[place] if place < len(args) else named.get(option):
        raise ValueError(f"its graph has {option} of {name}; export it in eval mode")
    if name in ("unbind", "split"):
        each, dim = (1, args[1:2]) if name == "unbind" else (args[1], args[2:3])
        length = args[0].shape[dim[0] if dim else named.get("dim", 0)]
        if isinstance(each, int) and length > MOST_ITEMS * max(1, each):
            raise ValueError(f"it takes {length:,} tensors apart")
    if name == "scaled_dot_product_attention":
        q, k, v = (*args, *(named[key] for key in ("query", "key", "value") if key in named))[:3]
        if k.shape[:-1] != v.shape[:-1] or q.shape[:-2] != k.shape[:-2]:
            shapes = ", ".join(str(tuple(one.shape)) for one in (q, k, v))
            raise ValueError(f"it attends with shapes that do not match: {shapes}")


def products_of(target: str, args: Sequence[Any], out: Any) -> int:
    """Return how many numbers an operation multiplies or adds for a result, roughly; often 0.

    Args:
        target: The operation, as the graph calls it.
        args: Its arguments in their order.
        out: Its result.
    """
    name = target.split(".")[-2]
    if name in ("linear", "matmul", "mm", "bmm", "mv", "dot"):
        return int(out.numel() * args[0].shape[-1])
    if name in ("addmm", "baddbmm"):
        return int(out.numel() * args[1].shape[-1])
    if name in ("conv1d", "conv2d"):
        return int(out.numel() * args[1][0].numel())
    if name == "conv_transpose2d":
        return int(args[0].numel() * args[1][0].numel())
    if name == "scaled_dot_product_attention":
        return int(2 * args[0].numel() * args[1].shape[-2])
    if name == "einsum":
        terms = args[0].partition("->")[0].replace(" ", "").split(",")
        sizes = {
            letter: size
            for term, x in zip(terms, args[1], strict=True)
            for letter, size in zip(term.replace("...", ""), x.shape[::-1], strict=False)
        }
        return int(max(math.prod(sizes.values()), out.numel()))
    if "_pool" in name and "adaptive" not in name:
        kernel = out[0] if isinstance(out, tuple) else out
        return int(kernel.numel() * math.prod(args[1]))
    return 0


def size_of(value: Any) -> int:
    """Return the bytes of a result, a tensor or several; 0 of a size."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(size_of, value)) if isinstance(value, list | tuple) else 0
