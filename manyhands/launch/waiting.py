"""The process that waits, with everything imported, until the launcher orders a worker (see `spare`)."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence

from manyhands.launch import child


def main() -> None:
    """Import, wait for a line, become a worker or fork one."""
    entry, nice, lifeline, *modules = sys.argv[1:]
    child.die_with_parent(int(os.environ.pop("MANYHANDS_PARENT")))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would take the ends of forks away from us
    launcher = os.dup(1)  # what is imported may print
    os.dup2(2, 1)
    importing = threading.Thread(target=_import, args=(modules, int(nice), launcher), daemon=True)
    if lifeline:  # on the thread that forks will have: libraries may remember which one loaded them
        _import(modules, 0, launcher)
    else:  # a waiting one hears meanwhile that nobody needs it
        importing.start()
    lines, children = _Lines(), dict[int, int]()  # descriptors of forks, and their process ids
    while (line := _next_line(lines, children, launcher)) is not None:
        order = json.loads(line)
        if not lifeline:
            importing.join()
            tell_code = None
            break
        if tell_code := _fork(lines, children, launcher, int(lifeline)):
            break
    else:
        os._exit(0)  # the launcher has no use for it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(order["log"], "ab") as log, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.clear()
    os.environ.update(order["variables"])
    os.environ.pop("MANYHANDS_PARENT", None)
    child.work(entry, tell_code)


class _Lines:
    """Lines of the standard input, read without a buffer that a fork would share."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []
        self._part = b""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def next(self) -> bytes | None:
        """None at the end of the input."""
        while not self._waiting:
            piece = os.read(0, 1 << 16)
            if not piece:
                return None
            *self._waiting, self._part = (self._part + piece).split(b"\n")
        return self._waiting.pop(0)


def _next_line(lines: _Lines, children: dict[int, int], launcher: int) -> bytes | None:
    """The next order; meanwhile, how forks end is told."""
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    for descriptor in children:
        poll.register(descriptor, select.POLLIN)
    while not lines:
        ready = [descriptor for descriptor, _ in poll.poll()]
        for descriptor in ready:
            if descriptor in children:
                pid, status = os.waitpid(children.pop(descriptor), 0)
                poll.unregister(descriptor)
                os.close(descriptor)
                os.write(launcher, b"ended %d %d\n" % (pid, os.waitstatus_to_exitcode(status)))
        if 0 in ready:
            break
    return lines.next()


def _fork(
    lines: _Lines, children: dict[int, int], launcher: int, lifeline: int
) -> Callable[[int], None] | None:
    """None in this process; in the new one, what it calls with its exit code.

    The new one begins when the launcher knows of it. Should this process be gone or given up by then, it ends.
    """
    heard, may_go = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # BLAS and allocators have threads; they see to them at a fork
        pid = os.fork()
    if pid:
        os.close(heard)
        children[os.pidfd_open(pid)] = pid
        if lines.next() is not None:
            with contextlib.suppress(OSError):  # it has just ended
                os.write(may_go, b"1")
        os.close(may_go)
        return None
    os.close(may_go)
    os.setsid()  # a group of its own, as `guard` expects
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a Ctrl-C may come right now
    _die_with(lifeline)
    for descriptor in children:
        os.close(descriptor)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # else all begin with the same numbers; `random` sees to itself
    pid = os.getpid()
    os.write(launcher, b"born %d\n" % pid)
    if not os.read(heard, 1):
        os._exit(128 + signal.SIGKILL)
    os.close(heard)

    def tell_code(code: int) -> None:
        with contextlib.suppress(OSError):
            os.write(launcher, b"left %d %d\n" % (pid, code))

    return tell_code


def _die_with(lifeline: int) -> None:
    """The kernel kills our process group, with whatever we started, when the pipe's other end closes."""
    mine = os.open(f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_NONBLOCK)  # owners are kept by opening
    os.close(lifeline)
    fcntl.fcntl(mine, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(mine, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(mine, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    if select.select([mine], [], [], 0)[0]:  # it closed before we asked
        os._exit(128 + signal.SIGKILL)


def _import(modules: Sequence[str], nice: int, launcher: int) -> None:
    if nice and sys.platform == "linux":  # elsewhere it would be the whole process's, for good
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    try:
        for name in modules:
            with contextlib.suppress(Exception, SystemExit):  # the worker will say so, if it needs it
                importlib.import_module(name)
    finally:
        os.write(launcher, b"ready\n")
