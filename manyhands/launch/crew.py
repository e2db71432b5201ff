"""The workers of one launch: started, watched, replaced, ended."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.coordinate.words import during
from manyhands.core import hardware
from manyhands.core.passes import told
from manyhands.launch import child, guard, place
from manyhands.launch.nursery import Nursery
from manyhands.launch.terminal import Requests
from manyhands.launch.verdict import End, back_off, cause, final, killed
from manyhands.launch.worker import Worker, nap

if TYPE_CHECKING:
    from manyhands.core.membership import Loss
    from manyhands.launch.control import Control, Elastic
    from manyhands.launch.served import ServerProcesses

GRACE_S = 10.0  # between SIGTERM and SIGKILL for the peers of a failed worker
POLL_S = 0.02
ALIKE_S = 1.0  # before a job's first step: how long others' like failures are awaited until one is replaced
HEALTHY_S = 600.0  # of life, after which a worker's replacements are counted anew


@dataclass
class Crew:
    """See the module.

    Attributes:
        told_s: when this launcher began to end the workers itself.
        hopeless: a worker failed before the first step in a way that no other attempt would mend.
    """

    requests: Requests
    watcher: subprocess.Popen[bytes]
    entry: str
    logs: Path
    console: int
    servers: ServerProcesses | None = None
    control: Control | None = None
    elastic: Elastic | None = None
    prefix: str = ""
    workers: list[Worker] = field(default_factory=list)
    told_s: float | None = None
    hopeless: bool = False
    _variables: dict[int, dict[str, str]] = field(default_factory=dict)
    _spent: Counter[int] = field(default_factory=Counter)  # replacements, by rank
    _known: dict[str, tuple[str, str]] = field(
        default_factory=dict
    )  # by id: its end, and what is done about it
    _losses: dict[str, Loss] = field(default_factory=dict)  # by id: what the coordinator knows of it
    _untold: dict[str, str] = field(
        default_factory=dict
    )  # by id: the line that the job's display says instead
    _held: list[tuple[float, Worker, str, str]] = field(
        default_factory=list
    )  # failures until they are replaced
    _nursery: Nursery | None = None
    _without: bool = False  # the coordinator is not reached, which was told
    _kills_before: int = field(default_factory=lambda: hardware.oom_kills())
    _kills_told: int = 0  # of the kernel's since then, by which the ends of workers are explained
    _pass_rows: dict[int, int] = field(default_factory=dict)  # by rank: the most rows of a pass from now on
    _forwarded: int = 0

    def name(self, rank: int, generation: int) -> str:
        """A worker's id in the job."""
        first = f"{self.prefix}{rank}" if self.prefix else f"w{rank}"
        return f"{first}-{generation}" if generation else first

    def prepare(self, variables: Mapping[str, str]) -> None:
        """Before the first start: import once what all of them need, where they can be forked."""
        if self.elastic is not None and self.elastic.warm:
            self._nursery = Nursery(
                self.elastic.warm,
                self.entry,
                log=self.logs / f"{self.prefix}imports.log",
                files=[self.console],
                tell=self.tell,
            )
            self._nursery.open(variables, unless=lambda: self.requests.stop)

    def start(self, rank: int, variables: dict[str, str], generation: int = 0) -> None:
        """Start a worker: of the waiting process, if there is one, else a new interpreter."""
        label = f"{self.prefix or 'rank-'}{rank}"
        log, error = self.logs / f"{label}.log", self.logs / f"{label}.error.json"
        with contextlib.suppress(OSError):
            error.unlink()
        self._variables[rank] = variables
        id = self.name(rank, generation)
        mine = {**variables, "MANYHANDS_ERROR_FILE": str(error.absolute())}
        if self.control is not None:
            mine |= {**self.control.variables, "MANYHANDS_SEAT": id}
            if not self._shown():
                mine["MANYHANDS_TOLD"] = self.prefix or "w"
        if rank in self._pass_rows:
            mine["MANYHANDS_PASS_ROWS"] = str(self._pass_rows[rank])
        if self.control is not None or rank == 0:  # any worker may become the first
            mine["MANYHANDS_CONSOLE"] = str(self.console)
        log = place.writable(log)
        begin = log.stat().st_size
        process = self._nursery.wake(mine, log) if self._nursery is not None else None
        if process is None:
            with log.open("ab") as sink:
                process = subprocess.Popen(
                    [sys.executable, *place.flags(), "-c", child.BOOT, os.pathsep.join(sys.path), self.entry],
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    env=mine,
                    pass_fds=[self.console] if "MANYHANDS_CONSOLE" in mine else [],
                    start_new_session=True,  # a Ctrl-C reaches us alone, and we hand it on once
                )
        self.tell(f"started {process.pid}")
        self.workers.append(Worker(rank, generation, id, process, log, begin, error))

    def watch(self) -> None:
        """Until all have ended."""
        while True:
            for worker in list(self.workers):
                if worker.ended_s is None and worker.process.poll() is not None:
                    worker.ended_s = time.time()
                    self._ended(worker)
            self._hear()
            for worker in self.workers:
                worker.expire()
            self._tell_gone()
            self._let_go()
            if not self._held and all(worker.ended_s is not None for worker in self.workers):
                return
            self._serve()
            if self.servers is not None and self.told_s is None and not self.servers.watch():
                self._give_up()
            self._keep_nursery()
            if self.told_s is not None and time.time() - self.told_s > GRACE_S:
                self._signal(signal.SIGKILL)
            nap(self.workers, POLL_S)

    def _tell_gone(self) -> None:
        """Once when the coordinator is no longer reached, and once when it is again."""
        why = self.control.gone if self.control is not None else ""
        if bool(why) == self._without:
            return
        self._without = bool(why)
        line = "manyhands: the coordinator is reached again"
        if why:
            line = (
                f"manyhands: the coordinator is not reached ({why}). The workers go on until one comes, leaves or is lost, and "
                "then wait for it for a minute: start it again with the same --output"
            )
        print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Whatever still runs is killed, with all that the workers had started."""
        for line in self._untold.values():
            print(line, file=sys.stderr, flush=True)
        self._signal(signal.SIGKILL)
        for worker in self.workers:
            worker.process.wait()
            if not worker.survived:
                worker.ended_s = worker.ended_s or time.time()
                self._clear(worker)
        if self._nursery is not None:
            self._nursery.close()
        if self.servers is not None:
            self.servers.end()

    def out_of_memory(self) -> bool:
        return hardware.oom_kills() > self._kills_before

    def _killed_for_memory(self, end: End) -> bool:
        """Whether it said so, or the kernel has killed it: each of its kills explains one end."""
        if (end.record or {}).get("starved"):
            return True
        if not killed(end) or hardware.oom_kills() <= self._kills_before + self._kills_told:
            return False
        self._kills_told += 1
        return True

    def tell(self, line: str) -> None:
        """To the process that clears up after us."""
        assert self.watcher.stdin is not None
        with contextlib.suppress(OSError):  # somebody killed it
            self.watcher.stdin.write(line.encode() + b"\n")
            self.watcher.stdin.flush()

    # -- who is lost

    def _ended(self, worker: Worker) -> None:
        """A process is gone: the job goes on without it, or all are ended."""
        code, control = worker.process.returncode, self.control
        if control is None:
            if code != 0:
                self._give_up()
            return
        if code == 0:
            control.lost(worker.id, how="left", detail="done")
            return
        end = worker.end()
        evicted = worker.evicted_s is not None
        starved = not evicted and self._killed_for_memory(end)
        how, detail = cause(end, starved)
        reason = (
            "" if evicted and end.record is None else detail
        )  # we have killed it: the coordinator knows why
        if control.ended is not None and control.ended[0] == 0:  # it came, or fell, after the job was done
            worker.survived, worker._end = True, dataclasses.replace(end, survived=True, late=True)
            self._clear(worker)
            return
        finished = any(w.ended_s is not None and w.process.returncode == 0 for w in self.workers)
        ending = finished or control.ended is not None or self.requests.stop or self.told_s is not None
        early = not control.began
        others = [w.end() for w in self.workers if w.ended_s is not None and w is not worker]
        alone = bool(control.gone) and end.record is not None  # nobody would tell a successor where to go
        own = how != "left" and not starved and not evicted
        hopeless = (how != "left" and alone) or (own and final(end, others if early else ()))
        if ending or (early and hopeless):
            self.hopeless = self.hopeless or not ending
            control.lost(worker.id, how=how, detail=reason, final=hopeless)
            self._give_up()
            return
        then = "the others go on" if how == "left" else self._succession(worker, hopeless, starved)
        control.lost(worker.id, how=how, detail=reason, final=hopeless, then=then)
        wait_s = ALIKE_S if early and end.record is not None and how == "failed" else 0.0
        self._held.append((time.monotonic() + wait_s, worker, reason, then))
        self._let_go()

    def _let_go(self) -> None:
        """Go on without those whose time has come, and start their successors."""
        if self.told_s is not None or self.requests.stop:
            self._held.clear()
        for held in [each for each in self._held if each[0] <= time.monotonic()]:
            self._held.remove(held)
            _, worker, detail, then = held
            worker.survived, worker._end = True, dataclasses.replace(worker.end(), survived=True)
            if "takes its place" in then:
                then = self._replace(worker) or then
            self._known[worker.id] = (detail, then)
            self._clear(worker)
            if self._without:  # who else would say it
                print(
                    f"manyhands: worker {worker.id} {detail or 'was given up'}; {then}",
                    file=sys.stderr,
                    flush=True,
                )
            self._say_lost(worker)

    def _replace(self, worker: Worker) -> str:
        """Start its successor; why that cannot be: the others go on all the same."""
        assert self.control is not None
        try:
            self.start(worker.rank, self._variables[worker.rank], worker.generation + 1)
        except OSError as error:  # no memory, no process
            successor = self.name(worker.rank, worker.generation + 1)
            self.control.lost(successor, how="failed", detail=f"it cannot be started: {error}")
            return f"{successor} cannot be started: {error}"
        return ""

    def _succession(self, worker: Worker, hopeless: bool, starved: bool) -> str:
        """Whether it gets a successor, which is then expected; in words. `starved`: it was killed for memory."""
        assert self.control is not None
        assert self.elastic is not None
        store = self._variables[worker.rank].get("MANYHANDS_STORE", "")
        rows, words = back_off(told(store, worker.id)) if starved else (None, "")
        if rows == 0:
            return words
        successor = self.name(worker.rank, worker.generation + 1)
        if rows:  # it ends with one row, however few restarts there are
            self._pass_rows[worker.rank] = rows
            self.control.expect(successor)
            return f"{successor} takes its place, {words}"
        if worker.ended_s is not None and worker.ended_s - worker.started_s >= HEALTHY_S:
            self._spent[worker.rank] = 0
        if hopeless:
            return "it is not replaced: it would meet the same"
        if self._spent[worker.rank] >= self.elastic.restarts:
            return f"it is not replaced (restarts = {self.elastic.restarts})"
        self._spent[worker.rank] += 1
        self.control.expect(successor)
        times = f"{self._spent[worker.rank]} of {self.elastic.restarts}"
        return f"{successor} takes its place ({times})" + (f"; {words}" if words else "")

    def _hear(self) -> None:
        """What the coordinator has decided."""
        if self.control is None:
            return
        for happening in self.control.happenings():
            if happening.kind == "evict":
                for worker in self.workers:
                    if worker.id == happening.seat_id:
                        worker.evict()
            elif happening.kind == "lost":
                for worker in self.workers:
                    if worker.id == happening.seat_id and happening.loss is not None:
                        self._losses[worker.id] = happening.loss
                        self._say_lost(worker)
            elif happening.epoch is not None:  # its first rank tells of them
                for loss in happening.epoch.losses:
                    self._untold.pop(loss.seat.id, None)
            elif happening.kind == "stop" and not self.requests.stop:
                self.requests.stop.append(signal.SIGTERM)
        if self.control.ended is not None and self.control.ended[0] != 0:
            self._give_up()

    def _say_lost(self, worker: Worker) -> None:
        """One line for people, and the last stack to the worker's log, once both sides of it are known."""
        if worker.id not in self._known or worker.id not in self._losses:
            return
        (detail, then), loss = self._known.pop(worker.id), self._losses.pop(worker.id)
        rank = loss.rank if loss.rank >= 0 or self.prefix else worker.rank
        who = f"worker {worker.id}" + (f" (rank {rank})" if rank >= 0 else "")
        frames = loss.stack.strip().splitlines()
        given_up = loss.how == "hang" or not detail
        what = f"was given up: {loss.detail}" if given_up else detail
        if given_up and not frames:  # it was never heard; but may have written where it stood
            what += f" (log: {worker.log})"
        at = f" at {frames[-1].rpartition('/')[2]}" if frames else ""
        line = f"manyhands: {who} on {hardware.hostname()}{during(loss)}{at} {what}; {then}"
        if self._shown() and loss.rank >= 0 and self.control is not None and self.control.began:
            self._untold[worker.id] = line
        else:
            print(line, file=sys.stderr, flush=True)
        if loss.stack:
            with contextlib.suppress(OSError), worker.log.open("a", encoding="utf-8") as log:
                log.write(f"manyhands: last known stack of {worker.id}, innermost call last:\n{loss.stack}\n")

    def _shown(self) -> bool:
        """Whether the job's display draws on this terminal, where a line of ours would be drawn over: it tells of losses."""
        return self.control is not None and self.control.shows and os.isatty(self.console)

    def _give_up(self) -> None:
        if self.told_s is None and not self.requests.stop:
            self.told_s = time.time()
            self._signal(signal.SIGTERM)

    def _clear(self, worker: Worker) -> None:
        guard.end_group(worker.process.pid, linger_s=0 if worker.survived else guard.LINGER_S)
        self.tell(f"ended {worker.process.pid}")
        guard.clear([worker.process.pid])

    def _keep_nursery(self) -> None:
        """Once the job runs, have a process ready to replace somebody."""
        elastic, control, nursery = self.elastic, self.control, self._nursery
        if nursery is None or elastic is None or control is None or not control.began:
            return
        if self.requests.stop or self.told_s is not None:
            return
        if any(w.ended_s is None and self._spent[w.rank] < elastic.restarts for w in self.workers):
            nursery.keep(
                {**self._variables[0], **control.variables},
                after_s=elastic.spare_after_s,
                urgent=bool(self._spent),
            )

    # -- signals

    def _serve(self) -> None:
        """Hand on what we were asked: the first SIGINT or SIGTERM once, later ones as SIGKILL; a Ctrl-Z to all."""
        asked = list(self.requests.stop)
        for number in range(self._forwarded, len(asked)):
            signum = asked[0] if number == 0 else signal.SIGKILL
            what = "stopping the workers; once more to kill them" if number == 0 else "killing the workers"
            print(f"manyhands: {signal.Signals(asked[number]).name}: {what}", file=sys.stderr, flush=True)
            if number == 0 and self.control is not None:
                self.control.stop()  # so that they know: all of them are to stop
            self._signal(signum)
        self._forwarded = len(asked)
        if self.requests.pause:
            self.requests.pause = False
            self._signal(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self._signal(signal.SIGCONT)  # here we are in the foreground again

    def _signal(self, signum: int) -> None:
        for worker in self.workers:
            worker.signal(signum)
