"""What never comes back is left: calls, channels and servers of gRPC that do not end (grpc/grpc#20562), played by stand-ins."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from coordinators import TOKEN, WAIT_S, serving, until

from manyhands.coordinate import line as lines
from manyhands.coordinate import messages
from manyhands.coordinate import server as coordinators
from manyhands.coordinate.line import Line
from manyhands.core import rpc, tls
from manyhands.core.aside import Aside
from manyhands.core.errors import ManyhandsError, PeerLost
from manyhands.serve import client, protocol
from manyhands.serve import server as servers_of
from manyhands.serve.client import Servers
from manyhands.serve.link import Endpoint, Link, _Reading
from manyhands.serve.server import Server


class Call:
    """It says what it was given, and then its iterator sleeps, though the call be over."""

    def __init__(self, said: list[bytes], wake: threading.Event) -> None:
        self._said, self._wake, self.active = list(said), wake, True

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._said:
            return self._said.pop(0)
        self._wake.wait(WAIT_S)
        raise StopIteration

    def is_active(self) -> bool:
        return self.active

    def cancel(self) -> None:
        self.active = False


class Channels:
    """Stands for `rpc.channel`: nothing on its channels ever ends, nor does their closing."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.closing = 0
        self.said: list[bytes] = []
        self.wake = threading.Event()
        self.errors: list[Exception] = []

    def __call__(self, *_: object, **__: object) -> Channels:
        if self.errors:
            raise self.errors.pop()
        return self

    def stream_stream(self, _: str) -> Callable[..., Call]:
        def call(_: Iterator[bytes], metadata: object) -> Call:
            self.calls.append(Call(self.said, self.wake))
            return self.calls[-1]

        return call

    def close(self) -> None:
        self.closing += 1
        self.wake.wait(WAIT_S)


@pytest.fixture
def channels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Channels]:
    made = Channels()
    monkeypatch.setattr(rpc, "channel", made)
    for name, short_s in (("LOOK_S", 0.01), ("CANCEL_S", 0.05), ("CLOSE_S", 0.05)):
        monkeypatch.setattr(rpc, name, short_s)
    yield made
    made.wake.set()


def aside(call: Callable[[], Any]) -> Callable[[], Any]:
    """Runs `call` on a thread of its own; what is returned waits for its end, and gives its result or its error."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(WAIT_S / 2)
        assert not thread.is_alive(), "it hangs"
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    return result


# -------------------------------------------------------------------------------------------- threads aside


def test_a_call_that_hangs_does_not_hold_up_the_end_of_the_interpreter() -> None:
    code = (
        "import threading; from manyhands.core.aside import Aside; Aside('x').submit(threading.Event().wait)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT_S)


def test_calls_aside() -> None:
    threads, go = Aside("x", 2), threading.Event()
    first = threads.submit(threading.get_ident)
    assert first.result() != threading.get_ident()
    until(lambda: threads._idle == 1)
    assert threads.submit(threading.get_ident).result() == first.result()  # kept
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 1, 0).result()
    held = [threads.submit(go.wait, WAIT_S) for _ in range(3)]
    until(lambda: len(threads._waiting) == 1)  # the third one waits for a thread
    assert threads._threads == 2
    threads.close()
    go.set()
    assert [one.result() for one in held] == [True] * 3
    threads.close(WAIT_S)
    assert threads._threads == 0
    assert threads.submit(divmod, 7, 2).result() == (3, 1)  # somebody was late
    threads.close(WAIT_S)
    assert threads._threads == 0


def test_where_no_thread_can_be_started_a_call_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`concurrent.futures` raises, and gRPC's serving thread, which asks it, ends: the server hears nobody any more."""
    threads, go = Aside("x"), threading.Event()
    held = threads.submit(go.wait, WAIT_S)
    with monkeypatch.context() as patched:

        def start(_: object) -> None:
            raise RuntimeError("can't start new thread")

        patched.setattr(threading.Thread, "start", start)
        late = threads.submit(divmod, 7, 2)
        with pytest.raises(RuntimeError, match="can't start"):
            Aside("y").submit(divmod, 7, 2)
        rpc.close_aside(threads)  # left open
    assert not late.done()
    go.set()
    assert (held.result(), late.result()) == (True, (3, 1))
    threads.close()


# -------------------------------------------------------------------------------------------- parameter servers


def link_of(patience_s: float = WAIT_S) -> Link:
    return Link(lambda: Endpoint("127.0.0.1:1"), TOKEN, patience_s=patience_s)


def test_a_link_is_closed_though_nothing_on_it_ends(channels: Channels) -> None:
    link = link_of()
    answer = aside(lambda: link.call({"op": "status"}))
    until(lambda: channels.calls)
    aside(link.close)()
    assert channels.closing == 1
    assert link._channel is None
    with pytest.raises(PeerLost, match="hung up"):
        answer()


def test_a_call_that_has_ended_unnoticed_is_made_again(channels: Channels) -> None:
    link = link_of()
    answer = aside(lambda: link.call({"op": "status"}))
    until(lambda: channels.calls)
    channels.said = list(protocol.messages({"version": 3}))
    channels.calls[0].active = False
    until(lambda: len(channels.calls) == 2)
    channels.wake.set()  # this time it ends
    assert answer().header == {"version": 3}
    link.close()


def test_a_call_of_which_nothing_moves_is_made_again_and_at_last_the_server_is_gone(
    channels: Channels,
) -> None:
    link = link_of(patience_s=0.02)
    answer = aside(lambda: link.call({"op": "push"}, silent_s=0.05))
    with pytest.raises(PeerLost, match="nothing has moved for"):
        answer()
    assert len(channels.calls) == 2


def test_a_server_that_answers_other_calls_is_not_gone(channels: Channels) -> None:
    """A push waits for other workers for as long as it takes."""
    link = link_of(patience_s=0.02)
    answer = aside(lambda: link.call({"op": "push"}, silent_s=0.02))

    def three() -> bool:
        link._heard_s = time.monotonic()  # a sign of life was answered
        return len(channels.calls) == 3

    until(three)
    link.close()
    with pytest.raises(PeerLost, match="hung up"):
        answer()


def test_whoever_was_left_writes_nothing_any_more() -> None:
    out, go, begun = torch.zeros(8, dtype=torch.uint8), threading.Event(), threading.Event()
    opening, *_ = protocol.messages({}, [protocol.view(torch.ones(8, dtype=torch.uint8))])

    def replies() -> Iterator[bytes]:
        yield opening
        yield b"\x01" * 4
        begun.set()
        assert go.wait(WAIT_S)
        yield b"\x01" * 4

    reading = _Reading(out)
    answer = aside(lambda: reading.read(replies()))
    assert begun.wait(WAIT_S)
    reading.leave()
    go.set()
    with pytest.raises(ConnectionAbortedError):
        answer()
    assert out.tolist() == [1] * 4 + [0] * 4


def test_a_farewell_to_servers_that_do_not_answer_comes_to_an_end(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LEAVE_S", 0.05)
    servers = Servers([link_of(), link_of()], member="me", job="job", lease_s=0.03)
    for heart in servers._hearts:
        heart.start()
    status = aside(servers.status)
    until(lambda: len(channels.calls) >= 4)  # a sign of life and a question to each
    aside(servers.close)()
    with pytest.raises(PeerLost):
        status()
    assert not any(heart.is_alive() for heart in servers._hearts)


def test_servers_whose_grpc_does_not_stop_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (coordinators, servers_of):
        monkeypatch.setattr(module, "STOP_S", 0.05)
    go = threading.Event()
    for server in (Server(listen="127.0.0.1:0", token=TOKEN), coordinators.Coordinator(token=TOKEN)):
        server.start()
        server._pool.submit(go.wait, WAIT_S)
        stop = server._server.stop
        server._server.stop = lambda grace_s: threading.Event()
        aside(lambda server=server: server.stop(0.0))()  # type: ignore[misc]
        stop(0).wait()
    go.set()


# -------------------------------------------------------------------------------------------- the coordinator


@pytest.fixture
def line(channels: Channels) -> Iterator[Line]:
    """On a coordinator that welcomes, and then says nothing. What it hears, and what was fatal, is in `line.heard`."""
    channels.said = [messages.pack({"op": "welcome", "facts": {}})]
    heard: list[Any] = []
    made = Line("", "", greeting=dict, hear=lambda said: heard.append(said["facts"]), fatal=heard.append)
    made.heard = heard  # type: ignore[attr-defined]
    yield made
    made.close()


def test_a_line_whose_call_has_ended_unnoticed_is_opened_anew(channels: Channels, line: Line) -> None:
    line.start()
    until(lambda: line.heard)  # type: ignore[attr-defined]
    channels.said = []
    channels.calls[0].active = False
    until(lambda: line.gone_s is not None, "that it is noticed")
    until(lambda: len(channels.calls) == 2, "the next attempt")
    assert line.reason == "its call has ended"


def test_a_coordinator_that_says_nothing_is_not_reached(
    channels: Channels, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "SILENT_S", 0.05)
    line.start()
    until(lambda: len(channels.calls) == 2, "the next attempt")
    assert "has said nothing" in line.reason


def test_a_line_comes_back_after_what_nobody_foresaw(channels: Channels, line: Line) -> None:
    channels.errors = [RuntimeError("can't start new thread")]
    line.start()
    until(lambda: line.heard)  # type: ignore[attr-defined]


def test_a_message_that_cannot_be_understood_is_fatal(channels: Channels, line: Line) -> None:
    channels.said = [messages.pack({"op": "welcome"})]
    line.start()
    (error,) = until(lambda: line.heard)  # type: ignore[attr-defined]
    assert isinstance(error, ManyhandsError)
    assert "'welcome' cannot be understood (KeyError('facts'))" in str(error)


def test_a_coordinator_tells_that_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "SIGN_S", 0.05)
    heard: list[Any] = []
    with serving() as coordinator:
        line = Line(
            coordinator.address,
            TOKEN,
            greeting=lambda: {"op": "hello"},
            hear=heard.append,
            fatal=heard.append,
        )
        line.start()
        until(lambda: heard)
        welcomed_s = line._heard_s
        until(lambda: line._heard_s > welcomed_s)
        line.close()
    assert [said["op"] for said in heard] == ["welcome"]


# -------------------------------------------------------------------------------------------- commands


class Full:
    """A stream to a full disk."""

    def write(self, _: str) -> None:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_log_on_a_full_disk_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from manyhands.cli import coordinate, serve

    monkeypatch.setattr(sys, "stderr", Full())
    coordinate._log("w0 is here")
    serve._log("refused somebody")


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names the servers that were started in this process and stopped."""
    names: list[str] = []
    for kind in (coordinators.Coordinator, Server):

        def stop(self: Any, grace_s: float = 0.0, *, kind: Any = kind, before: Any = kind.stop) -> None:
            names.append(kind.__name__)
            before(self, grace_s)

        monkeypatch.setattr(kind, "stop", stop)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return names


def test_a_coordinator_that_cannot_say_where_it_is_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: list[str]
) -> None:
    from manyhands.cli import coordinate
    from manyhands.launch import control

    (tmp_path / "corpus.txt").write_text("a few words\n")
    output = tmp_path / "out"
    (output / control.CONTACT).mkdir(parents=True)  # it cannot be written
    words = ["--data", str(tmp_path / "corpus.txt"), "--output", str(output), "--plain", "--workers", "1"]
    with pytest.raises(IsADirectoryError):
        coordinate.main(words)
    assert stopped == ["Coordinator"]


def test_a_parameter_server_that_cannot_say_where_it_is_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: list[str]
) -> None:
    from manyhands.cli import serve

    def announce(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(serve, "_announce", announce)
    tls.private(tmp_path / "token", TOKEN.encode())
    words = ["--token-file", str(tmp_path / "token"), "--plain", "--ready", str(tmp_path / "ready")]
    with pytest.raises(MemoryError):
        serve.main(words)
    assert stopped == ["Server"]
