"""Pack what a report of a bug needs, without secrets and without names of persons or machines."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections import deque
from collections.abc import Sequence
from importlib import metadata

import attrs

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.doctor.finding import Finding
from e2ediff.doctor.scrubbing import Scrubber
from e2ediff.host.plugins import Host
from e2ediff.store.environment import describe_environment
from e2ediff.store.run_directory import (
    EVENTS,
    METRICS,
    RECIPE,
    RESOLVED,
    RUN,
    STATUS,
    RunDirectory,
)
from e2ediff.store.storage import Store

_LINES = 200
_LIMIT = 1 << 24  # bytes of a file of the run that are read


def write_bundle(
    place: Address, host: Host, findings: Sequence[Finding], run: str | None
) -> list[tuple[str, int]]:
    """Write a zip; return its members with their sizes.

    Args:
        place: The file, replaced if it exists.
        host: Has the plugins.
        findings: What `examine` found.
        run: The directory of a run whose recipe and records are packed, too; of events and
            figures the last lines.

    Raises:
        RunDirectoryError: There is no run.
        ResourceError: The file cannot be written.
    """
    scrubber = Scrubber()
    members = {
        "doctor.json": _json(scrubber, [attrs.asdict(finding) for finding in findings]),
        "environment.json": _json(scrubber, describe_environment()),
        "packages.txt": scrubber.text("\n".join(_packages())),
        "plugins.json": _json(
            scrubber,
            [
                {
                    "name": entry.name,
                    "distribution": entry.distribution,
                    "version": entry.version,
                    "fault": str(host.broken.get(entry.name, "")),
                }
                for entry in host.entries
            ],
        ),
    }
    if run is not None:
        members |= _of_run(scrubber, run)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(zipfile.ZipInfo(name), text)  # dated 1980
    folder, file = os.path.split(addresses.plain(place))
    Store(folder or os.curdir, "--bundle").write(file, packed.getvalue())
    return [(name, len(text.encode())) for name, text in members.items()]


def _json(scrubber: Scrubber, value: object) -> str:
    return json.dumps(scrubber.json(value), indent=1) + "\n"


def _packages() -> list[str]:
    found = {
        f"{distribution.metadata['Name']} {distribution.version}"
        for distribution in metadata.distributions()
    }
    return sorted(found, key=str.lower)


def _of_run(scrubber: Scrubber, run: str) -> dict[str, str]:
    """Return the records of a run; also of one that cannot be opened, as one of them is damaged.

    Raises:
        RunDirectoryError: There is none.
    """
    store, found = Store(run), dict[str, str]()
    for file in (RECIPE, RESOLVED, RUN, STATUS, EVENTS, METRICS):
        if not store.exists(file):
            continue
        try:
            if file in (EVENTS, METRICS):
                lines = [line.decode(errors="replace") for line in _last_lines(store, file)]
                text = "".join(scrubber.json_line(line) + "\n" for line in lines)
            else:
                text = store.read(file, _LIMIT).decode(errors="replace")
                whole = file in (RUN, STATUS)
                text = scrubber.json_line(text) + "\n" if whole else scrubber.text(text)
        except OSError as error:
            text = f"cannot be read: {error.strerror}\n"
        found[f"run/{file}"] = text
    if not found:
        RunDirectory.open(run)  # says what is there instead
    return found


def _last_lines(store: Store, file: str) -> list[bytes]:
    """Return the last lines of a file of any length."""
    return [*deque((line for _, line in store.lines(file, torn=True)), _LINES)]
