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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.launch import guard

if TYPE_CHECKING:
    from manyhands.placement.served import Served

BOOT = (
    f"import sys; sys.path[:] = sys.argv.pop(1).split({os.pathsep!r}); "
    "from manyhands.cli.main import main; sys.exit(main())"
)
RESTARTS = 20  # of one server in one job
END_S = 10.0
LONGEST_SOCKET = 100  # bytes of a socket file's path that every system takes


@dataclass
class ServerProcesses:
    """The servers of one launch.

    Args:
        placement: what the job says of its servers.
        output: the job's.
    """

    placement: Served
    output: Path
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    _store: str = ""
    _tell: Callable[[str], None] = print

    def start(self, store: str, env: Mapping[str, str], tell: Callable[[str], None]) -> None:
        """Start all. `tell` takes "started PID" and "ended PID" for the guard."""
        from manyhands.core import tls

        self._store, self._tell, self._env = store, tell, dict(env)
        tls.private(Path(store) / "token", tls.new_token().encode())
        shutil.rmtree(self.output / "servers", ignore_errors=True)  # of an earlier job that was killed
        for server in range(self.placement.servers):
            self._starts.append(0)
            self._running.append(self._launch(server))

    def watch(self) -> None:
        """Start again whatever has died."""
        for server, process in enumerate(self._running):
            if process.poll() is None or self._starts[server] >= RESTARTS:
                continue
            self._starts[server] += 1
            self._tell(f"ended {process.pid}")
            print(
                f"manyhands: parameter server {server} ended ({_how(process.returncode)}); starting it again",
                file=sys.stderr,
                flush=True,
            )
            self._running[server] = self._launch(server)

    def end(self) -> None:
        """After the workers: nothing is needed any more."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self._running:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            guard.end_group(process.pid, linger_s=0)
            self._tell(f"ended {process.pid}")
        shutil.rmtree(self.output / "servers", ignore_errors=True)

    def _launch(self, server: int) -> subprocess.Popen[bytes]:
        store, placement = Path(self._store), self.placement
        socket = store / f"server-{server}.sock"
        fits = len(os.fsencode(socket)) < LONGEST_SOCKET
        arguments: list[Any] = [
            *("--listen", f"unix:{socket}" if fits else "127.0.0.1:0"),
            *("--token-file", store / "token", "--ready", store / f"server-{server}.json"),
            *("--state", self.output / "servers" / f"server-{server}"),
            *("--durability", placement.durability, "--interval", placement.interval_s),
            *("--lease", placement.lease_s),
        ]
        log = self.output / "logs" / f"server-{server}.log"
        with log.open("ab") as sink:
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
        return process


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
