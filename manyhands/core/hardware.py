"""What this machine has, found without torch wherever possible, and what it can do, measured once."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import socket
import time
from pathlib import Path
from typing import Any


def hostname() -> str:
    return socket.gethostname()


@functools.lru_cache(maxsize=1)
def core_count() -> int:
    """Cores that this process may use: its affinity, limited by the cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(allowed, int(quota + 0.5)) if quota else allowed)


def _cgroup_quota() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text())
        period_us = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 else None
    except (OSError, ValueError):
        return None


def memory_bytes() -> int:
    """Physical memory, limited by the cgroup."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(total, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return total


def gpu_count() -> int:
    """GPUs that torch can use; torch is imported only where there may be one."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return 0
    if not (Path("/proc/driver/nvidia/gpus").exists() or Path("/dev/kfd").exists() or shutil.which("nvidia-smi")):
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


def peak_flops(device: str, dtype: str, threads: int) -> float:
    """The device's measured matrix-product rate in FLOP/s, kept in the cache directory.

    The best of several square products of 512 to 2,048 (8,192 on a GPU), a product of n×n matrices counting 2n³.
    """
    import torch

    name = f"{device_name(device)}|{dtype}|{threads}|{torch.__version__}"
    path = cache_directory() / "peak_flops.json"
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    if name not in known:
        known[name] = _measure_peak(device, getattr(torch, dtype))
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(known, indent=1))
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
    return float(known[name])


def _measure_peak(device: str, dtype: Any) -> float:
    import torch

    best = 0.0
    cuda = device.startswith("cuda")
    for n in (2048, 4096, 8192) if cuda else (512, 1024, 2048):
        a = torch.randn(n, n, device=device).to(dtype)
        b = torch.randn(n, n, device=device).to(dtype)
        a @ b
        for _ in range(4):
            if cuda:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            a @ b
            if cuda:
                torch.cuda.synchronize(device)
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
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
        "cores": core_count(),
        "memory_bytes": memory_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }
