"""The coordinator with real processes that are killed, stopped, join and leave, and with callers that it refuses."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from coordinators import TOKEN, WAIT_S, Worker, free_port, ids, seat, serving, until, working

from manyhands.cli.coordinate import _called_back
from manyhands.coordinate import judge, messages
from manyhands.coordinate.client import Member
from manyhands.coordinate.journal import Journal
from manyhands.coordinate.line import Line
from manyhands.coordinate.server import Coordinator
from manyhands.coordinate.state import BACK_S
from manyhands.coordinate.words import Rules
from manyhands.core import tls
from manyhands.core.errors import ManyhandsError, PeerLost, Stopped, UsageError
from manyhands.core.membership import Epoch
from manyhands.launch.chaos import cut


def test_a_killed_worker_is_known_at_once_and_the_others_form_the_next_epoch() -> None:
    with serving() as coordinator:
        coordinator.expect(["w0", "w1", "w2"])
        with working(coordinator.address, "w0", "w1", "w2") as (zero, one, two):
            assert zero.epoch(1)["ids"] == ["w0", "w1", "w2"]
            until(lambda: coordinator.began, "the first step")
            killed = one.kill()
            one.process.wait()
            coordinator.lost("w1", how="death", detail="killed by SIGKILL")  # as its launcher does at once
            delays = [worker.await_("over")["heard_s"] - killed for worker in (zero, two)]
            assert max(delays) < 2.0  # measured: a few milliseconds
            for worker in (zero, two):
                worker.tell("next")
            for rank, worker in enumerate((zero, two)):
                epoch = worker.epoch(2)
                assert (epoch["ids"], epoch["rank"]) == (["w0", "w2"], rank)
                assert epoch["losses"][0][:3] == ["w1", 1, "death"]
                assert not epoch["over"]
            found = []
            while not any(happening.kind == "lost" for happening in found):
                found.append(coordinator.happenings.get(timeout=WAIT_S))
            assert found[-1].loss is not None
            assert found[-1].loss.detail == "killed by SIGKILL"


def test_a_worker_whose_link_is_cut_comes_back_and_one_without_a_launcher_is_missed_soon() -> None:
    with serving() as coordinator:
        coordinator.expect(["w0", "w1"])
        with working(coordinator.address, "w0", "w1") as (zero, one):
            until(lambda: coordinator.began, "the first step")
            for count in range(3):
                before = coordinator._lines["w1"]
                assert cut(one.process.pid, random.Random(1)).startswith("done")
                until(lambda before=before: coordinator._lines.get("w1") not in (None, before), "its return")
                one.tell("publish", f"fact{count}", "x")
                zero.tell("lookup", f"fact{count}")
                zero.await_("fact", count + 1)
            assert coordinator.alive() == ["w0", "w1"]
            assert not [line for line in zero.heard if line["what"] == "over"]
            killed = one.kill()
            assert (
                zero.await_("over")["heard_s"] - killed < 2.0 + BACK_S
            )  # measured: 1.5 s, for so long it is awaited
            zero.tell("next")
            assert "it has not come back" in zero.epoch(2)["losses"][0][3]


def test_a_stopped_worker_is_a_hang_named_with_its_stack() -> None:
    with serving(rules=Rules(hang_s=1.5)) as coordinator:
        coordinator.expect(["w0", "w1"])
        with working(coordinator.address, "w0", "w1") as (zero, one):
            one.tell("at", "backward", 5)
            one.tell("linger")
            member = coordinator._state.members["w1"]
            until(lambda: "in linger" in member.stack and member.phase == "backward", "its heartbeat")
            one.kill(signal.SIGSTOP)
            zero.await_("over")
            zero.tell("next")
            seat, rank, how, detail, phase, step, stack = zero.epoch(2)["losses"][0]
            assert (seat, rank, how, phase, step) == ("w1", 1, "hang", "backward", 5)
            assert "no sign of life" in detail
            assert "in linger" in stack
            one.kill(signal.SIGCONT)  # it learns that it was given up
            one.await_("over")
            one.tell("return")
            one.tell("next")
            assert "given up" in one.await_("error")["message"]


def test_joining_leaving_and_facts() -> None:
    with serving() as coordinator:
        coordinator.expect(["w0", "w1"])
        with working(coordinator.address, "w0", "w1") as (zero, one):
            zero.tell("publish", "job", "all-of-it")
            one.tell("lookup", "job")
            assert one.await_("fact")["text"] == "all-of-it"
            newcomer = Worker(coordinator.address, "n")
            try:
                newcomer.tell("lookup", "job")
                assert newcomer.await_("fact")["text"] == "all-of-it"
                newcomer.tell("next")
                zero.tell("wanted")
                zero.await_("wanted")
                for worker in (zero, one):
                    worker.tell("next")
                assert newcomer.epoch(2)["ids"] == ["w0", "w1", "n"]
                assert newcomer.epoch(2)["fresh"] == ["n"]
                one.tell("leave", "SIGTERM")
                one.await_("left")
                zero.tell("wanted")
                zero.await_("wanted", 2)
                for worker in (zero, newcomer):
                    worker.tell("next")
                assert zero.epoch(3)["ids"] == ["w0", "n"]
                one.tell("close")
                assert one.process.wait(WAIT_S) == 0
                assert not [line for line in zero.heard if line["what"] == "over"]
            finally:
                newcomer.end()


def test_the_whole_job_is_told_to_stop_before_anybody_gets_a_signal() -> None:
    with serving() as coordinator:
        coordinator.expect(["w0", "w1"])
        with working(coordinator.address, "w0", "w1") as workers:
            assert coordinator.tell_stop(WAIT_S)
            for worker in workers:
                worker.tell("stopping")
                assert worker.await_("stopping")["value"]


def test_a_killed_coordinator_goes_on_from_its_journal_while_members_go_on(tmp_path: Path) -> None:
    port = free_port()
    script = Path(__file__).parent / "coordinate_worker.py"
    command = [sys.executable, str(script), "serve", str(port), TOKEN, str(tmp_path / "coordinator.jsonl")]
    first = subprocess.Popen(command)
    second = None
    try:
        with working(f"127.0.0.1:{port}", "w0", "w1", "w2") as (zero, one, two):
            zero.tell("publish", "job", "x")
            one.tell("lookup", "job")
            one.await_("fact")
            first.kill()
            first.wait()
            for worker in (zero, two):
                worker.tell("at", "step", 4)  # training goes on meanwhile
            one.kill()
            zero.tell("suspect", 1)  # their wire has noticed; nobody hears it now
            for worker in (zero, two):
                worker.tell("next")
            second = subprocess.Popen(command)
            for worker in (zero, two):
                epoch = worker.epoch(2)
                assert epoch["ids"] == [id for id in zero.epoch(1)["ids"] if id != "w1"]
                assert "has not come back" in epoch["losses"][0][3]
            zero.tell("lookup", "job")
            assert zero.await_("fact")["text"] == "x"
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.wait()


def journal_of(path: Path, held: Epoch) -> Path:
    """What a coordinator leaves that is killed while `held` runs."""
    journal = Journal(path, lambda line: None)
    journal.append({"kind": "fact", "key": "order", "text": "x"})
    journal.append({"kind": "epoch", **messages.epoch_to(held)})
    journal.append({"kind": "began"})
    journal.close()
    return path


def test_who_still_runs_the_job_is_taken_back_before_others_come(tmp_path: Path) -> None:
    held = Epoch(number=3, seats=(seat("w0"), seat("w1")))
    path = journal_of(tmp_path / "coordinator.jsonl", held)
    with serving(journal=path, calling=True) as coordinator:
        newcomer = Member(coordinator.address, TOKEN, seat("n"))
        newcomer._line.start()
        until(lambda: "UNAVAILABLE" in newcomer._line.reason, "its being told to try again")
        assert (coordinator.alive(), newcomer.facts()) == ([], {})
        back = Member(coordinator.address, TOKEN, seat("w1"))
        back._epoch = held
        back._line.start()
        assert _called_back(coordinator, [])
        until(lambda: coordinator.alive() == ["w1", "n"], "the newcomer's second attempt")
        newcomer.close()
        back.close()


def test_where_nobody_still_runs_the_job_nobody_is_waited_for_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "RETURN_S", 0.2)
    path = journal_of(tmp_path / "coordinator.jsonl", Epoch(number=3, seats=(seat("w0"),)))
    with serving(journal=path, calling=True, rules=Rules(hang_s=0.1)) as coordinator:
        assert not _called_back(coordinator, [])
    assert _called_back(coordinator, [signal.SIGTERM])
    with serving(journal=tmp_path / "another", calling=True) as coordinator:  # nobody has taken part yet
        assert _called_back(coordinator, [])
        Member.connect(coordinator.address, TOKEN, seat("n")).close()


def test_who_is_refused_and_what_it_hears(capfd: pytest.CaptureFixture[str]) -> None:
    log: list[str] = []
    with serving(log=log.append) as coordinator:
        member = Member.connect(coordinator.address, TOKEN, seat("w0"))
        with pytest.raises(UsageError, match="refused the token"):
            Member.connect(coordinator.address, "another token", seat("w1"))
        with pytest.raises(ManyhandsError, match="w0 takes part already"):
            Member.connect(coordinator.address, TOKEN, seat("w0"))
        assert [line.split(": ", 1)[1].split(" (")[0] for line in log] == [
            "wrong token",
            "worker w0 takes part already",
        ]
        with socket.create_connection(("127.0.0.1", int(coordinator.address.split(":")[1]))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            stranger.settimeout(WAIT_S)
            while stranger.recv(4096):
                pass
        assert coordinator.alive() == ["w0"]
        member.publish("still", "here")
        until(lambda: coordinator.facts.get("still") == "here")
        member.close()


GARBAGE = {
    "nothing": [],
    "noise": [b"\x00\xff" * 40],
    "nested": [b"[" * 100_000],
    "no object": [b"[]"],
    "no hello": [b'{"op":"beat"}'],
    "no seat": [b'{"op":"hello","version":1,"seat":{}}'],
    "types": [b'{"op":"hello","version":1,"seat":{"id":"x","host":7}}'],
    "holding": [b'{"op":"hello","version":1,"seat":{"id":"x"},"holding":{"number":1}}'],
    "version": [b'{"op":"hello","version":99,"seat":{"id":"x"}}'],
    "then noise": [b'{"op":"hello","version":1,"seat":{"id":"x"}}', b"noise"],
    "then steps": [b'{"op":"hello","version":1,"seat":{"id":"x"}}', b'{"op":"beat","step":-1}'],
    "then shutdown": [b'{"op":"hello","version":1,"seat":{"id":"x"}}', b'{"op":"shutdown"}'],
    "launcher": [b'{"op":"hello"}', b'{"op":"lost","id":"w0","how":"death"}'],
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_refused_and_harms_nobody(name: str) -> None:
    import grpc

    from manyhands.core import rpc

    log: list[str] = []
    with serving(log=log.append) as coordinator:
        member = Member.connect(coordinator.address, TOKEN, seat("w0"))
        with grpc.insecure_channel(coordinator.address) as channel:
            call = channel.stream_stream(messages.METHOD)(
                iter(GARBAGE[name]), metadata=rpc.bearer(TOKEN), timeout=WAIT_S
            )
            with contextlib.suppress(grpc.RpcError):
                list(call)
        until(lambda: len(log) == 1, "a line in the log")
        assert coordinator.alive() == ["w0"]
        assert not member.over.is_set()
        member.close()


def test_an_unreachable_coordinator() -> None:
    with pytest.raises(ManyhandsError, match="cannot be reached"):
        Member.connect(f"127.0.0.1:{free_port()}", TOKEN, seat("w0"), first_s=0.5)


def test_a_coordinator_that_does_not_come_back_is_given_up() -> None:
    with serving() as coordinator:
        member = Member.connect(coordinator.address, TOKEN, seat("w0"), patience_s=0.3)
        assert ids(member.next()) == ["w0"]
    assert not member.over.is_set()  # training goes on
    with pytest.raises(ManyhandsError, match="has not been reached"):
        member.next()
    with pytest.raises(PeerLost, match="nobody said it"):
        member.lookup("x", timeout_s=0.1)
    member.close()


def test_one_that_has_told_all_to_stop_is_not_waited_for() -> None:
    """The others were quicker, and their launcher is gone with its coordinator: that is no failure of mine."""
    with serving() as coordinator:
        member = Member.connect(coordinator.address, TOKEN, seat("w0"), patience_s=3600.0)
        assert ids(member.next()) == ["w0"]
        assert coordinator.tell_stop(WAIT_S)
    with pytest.raises(Stopped) as caught:
        member.next()
    assert caught.value.exit_code == 143
    member.close()


def test_a_taken_port() -> None:
    with serving() as coordinator, pytest.raises(UsageError, match="free HOST:PORT"):
        Coordinator(token=TOKEN, listen=coordinator.address)


def test_tls_knows_the_coordinator_by_its_fingerprint() -> None:
    identity = tls.self_signed()
    with serving(identity=identity) as coordinator:
        assert coordinator.fingerprint == identity.fingerprint
        member = Member.connect(coordinator.address, TOKEN, seat("w0"), fingerprint=identity.fingerprint)
        assert ids(member.next()) == ["w0"]
        member.close()
        with pytest.raises(UsageError, match="fingerprint"):
            Member.connect(coordinator.address, TOKEN, seat("w1"), fingerprint="sha256:" + "0" * 64)


def test_a_launcher_that_joins_tells_of_its_workers_and_hears_of_theirs() -> None:
    heard: list[dict[str, Any]] = []
    with serving(rules=Rules(hang_s=1.0)) as coordinator:
        launcher = Line(
            coordinator.address,
            TOKEN,
            greeting=lambda: {"op": "hello"},
            hear=lambda message: heard.append(dict(message)),
            fatal=lambda error: heard.append({"op": str(error)}),
        )
        launcher.start()
        until(lambda: heard, "welcome")
        coordinator.publish("job", "x")
        launcher.say("expect", id="n0")
        launcher.say("expect", id="n1")
        until(lambda: set(coordinator._state.coming) == {"n0", "n1"})
        launcher.say("lost", id="n1", how="failed", detail="ImportError: x", final=True)
        until(lambda: any(message["op"] == "failed" for message in heard), "the news")
        assert "ImportError" in coordinator.ended[1] if coordinator.ended else False
        launcher.close()
        until(lambda: not coordinator._launchers, "its leaving")
        until(lambda: set(coordinator._state.coming) == set(), "their loss")


def test_a_launcher_whose_link_is_cut_comes_back_and_its_workers_are_awaited_meanwhile() -> None:
    welcomes: list[Any] = []

    def hear(message: Any) -> None:
        if message["op"] == "welcome":  # as `manyhands.launch.control.Joined` does
            launcher.say("expect", id="n0")
            welcomes.append(message)

    with serving() as coordinator:
        launcher = Line(
            coordinator.address,
            TOKEN,
            greeting=lambda: {"op": "hello"},
            hear=hear,
            fatal=lambda error: welcomes.append(error),
        )
        launcher.start()
        until(lambda: set(coordinator._state.coming) == {"n0"})
        launcher._call.cancel()
        until(lambda: len(welcomes) == 2, "its return")
        until(lambda: len(coordinator._launchers) == 1, "the end of its last connection")
        until(lambda: not coordinator._orphans, "that its workers are awaited")
        assert not coordinator._state.gone
        member = Member.connect(coordinator.address, TOKEN, seat("n0"))
        member.close()
        launcher.close()


def test_a_launcher_may_be_back_before_the_end_of_its_last_connection_is_known() -> None:
    with serving() as coordinator:

        def launcher(*starts: str) -> Line:
            def hear(message: Any) -> None:
                if message["op"] == "welcome":
                    for id in starts:
                        line.say("expect", id=id)

            line = Line(
                coordinator.address,
                TOKEN,
                greeting=lambda: {"op": "hello"},
                hear=hear,
                fatal=lambda error: None,
            )
            line.start()
            return line

        before = launcher("n0", "n1")
        until(lambda: set(coordinator._state.coming) == {"n0", "n1"}, "whom it starts")
        after = launcher("n0")
        until(lambda: any(line.expected == {"n0"} for line in coordinator._launchers), "its return")
        before.close()
        until(lambda: "n1" in coordinator._state.gone, "the loss of whom nobody starts any more")
        assert set(coordinator._state.coming) == {"n0"}
        after.close()
