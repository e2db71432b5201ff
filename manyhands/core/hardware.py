"""What this machine has, found without torch wherever possible, and what it can do, measured once."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import shutil
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


def hostname() -> str:
    return socket.gethostname()


SYSTEM = Path("/")  # where /proc and /sys are


class Seat(NamedTuple):
    """Where one worker of this machine computes.

    Attributes:
        cpus: logical processors to be pinned to; empty: not pinned.
        threads: how many threads compute.
    """

    cpus: tuple[int, ...]
    threads: int


def core_count() -> int:
    """Cores that this process may use: physical ones of its affinity, limited by the cgroup's quota of CPU time."""
    quota = cpu_quota()
    cores = len(cores_allowed())
    return max(1, min(cores, int(quota))) if quota else cores


def cores_here() -> int:
    """Cores of this machine, limited by the cgroup's quota: a worker may be pinned to one of them."""
    quota, cores = cpu_quota(), len(cores_of(range(os.cpu_count() or 1)))
    return max(1, min(cores, int(quota))) if quota else cores


def cores_allowed() -> list[tuple[int, ...]]:
    """The physical cores of this process's affinity, neighbours beside each other; each as its logical processors."""
    if not hasattr(os, "sched_getaffinity"):
        return [(cpu,) for cpu in range(os.cpu_count() or 1)]
    return cores_of(sorted(os.sched_getaffinity(0)))


def cores_of(cpus: Iterable[int]) -> list[tuple[int, ...]]:
    """The physical cores that logical processors belong to."""
    cores: dict[tuple[int, int], list[int]] = {}
    for cpu in cpus:
        topology = SYSTEM / f"sys/devices/system/cpu/cpu{cpu}/topology"
        try:
            package = int((topology / "physical_package_id").read_text())
            siblings = (topology / "thread_siblings_list").read_text()
            core = int(re.split("[-,]", siblings)[0])
        except (OSError, ValueError):
            package, core = 0, cpu
        cores.setdefault((package, core), []).append(cpu)
    return [tuple(cpus) for _, cpus in sorted(cores.items())]


def seats(workers: int, threads: int | None = None) -> list[Seat]:
    """The allowed cores divided among the workers of this machine.

    Nobody is pinned where the threads outnumber the cores (they would queue for one core beside an idle one), where a
    quota grants less than all of them (other tenants of the machine use the same cores), or where half of them are left
    over: another launch may be beside this one, and would choose the same cores.
    """
    cores = cores_allowed()
    each = threads or max(1, core_count() // workers)
    crowded = workers * each > len(cores) or core_count() < len(cores)
    if not hasattr(os, "sched_setaffinity") or crowded or 2 * workers * each <= len(cores):
        return [Seat((), each)] * workers
    own = [cores[rank * each : (rank + 1) * each] for rank in range(workers)]
    return [Seat(tuple(cpu for core in mine for cpu in core), each) for mine in own]


def cpu_quota() -> float | None:
    """CPUs' worth of time that the cgroup and those around it grant; None: no limit. Either cgroup version."""
    found = []
    for directory in _cgroups(""):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (directory / "cpu.max").read_text().split()
            found.append(int(quota) / int(period))
    for directory in _cgroups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            granted = int((directory / "cpu.cfs_quota_us").read_text())
            if granted > 0:
                found.append(granted / int((directory / "cpu.cfs_period_us").read_text()))
    return min(found, default=None)


def _cgroups(controller: str) -> list[Path]:
    """This process's directory for a controller ("": version 2) and all around it, where they are mounted."""
    try:
        lines = (SYSTEM / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mounted = SYSTEM / "sys/fs/cgroup"
    roots = [mounted / controller] if controller else [mounted, mounted / "unified"]
    directories = []
    for line in lines:
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            for root in roots:
                inner = root / path.lstrip("/")
                directories += [d for d in (inner, *inner.parents) if d.is_relative_to(root) and d.is_dir()]
    return directories


def memory_bytes() -> int:
    """Physical memory, limited by the cgroup."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(limit for limit, _ in _memory_limits())])


def memory_available_bytes() -> int:
    """Memory that can still be had: of the machine, and below the cgroup's limit."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError):
        for line in (SYSTEM / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return max(0, min([free, *(limit - used for limit, used in _memory_limits())]))


def _memory_limits() -> list[tuple[int, int]]:
    """(limit, use) in bytes of the cgroup and those around it; a use includes the files that the kernel could drop."""
    names = {
        "": ("memory.max", "memory.current"),
        "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    }
    found = []
    for controller, (limit, used) in names.items():
        for directory in _cgroups(controller):
            with contextlib.suppress(OSError, ValueError):
                found.append((int((directory / limit).read_text()), int((directory / used).read_text())))
    return found


def oom_kills() -> int:
    """How many processes the kernel has killed for memory: of this cgroup, where it counts them, else of the machine.

    0 where it does not say.
    """
    for controller, name in (("", "memory.events"), ("memory", "memory.oom_control")):
        for directory in _cgroups(controller):
            if (count := _counted(directory / name)) is not None:
                return count
    return _counted(SYSTEM / "proc/vmstat") or 0


def _counted(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def gpu_possible() -> bool:
    """Whether there may be a GPU, as far as is seen without torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    signs = (Path("/proc/driver/nvidia/gpus"), Path("/dev/kfd"))
    return any(sign.exists() for sign in signs) or shutil.which("nvidia-smi") is not None


def gpu_count() -> int:
    """GPUs that torch can use; torch is imported only where there may be one."""
    if not gpu_possible():
        return 0
    import importlib.metadata

    if importlib.metadata.version("torch").endswith("+cpu"):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@functools.lru_cache(maxsize=1)
def _cpu_info() -> tuple[str, frozenset[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    name, flags = "", frozenset[str]()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and not name:
            name = value.strip()
        if key.strip() in ("flags", "Features") and not flags:
            flags = frozenset(value.split())
    return name or platform.machine(), flags


def cpu_name() -> str:
    return _cpu_info()[0]


def cpu_flags() -> frozenset[str]:
    """The instruction sets that the kernel names; empty where it names none."""
    return _cpu_info()[1]


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX-512 BF16, AMX, or Arm's BF16 extension)."""
    return bool(_cpu_info()[1] & {"avx512_bf16", "amx_bf16", "bf16"})


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    return cpu_name()


def cpu_environment(threads: int) -> dict[str, str]:
    """Variables for a worker of `threads` threads, unless the user has set them.

    OpenMP threads spin while they wait, and a spinning thread on a busy core costs more than it saves (measured
    1,500 against 3,450 tokens/s beside another process): they spin briefly, then sleep.
    """
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "1000",
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
        "RAYON_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),  # else each worker starts a compiler for every core
    }
    chosen = {name: value for name, value in wanted.items() if name not in os.environ}
    chosen["OMP_NUM_THREADS"] = chosen["MKL_NUM_THREADS"] = str(threads)
    return chosen


def cache_directory() -> Path:
    """Where measurements and built parts are kept: $MANYHANDS_CACHE, else the user's cache directory."""
    if os.environ.get("MANYHANDS_CACHE"):
        return Path(os.environ["MANYHANDS_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "manyhands"


PEAK_RUNS = 3  # a first measurement may have met a busy machine: the best of the first runs' is kept
PEAK_S = 0.2


def peak_flops(device: str, dtype: str, threads: int) -> float:
    """The device's measured matrix-product rate in FLOP/s, kept in the cache directory.

    The best of several square products of 128 to 2,048 (2,048 to 8,192 on a GPU), a product of n×n matrices counting 2n³;
    sizes of which one product would take longer than `PEAK_S` are left out.

    Args:
        dtype: a name of torch's, such as "bfloat16".
    """
    import torch

    name = f"{hostname()}|{device_name(device)}|{dtype}|{threads}|{torch.__version__}"
    path = cache_directory() / "peak_flops.json"
    best, runs = _known_peaks(path).get(name, (0.0, 0))
    if runs < PEAK_RUNS:
        best = max(best, _measure_peak(device, getattr(torch, dtype)))
        known = {**_known_peaks(path), name: (best, runs + 1)}
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(known, indent=1))
            temporary.replace(path)
        except OSError:  # without a cache it is measured each time
            with contextlib.suppress(OSError):
                temporary.unlink()
    return best


def _known_peaks(path: Path) -> dict[str, tuple[float, int]]:
    try:
        return {name: (float(best), int(runs)) for name, (best, runs) in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _measure_peak(device: str, dtype: Any) -> float:
    import torch

    cuda = device.startswith("cuda")

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    sizes = (2048, 4096, 8192) if cuda else (128, 512, 1024, 2048)
    best = 0.0
    for n in sizes:
        if (
            best and 2.0 * n**3 / best > PEAK_S
        ):  # a type that the device only emulates: a product would take minutes
            break
        # not torch.randn: to measure must not move the state of the random number generator
        a = torch.linspace(-1, 1, n * n, device=device).reshape(n, n).to(dtype)
        a @ a  # picks and warms the kernel
        wait()
        begun = time.perf_counter()
        for _ in range(50):
            start = time.perf_counter()
            a @ a
            wait()
            now = time.perf_counter()
            best = max(best, 2 * n**3 / (now - start))
            if now - begun > PEAK_S / len(sizes):
                break
    return best


def machine_facts() -> dict[str, Any]:
    """What a result file says of the machine and versions."""
    import importlib.metadata

    versions = {}
    for package in ("torch", "transformers", "tokenizers", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_name(),
        "cores": cores_here(),
        "memory_bytes": memory_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }
