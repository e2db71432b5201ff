"""The caching allocator. Each test is a process of its own: an installed allocator stays for a process's life."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="needs Linux and a compiler",
)

PREAMBLE = """
from manyhands.core import native
import torch
before = [torch.full((n,), 7.0) for n in (1, 100, 10_000, 1_000_000)]
status = native.enable_allocator()
assert status == "caching", status
MB = 1 << 20
def block(bytes, value=0):
    return torch.full((bytes,), value, dtype=torch.uint8)
"""


def run(code: str, *, preamble: str = PREAMBLE, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", preamble + code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reuse_alignment_and_memory_from_and_to_elsewhere() -> None:
    run("""
for size in (1, 63, 64, 65, 4096, 4097, MB, 2 * MB - 64, 2 * MB, 3 * MB + 1, 30 * MB):
    first = block(size, 3)
    assert first.data_ptr() % 64 == 0
    address, hits = first.data_ptr(), native.figures()["hits"]
    assert first.sum(dtype=torch.int64) == 3 * size
    del first
    again = block(size, 4)
    assert again.data_ptr() == address and native.figures()["hits"] > hits, size
    assert again.sum(dtype=torch.int64) == 4 * size
empty = torch.empty(0)
assert empty.data_ptr() == 0 and empty.clone().numel() == 0 and torch.zeros(3, 0, 2).sum() == 0
assert all((tensor == 7).all() for tensor in before)
del before  # made by the allocator before ours, freed after

import ctypes, gc, io, numpy
array = numpy.arange(1000.0)
tensor = torch.from_numpy(array); tensor += 1
assert array[0] == 1
view = torch.ones(1000).numpy(); gc.collect(); block(4000, 9)
assert view.sum() == 1000  # numpy keeps the tensor's memory
shared = torch.ones(1000).share_memory_(); assert shared.is_shared() and shared.sum() == 1000
grown = torch.ones(10); grown.resize_(100_000); assert grown[:10].sum() == 10
file = io.BytesIO(); torch.save(torch.arange(5), file); file.seek(0); assert torch.load(file).sum() == 10
x = torch.randn(64, 3, 32, 32, requires_grad=True)  # oneDNN takes its scratch memory from the allocator
with torch.autocast("cpu", dtype=torch.bfloat16):
    torch.nn.functional.conv2d(x, torch.randn(8, 3, 3, 3)).sum().backward()
assert x.grad.isfinite().all()
""")


def test_many_threads_and_memory_freed_by_others() -> None:
    run("""
import queue, random, threading
torch.set_num_threads(1)
handed, wrong = queue.Queue(64), []
def make(seed):
    chance = random.Random(seed)
    for i in range(400):
        value = chance.randrange(256)
        handed.put((block(int(2 ** chance.uniform(0, 22)), value), value))
    handed.put(None)
def check():
    held = []
    while (item := handed.get()) is not None:
        held.append(item)
        if len(held) > 16:
            tensor, value = held.pop(0)
            if not bool((tensor == value).all()):
                wrong.append(value)
threads = [threading.Thread(target=make, args=(seed,)) for seed in range(4)] + [threading.Thread(target=check) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not wrong and native.figures()["hits"] > 100
used = native.figures()["used"]
assert used < 2 * MB, used  # nothing is lost
""")


def test_forked_children_while_others_allocate() -> None:
    run("""
import os, threading, warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads: this is the test
torch.set_num_threads(1)
done = threading.Event()
def busy():
    while not done.is_set():
        torch.empty(1000); torch.empty(5 * MB, dtype=torch.uint8)
threads = [threading.Thread(target=busy) for _ in range(3)]
[t.start() for t in threads]
kept = block(3 * MB, 5)
for _ in range(30):
    pid = os.fork()
    if pid == 0:
        fresh = block(3 * MB, 6)
        os._exit(0 if kept[0] == 5 and fresh[-1] == 6 else 1)
    assert os.waitpid(pid, 0)[1] == 0  # a lock held by another thread at the fork would hang here
done.set(); [t.join() for t in threads]
assert (kept == 5).all()
""")


def test_what_is_kept_is_bounded_by_what_was_used() -> None:
    run("""
import resource
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
base = resident()
for i in range(1, 120, 3):  # every size but once, as with batches of all lengths
    block(i * MB, 1)
    figures = native.figures()
    assert figures["used"] + figures["kept"] <= figures["peak"] * 1.25 + 64 * MB, figures
assert figures["peak"] < 140 * MB and resident() - base < 300 * MB, (figures, resident() - base)
several = [block(20 * MB, 1) for _ in range(10)]
del several
assert native.kept_bytes() > 150 * MB  # what a step used is there for the next
native.trim()
assert native.kept_bytes() == 0 and resident() - base < 60 * MB
""")


def test_an_exhausted_memory_frees_what_is_kept_then_raises() -> None:
    run("""
import resource
held = [block(50 * MB, 1) for _ in range(10)]
del held
assert native.kept_bytes() > 400 * MB
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 100 * MB, size + 100 * MB))
large = block(300 * MB, 2)  # fits only when the kept blocks go back
assert large[-1] == 2
for impossible in (10 << 30, 1 << 45, 1 << 62):
    try:
        torch.empty(impossible, dtype=torch.uint8)
    except RuntimeError as error:
        assert "can't allocate memory" in str(error) and str(impossible) in str(error), error
    else:
        raise AssertionError(impossible)
used = native.figures()["used"]
assert used < 400 * MB, used  # a failed request is not counted
assert block(MB, 3)[-1] == 3
""")


def test_a_training_step_needs_nothing_new_and_the_profiler_sees_memory() -> None:
    out = run("""
model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
data = torch.randn(2048, 256)
for step in range(8):
    if step == 4:
        misses = native.figures()["misses"]
    model(data).square().mean().backward(); optimizer.step(); optimizer.zero_grad()
print(native.figures()["misses"] - misses)
from torch.profiler import profile, ProfilerActivity
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
    kept = torch.empty(10 * MB, dtype=torch.uint8)
assert sum(event.self_cpu_memory_usage for event in seen.events()) >= 10 * MB
""")
    assert int(out) == 0


def test_workers_that_start_together_build_it_once(tmp_path: Path) -> None:
    code = "from manyhands.core import native; assert native.enable_allocator() == 'caching' == native.enable_allocator()"
    env = {**os.environ, "MANYHANDS_CACHE": str(tmp_path)}
    workers = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    assert [path.suffix for path in (tmp_path / "native").iterdir() if path.suffix != ".lock"] == [".so"]


def status(**variables: str) -> str:
    code = "from manyhands.core import native; print(native.enable_allocator())"
    return run(code, preamble="", **variables).strip()


def test_what_hinders_it_is_said(tmp_path: Path) -> None:
    assert "no C++ compiler on PATH" in status(PATH=str(tmp_path), MANYHANDS_CACHE=str(tmp_path / "a"))
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    said = status(PATH=f"{tmp_path}:/usr/bin:/bin", MANYHANDS_CACHE=str(tmp_path / "b"))
    assert "c++ could not compile it: x.cpp:1: error: no such header" in said
    assert not list((tmp_path / "b" / "native").glob("*.tmp"))
    compiler.write_text('#!/bin/sh\nfor a; do [ "$p" = -o ] && echo garbage > "$a"; p=$a; done\n')
    assert "system's (" in status(PATH=f"{tmp_path}:/usr/bin:/bin", MANYHANDS_CACHE=str(tmp_path / "c"))
    (tmp_path / "file").write_text("")
    assert "system's (" in status(MANYHANDS_CACHE=str(tmp_path / "file"))
    assert "MANYHANDS_ALLOCATOR=off" in status(MANYHANDS_ALLOCATOR="off")
