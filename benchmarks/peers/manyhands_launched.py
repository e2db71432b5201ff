"""`manyhands_loop.py` as users of manyhands start workers: its launcher (which pins them) and its allocator.

python benchmarks/peers/manyhands_launched.py --setting DIR --steps 12 --workers 2 --bf16 [--compile]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path


def worker(argument: str) -> int:
    """One worker; `argument` is the loop's command line, in JSON."""
    from manyhands.core.native import enable_allocator

    enable_allocator()  # as `manyhands train` does, before the first tensor
    import manyhands_loop

    sys.argv = ["manyhands_loop", *json.loads(argument)]
    manyhands_loop.main()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    given, loop = parser.parse_known_args()
    from manyhands.launch.local import launch

    with tempfile.TemporaryDirectory() as output:
        # one thread each, pinned to a core, as `manyhands train` has it with a worker for each core
        code = launch(
            "manyhands_launched:worker",
            json.dumps(loop),
            workers=given.workers,
            threads=1,
            output=Path(output),
        )
        print((Path(output) / "logs" / "rank-0.log").read_text(), end="")
    return code


if __name__ == "__main__":
    sys.exit(main())
