"""`manyhands coordinate [JOB.toml]`: the coordinator alone, for jobs whose workers come from several machines."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.cli import options, train
from manyhands.cli.serve import known_identity, token_in
from manyhands.core.errors import UsageError

if TYPE_CHECKING:
    from manyhands.coordinate.server import Coordinator
    from manyhands.train.job import Job

JOURNAL = "coordinator.jsonl"  # in the output directory
LINGER_S = 2.0  # so that everybody hears how the job ended
AS_GIVEN = "the job goes on as it was given; of this command only where to listen and --replace-s count"
STOP_S = 600.0  # for the workers to save, after a signal


def main(arguments: Sequence[str]) -> int:
    from manyhands.launch.claim import claimed
    from manyhands.launch.job import placed
    from manyhands.placement.served import local

    p = train.parser()
    p.prog = "manyhands coordinate"
    p.description = "Wait for workers (`manyhands join`), let them train the job, and see it through losses and newcomers."
    p.epilog = (
        "Exit codes: those of `manyhands train`. Killed and started again with the same --output, it goes on."
    )
    p.add_argument(
        "--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0: a free one (default)"
    )
    p.add_argument(
        "--token-file",
        "--token_file",
        metavar="FILE",
        help="made where absent; default: OUTPUT/coordinator.token",
    )
    p.add_argument("--tls-cert", "--tls_cert", metavar="PEM", help="none: one is made and kept in --output")
    p.add_argument("--tls-key", "--tls_key", metavar="PEM", help="the certificate's key")
    p.add_argument("--plain", action="store_true", help="no TLS; for loopback addresses")
    p.add_argument(
        "--replace-s", type=float, default=600.0, metavar="S", help="how long too few workers wait for others"
    )
    given = options.parse(p, arguments)
    if given.plain and not local(given.listen):
        raise UsageError(
            f"--plain with --listen {given.listen}",
            "without TLS only this machine is served",
            "leave out --plain, or listen on 127.0.0.1",
        )
    if given.plain and (given.tls_cert or given.tls_key):
        raise UsageError("--plain with --tls-cert", "a certificate is for TLS", "leave out one of them")
    if not 0 <= given.replace_s < float("inf"):
        raise UsageError(f"--replace-s {given.replace_s}", "it is a time in seconds", "")
    job, origins = train.assemble(given)
    if given.accumulate is not None and job.workers is None:
        raise UsageError(
            f"--gradient-accumulation-steps {given.accumulate} without --workers",
            "the global batch is then a product with the workers, whose number only joining tells",
            "give --global-batch, or --workers N",
        )
    output = Path(job.output)
    if not (output / JOURNAL).exists():
        job = placed(job, origins)
        output = Path(job.output)
    _check_launch(job)
    with claimed(output):
        return _coordinate(given, job, origins, default_listen=p.get_default("listen"))


def _coordinate(
    given: argparse.Namespace, job: Job, origins: Mapping[str, str], *, default_listen: str
) -> int:
    """The job, from its output's being ours to its end; returns the exit code."""
    from manyhands.coordinate.journal import unfinished
    from manyhands.coordinate.server import Coordinator
    from manyhands.coordinate.words import Rules
    from manyhands.core.rpc import CannotListen, reachable
    from manyhands.launch.claim import make_fresh
    from manyhands.launch.control import CONTACT, contact
    from manyhands.launch.job import RESUME_AUTO
    from manyhands.train.order import Order

    output = Path(job.output)
    journal = output / JOURNAL
    output.mkdir(parents=True, exist_ok=True)
    auto = origins.get("output") == RESUME_AUTO  # "continue": whoever still runs it does
    before = unfinished(journal, end=job.resume is not None and not auto)
    if before is None:
        make_fresh(output, job.resume, job.sinks)
    listen, awaited = given.listen, job
    if (
        before is not None and listen == default_listen
    ):  # where its workers look for us, to go on or to be turned away
        listen = _address_of(output / CONTACT) or listen
    if before is not None and job.resume is not None and not auto:
        _log("the job begins anew from its checkpoint; whoever still runs it is turned away")
    elif before is not None and "order" in before:  # its workers know its rules
        _log("the job had not ended: its workers are awaited" if auto else AS_GIVEN)
        awaited = Order.from_json(before["order"]).job
    token_file = given.token_file or str(output / "coordinator.token")
    asked: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _: asked.append(number))

    def serve(awaited: Job, *, calling: bool) -> Coordinator:
        served = Coordinator(
            token=token_in(token_file),
            listen=listen,
            identity=None if given.plain else known_identity(given, output),
            journal=journal,
            calling=calling,
            rules=Rules(
                hang_s=awaited.hang_s,
                stuck_s=awaited.stuck_s,
                min_workers=awaited.min_workers,
                awaited=awaited.workers or awaited.min_workers,
                patience_s=given.replace_s,
                shared=awaited.shares_memory,
                resume=f"manyhands coordinate --resume {output}",
            ),
            log=_log,
        )
        served.start()
        return served

    try:
        coordinator = serve(awaited, calling=auto and before is not None)
    except CannotListen:
        if listen == given.listen or auto or job.resume is None:  # where it was told to be, or is looked for
            raise
        _log(
            f"{listen}, where the job was, is taken: whoever still runs it is not told that it has begun anew"
        )
        listen = f"{listen.rpartition(':')[0]}:0"
        coordinator = serve(awaited, calling=False)
    try:  # whatever happens: connections that nobody ends would keep this process
        if auto and before is not None and _called_back(coordinator, asked):
            _log(AS_GIVEN)
        elif auto and before is not None:
            _log(
                "none of its workers has come back: the job begins anew from its checkpoint, where it has one"
            )
            coordinator.stop()
            unfinished(journal, end=True)
            make_fresh(output, job.resume, job.sinks)
            coordinator = serve(job, calling=False)
        if "order" not in coordinator.facts:
            coordinator.publish("order", Order(job, dict(origins), time.time()).to_json())
        address = reachable(coordinator.address)
        there = contact(address, token_file, coordinator.fingerprint, listen=coordinator.address)
        (output / CONTACT).write_text(there, encoding="utf-8")
        fingerprint = f" --fingerprint {coordinator.fingerprint}" if coordinator.fingerprint else ""
        _log(f"join by: manyhands join {address} --token-file {token_file}{fingerprint}")
        try:
            return _see_through(coordinator, asked)
        finally:
            (output / CONTACT).unlink(missing_ok=True)
    finally:
        coordinator.stop()


def _check_launch(job: Job) -> None:
    """Launchers join by themselves, and what they have in common, parameter servers, stands alone. Raises `UsageError`."""
    placement: Any = job.strategy.placement
    if job.launcher != "auto":
        raise UsageError(
            f"launcher = {job.launcher!r} with manyhands coordinate",
            "each machine's manyhands join starts the workers there",
            "leave out --launcher",
        )
    if job.elastic == "off":
        raise UsageError(
            "elastic = 'off' with manyhands coordinate",
            "a coordinator is there for workers that come, leave and are lost",
            "leave out --elastic, or use manyhands train",
        )
    if getattr(placement, "consistency", None) is not None and not placement.address:
        raise UsageError(
            f"strategy = {job.strategy!r} without address",
            "workers of several machines share servers that stand alone",
            "start manyhands serve-parameters, and give address, token_file and fingerprint as it prints them",
        )


def _address_of(contact: Path) -> str | None:
    """Where the coordinator before listened, if it could not clear that away."""
    try:
        found = json.loads(contact.read_text(encoding="utf-8"))
        return str(found.get("listen") or found["address"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _called_back(coordinator: Coordinator, asked: list[int]) -> bool:
    """Whether a worker of before the restart is there again, awaited for as long as any may come; or we are asked to stop."""
    while not (coordinator.alive() or asked or coordinator.epoch is None):
        if coordinator.ended is not None or not coordinator.missing:
            return False
        time.sleep(0.02)
    return True


def _see_through(coordinator: Coordinator, asked: list[int]) -> int:
    """Until the job has ended; returns its code."""
    told, deadline = 0, float("inf")
    while coordinator.ended is None:
        _tell(coordinator)
        if len(asked) > told:
            told = len(asked)
            if told > 1:
                return 128 + asked[0]
            _log(f"{signal.Signals(asked[0]).name}: stopping the workers; once more to end at once")
            coordinator.tell_stop()
            deadline = time.monotonic() + STOP_S
        if asked and (not coordinator.alive() or time.monotonic() > deadline):
            if not (coordinator.alive() or coordinator.missing):  # else somebody may still run it
                coordinator.fail(f"stopped by {signal.Signals(asked[0]).name}", 128 + asked[0])
            return 128 + asked[0]
        time.sleep(0.05)
    _tell(coordinator)
    code, words = coordinator.ended
    with contextlib.suppress(OSError):
        print(f"manyhands: {words}" if code else "manyhands: the job is done", file=sys.stderr, flush=True)
    deadline = time.monotonic() + LINGER_S
    while coordinator.alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    threading.Event().wait(0.2)  # launchers that joined hear it, too
    return code


def _tell(coordinator: Coordinator) -> None:
    """What has happened, in lines."""
    from manyhands.coordinate.words import during

    while not coordinator.happenings.empty():
        happening = coordinator.happenings.get_nowait()
        loss, epoch = happening.loss, happening.epoch
        if happening.kind == "joined":
            _log(f"{happening.seat_id} is here")
        elif epoch is not None:
            _log(f"epoch {epoch.number}: {', '.join(seat.id for seat in epoch.seats)}")
        elif loss is not None:
            where = f" on {loss.seat.host}" if loss.seat.host else ""
            if loss.how == "left":
                _log(f"{loss.seat.id}{where} has left{during(loss)}: {loss.detail}")
            else:
                _log(f"{loss.seat.id}{where} is lost{during(loss)} ({loss.how}: {loss.detail})")


def _log(line: str) -> None:
    with contextlib.suppress(OSError):  # a full disk: the job goes on
        print(f"{time.strftime('%H:%M:%S')} manyhands: {line}", file=sys.stderr, flush=True)
