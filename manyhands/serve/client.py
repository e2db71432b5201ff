"""A worker's connections to its parameter servers, as one: parameters are divided among them by bytes, and every request goes
to all at once.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from manyhands.core import errors
from manyhands.core.aside import Aside
from manyhands.core.errors import ManyhandsError
from manyhands.serve import protocol
from manyhands.serve.layout import Layout, divide
from manyhands.serve.link import Answer

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.serve.link import Link


LEAVE_S = 10.0  # a server that does not hear of my leaving learns it from my silence
HEART_S = 2.0


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


class Servers:
    """All servers of a job, as one worker sees them.

    Args:
        links: one per server.
        member: this worker's name.
        job: the job's, equal on all its workers.
        lease_s: a sign of life is sent three times as often, or more often where a server's own is shorter.
    """

    def __init__(self, links: Sequence[Link], *, member: str, job: str, lease_s: float = 30.0) -> None:
        self._links, self.member, self.job = list(links), member, job
        self._threads = Aside("server")
        self._ended = threading.Event()
        self._lease_s = lease_s
        self._hearts = [  # one for each: a server that is gone for a while keeps no other from hearing of me
            threading.Thread(target=self._beat, args=(link,), name="heart", daemon=True) for link in links
        ]
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
                "part": server,
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
        self._lease_s = min([self._lease_s, *(float(a.header.get("lease_s", math.inf)) for a in answers)])
        for heart in self._hearts:
            if not heart.is_alive() and not self._ended.is_set():
                heart.start()
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
            True, "lost": WHO}``: the job's workers meet anew, and the push counts for nothing; because of whom, if known.
        """

        def one(server: int) -> Answer:
            flags = "".join("1" if used[e.name] else "0" for e in self.layouts[server].entries)
            full = {**header, **self._who("push"), "used": flags}
            return self._links[server].call(full, [protocol.view(payloads[server])], out=out[server])

        answers = self._all(one)
        halted = any(a.header.get("halted") for a in answers)
        if not halted and any("version" not in a.header for a in answers):  # all of several servers have it
            answers = self._agree(answers, header, out, one)
            halted = any(a.header.get("halted") for a in answers)
        if halted:
            return {"halted": True, **{k: v for a in answers for k, v in a.header.items() if k == "lost"}}
        return {**answers[0].header, "applied": [bool(a.header.get("applied")) for a in answers]}

    def pull(self, out: Sequence[Tensor], *, flush: bool = False) -> dict[str, Any]:
        """The parameters as they are now, into `out`; with `flush`, gathered pushes are applied before."""
        ask = {**self._who("pull"), "flush": flush}
        return self._all(lambda i: self._links[i].call(ask, out=out[i]))[0].header

    def halt(self) -> Halted | None:
        """No push is taken any more until the job begins anew; which are in the parameters. None: it has begun already.

        A round or a push that some of several servers have applied, and others not yet, is finished on these.
        """
        ask = {**self._who("halt"), "flush": len(self._links) == 1}
        told = [link.call(ask).header for link in self._links]
        if any(each.get("over") for each in told):
            return None
        if not told[0]["sync"]:
            return self._finish_pushes(told)
        ahead = max(told, key=lambda each: int(each["step"]))
        rest = {"step": int(ahead["step"]) - 1, "norm_sq": ahead["norm_sq"], "finish": True}
        for server, (link, each) in enumerate(zip(self._links, told, strict=True)):
            if int(each["step"]) < int(ahead["step"]):
                if "again" in link.call({**self._who("agree"), **rest}).header:
                    raise _lost(server, rest["step"])
                told[server] = link.call(self._who("halt")).header
        return _halted(told)

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
                link.call(self._who("leave"), silent_s=LEAVE_S)
        self.hang_up()

    def hang_up(self) -> None:
        """Without a word: the servers believe that I am still there."""
        self._ended.set()
        for link in self._links:
            link.close()
        for heart in self._hearts:
            if heart.is_alive():
                heart.join(HEART_S)
        self._threads.close()

    def _who(self, op: str) -> dict[str, Any]:
        return {"op": op, "member": self.member, "job": self.job, "serial": self.serial}

    def _finish_pushes(self, told: list[dict[str, Any]]) -> Halted | None:
        """What some servers were told to apply, the others have, too: nobody is told before all have it."""
        for who in {who for each in told for who in each["clocks"]}:
            first = max(told, key=lambda each: int(each["clocks"].get(who, 0)))
            clock = int(first["clocks"][who])
            rest = {
                "member": who,
                "step": clock - 1,
                "staleness": first["judged"].get(who, 0),
                "finish": True,
            }
            for server, each in enumerate(told):
                if int(each["clocks"].get(who, clock)) < clock:
                    answer = self._links[server].call({**self._who("agree"), **rest}).header
                    if "again" in answer and each["keeps"]:
                        raise _lost(server, rest["step"])
        ask = {
            **self._who("halt"),
            "flush": True,
        }  # only now: all make the same updates of what waits for company
        told = [link.call(ask).header for link in self._links]
        return None if any(each.get("over") for each in told) else _halted(told)

    def _agree(
        self,
        answers: Sequence[Answer],
        header: Mapping[str, Any],
        out: Sequence[Tensor],
        push: Callable[[int], Answer],
    ) -> list[Answer]:
        """The second half of a push, with the norm of the whole; a server that lost the first in a restart gets it again."""
        norm_sq = sum(float(a.header.get("norm_sq") or 0.0) for a in answers)
        said = {key: header[key] for key in ("step", "norm", "loss", "count")}
        ask = {
            **self._who("agree"),
            **said,
            "norm_sq": norm_sq,
            "staleness": answers[0].header.get("staleness"),
        }

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
        asked = [self._threads.submit(one, server) for server in range(len(self._links))]
        return [answer.result() for answer in asked]

    def _beat(self, link: Link) -> None:
        while not self._ended.wait(self._lease_s / 3):
            with contextlib.suppress(Exception):  # whatever it was, the next one may be heard
                link.call(self._who("beat"))


def _lost(server: int, step: int) -> ManyhandsError:
    return ManyhandsError(
        f"parameter server {server} lost the pushes of step {step}, which others have applied",
        "servers that restart keep what they have acknowledged (durability = each)",
        "continue from the last checkpoint with --resume",
    )


def _halted(told: Sequence[Mapping[str, Any]]) -> Halted:
    """What all servers have, of what each tells."""
    everywhere = set(told[0]["clocks"]).intersection(*(each["clocks"] for each in told))
    clocks = {who: min(int(each["clocks"][who]) for each in told) for who in everywhere}
    unused = {who: set(steps) for who, steps in told[0]["unused"].items()}
    applied = [bool(each["applied"]) for each in told]
    return Halted(clocks, unused, int(told[0]["step"]), int(told[0]["tokens"]), applied)
