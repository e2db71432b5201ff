"""`manyhands serve-parameters`: a parameter server that stands alone. Jobs reach it by `parameter-server(address=…)`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.cli import options
from manyhands.core.errors import UsageError

if TYPE_CHECKING:
    from manyhands.core.tls import Identity

BEAT_S = 0.25


def main(arguments: Sequence[str]) -> int:
    given = options.parse(_parser(), arguments)
    os.environ.setdefault("GRPC_VERBOSITY", "INFO")  # before grpc is loaded: it logs refused handshakes then
    import torch

    from manyhands.placement.served import local
    from manyhands.serve.server import Server

    state = Path(given.state) if given.state else None
    plain = given.plain or given.listen.startswith("unix:")
    _check_used(given, kept=state is not None, plain=plain)
    for name in ("interval", "lease"):
        if getattr(given, name) is not None and not 0 < getattr(given, name) < float("inf"):
            raise UsageError(f"--{name} {getattr(given, name)}", "it is a positive time in seconds", "")
    if given.threads < 1:
        raise UsageError(f"--threads {given.threads}", "it is at least 1", "")
    if given.plain and not local(given.listen):
        raise UsageError(
            f"--plain with --listen {given.listen}",
            "without TLS only this machine is served",
            "leave out --plain, or listen on 127.0.0.1",
        )
    torch.set_num_threads(given.threads)
    server = Server(
        listen=given.listen,
        token=token_in(given.token_file),
        identity=None if plain else known_identity(given, state),
        state=state,
        durability=given.durability or "each",
        interval_s=given.interval or 60.0,
        lease_s=given.lease,
        log=_log,
    )
    asked = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: asked.set())
    server.start()
    try:  # whatever happens: calls that nobody ends would keep this process
        where = f"serving on {server.address}" + (f", certificate {server.fingerprint}" if not plain else "")
        _log(where + ("" if state else "; without --state nothing survives a restart"))
        if given.ready:
            try:
                _announce(Path(given.ready), {"address": server.address, "fingerprint": server.fingerprint})
            except OSError as error:
                raise UsageError(
                    f"--ready {given.ready}: {error.strerror}", "it can be written", ""
                ) from None
        while not asked.wait(BEAT_S):
            if given.ready:
                with contextlib.suppress(OSError):  # somebody has removed it
                    os.utime(given.ready)
    finally:
        server.stop()
    _log("stopped" + (f"; {state} has the state" if state else ""))
    return 0


def _check_used(given: argparse.Namespace, *, kept: bool, plain: bool) -> None:
    """Raises `UsageError` for an option that would do nothing."""
    for name in ("durability", "interval"):
        if getattr(given, name) is not None and not kept:
            raise UsageError(
                f"--{name} {getattr(given, name)} without --state",
                "nothing is kept anywhere then",
                f"give --state DIR, or leave out --{name}",
            )
    if plain and (given.tls_cert or given.tls_key):
        what = "--plain" if given.plain else f"--listen {given.listen}"
        raise UsageError(
            f"{what} with --tls-cert", "a certificate is for TLS, which is not used", "leave out one of them"
        )


def _parser() -> options.Parser:
    p = options.Parser(
        prog="manyhands serve-parameters",
        description="Keep a model's parameters for workers that push gradients: "
        "manyhands train --strategy \"parameter-server(address='HOST:PORT', token_file='FILE', fingerprint='sha256:…')\".",
        allow_abbrev=False,
    )
    p.add_argument(
        "--listen",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="or unix:PATH; port 0: a free one, which is printed (default 127.0.0.1:0)",
    )
    p.add_argument(
        "--token-file",
        "--token_file",
        required=True,
        metavar="FILE",
        help="the token that workers must know; made where the file is absent",
    )
    p.add_argument(
        "--state", metavar="DIR", help="snapshots and log; a restarted server continues from there"
    )
    p.add_argument(
        "--durability",
        choices=("each", "synced", "interval"),
        help="what survives the server's death: each acknowledged push; also after a loss of power (synced); "
        "the last snapshot (interval) (default each)",
    )
    p.add_argument("--interval", type=float, metavar="S", help="between snapshots (default 60)")
    p.add_argument(
        "--lease",
        type=float,
        default=30.0,
        metavar="S",
        help="a worker silent for so long is not waited for (default 30)",
    )
    p.add_argument("--tls-cert", "--tls_cert", metavar="PEM", help="none: one is made and kept in --state")
    p.add_argument("--tls-key", "--tls_key", metavar="PEM", help="the certificate's key")
    p.add_argument("--plain", action="store_true", help="no TLS; for loopback addresses")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="for updates (default 1)")
    p.add_argument(
        "--ready",
        metavar="FILE",
        help="write address and fingerprint there (JSON) once serving; touched as long as it does",
    )
    return p


def token_in(path: str) -> str:
    """The token in a file, which is made where it is absent. Raises `UsageError`."""
    from manyhands.core import tls

    if not Path(path).exists():
        try:
            tls.private(Path(path), tls.new_token().encode())
        except OSError as error:
            raise UsageError(f"--token-file {path}: {error.strerror}", "it can be written", "") from None
        _log(f"made a new token in {path}")
    return tls.read_token(path)


def known_identity(given: Any, state: Path | None) -> Identity:
    """The certificate that --tls-cert and --tls-key name, else the one kept in `state`. Raises `UsageError`."""
    from manyhands.core import tls

    if bool(given.tls_cert) != bool(given.tls_key):
        raise UsageError("--tls-cert and --tls-key", "they are given together", "")
    if not given.tls_cert:
        try:
            return tls.kept(state)
        except OSError as error:
            raise UsageError(f"{state}: {error.strerror}", "certificate and key are kept there", "") from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(given.tls_cert, given.tls_key, password="")
        return tls.Identity(Path(given.tls_cert).read_bytes(), Path(given.tls_key).read_bytes())
    except OSError as error:  # SSLError among them
        raise UsageError(
            f"--tls-cert {given.tls_cert} with --tls-key {given.tls_key}: {error.strerror or error}",
            "they are PEM files of a certificate and its key, without a password",
            "",
        ) from None


def _announce(path: Path, facts: dict[str, str]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    temporary.replace(path)


def _log(line: str) -> None:
    with contextlib.suppress(OSError):  # a full disk: what was served goes on
        print(f"{time.strftime('%H:%M:%S')} manyhands: {line}", file=sys.stderr, flush=True)
