"""A local server of the S3 protocol whose buckets fail or lag, as their names say.

`python -m benchmarks.reliability.moto_server PORT`. In a bucket `fail-...` a twentieth of the
requests are refused with 503, before or after they were carried out; in `lag-...` they take up to
a tenth of a second. What befalls which request follows from the bucket's name.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

RATE = 0.05


class Weather:
    """WSGI around a server, which fails or lags by the names of its buckets."""

    def __init__(self, server: Callable[..., Iterable[bytes]]) -> None:
        self.server = server
        self.chances: dict[str, random.Random] = {}

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        bucket, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
        chance = self.chances.setdefault(bucket, random.Random(bucket))
        if bucket.startswith("lag-"):
            time.sleep(chance.uniform(0, 0.1))
        if bucket.startswith("fail-") and (key or environ["QUERY_STRING"]):
            luck = chance.random()
            if luck < RATE / 2:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                return _refuse(start)
            if luck < RATE:  # it is done, and the answer is lost
                for _ in self.server(environ, lambda *given: lambda data: None):
                    pass
                return _refuse(start)
        return self.server(environ, start)


def _refuse(start: Callable[..., Any]) -> list[bytes]:
    start("503 Slow Down", [("Content-Type", "application/xml")])
    return [b"<Error><Code>SlowDown</Code><Message>made up by the harness</Message></Error>"]


def main(port: int) -> None:
    """Serve until this process is ended."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    app = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", port, Weather(app), threaded=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
