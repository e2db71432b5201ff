"""Builds the C++ parts of the package and installs the caching allocator (``allocator.cpp``); their absence is only a slower run.

Compiled once by the system's compiler and kept in the user's cache directory under a name made from the source and whatever else
decides the result. The allocator needs torch's headers and is loaded before a worker makes its first tensor. Kernels are plain
loops over raw pointers, compiled for this very processor and called by ctypes, which lets go of the interpreter's lock meanwhile.
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
from collections.abc import Sequence
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
        library = _load(_build_allocator())
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


def kernels_wanted() -> bool:
    """Whether the environment allows compiled kernels (MANYHANDS_KERNELS)."""
    return os.environ.get("MANYHANDS_KERNELS", "").lower() not in ("off", "0", "no")


def kernels(source: Path, *extra: str) -> ctypes.CDLL:
    """The library of a C++ file of plain loops, with this processor's vector instructions; built if need be.

    Floating-point operations are neither fused nor reordered: the same bits on every processor. MANYHANDS_KERNELS=off in the
    environment does without.

    Args:
        extra: further options of the compiler, left out where it does not know them.

    Raises:
        RuntimeError, OSError, subprocess.SubprocessError: why it cannot be had; the caller computes in another way.
    """
    if not kernels_wanted():
        raise RuntimeError("MANYHANDS_KERNELS=off")
    options = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-std=c++17"]
    facts = (hardware.cpu_name(), *sorted(hardware.cpu_flags()))
    native = [*options, "-march=native"]
    variants = [[*native, *extra], native, [*options, *extra], options] if extra else [native, options]
    return ctypes.CDLL(str(_build(source, variants, facts)))


def _build_allocator() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed")
    torch = Path(spec.origin).parent
    options = ["-O2", "-isystem", str(torch / "include"), f"-L{torch / 'lib'}", "-lc10"]
    options.append(f"-Wl,-rpath,{torch / 'lib'}")
    # which standard torch's headers need depends on its version
    variants = [[*options, standard] for standard in ("-std=c++20", "-std=c++17")]
    return _build(SOURCE, variants, (importlib.metadata.version("torch"), str(torch)))


def _build(source: Path, variants: Sequence[Sequence[str]], facts: Sequence[str]) -> Path:
    """The compiled library, building it if need be. Raises RuntimeError with the reason.

    Args:
        variants: the compiler's options; the first that compiles is taken.
        facts: what the result depends on besides the source, the options and the C library.
    """
    told = [*facts, platform.machine(), *platform.libc_ver(), *(o for options in variants for o in options)]
    name = hashlib.sha256(source.read_bytes() + "|".join(told).encode()).hexdigest()[:16]
    target = hardware.cache_directory() / "native" / f"{source.stem}-{name}.so"
    if not target.exists():
        compiler = next((path for c in ("c++", "g++", "clang++") if (path := shutil.which(c))), None)
        if compiler is None:
            raise RuntimeError("no C++ compiler on PATH")
        from filelock import FileLock

        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(f"{target}.lock"):  # the workers of one job come all at once
            if not target.exists():
                _compile(compiler, source, variants, target)
    if target.stat().st_uid != os.geteuid():
        raise RuntimeError(f"{target} belongs to another user")
    return target


def _compile(compiler: str, source: Path, variants: Sequence[Sequence[str]], target: Path) -> None:
    """Build `target` under a temporary name. Raises RuntimeError with the compiler's first complaint."""
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, "-fPIC", "-shared", "-fvisibility=hidden", str(source), "-o", str(temporary)]
    complaint = ""
    try:
        for options in variants:
            done = subprocess.run(
                [*command, *options], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
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
