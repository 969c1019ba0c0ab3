"""Take secrets and names of persons and machines out of texts that leave this machine."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from e2ediff.store.environment import SECRET, masked

HIDDEN = "***"

# Names that many machines share; in a recipe, `root` is an option.
_COMMON = {"root", "user", "admin", "ubuntu", "debian", "nobody", "runner", "home", "localhost"}
_SHORTEST = 3

_WORD = rf"[\w.\-]*{SECRET.pattern.removeprefix('(?i)').replace('(', '(?:')}[\w.\-]*"
_VALUE = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'])*'|\[[^\]]*\]|[^\s,}\]#][^,}\]#\n]*"
_ASSIGNED = re.compile(rf"(?i)([\"']?{_WORD}[\"']?\s*[:=][ \t]*)({_VALUE})")
_BLOCK = re.compile(rf"(?i)^(\s*)(?:- )?[\"']?{_WORD}[\"']?\s*:\s*[|>]?[+-]?\s*(#.*)?$")
_PLAIN = re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?|true|false|null|~|[\[{]\s*|auto", re.IGNORECASE)
_URL_USER = re.compile(r"(?<=://)[^/@\s\"']+@")
_URL_QUERY = re.compile(r"(://[^\s\"'?]+)\?[^\s\"']+")
_HOMES = re.compile(r"(?:/home|/Users|[A-Z]:\\+Users)[/\\]+[^/\\\s\"',:;)]+")
# The shapes of tokens of Hugging Face, GitHub, AWS, OpenAI and the like, and of JSON web tokens.
_TOKEN = re.compile(
    r"\b(?:hf_|gh[pousr]_|github_pat_|sk-|xox[abp]-|glpat-|pypi-)[\w\-]{8,}"
    r"|\bAKIA[0-9A-Z]{12,}|\beyJ[\w\-]{10,}\.[\w\-.]+"
)


class Scrubber:
    """Replaces in texts the home by `~`, names of user and host, and whatever looks secret."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._literal: list[tuple[str, str]] = []
        for name, value in environment.items():
            if SECRET.search(name) and len(value) >= 6:
                self._literal.append((value, HIDDEN))
        homes = {os.path.expanduser("~"), environment.get("HOME", "")}
        homes |= {os.path.realpath(home) for home in homes if home}
        self._literal += [(home, "~") for home in homes if len(home) > 1]
        # The longest first, so that none is cut by a part of it.
        self._literal.sort(key=lambda pair: -len(pair[0]))
        self._names = [(re.compile(rf"(?i){re.escape(name)}"), instead) for name, instead in
                       _names(environment)]  # fmt: skip

    def text(self, text: str) -> str:
        """Return a text, of any format, without them."""
        return self._names_hidden("\n".join(_lines(text.split("\n"))))

    def json(self, value: Any) -> Any:
        """Return a value of JSON without them, in its keys and texts."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {
                self.text(str(key)): _hidden(inner)
                if SECRET.search(str(key))
                else self.json(inner)
                for key, inner in value.items()
            }
        if isinstance(value, Sequence):
            if all(isinstance(item, str) for item in value):
                value = masked(value)
            return [self.json(item) for item in value]
        return value

    def json_line(self, line: str) -> str:
        """Return a line of JSON without them; as plain text if it is damaged."""
        with contextlib.suppress(ValueError, RecursionError):
            return json.dumps(self.json(json.loads(line)))
        return self.text(line)

    def _names_hidden(self, text: str) -> str:
        for value, instead in self._literal:
            text = text.replace(value, instead)
        text = _HOMES.sub("~", text)
        text = _URL_QUERY.sub(rf"\1?{HIDDEN}", _URL_USER.sub(f"{HIDDEN}@", text))
        text = _TOKEN.sub(HIDDEN, text)
        for pattern, instead in self._names:
            text = pattern.sub(instead, text)
        return text


def _names(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the names of the user and the host, and what stands for them."""
    users = {environment.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    with contextlib.suppress(Exception):  # there may be no entry for this user
        users.add(getpass.getuser())
    with contextlib.suppress(ImportError, KeyError):
        import pwd  # not on Windows

        entry = pwd.getpwuid(os.getuid())
        users |= {entry.pw_name, entry.pw_gecos.partition(",")[0]}
    hosts = {socket.gethostname(), environment.get("HOSTNAME", "")}
    hosts |= {host.partition(".")[0] for host in hosts}
    for names, instead in ((hosts, "<host>"), (users, "<user>")):
        for name in sorted(names, key=len, reverse=True):
            if len(name) >= _SHORTEST and name.lower() not in _COMMON:
                yield name, instead


def _lines(lines: Sequence[str]) -> Iterator[str]:
    """Yield lines of YAML or of other text with the values of secret keys hidden."""
    below: int | None = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if below is not None and line.strip() and indent > below:
            yield " " * indent + HIDDEN
            continue
        match = _BLOCK.match(line)
        below = len(match[1]) if match else None
        yield line if match else _ASSIGNED.sub(_assigned, line)


def _assigned(match: re.Match[str]) -> str:
    return match[0] if _PLAIN.fullmatch(match[2].strip()) else f"{match[1]}{HIDDEN}"


def _hidden(value: Any) -> Any:
    """Return what is under a secret key without its texts."""
    if isinstance(value, str):
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(key): _hidden(inner) for key, inner in value.items()}
    return [_hidden(item) for item in value] if isinstance(value, list) else value
