"""What the machine has: read from trees of files as kernels write them, and from this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from manyhands.core import hardware
from manyhands.launch import job

Plant = Callable[[Mapping[str, str]], None]
NO_LIMIT = str((1 << 63) - 4096)


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Write files below a root of its own and look there."""

    def write(files: Mapping[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        monkeypatch.setattr(hardware, "SYSTEM", tmp_path)

    return write


def cores(monkeypatch: pytest.MonkeyPatch, allowed: set[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)


def topology(packages: list[int], siblings: list[str]) -> dict[str, str]:
    where = "sys/devices/system/cpu/cpu{}/topology/{}"
    both = enumerate(zip(packages, siblings, strict=True))
    return {
        where.format(cpu, name): value
        for cpu, (package, pair) in both
        for name, value in (("physical_package_id", str(package)), ("thread_siblings_list", pair))
    }


def test_hyperthreads_are_one_core(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(topology([0, 1, 0, 1], ["0,2", "1,3", "0,2", "1,3"]))
    cores(monkeypatch, {0, 1, 2, 3})
    assert hardware.cores_allowed() == [(0, 2), (1, 3)]
    assert hardware.core_count() == 2
    assert hardware.seats(2) == [hardware.Seat((0, 2), 1), hardware.Seat((1, 3), 1)]
    cores(monkeypatch, {1, 2})
    assert hardware.cores_allowed() == [(2,), (1,)]


def test_workers_stay_within_a_package(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(topology([0, 1, 0, 1], ["0", "1", "2", "3"]))  # numbered alternately, as some firmware does
    cores(monkeypatch, {0, 1, 2, 3})
    assert hardware.seats(2) == [hardware.Seat((0, 2), 2), hardware.Seat((1, 3), 2)]


def test_seats(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant({})
    cores(monkeypatch, {0, 1, 2, 3, 4})
    assert hardware.seats(2) == [hardware.Seat((0, 1), 2), hardware.Seat((2, 3), 2)]
    assert hardware.seats(3, 1) == [hardware.Seat((cpu,), 1) for cpu in range(3)]
    assert hardware.seats(2, 1) == [hardware.Seat((), 1)] * 2  # there is room for another launch
    assert hardware.seats(5) == [hardware.Seat((cpu,), 1) for cpu in range(5)]
    assert hardware.seats(6) == [hardware.Seat((), 1)] * 6  # more workers than cores
    assert hardware.seats(2, 3) == [hardware.Seat((), 3)] * 2  # more threads than cores


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/"}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        (  # a slice's limit around an unlimited scope
            {
                "proc/self/cgroup": "0::/job.slice/run.scope",
                "sys/fs/cgroup/job.slice/cpu.max": "200000 100000",
                "sys/fs/cgroup/job.slice/run.scope/cpu.max": "max 100000",
            },
            2.0,
        ),
        (  # version 1; the path is the host's, a container sees only its own root
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n0::/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({}, None),
    ],
)
def test_quota(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], quota: float | None
) -> None:
    plant(files)
    cores(monkeypatch, set(range(4)))
    assert hardware.cpu_quota() == quota
    assert hardware.core_count() == (int(quota) if quota else 4)
    pinned = hardware.seats(1)[0].cpus
    assert pinned == (() if quota else (0, 1, 2, 3))  # others use the same cores under a quota


def test_memory_is_limited_by_every_group_around(plant: Plant) -> None:
    plant(
        {
            "proc/self/cgroup": "0::/a/b",
            "proc/meminfo": "MemTotal: 999 kB\nMemAvailable: 1000000 kB",
            "sys/fs/cgroup/a/memory.max": "1000000",
            "sys/fs/cgroup/a/memory.current": "400000",
            "sys/fs/cgroup/a/b/memory.max": "max",
            "sys/fs/cgroup/a/b/memory.current": "5",
        }
    )
    assert hardware.memory_bytes() == 1_000_000
    assert hardware.memory_available_bytes() == 600_000


def test_memory_of_version_1(plant: Plant) -> None:
    plant(
        {
            "proc/self/cgroup": "4:memory:/x",
            "proc/meminfo": "MemAvailable: 10 kB",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "7",
        }
    )
    assert hardware.memory_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert hardware.memory_available_bytes() == 10 * 1024


def test_this_machine() -> None:
    facts = json.loads(json.dumps(hardware.machine_facts()))
    assert facts["cores"] >= 1
    assert 0 < hardware.memory_available_bytes() <= facts["memory_bytes"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]


def test_units_for_bf16_agree_with_torch() -> None:
    if hasattr(torch.cpu, "_is_avx512_bf16_supported") and Path("/proc/cpuinfo").exists():
        assert hardware.cpu_has_bf16() >= torch.cpu._is_avx512_bf16_supported()


def test_nothing_imports_torch_until_something_is_measured() -> None:
    code = (
        "import sys; from manyhands.core import hardware as h; h.machine_facts(); h.seats(2); h.cpu_has_bf16();"
        "import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''; assert h.gpu_count() == 0; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_peak_is_measured_kept_and_moves_no_random_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYHANDS_CACHE", str(tmp_path))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    peak = hardware.peak_flops("cpu", "float32", torch.get_num_threads())
    assert torch.equal(torch.rand(3), expected)
    assert 1e8 < peak < 1e15
    later = [hardware.peak_flops("cpu", "float32", torch.get_num_threads()) for _ in range(3)]
    assert sorted([peak, *later]) == [peak, *later]  # the best of the first runs
    assert later[-1] == later[-2]
    ((_, runs),) = json.loads((tmp_path / "peak_flops.json").read_text()).values()
    assert runs == hardware.PEAK_RUNS


def test_a_damaged_cache_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYHANDS_CACHE", str(tmp_path))
    (tmp_path / "peak_flops.json").write_text('{"a": 1')
    assert hardware.peak_flops("cpu", "bfloat16", 1) > 1e8
    json.loads((tmp_path / "peak_flops.json").read_text())


def test_a_cache_that_cannot_be_written_is_only_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MANYHANDS_CACHE", str(tmp_path / "file"))
    assert hardware.peak_flops("cpu", "float32", 1) > 1e8


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/memory.events": "oom 3\noom_kill 2"}, 2),
        ({"proc/self/cgroup": "4:memory:/x", "sys/fs/cgroup/memory/x/memory.oom_control": "oom_kill 1"}, 1),
        ({"proc/self/cgroup": "0::/"}, 7),  # the outermost group counts none
        ({}, 7),
    ],
)
def test_the_kernels_kills_for_memory_are_those_of_this_group(
    plant: Plant, files: dict[str, str], kills: int
) -> None:
    plant({**files, "proc/vmstat": "oom_kill 7"})
    assert hardware.oom_kills() == kills


def test_without_any_count_the_kernel_has_killed_nobody(plant: Plant) -> None:
    plant({})
    assert hardware.oom_kills() == 0


@pytest.mark.parametrize(
    ("cores", "bf16", "gpu", "rank", "steps"),
    [
        (2, False, False, "", 150),
        (1, False, False, "", 150),
        (4, False, False, "", 300),
        (32, False, False, "", 600),
        (2, True, False, "", 600),
        (2, False, True, "", 600),
        (2, False, False, "0", 600),
    ],
)
def test_the_built_in_job_is_as_long_as_the_machine_is_fast(
    cores: int, bf16: bool, gpu: bool, rank: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About two minutes; but several machines, which a cluster's launcher joins, all take the same number."""
    for name, value in (("core_count", cores), ("cpu_has_bf16", bf16), ("gpu_possible", gpu)):
        monkeypatch.setattr(hardware, name, lambda value=value: value)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "1")
    layers = job.lowest_layers([])
    assert {key: value for _, data in layers for key, value in data.items()} == {
        "strategy": "ddp(lr=3e-3)",
        "steps": steps,
    }
    assert ("shortened" in layers[-1][0]) == (steps < 600)
    assert [list(data) for _, data in job.lowest_layers([("--steps", {"steps": 7})])] == [["strategy"]]
    assert job.lowest_layers([("--data", {"data": "x"})]) == []
