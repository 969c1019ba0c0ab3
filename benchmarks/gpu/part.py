"""The process of one part: `python part.py NAME[:ARGUMENT...] LOOK`, as `check.py` starts it."""

from __future__ import annotations

import importlib
import json
import sys
import traceback

from look import Look, cores, reason


def main(name: str, given: str) -> int:
    """Run a part; what ends it is its last finding."""
    look = Look(**json.loads(given))
    word, *arguments = name.split(":")
    try:
        import torch

        torch.set_num_threads(1 if look.device == "cpu" else min(8, cores()))
        importlib.import_module(f"parts.{word}").run(look, *arguments)
    except BaseException as error:
        traceback.print_exc()
        look.note(ok=False, error=reason(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
