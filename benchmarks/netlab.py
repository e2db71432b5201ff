"""Hosts joined by links of a chosen rate, on one machine: network namespaces, veth pairs, a bridge, token buckets.

    python benchmarks/netlab.py --hosts 2 --rate 100mbit -- ping -c 1 10.77.0.2    # runs on host 0 (--on all: on each)
    python benchmarks/netlab.py --hosts 4 --rate 100mbit --check                   # measure what the links really carry
    python benchmarks/netlab.py --sweep                                            # remove what a killed run left

A `Lab` is a context manager. Each host is a namespace with one interface, ``eth0``, whose other end is a port of a bridge in
a namespace of its own, so nothing of the machine's network is touched. A token bucket (``tc … tbf``) limits both directions
of each host's link: at the host for what it sends, at the bridge's port for what it receives.

What is like a real network and what is not:

* Rate, a queue of 50 ms that drops its tail, TCP (cubic where the kernel lets a namespace choose it, else the
  machine's default) and the bytes of headers are real.
* A bucket holds 2 ms of its rate (at least ten packets): a conversation gets that much for nothing after silence.
* There is no delay beyond queueing, and no loss beyond full queues (``netem`` is absent from many kernels).
* The processors are shared: sending costs time of the same cores that compute. `cores` gives each host its fair part.

Needs root and iproute2 (``apt-get install iproute2``); `missing` says what is absent. Nothing is left behind: leaving the
context ends every process in the namespaces and removes them; where the program was killed, the next lab (or ``--sweep``) finds
the namespaces by their names, which carry the process number and start time of their maker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

PREFIX = "netlab"
SUBNET = "10.77.0"
MOST_HOSTS = 64
MTU_BYTES = 1500
QUEUE_S = 0.05
BURST_S = 0.002
UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}


class NetlabError(Exception):
    """A lab that cannot be built or used: the command that failed and what it said."""


def missing() -> str | None:
    """Why no lab can be had here; None where one can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(absent)} not found: apt-get install iproute2" if absent else None


def parse_rate(text: str) -> float:
    """Bits per second of ``100mbit``, ``1gbit``, ``2.5e8``.

    >>> parse_rate("100mbit"), parse_rate("1gbit"), parse_rate("5e6")
    (100000000.0, 1000000000.0, 5000000.0)
    """
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kmg]?bit)?(?:/s)?", text.strip().lower())
    if match is None:
        raise NetlabError(f"rate {text!r}: a number and bit, kbit, mbit or gbit, as in 100mbit")
    return float(match[1]) * UNITS[match[2] or "bit"]


def bucket(rate_bits_per_s: float) -> tuple[int, int]:
    """Burst and queue limit of a token bucket, in bytes.

    The burst is 2 ms of the rate, at least ten packets: the kernel refills a bucket at timer ticks, and one that holds
    less than a tick never reaches its rate. Larger packets (segmentation offload) are cut by the bucket itself.

    >>> bucket(20e6), bucket(1e9)
    ((15140, 140140), (250000, 6500000))
    """
    rate = rate_bits_per_s / 8
    burst = int(max(rate * BURST_S, 10 * (MTU_BYTES + 14)))
    return burst, burst + int(max(rate * QUEUE_S, 20 * (MTU_BYTES + 14)))


@dataclass(frozen=True)
class Counters:
    """What an interface has carried since it was made, link-layer headers included.

    Attributes:
        sent_bytes, received_bytes, sent_packets: of ``eth0``. Dropped ones are counted where they were dropped: `dropped`
            are those this host's own queue refused.
    """

    sent_bytes: int
    received_bytes: int
    sent_packets: int
    dropped: int

    def __sub__(self, other: Counters) -> Counters:
        return Counters(
            self.sent_bytes - other.sent_bytes,
            self.received_bytes - other.received_bytes,
            self.sent_packets - other.sent_packets,
            self.dropped - other.dropped,
        )


@dataclass(frozen=True)
class Host:
    """One host of a lab.

    Attributes:
        namespace: its name for ``ip netns``.
        address: its IPv4 address; every other host reaches it there.
        cores: processors its processes are pinned to; hosts share one where there are more hosts than processors.
    """

    index: int
    namespace: str
    address: str
    cores: tuple[int, ...]
    interface: str = "eth0"

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, to be started anywhere, as it runs on this host. The process keeps its number: no shell is between."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def popen(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start `command` on this host, pinned to its cores, in a session of its own (`options` as for `Popen`)."""
        options.setdefault("start_new_session", True)
        process = subprocess.Popen(self.command(command), env=None if env is None else dict(env), **options)
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            os.sched_setaffinity(process.pid, self.cores)
        return process

    def run(self, command: Sequence[str], **options: Any) -> str:
        """Run `command` here to its end; its output. Raises `NetlabError`."""
        return _call(self.command(command), **options)

    def counters(self) -> Counters:
        """Of this host's interface, now (the kernel's /sys/class/net/eth0/statistics, read in one call)."""
        text = _call(["ip", "-j", "-s", "-n", self.namespace, "link", "show", "dev", self.interface])
        stats = json.loads(text)[0]["stats64"]
        refused = json.loads(
            _call(["tc", "-j", "-s", "-n", self.namespace, "qdisc", "show", "dev", self.interface])
        )
        return Counters(
            stats["tx"]["bytes"],
            stats["rx"]["bytes"],
            stats["tx"]["packets"],
            sum(q.get("drops", 0) for q in refused),
        )


def fair_cores(hosts: int, available: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """Processors of each host: equal parts, what is left over unused; one shared in turn where there are too few.

    >>> fair_cores(2, [0, 1]), fair_cores(3, [0, 1, 2, 3]), fair_cores(4, [0, 1])
    ([(0,), (1,)], [(0,), (1,), (2,)], [(0,), (1,), (0,), (1,)])
    """
    cores = sorted(os.sched_getaffinity(0)) if available is None else list(available)
    each = len(cores) // hosts
    if each == 0:
        return [(cores[i % len(cores)],) for i in range(hosts)]
    return [tuple(cores[i * each : (i + 1) * each]) for i in range(hosts)]


class Lab:
    """Some hosts joined by links of one rate, from entering the context to leaving it.

    Args:
        hosts: how many, from 1.
        rate_bits_per_s: of each host's link, in each direction; None: no limit.
        rates: of single hosts, by index, where they differ.

    Raises:
        NetlabError: not root, no iproute2, or the kernel refuses something.
    """

    def __init__(
        self, hosts: int, rate_bits_per_s: float | None, *, rates: Mapping[int, float | None] | None = None
    ) -> None:
        if not 1 <= hosts <= MOST_HOSTS:
            raise NetlabError(f"hosts = {hosts}: a lab has 1 to {MOST_HOSTS}")
        for rate in (rate_bits_per_s, *(rates or {}).values()):
            if rate is not None and not 8_000 <= rate <= 1e12:
                raise NetlabError(f"rate {rate:g} bit/s: between 8 kbit/s and 1 Tbit/s")
        name = f"{PREFIX}-{os.getpid()}-{_started(os.getpid())}-{next(_numbers)}"
        self._bridge = f"{name}-b"
        self.hosts = [
            Host(i, f"{name}-h{i}", f"{SUBNET}.{i + 1}", cores) for i, cores in enumerate(fair_cores(hosts))
        ]
        self.rates = [(rates or {}).get(i, rate_bits_per_s) for i in range(hosts)]

    def __enter__(self) -> Lab:
        if reason := missing():
            raise NetlabError(reason)
        sweep()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _build(self) -> None:
        _new_namespace(self._bridge)
        _ip(self._bridge, "link", "add", "br0", "type", "bridge")
        _ip(self._bridge, "link", "set", "br0", "up")
        for host in self.hosts:
            _new_namespace(host.namespace)
            port, inside = f"p{host.index}", host.interface
            _ip(
                host.namespace,
                *f"link add {inside} type veth peer name {port} netns {self._bridge}".split(),
            )
            _ip(self._bridge, *f"link set {port} master br0 up".split())
            _ip(host.namespace, *f"addr add {host.address}/24 dev {inside}".split())
            _ip(host.namespace, *f"link set {inside} up".split())
        for host, rate in zip(self.hosts, self.rates, strict=True):
            self.set_rate(host.index, rate)

    def set_rate(self, host: int, rate_bits_per_s: float | None) -> None:
        """Change a host's link, both directions, also while it is in use."""
        at = self.hosts[host]
        for namespace, device in ((at.namespace, at.interface), (self._bridge, f"p{host}")):
            if rate_bits_per_s is None:
                subprocess.run(  # there may be none to remove
                    ["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], capture_output=True
                )
                continue
            burst, limit = bucket(rate_bits_per_s)
            shape = f"tbf rate {int(rate_bits_per_s)}bit burst {burst} limit {limit}".split()
            _call(["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shape])
        self.rates[host] = rate_bits_per_s

    def plug(self, host: int, *, in_: bool = True) -> None:
        """Put the cable of a host's link in, or pull it: what is under way is lost, and nobody is told."""
        _ip(self._bridge, *f"link set p{host} {'up' if in_ else 'down'}".split())

    def close(self) -> None:
        """End every process in the namespaces and remove them. May be called again."""
        for name in [*(h.namespace for h in self.hosts), self._bridge]:
            _remove(name)


def sweep() -> list[str]:
    """Remove namespaces of labs whose maker is gone (with the processes in them); their names."""
    gone = []
    for name in namespaces():
        match = re.fullmatch(rf"{PREFIX}-(\d+)-(\d+)-\d+-[bh]\d*", name)
        if match and _started(int(match[1])) != match[2]:
            _remove(name)
            gone.append(name)
    return gone


def namespaces() -> list[str]:
    """All of the machine's named network namespaces."""
    directory = Path("/var/run/netns")
    return sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []


def measured_rate(sender: Host, receiver: Host, size_bytes: int) -> float:
    """Bits per second of payload that one TCP connection carries from one host to another."""
    code = (
        "import socket, sys\n"
        "s = socket.create_server((sys.argv[1], 0)); print(s.getsockname()[1], flush=True)\n"
        "c, _ = s.accept(); n = 0\n"
        "while part := c.recv(1 << 18): n += len(part)\n"
        "c.sendall(n.to_bytes(8, 'big'))\n"
    )
    send = (
        "import socket, sys, time\n"
        "s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); size = int(sys.argv[3])\n"
        "block = memoryview(bytes(1 << 18)); t = time.perf_counter(); left = size\n"
        "while left: left -= s.send(block[: min(left, len(block))])\n"
        "s.shutdown(socket.SHUT_WR); assert int.from_bytes(s.recv(8), 'big') == size\n"
        "print(time.perf_counter() - t)\n"
    )
    listening = receiver.popen(
        [sys.executable, "-c", code, receiver.address], stdout=subprocess.PIPE, text=True
    )
    try:
        assert listening.stdout is not None
        port = listening.stdout.readline().strip()
        took = float(sender.run([sys.executable, "-c", send, receiver.address, port, str(size_bytes)]))
    finally:
        listening.kill()
        listening.communicate()
    return size_bytes * 8 / took


_numbers = iter(range(10**9))


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot; None where there is none (or it is dead and not yet reaped)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _new_namespace(name: str) -> None:
    _call(["ip", "netns", "add", name])
    _ip(name, "link", "set", "lo", "up")
    # no background packets of IPv6 in the counters; cubic, where a namespace may choose it
    for key, value in (("ipv6/conf/all/disable_ipv6", "1"), ("ipv4/tcp_congestion_control", "cubic")):
        write = f"echo {value} > /proc/sys/net/{key}"
        subprocess.run(["ip", "netns", "exec", name, "sh", "-c", write], capture_output=True)


def _remove(name: str) -> None:
    """End the processes in a namespace, then the namespace; its interfaces go with it."""
    if name not in namespaces():
        return
    for _ in range(100):
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if not found:
            break
        time.sleep(0.01)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(namespace: str, *arguments: str) -> None:
    _call(["ip", "-n", namespace, *arguments])


def _call(command: Sequence[str], **options: Any) -> str:
    done = subprocess.run(list(command), capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise NetlabError(
            f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-500:]}{done.stderr[-1500:]}"
        )
    return done.stdout


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM leaves contexts as an exception does."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check(lab: Lab, out: IO[str]) -> None:
    """Print, of each host, the rate of sending to and receiving from its neighbour, against what was asked for."""
    for host in lab.hosts:
        other = lab.hosts[(host.index + 1) % len(lab.hosts)]
        limits = [r for r in (lab.rates[host.index], lab.rates[other.index]) if r is not None]
        size = int(min(limits, default=4e9) / 8) + 1  # a second's worth
        before = host.counters()
        rate = measured_rate(host, other, size)
        moved = host.counters() - before
        asked = f"{min(limits) / 1e6:g}" if limits else "unlimited"
        print(
            f"{host.address} -> {other.address}: {rate / 1e6:.1f} Mbit/s of {asked}; "
            f"{moved.sent_bytes / size:.3f} bytes on the interface per byte, {moved.dropped} packets dropped",
            file=out,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument(
        "--rate", default="unlimited", help="of each link and direction: 100mbit, 1gbit, unlimited"
    )
    parser.add_argument("--on", default="0", help="hosts to run the command on: numbers with commas, or all")
    parser.add_argument("--check", action="store_true", help="measure the links")
    parser.add_argument("--sweep", action="store_true", help="remove what killed runs left, and nothing else")
    parser.add_argument("command", nargs="*", help="after --; NETLAB_HOST and NETLAB_ADDRESS are set for it")
    given = parser.parse_args()
    if given.sweep:
        print("\n".join(sweep()) or "nothing was left")
        return 0
    if not given.command and not given.check:
        parser.error("give a command after --, or --check")
    try:
        rate = None if given.rate == "unlimited" else parse_rate(given.rate)
        with _ended_by_sigterm(), Lab(given.hosts, rate) as lab:
            if given.check:
                _check(lab, sys.stdout)
            if not given.command:
                return 0
            chosen = lab.hosts if given.on == "all" else [lab.hosts[int(i)] for i in given.on.split(",")]
            running = []
            for host in chosen:
                env = {**os.environ, "NETLAB_HOST": str(host.index), "NETLAB_ADDRESS": host.address}
                running.append(host.popen(given.command, env=env, start_new_session=False))
            return max(process.wait() for process in running)
    except NetlabError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
