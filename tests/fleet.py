"""Real worker processes for tests: started once, joined by a real wire, then given functions to run."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import warm

TIMEOUT_S = 300.0


def _serve(pipe: Any, rank: int, size: int, directory: str, transport: str) -> None:
    import torch

    from manyhands.wire.world import connect

    torch.set_num_threads(1)
    try:
        world = connect(
            rank=rank,
            size=size,
            local_size=size,
            device=torch.device("cpu"),
            store_path=directory,
            master=None,
            agent_store=False,
            transport=transport,
            timeout_s=120.0,
        )
        pipe.send(("ready", None))
        while True:
            task = pipe.recv()
            if task is None:
                break
            function, args = task
            try:
                pipe.send(("ok", function(world, *args)))
            except BaseException:
                pipe.send(("error", traceback.format_exc()))
    except (EOFError, KeyboardInterrupt):
        pass


class Fleet:
    """`size` processes joined by one wire ("shared" or "group")."""

    def __init__(self, size: int, transport: str) -> None:
        self.size = size
        self._directory = tempfile.TemporaryDirectory(prefix="manyhands-test-")
        context = warm.context()
        self._pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, size, self._directory.name, transport), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self.processes.append(process)
        self._replies()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``function(world, *args)`` on every worker; their results in rank order."""
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._replies()

    def _replies(self) -> list[Any]:
        results, errors = [], []
        for rank, pipe in enumerate(
            self._pipes
        ):  # all are read, so that a failure does not shift later answers
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"worker {rank} did not answer")
            kind, value = pipe.recv()
            results.append(value)
            if kind == "error":
                errors.append(f"worker {rank}:\n{value}")
        if errors:
            raise AssertionError("\n".join(errors))
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
                pipe.close()
            except OSError:
                pass
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._directory.cleanup()
