"""Join a job that another launcher started: torchrun, srun, mpirun, anything that sets RANK and WORLD_SIZE."""

from __future__ import annotations

import sys
import traceback

from manyhands.core.errors import ManyhandsError, PeerLost, Stopped
from manyhands.core.registry import resolve_target


def join(entry: str, argument: str) -> int:
    """Run `entry` in this process as one worker; returns the exit code. The launcher watches the others."""
    try:
        return int(resolve_target(entry)(argument) or 0)
    except Stopped as stopped:
        return stopped.exit_code
    except ManyhandsError as error:
        kind = "lost a peer" if isinstance(error, PeerLost) else "failed"
        print(f"manyhands: this worker {kind}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1
