"""Parameter servers beside the workers of one machine: started by the launcher, started anew when they die, ended with it.

No ports: each listens on a socket file in the launcher's private directory, where the token is, too. What a server keeps
lies in ``OUTPUT/servers`` while the job runs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.launch import guard, place
from manyhands.launch.verdict import Verdict, read_tail

if TYPE_CHECKING:
    from manyhands.placement.served import Served

BOOT = (
    f"import sys; sys.path[:] = sys.argv.pop(1).split({os.pathsep!r}); "
    "from manyhands.cli.main import main; sys.exit(main())"
)
RESTARTS = 20  # of one server, one soon after the other
FUTILE = 5  # lives of a server that end before it serves, one after the other: the next would, too
HEALTHY_S = 600.0  # of life, after which a server's restarts are counted anew
END_S = 10.0
LEAST_HANG_S = 5.0  # a busy machine, and files whose times are coarse
LONGEST_LOOK_S = 1.0  # from one look to the next that counts as silence
LONGEST_SOCKET = 100  # bytes of a socket file's path that every system takes


@dataclass
class _Running:
    """One life of a server's process.

    Attributes:
        log_begin: where its part of the log begins.
        restarts: that came before it, each soon after the last.
        futile: how many of those before it have ended before they served, without one that did.
        before: how the last one ended.
        beat: when it last said that it serves, by its file's time; silent_s: how long ago that is, as far as anybody has
            looked (a launcher that was stopped itself has not); looked_s: when.
    """

    process: subprocess.Popen[bytes]
    log_begin: int
    restarts: int = 0
    futile: int = 0
    before: str = ""
    since_s: float = field(default_factory=time.monotonic)
    beat: int = 0
    silent_s: float = 0.0
    looked_s: float = field(default_factory=time.monotonic)


@dataclass
class ServerProcesses:
    """The servers of one launch.

    Args:
        placement: what the job says of its servers.
        output: the job's.
        hang_s: one that has not moved for so long is killed (and started again).

    Attributes:
        failed: why no server is started any more, in words; empty while all serve.
    """

    placement: Served
    output: Path
    hang_s: float = 10.0
    failed: str = ""
    _running: list[_Running] = field(default_factory=list)
    _store: str = ""
    _tell: Callable[[str], None] = print

    def start(self, store: str, env: Mapping[str, str], tell: Callable[[str], None]) -> None:
        """Start all. `tell` takes "started PID" and "ended PID" for the guard."""
        from manyhands.core import tls

        self._store, self._tell, self._env = store, tell, dict(env)
        tls.private(Path(store) / "token", tls.new_token().encode())
        shutil.rmtree(self.output / "servers", ignore_errors=True)  # of an earlier job that was killed
        for server in range(self.placement.servers):
            self._running.append(self._launch(server))

    def watch(self) -> bool:
        """Start again whatever has died; False where that has not helped (see `failed`): the job is to end."""
        for server, life in enumerate(self._running):
            if self.failed:
                continue
            if life.process.poll() is None:
                self._look_at(server, life)
                continue
            self._tell(f"ended {life.process.pid}")
            how = _how(life.process.returncode)
            restarts = life.restarts if time.monotonic() - life.since_s < HEALTHY_S else 0
            futile = 0 if self._ready(server).exists() else life.futile + 1
            if restarts >= RESTARTS or futile >= FUTILE:
                self.failed = self._words(server, life, how)
                continue
            print(
                f"manyhands: parameter server {server} ended ({how}); starting it again",
                file=sys.stderr,
                flush=True,
            )
            last = read_tail(self._log(server), life.log_begin).rpartition("\n")[2].strip()
            try:
                again = self._launch(server)
            except OSError as error:  # no memory, no process
                self.failed = self._words(server, life, f"{how}; it cannot be started again: {error}")
                continue
            again.restarts, again.futile, again.before = (
                restarts + 1,
                futile,
                f"{how}: {last}" if last else how,
            )
            self._running[server] = again
        return not self.failed

    def _look_at(self, server: int, life: _Running) -> None:
        """Kill one that stands still, as a signal might: what survives is what survives that (`durability`)."""
        now = time.monotonic()
        passed, life.looked_s = now - life.looked_s, now
        try:
            beat = self._ready(server).stat().st_mtime_ns
        except OSError:  # it does not serve yet
            return
        life.silent_s = 0.0 if beat != life.beat else life.silent_s + min(passed, LONGEST_LOOK_S)
        life.beat = beat
        if life.silent_s > max(self.hang_s, LEAST_HANG_S):
            print(
                f"manyhands: parameter server {server} has given no sign of life for {life.silent_s:.0f} s "
                f"(hang_s = {self.hang_s:g}): it is killed",
                file=sys.stderr,
                flush=True,
            )
            life.process.kill()
            life.silent_s = 0.0  # it may take a while to go

    def end(self) -> None:
        """After the workers: nothing is needed any more."""
        processes = [life.process for life in self._running]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            guard.end_group(process.pid, linger_s=0)
            self._tell(f"ended {process.pid}")
        shutil.rmtree(self.output / "servers", ignore_errors=True)

    def judged(self, verdict: Verdict) -> Verdict:
        """A launch's verdict, where a server was the cause, or may have been."""
        if self.failed and verdict.exit_code:
            return Verdict(1, self.failed)
        words = verdict.words
        for server, life in enumerate(self._running) if words else ():
            if life.restarts and time.monotonic() - life.since_s < HEALTHY_S:
                times = f"{life.restarts} time{'s' if life.restarts > 1 else ''}"
                words += f"\n  parameter server {server} had ended {times}, at last by {life.before}"
                words += f"\n  log: {self._log(server)}"
        return Verdict(verdict.exit_code, words)

    def _words(self, server: int, life: _Running, how: str) -> str:
        tail = read_tail(self._log(server), life.log_begin)
        said = f"\n  its last words:\n{tail}" if tail else ""
        rule = f"it was started {life.restarts + 1} times, and is not started again"
        return f"manyhands: parameter server {server} ended ({how}); {rule}{said}\n  log: {self._log(server)}"

    def _log(self, server: int) -> Path:
        return self.output / "logs" / f"server-{server}.log"

    def _ready(self, server: int) -> Path:
        """Where a server says that it serves."""
        return Path(self._store) / f"server-{server}.json"

    def _launch(self, server: int) -> _Running:
        store, placement = Path(self._store), self.placement
        socket = store / f"server-{server}.sock"
        fits = len(os.fsencode(socket)) < LONGEST_SOCKET
        arguments: list[Any] = [
            *("--listen", f"unix:{socket}" if fits else "127.0.0.1:0"),
            *("--token-file", store / "token", "--ready", self._ready(server)),
            *("--state", self.output / "servers" / f"server-{server}"),
            *("--durability", placement.durability, "--interval", placement.interval_s),
            *("--lease", placement.lease_s),
        ]
        self._ready(server).unlink(missing_ok=True)  # the last one's
        with place.writable(self._log(server)).open("ab") as sink:
            begin = sink.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                [
                    *(sys.executable, "-c", BOOT, os.pathsep.join(sys.path)),
                    *("serve-parameters", *map(str, arguments)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=self._env,
                start_new_session=True,  # a Ctrl-C is the launcher's; servers end after the workers
            )
        self._tell(f"started {process.pid}")
        return _Running(process, begin)


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
