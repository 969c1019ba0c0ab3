"""Describe where a run takes place: versions, hardware, commit; no host, user or secrets."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

import safetensors
import torch

import e2ediff
from e2ediff.store.storage import JSON

SECRET = re.compile(r"(?i)(key|token|secret|passw|credential)")
"""What the names of secrets have in them."""

# Settings of the repository itself, rather than of its user, by which git starts programs as it
# compares files, or as it fetches objects that are not there.
_STARTS_PROGRAMS = re.compile(
    r"(?im)^(local|worktree)\t(filter\.|extensions\.partialclone|remote\..*\.promisor)"
)


def describe_environment(
    seeds: Mapping[str, int] | None = None,
    plugins: Mapping[str, str] | None = None,
    device: str = "cpu",
    argv: Sequence[str] | None = None,
) -> dict[str, JSON]:
    """Describe the environment for `run.json`; no host name, no user, secrets in `argv` masked.

    Only a CUDA device is asked for its name, as that initialises CUDA.
    """
    hardware: dict[str, JSON] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if torch.device(device).type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
        hardware["gpus"] = torch.cuda.device_count()
    return {
        "argv": masked(sys.argv if argv is None else argv),
        "versions": {**versions(), "cuda": torch.version.cuda},
        "plugins": dict(plugins or {}),
        "git": _git(),
        "hardware": hardware,
        "seeds": dict(seeds or {}),
    }


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a checkpoint's bits depend on."""
    return {
        "e2ediff": e2ediff.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "safetensors": safetensors.__version__,
    }


def machine() -> str:
    """Return a hash that identifies the machine without naming it."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]


def masked(argv: Sequence[str]) -> list[str]:
    """Return the words of a command without passwords, tokens and keys."""
    shown: list[str] = []
    hide_next = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if hide_next and not word.startswith("-"):
            shown.append("***")
        elif equals and SECRET.search(name):
            shown.append(f"{name}=***")
        else:
            shown.append(re.sub(r"(?<=://)[^/@\s]+@", "***@", word))
        hide_next = word.startswith("-") and not equals and bool(SECRET.search(word))
    return shown


def _git() -> dict[str, JSON] | None:
    """Return the commit of the working directory, and whether files differ from it.

    Somebody else may have packed the folder with its `.git`, whose configuration can name programs
    that `git status` starts: where it has some that cannot be disabled, `dirty` is None.
    """

    def ask(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *words]
        return subprocess.run(  # noqa: S603 - the arguments are the lines below
            command, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()

    try:
        commit = ask("rev-parse", "HEAD")
        settings = ask("config", "--list", "--name-only", "--show-scope")
        if _STARTS_PROGRAMS.search(settings):
            return {"commit": commit, "dirty": None}
        # A submodule's own configuration is not seen here, so git must not look into its files.
        words = ("status", "--porcelain", "-uno", "--ignore-submodules=dirty")
        return {"commit": commit, "dirty": bool(ask(*words))}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
