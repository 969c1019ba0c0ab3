"""Training steps of other projects, from a checkout that the user has, at a size of ours.

All get six blocks of width 384, 256 tokens and 1,000 classes, torch's fused AdamW, and their own
losses, conditioning and averages. Images or latents are random.
What needs weights or packages that are not part of a step is left out: UNITE's LPIPS is 0, and
solvers, downloads and model parallelism of fairscale are empty modules. On a CPU JiT's tables stay
there, and torch's attention is in place of its own, which puts a mask on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
import types
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import attrs
import click
import torch
from torch import Tensor, nn

WIDTH, DEPTH, HEADS, SIDE, CLASSES = 384, 6, 6, 16, 1000
_ABSENT = ("torchdiffeq", "requests", "fairscale", "tqdm", "wandb")


@attrs.frozen(eq=False)
class Peer:
    """A network of another project: its losses on a batch, and how its average moves."""

    name: str
    net: nn.Module
    loss: Callable[[], Tensor]
    average: Callable[[], None]
    clip: float


PROJECTS = {
    "ldm_is_ae/denoiser.py": "LDMisAE",
    "models/unite.py": "UNITE",
    "models/lightningdit.py": "LightningDiT",
    "meanflow_sampler.py": "MeanFlow",
    "models/meanflow.py": "py-meanflow",
    "train_repae.py": "REPA-E",
    "model_jit.py": "JiT",
    "models.py": "SiT",
    "taming/modules/losses/vqperceptual.py": "taming-transformers",
}


def project_in(path: str, among: Collection[str] = tuple(PROJECTS.values())) -> str:
    """Return which of these projects the checkout at `path` is, by its files.

    Raises:
        click.UsageError: The folder is missing, or none of them.
    """
    root = Path(path)
    if not root.is_dir():
        raise click.UsageError(f"--peer {path}: there is no such folder.")
    found = next((name for file, name in PROJECTS.items() if (root / file).exists()), None)
    if found not in among:
        *others, last = [name for name in PROJECTS.values() if name in among]
        raise click.UsageError(f"--peer {path}: is no checkout of {', '.join(others)} or {last}.")
    return found


def find_peer(path: str) -> Callable[[int, torch.device], Peer]:
    """Return what builds the network of the project in this checkout.

    Raises:
        click.UsageError: The folder is missing, or none of the projects that are known here.
    """
    known = {"UNITE": _unite, "LightningDiT": _lightning, "JiT": _jit, "SiT": _sit}
    return known[project_in(path, tuple(known))]


@contextlib.contextmanager
def imports_of(path: str, device: torch.device, *, compiled: bool = False) -> Iterator[None]:
    """Let a checkout's modules be imported inside `with`, and networks of theirs be built.

    Each time they are imported anew: some compile functions as they define them, which is done if
    `compiled` and not otherwise. What they move to a GPU stays where it is if `device` is a CPU.

    Raises:
        click.UsageError: A package that they need is missing.
    """
    root = Path(path).resolve()
    for name, module in [*sys.modules.items()]:
        file = Path(getattr(module, "__file__", None) or "/")
        if root in file.parents and "site-packages" not in file.parts:
            del sys.modules[name]
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    for name in _ABSENT:
        _stand_in(name)
    try:
        with _as_it_is(not compiled), _on_a_cpu(device):
            yield
    except ModuleNotFoundError as error:
        raise click.UsageError(f"{path} needs {error.name}: pip install {error.name}") from error


def load_peer(path: str, batch: int, device: torch.device, *, compiled: bool) -> Peer:
    """Import a project from its checkout, and build its network at our size.

    Each call imports it anew, as `imports_of` says.

    Raises:
        click.UsageError: The folder is none of the projects that are known here, or a package
            that its network needs is missing.
    """
    build = find_peer(path)
    with imports_of(path, device, compiled=compiled):
        peer = build(batch, device)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in peer.net.parameters():
            if p.requires_grad and not p.any():
                p.copy_(0.02 * torch.randn(p.shape, generator=g))
    return peer


@contextlib.contextmanager
def _as_it_is(wanted: bool) -> Iterator[None]:
    """Let `torch.compile` leave what is defined inside `with` as it is."""
    decorator = torch.compile
    if wanted:
        torch.compile = lambda fn=None, **_: fn if fn is not None else (lambda f: f)
    try:
        yield
    finally:
        torch.compile = decorator


@contextlib.contextmanager
def _on_a_cpu(device: torch.device) -> Iterator[None]:
    """Let tensors stay where they are inside `with`, if that is a CPU."""
    move = torch.Tensor.cuda
    if device.type == "cpu":
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = move  # type: ignore[method-assign]


def stepper(peer: Peer) -> Callable[[], None]:
    """Return a function that takes a training step of a peer again and again."""
    trained = [p for p in peer.net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        peer.loss().backward()
        if peer.clip:
            torch.nn.utils.clip_grad_norm_(trained, peer.clip)
        optimizer.step()
        peer.average()

    return step


class _Nothing(types.ModuleType):
    """A module in which every name is a class that does nothing."""

    __path__: list[str] = []  # noqa: RUF012 - as of a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _stand_in(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        inner = ("nn", "nn.model_parallel", "nn.model_parallel.layers",
                 "nn.model_parallel.initialize")  # fmt: skip
        for full in (name, *(f"{name}.{one}" for one in inner if name == "fairscale")):
            sys.modules[full] = module = _Nothing(full)
            above, _, last = full.rpartition(".")
            if above:
                setattr(sys.modules[above], last, module)


def _plain_average(net: nn.Module, decay: float) -> Callable[[], None]:
    """The loop over named parameters that all these projects have."""
    kept = copy.deepcopy(net).requires_grad_(requires_grad=False)

    @torch.no_grad()
    def move() -> None:
        mine = dict(kept.named_parameters())
        for name, p in net.named_parameters():
            mine[name].mul_(decay).add_(p.data, alpha=1 - decay)

    return move


def _labels(batch: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device) % CLASSES


class NoLPIPS(nn.Module):
    """In the place of UNITE's LPIPS, whose network is a download: 0."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return 0."""
        return b.new_zeros(())


def _unite(batch: int, device: torch.device) -> Peer:
    from models import unite  # type: ignore[import-not-found]

    unite.LPIPS = NoLPIPS
    unite.ENCODER_CONFIGS["Base"] = (DEPTH, WIDTH, HEADS)
    unite.DECODER_CONFIGS["Base"] = (DEPTH, WIDTH, HEADS, 4 * WIDTH)
    root = Path(unite.__file__).parent.parent
    import yaml

    config = yaml.safe_load((root / "configs/imagenet.yaml").read_text(encoding="utf-8"))
    options = {**config["gen_tok"], "flow_steps_per_recon": 1}
    net = unite.UNITE(options).to(device).train()
    x, y = torch.rand(batch, 3, 256, 256, device=device), _labels(batch, device)
    decay = config["training"]["ema_decay"]
    clip = config["training"]["clip_grad"]
    return Peer("unite", net, lambda: net(x, y)[0], _plain_average(net, decay), clip)


def _transported(name: str, net: nn.Module, channels: int, batch: int, device: torch.device,
                 **options: Any) -> Peer:  # fmt: skip
    from transport import create_transport  # type: ignore[import-not-found]

    transport = create_transport(**options)
    side = SIDE * net.patch_size
    z, y = torch.randn(batch, channels, side, side, device=device), _labels(batch, device)

    def loss() -> Tensor:
        found: Tensor = transport.training_losses(net, z, {"y": y})["loss"].mean()
        return found

    return Peer(name, net, loss, _plain_average(net, 0.9999), 0.0)


def _sit(batch: int, device: torch.device) -> Peer:
    from models import SiT  # type: ignore[import-not-found]

    net = SiT(input_size=2 * SIDE, patch_size=2, in_channels=4, hidden_size=WIDTH, depth=DEPTH,
              num_heads=HEADS, num_classes=CLASSES).to(device).train()  # fmt: skip
    return _transported("sit", net, 4, batch, device)


def _lightning(batch: int, device: torch.device) -> Peer:
    from models.lightningdit import LightningDiT  # type: ignore[import-not-found]

    net = LightningDiT(
        input_size=SIDE, patch_size=1, in_channels=32, hidden_size=WIDTH, depth=DEPTH,
        num_heads=HEADS, num_classes=CLASSES, use_qknorm=False, use_swiglu=True, use_rope=True,
        use_rmsnorm=True,
    ).to(device).train()  # fmt: skip
    return _transported(
        "lightningdit", net, 32, batch, device, use_cosine_loss=True, use_lognorm=True
    )


def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """In the place of JiT's attention, which puts a mask on a GPU: torch's."""
    return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


def _jit(batch: int, device: torch.device) -> Peer:
    import model_jit  # type: ignore[import-not-found]
    from denoiser import Denoiser  # type: ignore[import-not-found]

    if device.type == "cpu":
        model_jit.scaled_dot_product_attention = attend
    model_jit.JiT_models["small"] = lambda **options: model_jit.JiT(
        depth=DEPTH, hidden_size=WIDTH, num_heads=HEADS, bottleneck_dim=128, patch_size=16,
        in_context_len=32, in_context_start=4, **options,
    )  # fmt: skip
    args = types.SimpleNamespace(
        model="small", img_size=256, class_num=CLASSES, attn_dropout=0.0, proj_dropout=0.0,
        label_drop_prob=0.1, P_mean=-0.8, P_std=0.8, t_eps=5e-2, noise_scale=1.0,
        ema_decay1=0.9999, ema_decay2=0.9996, sampling_method="heun", num_sampling_steps=50,
        cfg=1.0, interval_min=0.0, interval_max=1.0,
    )  # fmt: skip
    net = Denoiser(args).to(device).train()
    x, y = torch.rand(batch, 3, 256, 256, device=device) * 2 - 1, _labels(batch, device)
    first, second = _plain_average(net, 0.9999), _plain_average(net, 0.9996)
    return Peer("jit", net, lambda: net(x, y), lambda: (first(), second())[0], 0.0)


def compile_networks(peer: Peer) -> None:
    """Compile what holds nearly all of a peer's work: encoder and decoder, or the network."""
    inner = [m for n, m in peer.net.named_children() if n in ("encoder", "decoder", "net")]
    for module in inner or [peer.net]:
        module.compile()
