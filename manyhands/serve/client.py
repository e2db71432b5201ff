"""A worker's connection to its parameter servers.

`Link` is one connection: it pins the server's certificate, sends the token, and calls again while a server is gone (a
server under the launcher is started anew and continues). `Servers` is all of them: parameters are divided among them by
bytes, and every request goes to all at once.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from manyhands.core import errors, rpc
from manyhands.core.errors import ManyhandsError, PeerLost, UsageError
from manyhands.serve import protocol
from manyhands.serve.layout import Layout, divide

if TYPE_CHECKING:
    from torch import Tensor

FIRST_S, LONGEST_S = 0.05, 1.0  # between calls to a server that is gone


class Endpoint(NamedTuple):
    """Where a server is: HOST:PORT or unix:PATH, and its certificate's fingerprint (empty: plain)."""

    address: str
    fingerprint: str = ""


class Answer(NamedTuple):
    """A reply: its header and its payload (uint8)."""

    header: dict[str, Any]
    payload: Tensor


class Halted(NamedTuple):
    """What the servers have.

    Attributes:
        clocks: by worker, the first step that not all servers have of it.
        unused: by worker, the steps whose pushes were dropped.
        step: where pushes are applied together: the first that is not.
        tokens: that they have been given.
        applied: of each server, whether my push is in the last round.
    """

    clocks: dict[str, int]
    unused: dict[str, set[int]]
    step: int
    tokens: int
    applied: list[bool]


class _Channel(NamedTuple):
    """A gRPC channel and its one method."""

    channel: Any
    method: Any


class Link:
    """One connection to one server.

    Args:
        where: asked at each (re)connection: a restarted server may be elsewhere. May raise `OSError`: not yet there.
        token: the server's.
        patience_s: how long to try to reach a server that is gone.
    """

    def __init__(self, where: Callable[[], Endpoint], token: str, *, patience_s: float = 60.0) -> None:
        self._grpc = rpc.grpc_module()
        self._where, self._patience_s = where, patience_s
        self._metadata = rpc.bearer(token)
        self._lock = threading.Lock()
        self._channel: _Channel | None = None
        self._closed = False
        self.sent_bytes = self.received_bytes = 0

    def call(
        self, header: Mapping[str, Any], payload: Sequence[memoryview] = (), *, out: Tensor | None = None
    ) -> Answer:
        """Ask and wait for the answer.

        Args:
            out: where the answer's payload goes (uint8 of its size); None: into a new tensor.

        Raises:
            PeerLost: the server could not be reached for `patience_s`.
            ManyhandsError: what the server says, in its own type.
        """
        codes = self._grpc.StatusCode
        gone = (codes.UNAVAILABLE, codes.CANCELLED, codes.INTERNAL, codes.UNKNOWN, codes.ABORTED)
        deadline, pause = time.monotonic() + self._patience_s, FIRST_S
        while True:
            if self._closed:
                raise PeerLost(None, f"a call to the parameter server ({header.get('op')})", "hung up")
            used = None
            try:
                used = self._connect()
                return self._once(used.method, header, payload, out)
            except self._grpc.RpcError as error:
                code, detail = error.code(), error.details() or ""
                if code is codes.UNAUTHENTICATED:
                    raise UsageError(
                        "the parameter server refused the token", detail, "give the token_file of that server"
                    ) from None
                if code not in gone:
                    raise _raised(code.name, detail) from None
                reason = f"{code.name}: {detail}"
            except ManyhandsError:
                raise
            except (OSError, ValueError) as error:  # ValueError: another thread has just closed the channel
                reason = str(error)
            if time.monotonic() > deadline:
                raise PeerLost(None, f"a call to the parameter server ({header.get('op')})", reason[:300])
            self._disconnect(used)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_S)

    def close(self) -> None:
        self._closed = True
        self._disconnect(self._channel)

    def _once(
        self, method: Any, header: Mapping[str, Any], payload: Sequence[memoryview], out: Tensor | None
    ) -> Answer:
        replies = method(protocol.messages(header, payload), metadata=self._metadata)
        try:
            opening = protocol.opening(replies)
            size = opening.size_bytes
            if out is None or not size:
                out, view = protocol.buffer(size)
            elif out.numel() != size:
                raise protocol.Garbage(f"an answer of {size:,} bytes", f"{out.numel():,} were expected", "")
            else:
                view = protocol.view(out)
            protocol.receive(replies, view)
        finally:
            replies.cancel()
        self.sent_bytes += sum(len(part) for part in payload)
        self.received_bytes += size
        return Answer(opening.header, out)

    def _connect(self) -> _Channel:
        with self._lock:
            if self._channel is None:
                endpoint = self._where()
                channel = rpc.channel(
                    endpoint.address,
                    fingerprint=endpoint.fingerprint,
                    message_bytes=protocol.MESSAGE_BYTES,
                )
                self._channel = _Channel(channel, channel.stream_stream(protocol.METHOD))
            return self._channel

    def _disconnect(self, used: _Channel | None) -> None:
        """Close the channel `used`, unless another thread has done so; a newer one of its is left alone."""
        with self._lock:
            if self._channel is not None and self._channel is used:
                self._channel.channel.close()
                self._channel = None


class Servers:
    """All servers of a job, as one worker sees them.

    Args:
        links: one per server.
        member: this worker's name.
        job: the job's, equal on all its workers.
        lease_s: the servers'; a sign of life is sent three times as often.
    """

    def __init__(self, links: Sequence[Link], *, member: str, job: str, lease_s: float = 30.0) -> None:
        self._links, self.member, self.job = list(links), member, job
        self._pool = ThreadPoolExecutor(len(links), thread_name_prefix="server")
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, args=(lease_s / 3,), name="heart", daemon=True)
        self.serial: int | None = None  # of the job's beginning that I push to
        self.layouts: list[Layout] = []
        self._entries: list[list[protocol.Entry]] = []

    def lay_out(self, params: Mapping[str, Tensor]) -> None:
        """Decide which server keeps which parameters. Raises `UsageError`: more servers than parameters."""
        entries = [protocol.entry_of(name, p) for name, p in params.items()]
        self._entries = divide(entries, len(self._links))
        self.layouts = [Layout.of(part) for part in self._entries]

    def begin(
        self,
        rules: Mapping[str, Any],
        params: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        *,
        serial: int,
        steps: int,
        tokens: int,
        progress: float | None = None,
        reached: int | None = None,
    ) -> None:
        """Give the servers the job's rules, parameters and (of a checkpoint) optimizer state by name.

        Args:
            progress: global batches done, parts of them included; None: `steps`.
            reached: the steps that anybody has pushed of; None: `steps`. Wishes are fulfilled after them.
        """
        owners = {e.name: server for server, part in enumerate(self._entries) for e in part}
        unknown = sorted({name.rpartition(".")[0] for name in optimizer} - set(owners))
        if unknown:
            raise errors.CheckpointError(
                f"optimizer state of {unknown[0]!r}",
                "the model has no such trainable parameter",
                errors.nearest(unknown[0], owners),
            )

        def one(server: int) -> Answer:
            mine = {f"parameters/{e.name}": params[e.name].detach().to("cpu") for e in self._entries[server]}
            for name, tensor in optimizer.items():
                if owners[name.rpartition(".")[0]] == server:
                    mine[f"optimizer/{name}"] = tensor.detach().to("cpu")
            described, parts = protocol.described(mine)
            header = {
                **self._who("begin"),
                "serial": serial,
                "steps": steps,
                "tokens": tokens,
                "progress": float(steps) if progress is None else progress,
                "reached": steps if reached is None else max(steps, reached),
                "rules": {**rules, "alone": len(self._links) == 1},
                "tensors": described,
            }
            return self._links[server].call(header, parts)

        self._all(one)

    def join(self, step: int, *, exact: bool = False) -> int:
        """Take part from now on; the step to take part in next (`exact`: this one)."""
        ask = {**self._who("join"), "step": step, "exact": exact}
        answers = self._all(lambda i: self._links[i].call(ask))
        if not self._heart.is_alive() and not self._ended.is_set():
            self._heart.start()
        return max(int(a.header["step"]) for a in answers)

    def push(
        self,
        header: Mapping[str, Any],
        used: Mapping[str, bool],
        payloads: Sequence[Tensor],
        out: Sequence[Tensor],
    ) -> dict[str, Any]:
        """Push my contribution, pull fresh parameters into `out` (uint8, as laid out); the first server's answer.

        Args:
            header: the fields of `rules.Push` but `member` and `used`.
            payloads: for each server uint8, raw or encoded.

        Returns:
            The first server's answer; `applied` in it is a list: whether each server has used its payload. ``{"halted":
            True}``: the job's workers meet anew, and the push counts for nothing.
        """

        def one(server: int) -> Answer:
            flags = "".join("1" if used[e.name] else "0" for e in self.layouts[server].entries)
            full = {**header, **self._who("push"), "used": flags}
            return self._links[server].call(full, [protocol.view(payloads[server])], out=out[server])

        answers = self._all(one)
        if any(a.header.get("halted") for a in answers):
            return {"halted": True}
        if any("version" not in a.header for a in answers):  # a round over several servers is complete
            answers = self._agree(answers, int(header["step"]), out, one)
            if any(a.header.get("halted") for a in answers):
                return {"halted": True}
        return {**answers[0].header, "applied": [bool(a.header.get("applied")) for a in answers]}

    def pull(self, out: Sequence[Tensor], *, flush: bool = False) -> dict[str, Any]:
        """The parameters as they are now, into `out`; with `flush`, gathered pushes are applied before."""
        ask = {**self._who("pull"), "flush": flush}
        return self._all(lambda i: self._links[i].call(ask, out=out[i]))[0].header

    def halt(self) -> Halted | None:
        """No push is taken any more until the job begins anew; which are in the parameters. None: it has begun already.

        A round that some of several servers have applied, and others not yet, is finished on these.
        """
        # not by the pool, whose threads may all be in a push that waits for somebody who is gone
        told = [link.call(self._who("halt")).header for link in self._links]
        if any(each.get("over") for each in told):
            return None
        ahead = max(told, key=lambda each: int(each["step"]))
        rest = {"step": int(ahead["step"]) - 1, "norm_sq": ahead["norm_sq"], "finish": True}
        for server, (link, each) in enumerate(zip(self._links, told, strict=True)):
            if int(each["step"]) < int(ahead["step"]):
                if "again" in link.call({**self._who("agree"), **rest}).header:
                    raise ManyhandsError(
                        f"parameter server {server} lost the pushes of step {rest['step']}, which others have applied",
                        "servers that restart keep what they have acknowledged (durability = each)",
                        "continue from the last checkpoint with --resume",
                    )
                told[server] = link.call(self._who("halt")).header
        everywhere = set(told[0]["clocks"]).intersection(*(each["clocks"] for each in told))
        clocks = {who: min(int(each["clocks"][who]) for each in told) for who in everywhere}
        unused = {who: set(steps) for who, steps in told[0]["unused"].items()}
        applied = [bool(each["applied"]) for each in told]
        return Halted(clocks, unused, int(told[0]["step"]), int(told[0]["tokens"]), applied)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
        """(the first server's answer, parameters, optimizer state), by name."""
        params: dict[str, Tensor] = {}
        optimizer: dict[str, Tensor] = {}
        answers = self._all(lambda i: self._links[i].call(self._who("state")))
        for answer in answers:
            entries = protocol.entries_of(answer.header["tensors"])
            for full, tensor in protocol.carved(entries, answer.payload).items():
                kind, _, name = full.partition("/")
                (params if kind == "parameters" else optimizer)[name] = tensor
        return answers[0].header, params, dict(sorted(optimizer.items()))

    def status(self) -> list[dict[str, Any]]:
        """Each server's figures."""
        return [a.header for a in self._all(lambda i: self._links[i].call(self._who("status")))]

    @property
    def traffic(self) -> tuple[int, int]:
        """Payload bytes sent and received so far."""
        return sum(li.sent_bytes for li in self._links), sum(li.received_bytes for li in self._links)

    def close(self) -> None:
        """Leave (as far as servers can be reached) and hang up."""
        self._ended.set()
        for link in self._links:
            link._patience_s = 0.0
            with contextlib.suppress(ManyhandsError):
                link.call(self._who("leave"))
        self.hang_up()

    def hang_up(self) -> None:
        """Without a word: the servers believe that I am still there."""
        self._ended.set()
        for link in self._links:
            link.close()
        if self._heart.is_alive():
            self._heart.join()
        self._pool.shutdown()

    def _who(self, op: str) -> dict[str, Any]:
        return {"op": op, "member": self.member, "job": self.job, "serial": self.serial}

    def _agree(
        self, answers: Sequence[Answer], step: int, out: Sequence[Tensor], push: Callable[[int], Answer]
    ) -> list[Answer]:
        """Its second half, with the norm of the whole; a server that lost the pushes in a restart gets them again."""
        norm_sq = sum(float(a.header.get("norm_sq") or 0.0) for a in answers)
        ask = {**self._who("agree"), "step": step, "norm_sq": norm_sq}

        def one(server: int) -> Answer:
            answer = self._links[server].call(ask, out=out[server])
            while answer.header.get("again"):
                push(server)
                answer = self._links[server].call(ask, out=out[server])
            return answer

        return self._all(one)

    def _all(self, one: Callable[[int], Answer]) -> list[Answer]:
        if len(self._links) == 1:
            return [one(0)]
        return list(self._pool.map(one, range(len(self._links))))

    def _beat(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            for link in self._links:
                with contextlib.suppress(ManyhandsError):
                    link.call(self._who("beat"))


def endpoints(file: str) -> Iterator[Endpoint]:
    """The servers that a launcher's file names: one JSON object a line. Raises `OSError` while it is not there."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            found = json.loads(line)
            yield Endpoint(found["address"], found["fingerprint"])


def _raised(code: str, detail: str) -> ManyhandsError:
    """The error that a server told of."""
    try:
        told = json.loads(detail)
        kind = getattr(errors, told["type"], ManyhandsError)
        if kind in (errors.PeerLost, errors.Stopped) or not issubclass(kind, ManyhandsError):
            kind = ManyhandsError
        found: ManyhandsError = kind(told["value"], told["rule"], told["remedy"])
        return found
    except (ValueError, KeyError, TypeError):
        return ManyhandsError(
            f"the parameter server answered {code}: {detail[:300]}", "", "see the server's log"
        )
