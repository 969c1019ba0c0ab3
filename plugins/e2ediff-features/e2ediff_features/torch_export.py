"""Networks in the files of `torch.export.save`, read as data.

`torch.export.load` unpickles (its documentation: never load data from an untrusted source), and
hands expressions to `sympify` and guards to `exec`. The graph itself is JSON and the weights are
raw bytes, so nothing of this is needed: here the graph is interpreted, and what would have to be
unpickled, or is no plain operation on tensors, is refused.

What a graph may do is limited too: `operations.py` lists what it may call, a graph has no more
than `MOST_NODES` of these, and its shapes are computed before any of its numbers.

Written for schema 8 of torch._export.serde.schema, that of torch 2.9 to 2.14.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from e2ediff.limits import MAX_GRAPH, check_unpacked, json_object
from e2ediff_features.operations import (
    MOST_ITEMS,
    check_call,
    check_written,
    makes_tensors,
    operation,
    products_of,
    size_of,
    writes,
)

_SCHEMA = 8
MOST_NODES = 20_000
"""Operations of a graph; Swin-V2 has 1,044, and a ViT of 100 blocks some 4,000."""
MOST_BYTES = 1 << 28
"""Bytes of any one result, for each image of the batch."""
MOST_WORK = 1 << 36
"""Bytes of all results together, for each image of the batch."""
MOST_PRODUCTS = 1 << 41
"""Products of numbers in all, for each image; a ViT-g of 518 pixels has 1.8e12."""
# Numbers of the file format's own enumerations, which are none of torch's.
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64,
    6: torch.float16, 7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_MEMORY = {
    1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d,
    4: torch.preserve_format,
}  # fmt: skip
_STRIDED = 7
_PLAIN = frozenset(
    f"as_{kind}{many}" for kind in ("int", "float", "bool", "string") for many in ("", "s")
)


@attrs.frozen
class _Node:
    """One operation: what it is, its arguments as they are written, and the names it gives.

    `last` are the names that no later operation reads.
    """

    target: str
    call: Callable[..., Any]
    inputs: Sequence[tuple[str, int, Mapping[str, Any]]]
    outputs: Sequence[str] | str
    makes_tensors: bool
    last: Sequence[str] = ()


class Program(nn.Module):
    """The network of one archive; it takes a batch and returns the tensors that the graph does.

    `shape` is the input's, with 0 for a size that may vary.
    Its tensors are buffers, so that it moves as a module does.

    Args:
        data: The archive.

    Raises:
        ValueError: It is no such archive, or holds more than a graph of tensors.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__()
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                check_unpacked(archive, len(data))
                self._read(archive, len(data))
        except (zipfile.BadZipFile, LookupError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"it is no archive of torch.export.save ({what})") from error
        except (RuntimeError, OSError, ArithmeticError, RecursionError, zlib.error) as error:
            what = str(error).partition("\n")[0]
            raise ValueError(f"it cannot be read ({what})") from error

    def _read(self, archive: zipfile.ZipFile, stored_bytes: int) -> None:
        names = [name for name in archive.namelist() if re.search(r"/models/[^/]+\.json$", name)]
        if len(names) != 1:
            raise ValueError(f"it has {len(names)} graphs instead of one")
        root, _, model = names[0].removesuffix(".json").partition("/models/")
        program = json_object(archive.read(names[0]), MAX_GRAPH)
        if (version := program["schema_version"]["major"]) != _SCHEMA:
            raise ValueError(f"its schema is {version}, and {_SCHEMA} is read here; export anew")
        if archive.read(f"{root}/byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        module = program["graph_module"]
        stored = {
            kind: _tensors(archive, f"{root}/data/{kind}/", f"{model}_{kind}_config.json")
            for kind in ("weights", "constants")
        }
        total = sum(size_of(t) for tensors in stored.values() for t in tensors.values())
        if total > 2 * stored_bytes:
            raise ValueError(f"it has tensors of {total:,} bytes in a file of {stored_bytes:,}")
        given = [self._bind(spec, stored) for spec in module["signature"]["input_specs"]]
        inputs = [name for name in given if name]
        if len(inputs) != 1:
            raise ValueError(f"its graph takes {len(inputs)} inputs instead of one batch")
        (self.input,) = inputs
        graph = module["graph"]
        if (count := len(graph["nodes"])) > MOST_NODES:
            raise ValueError(f"its graph has {count:,} operations, more than {MOST_NODES:,}")
        sizes = graph["tensor_values"][self.input]["sizes"]
        self.shape = tuple(int(size.get("as_int", 0)) for size in sizes)
        self.results = [_result(spec) for spec in module["signature"]["output_specs"]]
        self.nodes = _without_unread([_node(node) for node in graph["nodes"]], self.results)
        self.judged = set[int]()  # sizes of batches

    def _bind(self, spec: Mapping[str, Any], stored: Mapping[str, Mapping[str, Tensor]]) -> str:
        """Keep a stored tensor under its name in the graph; the name of an input from outside."""
        ((kind, what),) = spec.items()
        if kind == "user_input":
            found: str = what["arg"]["as_tensor"]["name"]
            return found
        keys = {"parameter": "parameter_name", "buffer": "buffer_name"}
        if kind not in (*keys, "tensor_constant"):
            raise ValueError(f"its graph takes a {kind}, which is no tensor")
        key = what[keys.get(kind, "tensor_constant_name")]
        kept = stored["weights"].get(key, stored["constants"].get(key))
        if kept is None:
            raise ValueError(f"it has no tensor {key!r}")
        self.register_buffer(what["arg"]["name"], kept)
        return ""

    def forward(self, x: Tensor) -> list[Tensor]:
        """The outputs for one batch, of which gradients reach x.

        Before the first batch of any size its shapes are computed, without numbers.

        Raises:
            ValueError: A result would be larger than `MOST_BYTES`, all of them together than
                `MOST_WORK`, they would take more than `MOST_PRODUCTS`, or the graph changes its
                own tensors.
        """
        if x.device.type != "meta" and len(x) not in self.judged:
            own = {name: tensor.to("meta") for name, tensor in self.named_buffers()}
            with torch.no_grad():
                self._run(x.to("meta"), own)
            self.judged.add(len(x))
        return self._run(x, dict(self.named_buffers()))

    def _run(self, x: Tensor, own: Mapping[str, Tensor]) -> list[Tensor]:
        values: dict[str, Any] = {**own, self.input: x}
        kept = {b.untyped_storage()._cdata for b in own.values()}
        images, work, products = max(1, len(x)), 0, 0
        for node in self.nodes:
            args = [_value(arg, values, x) for _, kind, arg in node.inputs if kind != 2]
            named = {name: _value(arg, values, x) for name, kind, arg in node.inputs if kind == 2}
            check_call(node.target, args, named)
            if node.makes_tensors:
                named["device"] = x.device  # also where the graph does not say so
            if writes(node.target) and args[0].untyped_storage()._cdata in kept:
                raise ValueError("its graph writes to its own buffers; export it in eval mode")
            out = node.call(*args, **named)
            size = size_of(out)
            work += size
            products += products_of(node.target, args, out)
            if products > MOST_PRODUCTS * images:
                raise ValueError(
                    f"it multiplies {products:.2g} numbers for {images} images; expected no more "
                    f"than {MOST_PRODUCTS:.2g} for each"
                )
            if size > MOST_BYTES * images or work > MOST_WORK * images:
                raise ValueError(
                    f"{node.target} makes {size:,} bytes of {images} images, after "
                    f"{work - size:,}; expected no more than {MOST_BYTES:,} at once and "
                    f"{MOST_WORK:,} in all for each image"
                )
            if isinstance(node.outputs, str):
                values[node.outputs] = out
            elif node.outputs:
                values.update(zip(node.outputs, out, strict=True))
            for name in node.last:
                del values[name]
        return [values[name] for name in self.results]


def _tensors(archive: zipfile.ZipFile, folder: str, config: str) -> dict[str, Tensor]:
    """Tensors by name, from raw bytes; those that have a file in common share its bytes."""
    found, read = {}, dict[str, bytearray]()
    for key, entry in json_object(archive.read(folder + config), MAX_GRAPH)["config"].items():
        path, meta = entry["path_name"], entry["tensor_meta"]
        if entry["use_pickle"] or meta is None or not re.fullmatch(r"[a-z]+_\d+", path):
            raise ValueError(f"{key!r} is pickled, and nothing is unpickled here")
        if path not in read:
            read[path] = bytearray(archive.read(folder + path))
        data, dtype = read[path], _dtype(meta["dtype"])
        raw = torch.uint8 if dtype == torch.bool else dtype  # a bool is 0 or 1, and a byte is not
        flat = torch.frombuffer(data, dtype=raw) if data else torch.empty(0, dtype=raw)
        sizes, strides = ([s["as_int"] for s in meta[k]] for k in ("sizes", "strides"))
        if math.prod(sizes) > len(flat):
            raise ValueError(f"{key!r} has the shape {sizes} and {len(flat):,} numbers")
        view = flat.as_strided(sizes, strides, meta["storage_offset"]["as_int"])
        found[key] = view != 0 if dtype == torch.bool else view
    return found


def _dtype(number: int) -> torch.dtype:
    if number not in _DTYPES:
        raise ValueError(f"it has numbers of type {number}, which are not read")
    return _DTYPES[number]


def _node(node: Mapping[str, Any]) -> _Node:
    """One operation, if it is one of torch's on tensors, or arithmetic of sizes."""
    target, outs = str(node["target"]), node["outputs"]
    call = operation(target)
    inputs = [(i["name"], i["kind"], i["arg"]) for i in node["inputs"]]
    if any(isinstance(v, list) and len(v) > MOST_ITEMS for _, _, a in inputs for v in a.values()):
        raise ValueError(f"{target} has an argument of more than {MOST_ITEMS:,} items")
    several = len(outs) == 1 and "as_tensors" in outs[0]
    names = [o["name"] for o in outs[0]["as_tensors"]] if several else [_name(o) for o in outs]
    single = len(names) == 1 and not several
    return _Node(target, call, inputs, names[0] if single else names, makes_tensors(call))


def _name(out: Mapping[str, Any]) -> str:
    """What a result is called: a tensor, or a size."""
    if "as_tensor" in out:
        name: str = out["as_tensor"]["name"]
        return name
    ((_, size),) = out.items()
    return str(size["as_name"])


def _result(spec: Mapping[str, Any]) -> str:
    if "user_output" not in spec:
        raise ValueError("its graph writes to its own buffers; export it in eval mode")
    return _name(spec["user_output"]["arg"])


def _value(written: Mapping[str, Any], values: Mapping[str, Any], like: Tensor) -> Any:
    """An argument as the operation takes it; what it names is looked up."""
    ((kind, what),) = written.items()
    if kind in _PLAIN:
        check_written(kind, what)
        return float(what) if kind == "as_float" else what  # "Infinity" is written as text
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return values[what["name"]]
    if kind == "as_tensors":
        return [values[t["name"]] for t in what]
    if kind == "as_optional_tensors":
        return [_value(t, values, like) for t in what]
    if kind == "as_name":
        return values[what]
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return _value(what, values, like)
    if kind == "as_sym_ints":
        return [_value(size, values, like) for size in what]
    if kind == "as_scalar_type":
        return _dtype(what)
    if kind == "as_device":
        return like.device  # where the network is now, not where it was exported
    if kind == "as_memory_format":
        return _MEMORY[what]
    if kind == "as_layout" and what == _STRIDED:
        return torch.strided
    raise ValueError(f"its graph has an argument of kind {kind}, which is not read")


def _without_unread(nodes: Sequence[_Node], results: Sequence[str]) -> list[_Node]:
    """The operations, each with what may be forgotten after it."""
    seen, found = set(results), []
    for node in reversed(nodes):
        own = [node.outputs] if isinstance(node.outputs, str) else [*node.outputs]
        names = {name for _, _, arg in node.inputs for name in _names(arg)} | set(own)
        found.append(attrs.evolve(node, last=sorted(names - seen)))
        seen |= names
    return found[::-1]


def _names(written: Any) -> list[str]:
    """Every name in an argument, or in what it holds."""
    if isinstance(written, Mapping):
        own = [v for k, v in written.items() if k in ("name", "as_name")]
        return own + [n for v in written.values() for n in _names(v)]
    return [n for v in written for n in _names(v)] if isinstance(written, list) else []
