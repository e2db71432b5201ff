"""How many rows fit into one forward and backward, found by trying; and what happens when memory runs out after all.

Before the start: a pass of one row and one of two are run, the second's larger peak is what a row needs, and what fits into
nine tenths of the memory that can be had (below the cgroup's limit, divided among this host's workers, less what
gradients and optimizer will take) is the most that a pass gets. On a GPU that number is tried out as well, and halved until
it does fit. What a row needs is remembered beside the machine's other facts.

In mid-run: a pass that finds no memory is cut in halves (`split_on_oom`), which changes no sum, though where a pass draws
random numbers (dropout) those of pieces are others; the worker keeps to the smaller passes from then on. Where a pass is
everybody's (ZeRO 2 and 3), all begin the step anew with half as many rows (`manyhands.train.sharded`). Where a container's limit
kills the worker instead, or what has travelled or was added up before cannot be taken back, its launcher starts the
successor with passes of half as many rows (`tell_launcher`, `manyhands.launch.verdict.back_off`).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from manyhands.core import passes
from manyhands.core.environment import read_env
from manyhands.core.errors import ManyhandsError
from manyhands.core.events import Emit, Warned

if TYPE_CHECKING:
    from torch import nn

    from manyhands.core.types import Batch, Rows, Task
    from manyhands.train.feed import Feed
    from manyhands.train.method import Part

T = TypeVar("T")

SPARE = 0.1  # of the memory that can be had is left alone
SMALL = 16 << 20  # bytes a row: less is measured in more rows at once


# -- in mid-run


@dataclass
class Fits:
    """The most rows of a pass that this worker's memory was found to hold; None: it never ran out.

    Attributes:
        told: what of that was told to people.
        largest: the rows of my largest pass, as my launcher knows.
    """

    most: int | None = None
    told: int | None = None
    largest: int = 0

    def announce(self, part: Part, device: torch.device) -> None:
        """Before a step on the CPU: where the kernel kills me for memory, nobody else can say how large my passes were."""
        rows = max((_rows(batch) for _, batch in part.micro_batches), default=0)
        if part.divisible and self.most is not None:
            rows = min(rows, self.most)
        if device.type == "cpu" and rows and (rows > self.largest or self.largest > (self.most or rows)):
            self.largest = rows
            tell_launcher(rows, divisible=part.divisible)


def tell_launcher(rows: int, *, divisible: bool) -> bool:
    """How many rows my largest pass has, and whether a successor's may have fewer. Returns whether there may be a successor."""
    env = read_env()
    if env.store is None or env.seat is None:
        return False
    passes.tell(env.store, env.seat, passes.Pass(rows, divisible))
    return True


class Torn(Exception):
    """Memory ran out in a backward that had already handed over some gradients: the passes before it count no more.

    Attributes:
        rows: of its pass.
    """

    def __init__(self, rows: int, why: str) -> None:
        self.rows = rows
        super().__init__(why)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in words or "out of memory" in words)


def split_on_oom(
    run: Callable[[Batch, int, bool], T],
    batch: Batch,
    fits: Fits,
    *,
    divisible: bool,
    untouched: Callable[[], bool],
    what: str = "forward and backward",
) -> list[T]:
    """Run a pass, in as many pieces as memory asks for.

    Args:
        run: (rows of the batch, the first's number, whether they are its last) -> anything; `what`, in words.
        fits: what is known, and learnt here.
        divisible: whether the sum over pieces may stand for the sum over the batch (no order of additions is promised).
        untouched: whether the last `run` has left no gradient behind.

    Raises:
        Torn: a piece has to be redone that had left gradients behind.
        ManyhandsError: not even one row fits, or the pass must not be cut.
    """
    rows = _rows(batch)
    divisible = divisible and isinstance(batch, Mapping)
    done: list[T] = []
    begin = 0
    while begin < rows or not done:
        end = min(rows, begin + fits.most) if divisible and fits.most else rows
        piece = batch if end - begin == rows else {name: value[begin:end] for name, value in batch.items()}
        failure = ""
        try:
            done.append(run(piece, begin, end == rows))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = first_line(error)
        if not failure:
            begin = end
            continue
        release()
        if not divisible or end - begin < 2:
            raise ManyhandsError(
                f"no memory for a {what} of {end - begin} row{'s' if end - begin > 1 else ''}: {failure}",
                "a pass has at least one row"
                if divisible
                else "a pass that is one micro-batch of a fixed order of additions is not cut",
                f"give {'' if divisible else 'a smaller --micro-batch, '}--gradient-checkpointing, a shorter --seq-len or a "
                "smaller model",
            )
        fits.most = (end - begin + 1) // 2
        if not untouched():
            raise Torn(end - begin, failure)
    return done


def first_line(error: BaseException) -> str:
    """What it says, in one line."""
    words = str(error).strip()
    return words.splitlines()[0] if words else type(error).__name__


def release() -> None:
    """Give back what is cached, so that the next try has all there is."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def heed(feed: Feed, fits: Fits, step: int, emit: Emit) -> None:
    """After a step in which memory ran out: later passes are smaller from the start, and it is told."""
    if fits.most is None or fits.most == fits.told:
        return
    fits.told = fits.most
    feed.device_batch = min(feed.device_batch, fits.most)
    random = feed.divisible and not feed.coalesce
    drawn = ", but their random numbers (dropout) are others than of passes in one piece" if random else ""
    message = f"step {step}: memory ran out; passes have at most {fits.most} rows from now on, and sums stay the same{drawn}"
    emit(Warned(message=message, where="memory"))


# -- before the start


@dataclass(frozen=True)
class Need:
    """Bytes that a pass takes at its peak: ``fixed`` + ``per_row`` · rows."""

    fixed: int
    per_row: int


def rows_that_fit(
    model: nn.Module,
    task: Task,
    rows: Rows,
    *,
    autocast: Callable[[], Any],
    wanted: int,
    workers_here: int,
    state_bytes: float,
    key: Mapping[str, Any],
) -> int | None:
    """The most rows, up to `wanted`, of a forward and backward of `model` on its device; None: it cannot be measured.

    Gradients are dropped, buffers restored.

    Args:
        workers_here: workers that share this device's memory.
        state_bytes: what a worker will keep for each trainable parameter beside it (`manyhands.train.state_bytes`).
        key: what the need of memory depends on besides the model's shape (row length, precision).

    Raises:
        ManyhandsError: not even one row fits.
    """
    device = next(model.parameters()).device
    name = _name(model, device, key)
    longest = _longest(rows)
    with _undisturbed(model):
        probe = _Probe(model, task, rows, autocast, device, longest)
        need = _known(name)
        if need is None:
            need = probe.need()
            if need is None:
                return None
            _remember(name, need)
        state = math.ceil(state_bytes * sum(p.numel() for p in model.parameters() if p.requires_grad))
        free = (1.0 - SPARE) * available_bytes(device) / max(1, workers_here) - state - need.fixed
        fit = min(wanted, int(free // max(1, need.per_row)))
        if fit < 1:
            raise ManyhandsError(
                f"a row needs {_mib(need.fixed + need.per_row)} beside {_mib(state)} of gradients, optimizer and method, "
                f"and {_mib(available_bytes(device))} can be had by {workers_here} workers",
                "each worker holds the model, its state and one row at least",
                "use fewer workers here, a smaller model, a shorter --seq-len or --gradient-checkpointing",
            )
        if device.type == "cuda":
            while not probe.fits(fit):
                if fit == 1:
                    raise ManyhandsError(
                        "not even one row fits", "a pass has at least one row", "use a smaller model"
                    )
                fit //= 2
    return fit


def available_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device; on a GPU with what PyTorch holds in reserve."""
    from manyhands.core.hardware import memory_available_bytes

    if device.type != "cuda":
        return memory_available_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


class _Probe:
    """Passes of a model that only measure."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        rows: Rows,
        autocast: Callable[[], Any],
        device: torch.device,
        longest: int,
    ) -> None:
        self._model, self._task, self._rows = model, task, rows
        self._autocast, self._device, self._longest = autocast, device, longest

    def need(self) -> Need | None:
        """From a pass of one row and one of two (of eight where rows are small); None where peaks cannot be read."""
        start = self._start()
        if start is None:
            return None
        try:
            self._peak(1, start)  # builds kernels
            one, many, n = self._peak(1, start), self._peak(2, start), 2
            if many - one < SMALL:
                many, n = self._peak(8, start), 8
        finally:
            release()
        per_row = max(1, (many - one) // (n - 1))
        return Need(fixed=max(0, one - per_row), per_row=per_row)

    def fits(self, n: int) -> bool:
        try:
            self._pass(n)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self._model.zero_grad(set_to_none=True)
            release()
        return True

    def _pass(self, n: int) -> None:
        taken = self._rows.take(np.full(n, self._longest, dtype=np.int64))
        batch = {name: tensor.to(self._device) for name, tensor in taken.items()}
        with self._autocast():
            loss_sum = self._task.loss(self._model, batch)[0]
        loss_sum.backward()  # type: ignore[no-untyped-call]

    def _start(self) -> int | None:
        """Bytes in use before any pass."""
        release()
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _reset_peak()

    def _peak(self, n: int, start: int) -> int:
        """Bytes by which a pass of `n` rows rises above `start`."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._pass(n)
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            _reset_peak()
            self._pass(n)
            peak = _resident("VmHWM")
        self._model.zero_grad(set_to_none=True)
        return max(0, peak - start)


def _reset_peak() -> int | None:
    """Let the kernel count this process's peak anew; what is resident now. None where it does not do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except OSError:
        return None


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        torch.set_rng_state(states[0])
        if states[1]:
            torch.cuda.set_rng_state_all(states[1])


def _longest(rows: Rows) -> int:
    lengths = getattr(rows, "lengths", None)
    return 0 if lengths is None else int(np.argmax(lengths))


def _rows(batch: Batch) -> int:
    first = next(iter(batch.values()), ()) if isinstance(batch, Mapping) else batch
    return len(first)


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"


def _name(model: nn.Module, device: torch.device, key: Mapping[str, Any]) -> str:
    """Of a model's shape on a kind of device."""
    from manyhands.core.hardware import device_name

    shape = [(name, list(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    said = json.dumps(
        [type(model).__name__, shape, device_name(str(device)), torch.__version__, dict(key)], sort_keys=True
    )
    return hashlib.sha256(said.encode()).hexdigest()


def _cache(name: str) -> Path:
    from manyhands.core.hardware import cache_directory

    return cache_directory() / "memory" / f"{name[:32]}.json"


def _known(name: str) -> Need | None:
    try:
        return Need(**json.loads(_cache(name).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _remember(name: str, need: Need) -> None:
    path = _cache(name)
    with contextlib.suppress(OSError):  # a cache that cannot be written is only slower
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"fixed": need.fixed, "per_row": need.per_row}))
        temporary.replace(path)
