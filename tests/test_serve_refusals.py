"""The parameter server's callers: strangers, noise, certificates, other jobs' workers; and what its command refuses."""

from __future__ import annotations

import argparse
import contextlib
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pushers
import pytest
from pushers import TOKEN, WAIT_S, close_to, gradient, together

from manyhands.core import tls
from manyhands.core.errors import ManyhandsError, PeerLost, UsageError
from manyhands.serve import protocol
from manyhands.serve.link import Endpoint, Link
from manyhands.serve.server import Server
from manyhands.strategy.optimizers import SGD

serve = pushers.serve  # the fixture


def raw_call(server: Server, messages: list[bytes], token: str = TOKEN) -> Any:
    """A foreign program's call over a real connection: the RpcError that it gets."""
    import grpc

    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream(protocol.METHOD)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter(messages), metadata=(("authorization", f"Bearer {token}"),), timeout=WAIT_S))
    return caught.value.code().name


HEAD = struct.Struct("<4sIQ")
JUNK = {
    "nothing": [],
    "noise": [b"\x00\xff" * 40],
    "short": [b"MHP1"],
    "foreign": [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
    "oversized header": [HEAD.pack(b"MHP1", 0xFFFFFFFF, 0) + b"{}"],
    "oversized payload": [HEAD.pack(b"MHP1", 2, 1 << 60) + b"{}"],
    "not json": [HEAD.pack(b"MHP1", 2, 0) + b"{["],
    "not an object": [HEAD.pack(b"MHP1", 2, 0) + b"[]"],
    "pickle": [HEAD.pack(b"MHP1", 4, 0) + b"\x80\x04N."],
    "no such op": list(protocol.messages({"op": "shutdown"})),
    "huge push": [HEAD.pack(b"MHP1", 13, 1 << 41) + b'{"op":"push"}'],
    "fields": list(protocol.messages({"op": "push", "member": "x", "step": -1, "used": "1111"})),
    "types": list(protocol.messages({"op": "push", "member": ["x"], "step": 0, "used": "1111"})),
    "no member": list(protocol.messages({"op": "join", "job": "job"})),
    "tensors": list(protocol.messages({"op": "begin", "tensors": [["p", "object", [1]]]})),
    "shape": list(protocol.messages({"op": "begin", "tensors": [["p", "float32", [-1]]]})),
    "claims more than it sends": [*protocol.messages({"op": "begin", "tensors": [["p", "float32", [9]]]})],
    "module": list(
        protocol.messages({"op": "begin", "tensors": [], "rules": {"optimizer": {"kind": "os:system"}}})
    ),
}


@pytest.mark.parametrize("what", JUNK)
def test_garbage_is_refused_logged_and_harmless(serve: Any, what: str) -> None:
    server = serve()
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="async")
    worker.push(0, gradient(0, 0))
    said = len(server.lines)
    assert raw_call(server, JUNK[what]) in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
    assert len(server.lines) > said
    close_to(worker.params, {n: p.detach() for n, p in server.shard.store.params.items()}, 0.0)
    assert worker.push(1, gradient(1, 0))["version"] == 2


@pytest.mark.parametrize(
    "load",
    [[1.0] * 4, [1.0] * 6, {"a": 1}, "12345", 3.0, ["1"] * 5, [0, 0, 0, 0, -1], [True] * 5]
    + [[0, 0, 0, 0, bad] for bad in (float("nan"), float("inf"), None, [])],
    ids=str,
)
def test_foreign_figures_of_a_workers_time_are_refused(serve: Any, load: Any) -> None:
    server = serve()
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="async")
    with pytest.raises(ManyhandsError, match=r"load = .*5 finite numbers that are not negative"):
        worker.push(0, gradient(0, 0), load=load)
    assert any("refused" in line and "load = " in line for line in server.lines)
    assert worker.push(0, gradient(0, 0), load=[0.5, 4, 0, 0, 0])["version"] == 1


def test_a_message_longer_than_allowed_is_refused(serve: Any) -> None:
    server = serve()
    assert raw_call(server, [b"\x00" * (protocol.MESSAGE_BYTES + 1)]) == "RESOURCE_EXHAUSTED"
    assert raw_call(server, [b""]) == "INVALID_ARGUMENT"


def test_a_wrong_token_is_refused_before_anything_is_read(serve: Any) -> None:
    server = serve()
    for token in ("", "wrong", TOKEN + "x"):
        assert raw_call(server, list(protocol.messages({"op": "status"})), token) == "UNAUTHENTICATED"
    assert sum("wrong token" in line for line in server.lines) == 3
    link = Link(lambda: Endpoint(server.address), "not the right token")
    with pytest.raises(UsageError, match="refused the token"):
        link.call({"op": "status"})
    link.close()


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 4096, b"\x16\x03\x01\xff\xff" + b"\xff" * 400]
)
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_noise_on_the_socket_harms_nobody(serve: Any, noise: bytes, secure: bool) -> None:
    server = serve(identity=tls.self_signed() if secure else None)
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="async")
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as stranger:
        stranger.sendall(noise)
        stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass
    assert worker.push(0, gradient(0, 0))["version"] == 1


def test_tls_is_pinned_to_the_certificate(serve: Any) -> None:
    server, other = serve(identity=tls.self_signed()), tls.self_signed()
    (worker,) = serve.workers([server], 1)
    worker.begin(SGD(0.1), consistency="sync")
    worker.servers.join(0)
    assert worker.push(0, gradient(0, 0))["version"] == 1
    wrong = Link(lambda: Endpoint(server.address, other.fingerprint), TOKEN)
    with pytest.raises(UsageError, match="shows the certificate sha256:"):
        wrong.call({"op": "status"})
    wrong.close()
    plain_link = Link(lambda: Endpoint(server.address), TOKEN, patience_s=0.1)
    with pytest.raises(PeerLost, match=f"the parameter server at {server.address} .status"):
        plain_link.call({"op": "status"})
    plain_link.close()


def own_certificate(directory: Path, *, names: Sequence[str], authority: bool) -> list[str]:
    """Files of a certificate as a company's tools make them, and its key: signed by itself or by an authority, a chain then."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def called(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def signed(subject: x509.Name, key: Any, issuer: x509.Name, by: Any, sans: Sequence[str]) -> bytes:
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=9))
        if sans:
            alternatives = x509.SubjectAlternativeName([x509.DNSName(n) for n in sans])
            builder = builder.add_extension(alternatives, critical=False)
        return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    key, root = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    subject, issuer = called("parameters.example.org"), called("An authority")
    if authority:
        pem = signed(subject, key, issuer, root, names) + signed(issuer, root, issuer, root, ())
    else:
        pem = signed(subject, key, subject, key, names)
    files = directory / "own.pem", directory / "own.key"
    files[0].write_bytes(pem)
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return [str(file) for file in files]


@pytest.mark.parametrize("authority", [False, True], ids=["self-signed", "chain"])
@pytest.mark.parametrize("names", [("*.example.org", "b.example.org"), ()], ids=["names", "common-name"])
def test_a_certificate_of_ones_own_serves(
    serve: Any, tmp_path: Path, names: tuple[str, ...], authority: bool
) -> None:
    from manyhands.cli.serve import known_identity

    certificate, key = own_certificate(tmp_path, names=names, authority=authority)
    identity = known_identity(argparse.Namespace(tls_cert=certificate, tls_key=key), None)
    server = serve(identity=identity)
    (worker,) = serve.workers([server], 1, patience_s=5.0)
    worker.begin(SGD(0.1), consistency="async")
    assert worker.push(0, gradient(0, 0))["version"] == 1


def test_a_server_that_hangs_up_while_it_greets_is_called_again(serve: Any) -> None:
    """As one does that is being started anew: the first connection ends in the middle of the handshake."""
    server = serve(identity=tls.self_signed())
    with socket.create_server(("127.0.0.1", 0)) as dying:
        places = iter([Endpoint(f"127.0.0.1:{dying.getsockname()[1]}", server.fingerprint)])

        def hang_up() -> None:
            stranger, _ = dying.accept()
            with stranger:
                stranger.recv(5)  # of its greeting
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4096):
                    pass

        there = Endpoint(server.address, server.fingerprint)
        link = Link(lambda: next(places, there), TOKEN, patience_s=20.0)
        answers = together(lambda: link.call({"op": "status"}), hang_up)
        assert answers[0].header["version"] == 0
        link.close()


def test_a_channel_that_another_thread_closed_is_no_end(serve: Any) -> None:
    server = serve()
    link = Link(lambda: Endpoint(server.address), TOKEN, patience_s=20.0)
    link.call({"op": "status"})
    first: Any = link._channel
    first.channel.close()  # between this thread's look and its call
    assert link.call({"op": "status"}).header["version"] == 0
    newer = link._channel
    assert newer is not first
    link._disconnect(first)  # one that failed on the old channel leaves the new one alone
    assert link._channel is newer
    assert link.call({"op": "status"}).header["version"] == 0
    link.close()


def test_only_a_socket_makes_way(tmp_path: Path) -> None:
    path = tmp_path / "thesis.tex"
    path.write_text("years of work")
    with pytest.raises(UsageError, match="something else than a socket"):
        Server(listen=f"unix:{path}", token=TOKEN)
    assert path.read_text() == "years of work"
    left = tmp_path / "socket"  # of a server that was killed
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(left))
    server = Server(listen=f"unix:{left}", token=TOKEN)
    server.start()
    with pytest.raises(UsageError, match="somebody listens there"):  # this one's, which lives
        Server(listen=f"unix:{left}", token=TOKEN)
    link = Link(lambda: Endpoint(server.address), TOKEN)
    assert link.call({"op": "status"}).header["version"] == 0
    link.close()
    server.stop(0)


def test_a_worker_of_an_old_job_changes_nothing(serve: Any) -> None:
    """Members are called alike in all jobs: one that wakes up late must not be taken for its successor."""
    server = serve()
    (old,) = serve.workers([server], 1, job="old")
    old.begin(SGD(0.1), consistency="async")
    old.push(0, gradient(0, 0))
    server.shard.expire("worker-0")
    (new,) = serve.workers([server], 1, job="new")
    new.begin(SGD(0.1), consistency="async")
    new.servers.join(0)
    new.push(0, gradient(0, 1))
    before = new.params
    (link,) = old.servers._links
    for call in (
        lambda: old.push(1, gradient(1, 0)),
        lambda: old.servers.pull(old.out, flush=True),
        old.servers.state,  # what survivors would go on with
        lambda: link.call({**old.servers._who("agree"), "step": 1, "norm_sq": 1.0}),
        lambda: link.call(old.servers._who("beat")),
        lambda: link.call(old.servers._who("leave")),
        lambda: old.servers.join(0),
    ):
        with pytest.raises(UsageError, match="works for another job"):
            call()
    assert old.servers.status()[0]["members"] == {"worker-0": 1}
    new.servers.pull(new.out)
    close_to(new.params, before, 0.0)


def test_two_addresses_of_one_server_are_refused(serve: Any) -> None:
    """Each half would be taken for the whole: the tensors' sizes alone tell nobody."""
    server = serve()
    (worker,) = serve.workers([server, server], 1)
    with pytest.raises(UsageError, match=r"addresses \d and \d lead to one parameter server"):
        worker.begin(SGD(0.1), consistency="async")


def test_another_job_waits_for_its_turn(serve: Any) -> None:
    server = serve()
    (first,) = serve.workers([server], 1)
    (second,) = serve.workers([server], 1, job="another")
    first.begin(SGD(0.1), consistency="async")
    first.servers.join(0)
    with pytest.raises(UsageError, match="works for another job"):
        second.begin(SGD(0.1), consistency="async")
    with pytest.raises(UsageError, match="works for another job"):
        second.servers.join(0)
    first.servers.close()
    second.begin(SGD(0.1), consistency="async")
    assert second.push(0, gradient(0, 0))["version"] == 1


def test_the_command_refuses_what_it_cannot_mean(tmp_path: Path) -> None:
    from manyhands.cli.main import main

    token = str(tmp_path / "token")
    own_certificate(tmp_path, names=(), authority=False)
    other = tmp_path / "other.key"
    other.write_bytes(tls.self_signed().key)
    for arguments in (
        [],
        ["--token-file", token, "--plain", "--listen", "0.0.0.0:0"],
        ["--token-file", token, "--lease", "0"],
        ["--token-file", token, "--tls-cert", "x"],
        ["--token-file", token, "--listen", "192.0.2.1:1"],
        ["--token-file", token, "--ready", str(tmp_path / "absent" / "ready")],
        ["--token-file", token, "--state", token],
        ["--token-file", token, "--tls-cert", str(other.with_name("own.pem")), "--tls-key", str(other)],
    ):
        assert main(["serve-parameters", *arguments]) == 2, arguments
    (tmp_path / "token").write_text("short")
    assert main(["serve-parameters", "--token-file", token]) == 2
