"""Running a method: over links whose rate changes while it trains (for its speed), or without a network (for its losses)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
import netlab
from methods_catalogue import RATES, Method, Work
from methods_setting import Size

WARMUP_STEPS = 3
POLL_S = 0.02
PORT = 29400
ENDLESS = 100_000  # steps of a run that is ended from outside


class RunFailed(Exception):
    """A method that did not run, with the end of what it said."""


@dataclass
class Stream:
    """The steps of one worker as they happen, from manyhands' ``metrics.jsonl`` or a script's output.

    Attributes:
        times, losses: of each step's end, in order.
    """

    path: Path
    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    _offset: int = 0

    def read(self) -> None:
        """Take in what was written since the last call; whole lines only."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            if line.startswith(b"{"):
                self._take(json.loads(line))

    def _take(self, record: Mapping[str, Any]) -> None:
        kind = record.get("event", "stepped")
        if kind == "stepped" and "step" in record:
            self.times.append(record["time_s"])
            self.losses.append(record["loss"])
        elif kind == "evaluated":
            self.evaluations.append((record["step"], record["metrics"]["loss"]))
        elif "eval_loss" in record.get("done", {}):
            self.evaluations.append((len(self.times), record["done"]["eval_loss"]))


@dataclass
class Meter:
    """Bytes on each host's interface over time, read from the kernel some times a second."""

    pids: Sequence[int]
    times: list[float] = field(default_factory=list)
    sent: list[list[int]] = field(default_factory=list)

    def read(self) -> None:
        self.times.append(time.time())
        self.sent.append([interface_bytes(pid) for pid in self.pids])

    def between(self, start: float, end: float) -> list[float]:
        """Bytes that each host sent from `start` to `end`, interpolated."""
        return [self._at(end, host) - self._at(start, host) for host in range(len(self.pids))]

    def _at(self, when: float, host: int) -> float:
        import numpy as np

        return float(np.interp(when, self.times, [s[host] for s in self.sent]))


def interface_bytes(pid: int) -> int:
    """Bytes sent by ``eth0`` of the namespace that a process lives in."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "eth0":
            return int(figures.split()[8])
    raise RunFailed(f"process {pid} has no eth0")


def environment(rank: int, world: int, address: str, port: int, host: str) -> dict[str, str]:
    """What a launcher would say, for one thread on one core."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(harness.REMOVED)}
    return {
        **kept,
        **harness.ADDED,
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "MANYHANDS_HOST": host,
    }


@contextmanager
def started(
    method: Method, lab: netlab.Lab, size: Size, place: Path, seed: int, scratch: Path
) -> Iterator[tuple[list[Any], list[Stream]]]:
    """The method's workers, one on each host; ended on leaving."""
    world = len(lab.hosts)
    processes, streams = [], []
    try:
        for host in lab.hosts:
            alone = method.apart and method.ours
            work = Work(
                size=size,
                place=place,
                seed=seed,
                steps=ENDLESS,
                output=scratch / (f"run-{host.index}" if method.apart else "run"),
                global_batch=size.global_batch // (world if alone else 1),
            )
            env = environment(
                0 if alone else host.index, 1 if alone else world, lab.hosts[0].address, PORT, host.namespace
            )
            env |= {"GLOO_SOCKET_IFNAME": host.interface, "NETLAB_ADDRESS": host.address}
            out = scratch / f"out-{host.index}"
            with out.open("wb") as file:
                process = host.popen(method.command(work), env=env, stdout=file, stderr=subprocess.STDOUT)
            processes.append(process)
            if method.apart or host.index == 0:
                streams.append(Stream(work.output / "metrics.jsonl" if method.ours else out))
        yield processes, streams
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rates(
    method: Method, *, world: int, names: Sequence[str], size: Size, place: Path, seed: int, timeout_s: float
) -> list[dict[str, Any]]:
    """Samples of the method's speed at each rate, from one run of it.

    Raises:
        RunFailed: a worker ended, or nothing happened for `timeout_s`.
    """
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="manyhands-methods-") as scratch,
        netlab.Lab(world, None) as lab,
        started(method, lab, size, place, seed, Path(scratch)) as (processes, streams),
    ):
        meter = Meter([p.pid for p in processes])

        def until(steps: int) -> None:
            deadline = time.monotonic() + timeout_s
            while min(len(s.times) for s in streams) < steps:
                time.sleep(POLL_S)
                try:
                    meter.read()
                    ended = any(p.poll() is not None for p in processes)
                except OSError:
                    ended = True
                if ended or time.monotonic() > deadline:
                    raise RunFailed(_told(method, Path(scratch), timeout_s))
                for stream in streams:
                    stream.read()
            meter.read()

        until(WARMUP_STEPS)
        if method.apart:
            names = names[:1]
        for name in names:
            for host in lab.hosts:
                lab.set_rate(host.index, None if method.apart else RATES[name])
            # a step that begins after the change; at low rates what was begun before it is a small part
            first = max(len(s.times) for s in streams) + method.settle + (name in ("10gbit", "1gbit"))
            last = first + method.timed[name]
            until(first)
            busy, used = harness.busy_seconds(), _cpu_seconds([*(p.pid for p in processes), os.getpid()])
            until(last)
            others = (harness.busy_seconds() - busy) - (
                _cpu_seconds([*(p.pid for p in processes), os.getpid()]) - used
            )
            found.append(_sample(method, name, streams, meter, first, last, size, others))
    return found


def _sample(
    method: Method,
    rate: str,
    streams: Sequence[Stream],
    meter: Meter,
    first: int,
    last: int,
    size: Size,
    others: float,
) -> dict[str, Any]:
    start = max(s.times[first - 1] for s in streams)  # of workers apart, the slowest's
    end = max(s.times[last - 1] for s in streams)
    seconds = end - start
    own = [_steps_between(s.times, start, end) for s in streams]
    steps = sum(own) / len(own)
    tokens = steps * size.tokens_per_step
    return {
        "method": method.name,
        "strategy": method.strategy,
        "workers": len(meter.pids),
        "rate": "none" if method.apart else rate,
        "size": size.name,
        "steps": round(steps, 3),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "sent_bytes_per_step": [b / steps for b in meter.between(start, end)],
        "step_seconds": [b - a for a, b in pairwise(streams[0].times[first - 1 : last])],
        "others_share": max(0.0, others) / seconds / (os.cpu_count() or 1),
        "at": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(end)),
    }


def _steps_between(times: Sequence[float], start: float, end: float) -> float:
    """Steps, and parts of steps, of a stream between two times."""
    import numpy as np

    counts = np.arange(1, len(times) + 1)
    return float(np.interp(end, times, counts) - np.interp(start, times, counts))


def _cpu_seconds(pids: Sequence[int]) -> float:
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def _told(method: Method, scratch: Path, timeout_s: float) -> str:
    parts = [f"{method.name}: a worker ended, or no step came within {timeout_s:g} s"]
    for out in sorted(scratch.glob("out-*")):
        parts.append(f"--- {out.name}\n{out.read_text(errors='replace')[-1500:]}")
    return "\n".join(parts)


def quality(
    method: Method,
    *,
    workers: int,
    size: Size,
    place: Path,
    seed: int,
    steps: int,
    timeout_s: float,
    device: str = "cpu",
) -> dict[str, Any]:
    """Loss curve and held-out losses of a run of `steps`, its workers joined without limits."""
    with tempfile.TemporaryDirectory(prefix="manyhands-methods-") as scratch:
        work = Work(
            size=size,
            place=place,
            seed=seed,
            steps=steps,
            output=Path(scratch) / "run",
            global_batch=size.global_batch,
            eval_every=max(1, steps // 8),
            device=device,
        )
        begun = time.time()
        outs = [Path(scratch) / f"out-{rank}" for rank in range(workers)]
        stream = Stream(work.output / "metrics.jsonl" if method.ours else outs[0])
        if method.ours:
            env = {k: v for k, v in os.environ.items() if not k.startswith(harness.REMOVED)} | harness.ADDED
            processes = [_start([*method.command(work), "--workers", str(workers)], env, outs[0])]
        else:
            port, processes = _free_port(), []
            for rank, out in enumerate(outs):
                env = environment(rank, workers, "127.0.0.1", port, f"host-{rank}")
                processes.append(_start(method.command(work), {**env, "GLOO_SOCKET_IFNAME": "lo"}, out))
        _end_well(processes, method, scratch, timeout_s)
        stream.read()
        if not stream.evaluations or len(stream.losses) < steps:
            raise RunFailed(_told(method, Path(scratch), timeout_s))
        sent = _sent_bytes(work.output)
        shutil.rmtree(work.output, ignore_errors=True)
    return {
        "method": method.name,
        "strategy": method.strategy,
        "workers": workers,
        "size": size.name,
        "seed": seed,
        "steps": steps,
        "tokens": steps * size.tokens_per_step,
        "eval_loss": stream.evaluations[-1][1],
        "evaluations": stream.evaluations,
        "losses": [round(x, 4) for x in stream.losses],
        "device": device,
        "payload_bytes_per_step": sent and sent / steps,
        "wall_s": time.time() - begun,
    }


def _sent_bytes(output: Path) -> float | None:
    """Payload that a worker of ours sent, on average."""
    path = output / "summary.json"
    if not path.exists():
        return None
    rows = json.loads(path.read_text())["workers"]
    return float(sum(r["sent_bytes"] for r in rows) / len(rows))


def _start(command: Sequence[str], env: Mapping[str, str], out: Path) -> subprocess.Popen[bytes]:
    with out.open("wb") as file:
        return subprocess.Popen(
            command, env=dict(env), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def _end_well(processes: Sequence[Any], method: Method, scratch: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    try:
        codes = [p.wait(timeout=max(1.0, deadline - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        codes = [124]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    if any(codes):
        raise RunFailed(f"exit codes {codes}: {_told(method, Path(scratch), timeout_s)}")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
