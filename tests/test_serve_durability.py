"""The parameter server's memory: what survives its end, and what the disk holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pushers
import pytest
import torch
from pushers import WAIT_S, Worker, close_to, gradient, initial, plain, together, vanish

from manyhands.core import config, tls
from manyhands.core.errors import CheckpointError, ManyhandsError
from manyhands.serve import protocol
from manyhands.serve.client import Servers
from manyhands.serve.link import Endpoint, Link
from manyhands.strategy.optimizers import SGD, AdamW

serve = pushers.serve  # the fixture


@pytest.mark.parametrize(
    "rules", [{"consistency": "sync"}, {"consistency": "async", "compensation": 0.1, "accumulate": 2}]
)
@pytest.mark.parametrize("durability", ["each", "synced"])
def test_acknowledged_pushes_survive(serve: Any, tmp_path: Path, durability: Any, rules: Any) -> None:
    """A server that vanishes without a word, and another that finds its files, give the same bits as one that lives."""
    runs = []
    for restart in (False, True):
        options = {"state": tmp_path / f"{restart}", "durability": durability}
        server = serve(**options)
        (worker,) = serve.workers([server], 1)
        worker.begin(AdamW(0.01, schedule=None), **rules)
        worker.servers.join(0)
        worker.servers.pull(worker.out)
        for step in range(5):
            answer = worker.push(step, gradient(step, 0), load=[step + restart] * 5 if restart else None)
            assert bool(answer["loads"]) == restart
        if restart:
            vanish(server)
            server = serve(**options)
            (worker,) = serve.workers([server], 1)
            assert server.shard.members["worker-0"].clock == 5
            again = worker.push(4, gradient(4, 0))  # its answer was lost, say: it is not applied again
            assert again["loads"] == {}  # who was busy is not kept: nothing depends on it
        for step in range(5, 8):
            worker.push(step, gradient(step, 0))
        runs.append((worker.params, worker.servers.state()[2], worker.servers.status()[0]["version"]))
    close_to(runs[0][0], runs[1][0], 0.0)
    close_to(runs[0][1], runs[1][1], 0.0)
    assert runs[0][2] == runs[1][2]


def test_interval_loses_what_it_says(serve: Any, tmp_path: Path) -> None:
    options = {"state": tmp_path / "state", "durability": "interval"}
    server = serve(**options)
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="async")
    worker.push(0, gradient(0, 0))
    log = sum(p.stat().st_size for p in (tmp_path / "state").glob("log-*"))
    worker.push(1, gradient(1, 0))
    assert sum(p.stat().st_size for p in (tmp_path / "state").glob("log-*")) == log
    vanish(server)
    again = serve(**options)
    assert again.shard.version == 0
    assert list(again.shard.members) == ["worker-0"]  # who takes part is never lost


def test_a_halt_and_what_is_known_of_the_lost_survive(serve: Any, tmp_path: Path) -> None:
    """Survivors that ask one after the other, a restart in between, are told the same."""
    options = {"state": tmp_path / "state"}
    server = serve(**options)
    a, b = serve.workers([server], 2)
    a.begin(SGD(0.1), consistency="async", discard=0)
    for step in range(3):
        a.push(step, gradient(step, 0))
    b.push(0, gradient(0, 1))  # taken at version 0: three updates ago
    b.servers.close()
    told = a.servers.halt()
    assert (told.clocks, told.unused) == ({"worker-0": 3, "worker-1": 1}, {"worker-1": {0}})
    vanish(server)
    again = serve(**options)
    (a,) = serve.workers([again], 1)
    assert a.servers.halt() == told
    assert again.shard.halted
    a.servers.serial = 0
    a.begin(SGD(0.1), serial=1, steps=3, consistency="async")
    assert not again.shard.halted
    assert (again.shard.discarded, again.shard.left) == (1, {})


def test_a_push_sent_again_after_its_lease_is_known(serve: Any) -> None:
    server = serve()
    (a,) = serve.workers([server], 1)
    a.begin(SGD(0.1), consistency="async")
    for step in range(2):
        a.push(step, gradient(step, 0))
    server.shard.expire("worker-0")
    before = a.params
    assert a.push(1, gradient(1, 0))["version"] == 2
    close_to(a.params, before, 0.0)
    assert a.push(2, gradient(2, 0))["version"] == 3


def test_a_torn_record_is_left_out(serve: Any, tmp_path: Path) -> None:
    options = {"state": tmp_path / "state"}
    server = serve(**options)
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="async")
    worker.push(0, gradient(0, 0))
    one = worker.params
    worker.push(1, gradient(1, 0))
    vanish(server)
    (log,) = (tmp_path / "state").glob("log-*")
    os.truncate(log, log.stat().st_size - 3)
    again = serve(**options)
    assert again.shard.version == 1
    close_to({n: p.detach() for n, p in again.shard.store.params.items()}, one, 0.0)


def test_failed_writes_and_zeros_at_the_end_leave_the_log_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manyhands.serve import journal as module

    def full(file: Any, data: memoryview) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    journal = module.Journal(tmp_path, "each")
    journal.rotate()
    payload = torch.arange(100, dtype=torch.uint8)

    def record(i: int) -> None:
        journal.record({"i": i}, protocol.view(payload), "push")

    record(0)
    for _ in range(3):  # a disk that stays full for a while
        with monkeypatch.context() as patch:
            patch.setattr(module, "_write_all", full)
            with pytest.raises(CheckpointError, match="No space left"):
                record(-1)
    record(1)
    journal.close()
    (log,) = tmp_path.glob("log-*")
    os.truncate(log, log.stat().st_size + 4096)  # grown, but never written, before a loss of power
    found = list(module.replayed([log]))
    assert [header["i"] for header, _ in found] == [0, 1]
    assert all(torch.equal(body, payload) for _, body in found)


def test_a_log_that_cannot_be_begun_leaves_the_old_one(serve: Any, tmp_path: Path) -> None:
    state, away = tmp_path / "state", tmp_path / "away"
    server = serve(state=state)
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="async")
    worker.push(0, gradient(0, 0))
    server.shard._keeper._interval_s = 0.0  # a snapshot is due after every push
    state.rename(away)
    for step in (1, 2):
        assert worker.push(step, gradient(step, 0))["version"] == step + 1
    assert any("no snapshot, the logs go on" in line for line in server.lines)
    for serial in (1, 1):  # asked again it is not kept either
        with pytest.raises(CheckpointError, match="it must be possible to write there"):
            worker.begin(SGD(0.1), serial=serial, consistency="async")
    vanish(server)
    again = serve(state=away)
    assert again.shard.version == 3
    close_to({n: p.detach() for n, p in again.shard.store.params.items()}, worker.params, 0.0)


def test_damage_in_a_log_that_others_follow_is_told(serve: Any, tmp_path: Path) -> None:
    options = {"state": tmp_path / "state"}
    server = serve(**options)
    (a,) = serve.workers([server], 1)
    a.begin(SGD(0.1), consistency="sync")
    a.servers.join(0)
    for step in range(2):
        a.push(step, gradient(step, 0))
    vanish(server)
    (log,) = (tmp_path / "state").glob("log-*")
    whole = log.read_bytes()
    at = whole.rindex(b'"op":"push"')
    log.with_name("log-2").write_bytes(whole[whole.rindex(b'{"op":"round"') - 16 :])
    log.write_bytes(
        whole[:at] + b'"op":"hush"' + whole[at + 11 :]
    )  # the push of the last round, not of its own log
    with pytest.raises(CheckpointError, match="cannot be done again"):
        serve(**options)
    log.with_name("log-2").unlink()
    server = serve(**options)
    assert server.shard.version == 1
    assert any("log-1: its last" in line and "are torn" in line for line in server.lines)


def test_a_push_that_no_codec_has_made_is_not_kept(serve: Any, tmp_path: Path) -> None:
    """One in the log would end every server that continues from there."""
    from manyhands.exchange.topk import TopK

    options, codec = {"state": tmp_path}, TopK(density=0.1, chunk=0)
    server = serve(**options)
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="async", codec=config.to_data(codec, "exchanges"))
    worker.push(0, gradient(0, 0), codec=codec)
    with pytest.raises(ManyhandsError, match="a push that is no payload of TopK"):
        worker.push(1, gradient(1, 0), codec=Noise(codec))
    vanish(server)
    (worker,) = serve.workers([serve(**options)], 1)
    assert worker.push(1, gradient(1, 0), codec=codec)["version"] == 2


class Noise:
    """As many bytes as a codec makes, all of them ones."""

    def __init__(self, codec: Any) -> None:
        self._codec = codec

    def encode(self, flat: torch.Tensor, key: int) -> torch.Tensor:
        return torch.full_like(self._codec.encode(flat, key), 255)


def test_what_was_dropped_is_forgotten_when_nobody_asks(serve: Any) -> None:
    a, b = serve.workers([serve()], 2)
    a.begin(SGD(0.1), consistency="async", discard=0)
    for step in range(20):
        a.push(step, gradient(step, 0))
        b.version = 0
        b.push(step, gradient(step, 1))
    assert a.servers.status()[0]["discarded"] == 20
    assert a.servers.halt().unused["worker-1"] >= {18, 19}
    assert len(a.servers.halt().unused["worker-1"]) < 5


def test_two_servers_do_not_share_a_state(serve: Any, tmp_path: Path) -> None:
    serve(state=tmp_path)
    with pytest.raises(CheckpointError, match="in use by another server"):
        serve(state=tmp_path)


def test_snapshots_fold_the_log(serve: Any, tmp_path: Path) -> None:
    server = serve(state=tmp_path, interval_s=1e-9)
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="async")
    for step in range(4):
        worker.push(step, gradient(step, 0))
    server.stop(0)
    assert len(list(tmp_path.glob("snapshot-*"))) == 1
    assert len(list(tmp_path.glob("log-*"))) == 1
    again = serve(state=tmp_path)
    assert again.shard.version == 4
    close_to({n: p.detach() for n, p in again.shard.store.params.items()}, worker.params, 0.0)


def start_alone(tmp_path: Path, *more: str) -> tuple[subprocess.Popen[str], Endpoint]:
    """`manyhands serve-parameters` as a process of its own, and where it says it is."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "manyhands", "serve-parameters"),
            *("--token-file", str(tmp_path / "token"), *more),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "serving on" in line:
            words = line.replace(",", " ").replace(";", " ").split()
            found = [w for w in words if w.startswith("sha256:")]
            return process, Endpoint(words[words.index("on") + 1], found[0] if found else "")
    raise AssertionError(f"it ended with {process.wait()}")


def test_a_killed_server_continues_alone(tmp_path: Path) -> None:
    """The command as a user runs it: TLS, a token made at the start, SIGKILL, and the same address again."""
    state = ("--state", str(tmp_path / "state"))
    process, where = start_alone(tmp_path, *state)
    assert (tmp_path / "token").stat().st_mode & 0o077 == 0
    token = tls.read_token(str(tmp_path / "token"))
    servers = Servers([Link(lambda: where, token, patience_s=60.0)], member="me", job="job", lease_s=1000.0)
    worker = Worker.__new__(Worker)
    servers.lay_out(initial())
    worker.servers, worker.version = servers, 0
    worker.out = [torch.zeros(servers.layouts[0].size_bytes, dtype=torch.uint8)]
    try:
        worker.begin(SGD(0.1, momentum=0.9), consistency="sync")
        servers.join(0)
        worker.push(0, gradient(0, 0))
        process.kill()
        process.communicate()
        answers = together(
            lambda: worker.push(1, gradient(1, 0)),  # calls until the server is there again
            lambda: start_alone(tmp_path, *state, "--listen", where.address),
        )
        process, again = answers[1]
        assert again == where  # the certificate is kept with the state
        assert answers[0]["version"] == 2
        means = [{n: g / 4 for n, g in gradient(step, 0).items()} for step in range(2)]
        close_to(worker.params, plain(SGD(0.1, momentum=0.9), means))
        servers.close()
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert "stopped" in said
