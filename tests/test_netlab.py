"""The network laboratory: links carry what they are told to, counters count, nothing is left behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("netlab", BENCHMARKS / "netlab.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["netlab"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


netlab = _load()
needs_root = pytest.mark.skipif(netlab.missing() is not None, reason=str(netlab.missing()))
MBIT = 1_000_000


def _own(namespaces: list[str], pid: int) -> list[str]:
    return [name for name in namespaces if name.startswith(f"{netlab.PREFIX}-{pid}-")]


def test_rates_are_read() -> None:
    assert netlab.parse_rate("100mbit") == 1e8
    assert netlab.parse_rate("2.5Gbit/s") == 2.5e9
    with pytest.raises(netlab.NetlabError, match="kbit, mbit or gbit"):
        netlab.parse_rate("fast")


@pytest.mark.parametrize("rate", [20e6, 100e6, 1e9, 10e9])
def test_a_bucket_holds_little_and_its_queue_more(rate: float) -> None:
    burst, limit = netlab.bucket(rate)
    assert 15_000 <= burst <= max(15_140, rate / 8 / 500)
    assert limit - burst >= rate / 8 / 21


def test_cores_are_shared_fairly() -> None:
    assert netlab.fair_cores(4, range(8)) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert netlab.fair_cores(3, [0, 1]) == [(0,), (1,), (0,)]


@pytest.mark.parametrize("hosts", [0, 65])
def test_an_impossible_lab_is_refused(hosts: int) -> None:
    with pytest.raises(netlab.NetlabError, match="1 to 64"):
        netlab.Lab(hosts, 1e8)
    with pytest.raises(netlab.NetlabError, match="8 kbit/s"):
        netlab.Lab(2, 100)


@needs_root
def test_a_transfer_takes_what_the_rate_says_and_is_counted() -> None:
    with netlab.Lab(2, 100 * MBIT) as lab:
        a, b = lab.hosts
        before, there = a.counters(), b.counters()
        fast = netlab.measured_rate(a, b, 4 * MBIT)
        sent, received = a.counters() - before, b.counters() - there
        assert 4 * MBIT < sent.sent_bytes < 5 * MBIT  # what was sent again after a drop is sent, too
        assert 4 * MBIT < received.received_bytes < 5 * MBIT
        assert sent.received_bytes < MBIT  # acknowledgements
        for host in (0, 1):
            lab.set_rate(host, 20 * MBIT)
        slow = netlab.measured_rate(b, a, MBIT)
        assert slow < 21 * MBIT
        assert 2 < fast / slow < 10  # five, were the machine idle and buckets empty


@needs_root
def test_links_limit_what_arrives_too() -> None:
    with netlab.Lab(3, None, rates={1: 20 * MBIT}) as lab:
        a, b, c = lab.hosts
        into = netlab.measured_rate(a, b, MBIT)
        free = netlab.measured_rate(a, c, 4 * MBIT)
        assert into < 21 * MBIT
        assert free > 2 * into


@needs_root
def test_hosts_have_their_own_network_and_cores() -> None:
    with netlab.Lab(2, None) as lab:
        code = "import os; print(sorted(os.sched_getaffinity(0)))"
        for host in lab.hosts:
            names = [
                line.split(":")[1].split("@")[0].strip()
                for line in host.run(["ip", "-o", "link"]).splitlines()
            ]
            assert names == ["lo", "eth0"]
            process = host.popen(
                ["sh", "-c", f'read go; {sys.executable} -c "{code}"'], stdin=-1, stdout=-1, text=True
            )
            out, _ = process.communicate("go\n")
            assert out.strip() == str(list(host.cores))


@needs_root
def test_nothing_is_left_behind() -> None:
    with netlab.Lab(2, 100 * MBIT) as lab:
        assert len(_own(netlab.namespaces(), os.getpid())) == 3
        left_running = lab.hosts[1].popen(["sleep", "1000"])
    assert _own(netlab.namespaces(), os.getpid()) == []
    assert left_running.wait() == -signal.SIGKILL
    lab.close()  # again, harmlessly


@needs_root
def test_what_a_killed_program_left_is_swept() -> None:
    command = [sys.executable, str(BENCHMARKS / "netlab.py"), "--", "sh", "-c", "echo ready; exec sleep 1000"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    try:
        assert program.stdout.readline() == "ready\n"
    finally:
        program.kill()
        program.wait()
    left = _own(netlab.namespaces(), program.pid)
    assert len(left) == 3
    with netlab.Lab(1, None):  # entering a lab sweeps
        assert _own(netlab.namespaces(), program.pid) == []
    assert program.stdout.read() == ""  # its sleeper has ended, or this would block
    program.stdout.close()


@needs_root
def test_a_terminated_program_cleans_up_itself() -> None:
    command = [sys.executable, str(BENCHMARKS / "netlab.py"), "--", "sh", "-c", "echo ready; exec sleep 1000"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    program.terminate()
    assert program.wait() == 128 + signal.SIGTERM
    program.stdout.close()
    assert _own(netlab.namespaces(), program.pid) == []
