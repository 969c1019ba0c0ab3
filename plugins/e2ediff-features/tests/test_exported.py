"""A feature network from a torch.export archive is the module that it was exported from.

The archive is read as data: what would have to be unpickled or executed is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from command_line import e2ediff
from e2ediff_features.exported import Exported
from torch import nn
from torch.nn import functional

from e2ediff.errors import DataError
from e2ediff.files import trial

SIDE = 16


class Maps(nn.Module):
    """A convolutional network with what such have: norms, in-place steps, two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        )
        self.two = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1, groups=2), nn.SiLU(), nn.Dropout(0.5))

    def forward(self, x):
        early = self.one(x)
        return early, functional.max_pool2d(self.two(early) + 1, 2)


class Tokens(nn.Module):
    """A transformer with a class token, sizes that depend on the batch, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.first = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.qkv = nn.Linear(8, 24)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        b = x.shape[0]
        h = self.patch(x).flatten(2).mT
        h = torch.cat([self.first.expand(b, -1, -1), h], dim=1)
        h = h + torch.arange(17)[None, :, None] / 17
        q, k, v = self.qkv(self.norm(h)).reshape(b * 17, 3, 2, 4).unbind(1)
        q, k, v = (a.reshape(b, 17, 2, 4).transpose(1, 2) for a in (q, k, v))
        h = h + functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 17, 8)
        return h + self.mlp(h)


class Vectors(Tokens):
    def forward(self, x):
        return super().forward(x)[:, 0].float()


NETWORKS = {"maps": Maps, "tokens": Tokens, "vectors": Vectors}


def module_of(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[name]().eval()
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return network


def export(network: nn.Module, place: Path, batch: bool = True) -> None:
    sizes = ({0: torch.export.Dim("batch")},) if batch else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of torch
        program = torch.export.export(
            network, (torch.zeros(2, 3, SIDE, SIDE),), dynamic_shapes=sizes
        )
        torch.export.save(program, place)


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    for name in NETWORKS:
        export(module_of(name), folder / f"{name}.pt2")
    return folder


def config(archives: Path, name: str, **changes: object) -> Exported:
    skip = 1 if name == "tokens" else 0
    options = {"size": SIDE, "output": name, "skip": skip, **changes}
    return Exported(weights=str(archives / f"{name}.pt2"), **options)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_network_is_the_module_it_was_exported_from(archives, name, channels) -> None:
    """Of another batch, scaled as the options say: outputs to the bit, gradients to rounding."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    net = config(archives, name, mean=mean, std=std).build()
    g = torch.Generator().manual_seed(1)
    x = (torch.rand(5, channels, SIDE, SIDE, generator=g) * 2 - 1).requires_grad_()
    maps = net(x)
    m, s = (torch.tensor(v).reshape(3, 1, 1) for v in (mean, std))
    out = module_of(name)(((x.expand(-1, 3, -1, -1) + 1) / 2 - m) / s)
    if name == "vectors":
        expected = [out[:, :, None, None]]
    elif name == "tokens":
        expected = [out[:, 1:].mT.reshape(5, 8, 4, 4)]
    else:
        expected = [*out]
    assert all(map(torch.equal, maps, expected))
    assert len(maps) == len(expected)
    mine, theirs = (
        torch.autograd.grad(sum(y.square().sum() for y in z), x)[0] for z in (maps, expected)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in net.parameters())
    assert not net.training


def test_images_of_another_size_are_resized_and_scores_read_the_mean_of_the_last_map(archives):
    net = config(archives, "maps").build()
    x = torch.rand(3, 3, 40, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    small = functional.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    maps = net(x)
    assert all(map(torch.equal, maps, net(small)))
    pool = net.vectors((x + 1) * 127.5)["pool"]
    torch.testing.assert_close(pool, maps[-1].mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def test_it_moves_as_a_module_does(archives) -> None:
    net = config(archives, "tokens").build().to("meta")
    assert net(torch.zeros(3, 3, SIDE, SIDE, device="meta"))[0].shape == (3, 8, 4, 4)


def test_eval_scores_in_the_features_of_a_file(archives, tmp_path) -> None:
    import numpy as np

    chance = np.random.default_rng(0)
    for name in ("made", "real"):
        array = chance.integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
    block = f"{{name: exported, size: {SIDE}}}"
    words = ["--features", block, "--weights-file", archives / "vectors.pt2", "--metrics", "[kid]"]
    sets = [tmp_path / "made.npz", "--reference", tmp_path / "real.npz"]
    done = e2ediff("eval", *sets, *words, "--out", tmp_path / "scores.json")
    assert done.code == 0, done.err
    assert "exported-vectors" in done.out


# What is refused


def rewritten(place: Path, archive: Path, change) -> str:
    """A copy whose files `change` may alter, given their names without the root and contents."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(place, "w") as new:
        for name in old.namelist():
            root, _, inner = name.partition("/")
            data = change(inner, old.read(name))
            if data is not None:
                new.writestr(f"{root}/{inner}", data)
    return str(place)


def graph_with(**changes: object):
    """Changes to the graph's first node."""

    def change(name: str, data: bytes) -> bytes:
        if name != "models/model.json":
            return data
        program = json.loads(data)
        program["graph_module"]["graph"]["nodes"][0].update(changes)
        return json.dumps(program).encode()

    return change


def pickled(name: str, data: bytes) -> bytes:
    return data.replace(b'"use_pickle": false', b'"use_pickle": true')


def of_another_schema(name: str, data: bytes) -> bytes:
    return data.replace(b'"major": 8', b'"major": 9')


def without_weights(name: str, data: bytes) -> bytes | None:
    return None if name.startswith("data/weights/weight_") else data


FILE = [{"name": "filename", "arg": {"as_string": "/etc/passwd"}, "kind": 1}]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (pickled, "is pickled, and nothing is unpickled here"),
        (of_another_schema, "its schema is 9, and 8 is read here; export anew"),
        (without_weights, "it is no archive of torch.export.save (KeyError: "),
        (graph_with(target="torch.ops.aten.from_file.default", inputs=FILE), "which is not among"),
        (graph_with(target="torch.ops.aten.save.default", inputs=FILE), "which is not among"),
        (graph_with(target="torch.load"), "calls torch.load, which is not among the operations"),
        (graph_with(target="_operator.attrgetter"), "calls _operator.attrgetter, which is not"),
        (graph_with(target="torch.ops.higher_order.cond"), "which is not among the operations"),
    ],
)
def test_an_archive_that_holds_more_than_a_graph_of_tensors_is_refused(
    archives, tmp_path, change, what
) -> None:
    place = rewritten(tmp_path / "changed.pt2", archives / "tokens.pt2", change)
    with pytest.raises(DataError) as caught:
        Exported(weights=place, size=SIDE, output="tokens", skip=1).build()
    assert str(caught.value).startswith(f"feature network: {place}: ")
    assert what in str(caught.value)


def test_nothing_is_unpickled_even_of_an_archive_that_holds_pickles(archives, tmp_path) -> None:
    """torch.export.save itself pickles the sample inputs, which are never looked at."""
    poison = lambda name, data: b"cos\nsystem\n" if "sample_inputs" in name else data  # noqa: E731
    place = rewritten(tmp_path / "poisoned.pt2", archives / "maps.pt2", poison)
    net = Exported(weights=place, size=SIDE, output="maps").build()
    assert [m.shape[1] for m in net(torch.zeros(1, 3, SIDE, SIDE))] == [6, 8]


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        (
            "tokens",
            {"output": "maps"},
            "it returns (2, 17, 8), and `output: maps` is (B, K, h, w)",
        ),
        ("maps", {"output": "vectors"}, "(2, 6, 8, 8), and `output: vectors` is (B, K)"),
        (
            "tokens",
            {"skip": 0},
            "it returns 17 tokens, and without the first 0 these are no square",
        ),
        ("maps", {"size": 32}, "it takes (3, 16, 16) and not images (3, 32, 32); set `size`"),
        ("maps", {"sha256": "0" * 64}, "has sha256 "),
    ],
)
def test_what_is_not_as_the_recipe_says_is_said(archives, name, changes, what) -> None:
    with pytest.raises(DataError) as caught:
        config(archives, name, **changes).build()
    assert what in str(caught.value)


def test_the_right_hash_is_taken_and_a_missing_or_foreign_file_named(archives, tmp_path) -> None:
    found = hashlib.sha256((archives / "maps.pt2").read_bytes()).hexdigest()
    config(archives, "maps", sha256=found).build()
    with pytest.raises(DataError, match=r"cannot read the weights at .*nowhere\.pt2"):
        Exported(weights=str(tmp_path / "nowhere.pt2")).build()
    for data in (b"no archive", b""):
        (tmp_path / "foreign.pt2").write_bytes(data)
        with pytest.raises(DataError, match=r"it is no archive of torch\.export\.save \(BadZip"):
            Exported(weights=str(tmp_path / "foreign.pt2")).build()


def test_a_network_for_one_size_of_batch_says_how_to_export_it(tmp_path) -> None:
    export(module_of("maps"), tmp_path / "fixed.pt2", batch=False)
    with pytest.raises(
        DataError, match=r"batches of 2 alone; export it with dynamic_shapes=\(\{0:"
    ):
        Exported(weights=str(tmp_path / "fixed.pt2"), size=SIDE, output="maps").build()


# What would crash, hang or fill the process


def hostile(place: Path, archive: Path, *nodes: dict[str, object]) -> Exported:
    """The network `maps` with other operations before its own."""

    def change(name: str, data: bytes) -> bytes:
        if name != "models/model.json":
            return data
        program = json.loads(data)
        graph = program["graph_module"]["graph"]
        graph["nodes"] = [*nodes, *graph["nodes"]]
        return json.dumps(program).encode()

    return Exported(weights=rewritten(place, archive, change), size=SIDE, output="maps")


def tensor(name: str) -> dict[str, object]:
    return {"as_tensor": {"name": name}}


def sizes(*values: int) -> dict[str, object]:
    return {"as_ints": list(values)}


def node(call: str, *args: dict[str, object], out: str = "h", **named: dict[str, object]):
    """An operation of aten, or one with its whole name."""
    given = [{"name": f"a{i}", "arg": arg, "kind": 1} for i, arg in enumerate(args)]
    given += [{"name": name, "arg": arg, "kind": 2} for name, arg in named.items()]
    target = call if call.startswith("_operator") else f"torch.ops.aten.{call}"
    return {"target": target, "inputs": given, "outputs": [tensor(out)]}


def conv(stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1):
    pairs = (sizes(n, n) for n in (stride, padding, dilation))
    weight, none = tensor("p_one_0_weight"), {"as_none": True}
    return [node("conv2d.default", X, weight, none, *pairs, {"as_int": groups})]


def attended(*lengths: int):
    made = [node("zeros.default", sizes(2, 4, n, 8), out=f"s{n}") for n in lengths]
    return [
        *made,
        node("scaled_dot_product_attention.default", *(tensor(f"s{n}") for n in lengths)),
    ]


FREE = ({"as_bool": False}, {"as_none": True})
X, NUMBER = tensor("x"), {"as_int": 10**9}
PLACES = node("full.default", sizes(4), {"as_int": 1000}, dtype={"as_scalar_type": 5}, out="i")
MATRIX = node("zeros.default", sizes(8192, 8192), out="m")
HOSTILE = {
    "lengths unchecked": (
        [node("segment_reduce.default", X, {"as_string": "sum"}, unsafe={"as_bool": True})],
        "calls torch.ops.aten.segment_reduce.default, which is not among",
    ),
    "strides": ([node("as_strided.default", X, sizes(9), sizes(1))], "which is not among"),
    "seed": ([node("manual_seed.default", NUMBER)], "which is not among"),
    "data say how many": ([node("nonzero.default", X)], "which is not among"),
    "huge repeat": ([node("repeat.default", X, sizes(9**6, 9**3, 1, 1))], "repeat.default makes "),
    "huge expand": ([node("expand.default", X, sizes(9**9, 2, 3, 16, 16))], "expand.default"),
    "huge zeros": ([node("zeros.default", sizes(9**5, 9**5))], "zeros.default makes "),
    "huge range": ([node("arange.default", NUMBER)], "arange.default makes 8,000,000,000 bytes"),
    "huge image": (
        [node("upsample_bilinear2d.vec", X, sizes(10**6, 10**6), *FREE)],
        "upsample_bilinear2d.vec makes ",
    ),
    "no sizes": ([node("zeros.default", sizes(2**40))], "has the number 1.1e+12, larger than any"),
    "negative": ([node("zeros.default", sizes(-5))], "negative"),
    "text for a size": (
        [node("_operator.mul", {"as_string": "x" * 50}, NUMBER)], "computes a size from str"),
    "long text": ([node("_operator.mul", {"as_string": "x" * 1000}, NUMBER)], "of 1,000 letters"),
    "powers": ([node("_operator.pow", NUMBER, NUMBER)], "calls _operator.pow, which is not among"),
    "by zero": ([node("_operator.floordiv", NUMBER, {"as_int": 0})], "divides a size by zero"),
    "many": ([{**node("relu.default", X), "inputs": []}] * 20_000, "operations, more than 20,000"),
    "many tensors": (
        [node("cat.default", {"as_tensors": [{"name": "x"}] * 5000})], "of more than 4,096 items"),
    "many parts": (
        [
            node("zeros.default", sizes(10**7), out="z"),
            node("unbind.int", tensor("z")),
        ],
        "it takes 10,000,000 tensors apart",
    ),
    "many products": ([MATRIX, *[node("mm.default", tensor("m"), tensor("m"), out="m")] * 20],
                      "numbers for 2 images; expected no more than "),
    "embedding": ([PLACES, node("embedding.default", tensor("p_one_0_bias"), tensor("i"))],
                  "must be 2-D"),
    "gather": (
        [PLACES, node("gather.default", tensor("p_one_0_bias"), {"as_int": 0}, tensor("i"))],
        "index 1000 is out of bounds",
    ),
    "index_select": (
        [PLACES, node("index_select.default", X, {"as_int": 0}, tensor("i"))],
        "index out of range",
    ),
    "groups": (conv(groups=0), "Invalid channel dimensions"),
    "stride": (conv(stride=0), "zero"),
    "dilation": (conv(dilation=2**30), "Kernel size can't be greater than actual input size"),
    "padding": (conv(padding=2**20), "it multiplies 1.4e+15 numbers for 2 images"),
    "keys without values": (attended(9, 9, 5), "attends with shapes that do not match"),
    "training": (
        [node("dropout.default", X, {"as_float": 0.5}, {"as_bool": True})],
        "has train of dropout",
    ),
    "own weights": (
        [node("mul_.Scalar", tensor("p_one_0_weight"), {"as_int": 0})],
        "writes to its own buffers",
    ),
    "no such tensor": ([node("relu.default", tensor("nowhere"))], "KeyError: 'nowhere'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_graph_that_would_harm_the_process_is_refused(kind: str, archives, tmp_path) -> None:
    nodes, what = HOSTILE[kind]
    with pytest.raises(DataError) as caught:
        hostile(tmp_path / "x.pt2", archives / "maps.pt2", *nodes).build()
    assert what in str(caught.value)


def test_a_batch_that_would_become_enormous_is_refused_before_it_is_computed(
    archives, tmp_path
) -> None:
    """A graph may behave for the two images of the trial alone."""
    count = node("sym_size.int", X, {"as_int": 0})
    count["outputs"] = [{"as_sym_int": {"as_name": "s"}}]
    less = node("_operator.sub", {"as_sym_int": {"as_name": "s"}}, {"as_int": 2})
    less["outputs"] = [{"as_sym_int": {"as_name": "t"}}]
    some = node("zeros.default", {"as_sym_ints": [{"as_name": "t"}, {"as_int": 10**9}]})
    net = hostile(tmp_path / "x.pt2", archives / "maps.pt2", count, less, some).build()
    with pytest.raises(ValueError, match=r"zeros\.default makes 12,000,000,000 bytes of 5 images"):
        net(torch.zeros(5, 3, SIDE, SIDE))


def with_lying_shapes(name: str, data: bytes) -> bytes:
    return data.replace(b'"sizes": [{"as_int": 6}', b'"sizes": [{"as_int": 60000000}')


@pytest.mark.parametrize("change", [with_lying_shapes])
def test_a_tensor_has_no_more_numbers_than_are_stored(archives, tmp_path, change) -> None:
    place = rewritten(tmp_path / "x.pt2", archives / "maps.pt2", change)
    with pytest.raises(DataError, match=r"has the shape \[60000000, 3, 3, 3\] and 162 numbers"):
        Exported(weights=place, size=SIDE, output="maps").build()


def test_an_archive_that_is_packed_is_refused_unread(archives, tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt2", "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("x/data/weights/weight_0", bytes(1 << 26))
    with pytest.raises(DataError, match=r"67,108,864 bytes unpacked from 6\d,\d+, and torch"):
        Exported(weights=str(tmp_path / "x.pt2")).build()


CRASHED = "it crashed the process that tried it (SIGSEGV)"


@pytest.mark.parametrize(("way", "said"), [
    (lambda: os.kill(os.getpid(), signal.SIGSEGV), CRASHED),
    (lambda: bytearray(1 << 50), "MemoryError"),
    (lambda: [][0], "IndexError: list index out of range"),
    (lambda: None, ""),
])  # fmt: skip
def test_a_trial_that_crashes_leaves_this_process_alone(way, said) -> None:
    assert trial.tried(way) == said


def test_a_trial_that_hangs_is_ended(monkeypatch) -> None:
    monkeypatch.setattr(trial, "WAIT", 0.3)
    assert trial.tried(lambda: signal.pause()) == "it took longer than 0.3 seconds"
