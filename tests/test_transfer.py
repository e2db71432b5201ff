"""A worker's state goes to another, bit by bit, or not at all."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from members import Job, PipeMembership

from manyhands.core.errors import ManyhandsError, PeerLost, UsageError
from manyhands.wire import transfer
from manyhands.wire.transfer import CHUNK_BYTES, Offer, fetch, interface_toward

TOKEN = "a token of this test"
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.complex64,
]


@pytest.fixture
def offer() -> Iterator[Offer]:
    made = Offer(TOKEN)
    yield made
    made.close()


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits, NaNs of all kinds among them."""
    numel = torch.Size(shape).numel()
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.bool)
    return torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_and_shape_arrives_bit_by_bit(offer: Offer, dtype: torch.dtype) -> None:
    tensors = {
        "whole": _random(dtype, 3, 5, 7),
        "scalar": _random(dtype, 1)[0],
        "empty": torch.empty(0, dtype=dtype),
        "emptier": torch.empty(3, 0, 2, dtype=dtype),
        "turned": _random(dtype, 4, 6).t(),
        "strided": _random(dtype, 10)[::3],
        "large": _random(dtype, CHUNK_BYTES // dtype.itemsize + 3),
    }
    facts = {"step": 3, "näme": [1.5, None, "x"], "nested": {"a": True}}
    offer.put(1, tensors, facts)
    seen: list[tuple[int, int]] = []
    got, told = fetch(offer.address, TOKEN, 1, progress=lambda done, total: seen.append((done, total)))
    assert told == facts
    assert list(got) == list(tensors)
    for name, tensor in tensors.items():
        assert got[name].dtype is dtype
        assert got[name].shape == tensor.shape
        assert _bits(got[name]) == _bits(tensor), name
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_a_parameter_is_read_and_nothing_at_all_is_a_state_too(offer: Offer) -> None:
    weight = torch.nn.Parameter(torch.randn(5))
    offer.put(1, {"w": weight}, {})
    got, _ = fetch(offer.address, TOKEN, 1)
    assert not got["w"].requires_grad
    assert torch.equal(got["w"], weight)
    offer.put(2, {}, {})
    assert fetch(offer.address, TOKEN, 2) == ({}, {})


def test_a_version_is_awaited(offer: Offer) -> None:
    offer.put(1, {"a": torch.zeros(1)}, {})
    threading.Timer(0.2, offer.put, (2, {"a": torch.ones(1)}, {"version": 2})).start()
    got, facts = fetch(offer.address, TOKEN, 2)
    assert (float(got["a"]), facts) == (1.0, {"version": 2})


def test_what_is_gone_or_does_not_come_is_said_so(offer: Offer) -> None:
    with pytest.raises(PeerLost, match="offers no state"):
        fetch(offer.address, TOKEN, 1, timeout_s=0.2)
    offer.put(3, {}, {})
    with pytest.raises(PeerLost, match="version 2 is not on offer any more"):
        fetch(offer.address, TOKEN, 2)
    offer.withdraw()
    with pytest.raises(PeerLost, match="version 3 is not on offer any more"):
        fetch(offer.address, TOKEN, 3)
    with pytest.raises(PeerLost, match="hands out no state"):
        fetch("", TOKEN, 1)
    offer.put(4, {"a": torch.ones(1)}, {})
    assert float(fetch(offer.address, TOKEN, 4)[0]["a"]) == 1.0
    offer.close()
    with pytest.raises(PeerLost):
        fetch(offer.address, TOKEN, 4, timeout_s=5.0)


def test_a_stranger_gets_nothing(offer: Offer) -> None:
    offer.put(1, {"a": torch.ones(1)}, {})
    with pytest.raises(UsageError, match="another token"):
        fetch(offer.address, "some other token", 1)


def test_state_that_is_withdrawn_on_its_way_does_not_arrive(offer: Offer) -> None:
    """It may have changed: nobody gets half of one version and half of another."""
    tensors = {str(i): torch.zeros(CHUNK_BYTES) for i in range(16)}
    offer.put(1, tensors, {})

    def change(done: int, total: int) -> None:
        if offer._version == 1:
            offer.withdraw()
            for tensor in tensors.values():
                tensor.fill_(1.0)

    with pytest.raises(PeerLost, match="withdrawn"):
        fetch(offer.address, TOKEN, 1, progress=change)


def test_the_end_of_the_epoch_ends_a_transfer_and_a_wait(offer: Offer) -> None:
    over = threading.Event()
    threading.Timer(0.1, over.set).start()
    with pytest.raises(PeerLost, match="epoch is over"):
        fetch(offer.address, TOKEN, 1, over=over)
    over.clear()
    offer.put(1, {str(i): torch.zeros(CHUNK_BYTES) for i in range(16)}, {})
    with pytest.raises(PeerLost, match="epoch is over"):
        fetch(offer.address, TOKEN, 1, over=over, progress=lambda done, total: (over.set(), time.sleep(0.1)))


def test_who_waits_hears_that_bytes_arrive(offer: Offer) -> None:
    offer.put(1, {str(i): torch.zeros(CHUNK_BYTES) for i in range(2)}, {})
    heard, threads = threading.Event(), list[threading.Thread]()

    def moved() -> None:
        threads.append(threading.current_thread())
        heard.set()

    fetch(offer.address, TOKEN, 1, progress=lambda done, total: heard.wait(30), moved=moved)
    assert set(threads) == {threading.current_thread()}


def test_several_fetch_at_once(offer: Offer) -> None:
    tensors = {"a": _random(torch.float32, 3, CHUNK_BYTES // 4)}
    offer.put(1, tensors, {})
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(fetch(offer.address, TOKEN, 1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [_bits(tensors_["a"]) for tensors_, _ in got] == [_bits(tensors["a"])] * 4


def _source(membership: PipeMembership) -> None:
    offer = Offer(TOKEN)
    offer.put(1, {"a": torch.zeros(1 << 26)}, {})
    membership.tell("told", offer.address)
    membership.next()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_source_that_ends_in_the_middle(signum: int) -> None:
    over = threading.Event()
    with Job(_source) as job:
        job.start("source")
        _, address = job.until(lambda: job.told[0] if job.told else None)
        pid, begun = job.processes["source"].pid, threading.Event()

        def hit(done: int, total: int) -> None:
            if not begun.is_set():
                begun.set()
                os.kill(pid, signum)
                if signum == signal.SIGSTOP:  # only the coordinator notices that
                    threading.Timer(0.2, over.set).start()

        with pytest.raises(PeerLost):
            fetch(address, TOKEN, 1, over=over, progress=hit)


def test_a_state_is_served_where_it_is_asked_for() -> None:
    assert interface_toward("") == "127.0.0.1"
    assert interface_toward("127.0.0.1:4000") == "127.0.0.1"
    assert interface_toward("localhost") in ("127.0.0.1", "[::1]")
    with pytest.raises(ManyhandsError, match=r"no\.such\.host"):
        interface_toward("no.such.host.invalid:1")
    offer = Offer(TOKEN, toward="127.0.0.1:4000")
    assert offer.address.startswith("127.0.0.1:")
    offer.close()


def test_a_call_that_never_ends_is_left(monkeypatch: pytest.MonkeyPatch, offer: Offer) -> None:
    """gRPC's own waiting has no limit: here it goes on after the call is cancelled."""
    stuck = threading.Event()
    monkeypatch.setattr(transfer, "CANCEL_S", 0.1)
    monkeypatch.setattr(transfer, "_receive", lambda *_: stuck.wait(60))
    over = threading.Event()
    offer.put(1, {"a": torch.zeros(3)}, {})
    threading.Timer(0.1, over.set).start()
    with pytest.raises(PeerLost, match="epoch is over"):
        fetch(offer.address, TOKEN, 1, over=over)
    monkeypatch.setattr(transfer, "SILENT_S", 0.1)
    with pytest.raises(PeerLost, match="has sent nothing for"):  # nobody else has noticed
        fetch(offer.address, TOKEN, 1)
    stuck.set()
