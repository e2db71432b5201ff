"""How a shard survives: events to the journal, snapshots beside the work, and the way back from both."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core.errors import CheckpointError, ManyhandsError
from manyhands.serve import protocol
from manyhands.serve.journal import Journal, Level, replayed
from manyhands.serve.members import Member
from manyhands.serve.rules import Push, Rules
from manyhands.serve.singly import behind, flush, take, take_kept
from manyhands.serve.store import Store, split
from manyhands.serve.together import apply_round

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.serve.shard import Shard

LOG_FACTOR = 12  # a log of so many parameters' sizes is folded into a snapshot
LOG_LEAST = 256 << 20
FIGURES = (
    "version",
    "step",
    "progress",
    "tokens",
    "loss",
    "count",
    "discarded",
    "skipped",
    "last",
    "applied",
    "left",
    "earlier",
    "halted",
    "lost",
    "unused",
    "judged",
    "unsound",
)


class Keeper:
    """Writes what a shard must not forget.

    Args:
        interval_s: between snapshots.
    """

    def __init__(self, journal: Journal, interval_s: float, log: Callable[[str], None]) -> None:
        self._journal, self._interval_s, self._log = journal, interval_s, log
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._writing: Future[None] | None = None
        self._snapshot_s = time.monotonic()
        self._again_bytes = 0  # of the log's: what was in the log before

    def record(self, header: Mapping[str, Any], payload: Tensor | None, level: Level) -> None:
        """Append an event. Raises `CheckpointError`."""
        self._journal.record(header, None if payload is None else protocol.view(payload), level)

    def due(self, size_bytes: int) -> bool:
        """Whether it is time for a snapshot of parameters of this size."""
        if self._writing is not None and not self._writing.done():
            return False
        old = time.monotonic() - self._snapshot_s > self._interval_s
        new_bytes = self._journal.log_bytes - self._again_bytes
        return old or new_bytes > max(LOG_LEAST, LOG_FACTOR * size_bytes)

    @property
    def keeps(self) -> bool:
        """Whether all that was acknowledged survives a restart."""
        return self._journal.durability != "interval"

    def snapshot(self, shard: Shard, *, wait: bool = False) -> None:
        """Copy everything now (under the shard's lock); write it on a thread of its own, or `wait` for it."""
        if self._writing is not None:
            self._writing.exception()  # waits; a failure was logged
        self._snapshot_s = time.monotonic()
        try:
            number = self._journal.rotate()
            # of several servers: they wait for their second half
            for push, payload in shard.pending.values():
                self.record({"op": "stage", **push.header()}, payload, "push")
            self._again_bytes = self._journal.log_bytes
        except ManyhandsError as error:
            self._log(f"no snapshot, the logs go on: {error}")
            if wait:
                raise
            return
        state, tensors = state_of(shard), shard.ready().tensors()
        self._writing = self._writer.submit(self._write, number, state, tensors, wait)
        if wait:
            self._writing.result()

    def close(self) -> None:
        self._writer.shutdown()
        self._journal.close()

    def _write(self, number: int, state: dict[str, Any], tensors: dict[str, Tensor], strict: bool) -> None:
        try:
            self._journal.install(number, state, tensors)
        except ManyhandsError as error:
            self._log(f"snapshot {number} failed, the log goes on: {error}")
            if strict:
                raise


def opened(shard: Shard, journal: Journal, interval_s: float, log: Callable[[str], None]) -> Keeper:
    """Bring `shard` to where the journal ends, and keep it from then on. Raises `CheckpointError`."""
    keeper = Keeper(journal, interval_s, log)
    try:
        with shard.cond:
            if recover(shard, journal, log):
                journal.rotate()
                log(f"continues with update {shard.version}, {len(shard.members)} members")
    except BaseException:
        keeper.close()
        raise
    return keeper


def status_of(shard: Shard) -> dict[str, Any]:
    """Figures for people."""
    return {
        "job": shard.header.get("job", ""),
        "version": shard.version,
        "updates": shard.earlier + shard.version,
        "members": {who: m.clock for who, m in sorted(shard.members.items())},
        "tokens": shard.tokens,
        "staleness": {str(k): n for k, n in sorted(shard.staleness.items())},
        "discarded": shard.discarded,
        "skipped": shard.skipped,
        "parameter_bytes": shard.size_bytes,
    }


def state_of(shard: Shard) -> dict[str, Any]:
    """Everything but the tensors, as JSON data."""
    return {
        **shard.header,
        **{name: getattr(shard, name) for name in FIGURES},
        "staleness": {str(k): n for k, n in shard.staleness.items()},
        "applied": dict(shard.applied),  # copies: these change while the snapshot is written
        "left": dict(shard.left),
        "judged": dict(shard.judged),
        "unsound": dict(shard.unsound),
        "unused": {who: list(steps) for who, steps in shard.unused.items()},
        "wishes": dict(vars(shard.wishes)),
        "order": list(shard.ready().params),
        "members": {who: [m.clock, m.loss, m.count] for who, m in shard.members.items()},
    }


def recover(shard: Shard, journal: Journal, log: Callable[[str], None]) -> bool:
    """Bring `shard` to where the journal ends; False where nothing was kept.

    Raises:
        CheckpointError: the snapshot is damaged, or a log, so that what it says after that makes no sense.
    """
    found = journal.recover()
    if found is None:
        return False
    try:
        _restore(shard, *found, log)
    except (LookupError, TypeError, ValueError, RuntimeError, ManyhandsError) as error:
        raise CheckpointError(
            f"{journal.directory}: what was kept cannot be done again ({type(error).__name__}: {error})",
            "snapshot and logs are as they were written",
            "give an empty --state, and continue from the last checkpoint with --resume",
        ) from error
    return True


def _restore(
    shard: Shard,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    logs: Sequence[Path],
    log: Callable[[str], None],
) -> None:
    params, optimizer, backups = split(tensors)
    shard.store = Store(Rules.read(state["rules"]), {n: params[n] for n in state["order"]}, optimizer)
    shard.store.backups = backups
    shard.header = {key: state[key] for key in ("job", "serial", "rules")}
    shard.header["part"] = state.get("part", 0)
    for figure in FIGURES:
        if figure in state:  # an earlier version's state lacks some
            setattr(shard, figure, state[figure])
    shard.staleness = Counter({int(k): n for k, n in state["staleness"].items()})
    vars(shard.wishes).update(state["wishes"])
    shard.members = {
        who: Member(clock, loss=loss, count=count) for who, (clock, loss, count) in state["members"].items()
    }
    for header, payload in replayed(logs, log):
        replay(shard, header, payload)


def replay(shard: Shard, event: Mapping[str, Any], payload: Tensor) -> None:
    """Do once more what the journal tells."""
    store, op = shard.ready(), event["op"]
    if op == "join":
        shard.members[event["member"]] = Member(event["step"], loss=shard.loss, count=shard.count)
    elif op == "leave":
        shard.forget(event["member"])
    elif op == "pull":
        store.keep_backup(event["member"])
    elif op == "flush":
        flush(shard)
    elif op == "halt":
        shard.halted = True
    elif op == "commit":
        shard.wishes.answered = max(shard.wishes.answered, event["step"])
        if event["member"] in shard.pending:  # else the record of its first half was damaged
            take_kept(shard, event["member"], event["staleness"])
    elif op in ("push", "stage"):
        push = Push.read(event, len(store.layout.entries))
        if "wishes" in event:
            vars(shard.wishes).update(event["wishes"])
        elif op == "push":  # of an earlier version
            shard.wishes.hear(push.step, stop=push.stop, save=push.save, change=push.change)
        if op == "push":
            shard.wishes.answered = max(shard.wishes.answered, push.step)
        if store.rules.sync or op == "stage":
            shard.pending[push.member] = (push, payload)
        else:
            take(shard, push, payload, behind(shard, push))
    elif op == "round":
        shard.step = event["step"]
        for who in event["members"]:
            store.add(*shard.pending[who])
        shard.folded = list(event["members"])
        apply_round(shard, event["norm_sq"])
