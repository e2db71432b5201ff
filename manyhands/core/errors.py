"""The exception tree.

Every message says three things in this order: the value that was met, the rule it breaks, the remedy.
``exit_code`` is what the command line returns (documented in README.md):

* 0 success, 1 failure, 2 usage, 130 interrupted (SIGINT), 143 terminated (SIGTERM).

Tree::

    ManyhandsError (1)
    ├── UsageError (2)         an option, configuration file or combination of them
    ├── DataError (1)          input text, tables, tokenizers, prepared shards
    ├── ModelError (1)         a model that cannot be built or does not fit its task
    ├── CheckpointError (1)    a checkpoint that is absent, truncated or edited
    ├── OutOfMemory (1)        a pass that found no memory, and that its worker cannot cut
    ├── PeerLost (1)           another worker is gone; carries ``rank`` and ``phase``
    ├── Diverged (1)           workers disagree: unequal requests or unequal parameters
    ├── Superseded (1)         the job that this worker takes part in has begun anew without it
    └── WorkerFailed (1)       a worker that the launcher started ended badly
    Stopped (128 + signal)     a signal asked for an orderly end (a BaseException: nobody swallows it)
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class ManyhandsError(Exception):
    """Base of all errors a user can cause or meet.

    Args:
        value: what was met, in words that contain the offending value.
        rule: the rule that it breaks.
        remedy: what to do about it.
    """

    exit_code = 1

    def __init__(self, value: str, rule: str = "", remedy: str = "") -> None:
        self.value, self.rule, self.remedy = value, rule, remedy
        text = ". ".join(part.rstrip(".") for part in (value, rule, remedy) if part)
        super().__init__(text if text.endswith("?") else text + ".")


class UsageError(ManyhandsError, ValueError):
    """An option, a configuration key or a combination of them that cannot be meant."""

    exit_code = 2


class DataError(ManyhandsError):
    """Input that cannot be read as what it is said to be."""


class ModelError(ManyhandsError):
    """A model that cannot be built, loaded or used for the task."""


class CheckpointError(ManyhandsError):
    """A checkpoint that is absent, truncated, edited or of another job."""


class OutOfMemory(ManyhandsError):
    """A pass found no memory, and this worker cannot go on with smaller ones by itself: a successor may."""


class PeerLost(ManyhandsError):
    """Another worker is gone.

    Attributes:
        rank: the lost worker's rank, or None where the transport cannot tell.
        phase: what this worker was waiting for.
    """

    def __init__(self, rank: int | None, phase: str, detail: str = "") -> None:
        self.rank, self.phase = rank, phase
        who = "a peer" if rank is None else f"worker {rank}"
        super().__init__(
            f"{who} was lost during {phase}" + (f" ({detail})" if detail else ""),
            "every worker must take part in each exchange",
            "see that worker's log for the cause; `--resume` continues from the last checkpoint",
        )


class Diverged(ManyhandsError):
    """Workers that must agree do not."""


class Superseded(ManyhandsError):
    """The job has begun anew: whoever took part in it before, and whoever their launchers would start, is of another one."""


class WorkerFailed(ManyhandsError):
    """A worker process ended badly."""


class Stopped(BaseException):
    """A signal asked for an orderly end. Not an `Exception`, so that no library swallows it.

    Attributes:
        signum: the signal's number; the process exits with ``128 + signum``.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"stopped by {signal.Signals(signum).name}")

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`, as a remedy: "did you mean 'x'?"; else the list of them.

    >>> nearest("adamv", ["sgd", "adamw"])
    "did you mean 'adamw'?"
    >>> nearest("zzz", ["sgd", "adamw"])
    'known: adamw, sgd'
    """
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + (", ".join(options) or "none")
