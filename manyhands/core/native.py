"""Builds and installs the caching allocator (``allocator.cpp``); its absence is only a slower run.

Compiled once by the system's compiler against torch's headers, kept in the user's cache directory under a name made from the
source and torch's version, loaded before a worker makes its first tensor.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from manyhands.core import hardware
from manyhands.core.environment import read_env

SOURCE = Path(__file__).with_name("allocator.cpp")
BUILD_TIMEOUT_S = 300
SHARE_OF_MEMORY = 0.25  # kept blocks of all workers of a machine never exceed this share of it

_installed: list[ctypes.CDLL] = []


def enable_allocator() -> str:
    """Install the allocator in this process; returns what the plan shows: what is used, and why not where it is not."""
    if _installed:
        return "caching"
    if os.environ.get("MANYHANDS_ALLOCATOR", "").lower() in ("off", "0", "no"):
        return "system's (MANYHANDS_ALLOCATOR=off)"
    preloaded = os.environ.get("LD_PRELOAD", "")
    if any(name in preloaded for name in ("tcmalloc", "jemalloc", "mimalloc")):
        return f"preloaded {Path(preloaded.split(':')[0].split()[0]).name}"
    if sys.platform != "linux":
        return "system's (the caching one is for Linux)"
    try:
        library = _load(_build())
    except (OSError, RuntimeError, subprocess.SubprocessError, ImportError) as error:
        return f"system's ({error}: a slower run)"
    local = read_env().local_world_size
    library.manyhands_install_allocator(
        ctypes.c_size_t(int(hardware.memory_bytes() * SHARE_OF_MEMORY / local))
    )
    _installed.append(library)
    return "caching"


def kept_bytes() -> int:
    """Bytes of free blocks that the allocator holds back in this process; 0 where it is not installed."""
    if not _installed:
        return 0
    _installed[0].manyhands_allocator_kept.restype = ctypes.c_size_t
    return int(_installed[0].manyhands_allocator_kept())


def trim() -> None:
    """Give all free blocks back to the system."""
    if _installed:
        _installed[0].manyhands_allocator_trim()


def figures() -> dict[str, int]:
    """What the allocator has done in this process; empty where it is not installed. Sizes in bytes."""
    if not _installed:
        return {}
    values = (ctypes.c_uint64 * 5)()
    _installed[0].manyhands_allocator_figures(values)
    return dict(zip(("used", "kept", "peak", "hits", "misses"), values, strict=True))


def _build() -> Path:
    """The compiled library, building it if need be. Raises RuntimeError with the reason."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed")
    torch = Path(spec.origin).parent
    facts = (importlib.metadata.version("torch"), str(torch), platform.machine(), *platform.libc_ver())
    name = hashlib.sha256(SOURCE.read_bytes() + "|".join(facts).encode()).hexdigest()[:16]
    target = hardware.cache_directory() / "native" / f"allocator-{name}.so"
    if not target.exists():
        compiler = next((path for c in ("c++", "g++", "clang++") if (path := shutil.which(c))), None)
        if compiler is None:
            raise RuntimeError("no C++ compiler on PATH")
        from filelock import FileLock

        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(f"{target}.lock"):  # the workers of one job come all at once
            if not target.exists():
                _compile(compiler, torch, target)
    if target.stat().st_uid != os.geteuid():
        raise RuntimeError(f"{target} belongs to another user")
    return target


def _compile(compiler: str, torch: Path, target: Path) -> None:
    """Build `target` under a temporary name. Raises RuntimeError with the compiler's first complaint."""
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    command = [
        compiler,
        "-O2",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-isystem",
        str(torch / "include"),
        str(SOURCE),
    ]
    command += ["-o", str(temporary), f"-L{torch / 'lib'}", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    complaint = ""
    try:
        for standard in ("-std=c++20", "-std=c++17"):  # which one torch's headers need depends on its version
            done = subprocess.run(
                [*command, standard], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
            )
            if done.returncode == 0:
                temporary.replace(target)
                return
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            complaint = complaint or (errors or done.stderr.splitlines() or ["no message"])[0]
    finally:
        temporary.unlink(missing_ok=True)
    raise RuntimeError(f"{Path(compiler).name} could not compile it: {complaint.strip()}")


def _load(path: Path) -> ctypes.CDLL:
    import torch  # noqa: F401  # its libraries must be loaded first

    return ctypes.CDLL(str(path))
