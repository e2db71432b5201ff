"""Tensor files: safetensors' own reader reads what we write; the digest of parameters is what its contract says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_victims import taken
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.core.errors import CheckpointError
from manyhands.train import checkpoint, tensors

DTYPES = [getattr(torch, name) for name in tensors.TYPES]
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=9), st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6)
)
def test_safetensors_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, spec: dict[str, Any]
) -> None:
    from safetensors import safe_open

    spec.pop("__metadata__", None)  # the format's own word
    path = tmp_path_factory.mktemp("t") / "a.safetensors"
    named = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in spec.items()}
    written = tensors.write(path, named, {"format": "pt"})
    data = path.read_bytes()
    assert written == (len(data), hashlib.sha256(data).hexdigest())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(named)
        for name, tensor in named.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found.to(torch.float64), tensor.to(torch.float64))


def test_every_tensor_starts_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    named = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(5),
        "c": torch.ones(1, dtype=torch.float64),
    }
    tensors.write(tmp_path / "f", named)
    data = (tmp_path / "f").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, tensor in named.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_views_and_transposes_are_written_in_their_own_order(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = torch.arange(12.0).reshape(3, 4)
    tensors.write(tmp_path / "f", {"t": base.t(), "v": base[:, 1]})
    found = load_file(tmp_path / "f")
    assert torch.equal(found["t"], base.t())
    assert torch.equal(found["v"], base[:, 1])


def test_a_type_outside_the_format_is_named(tmp_path: Path) -> None:
    shot = dataclasses.replace(taken(1), optimizer={"phase": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(CheckpointError, match="phase is of type complex64"):
        checkpoint.save(shot, tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_digest_of_parameters_is_what_its_contract_says() -> None:
    weight, step = torch.tensor([[1.5, -2.0], [0.25, 3.0]]), torch.tensor(7)
    naive = hashlib.sha256()
    naive.update(b"a.step\0torch.int64\0[]\0" + struct.pack("<q", 7))
    naive.update(b"b.weight\0torch.float32\0[2, 2]\0" + struct.pack("<4f", 1.5, -2.0, 0.25, 3.0))
    digest = checkpoint.sha256_of_parameters({"b.weight": weight, "a.step": step})
    assert digest == naive.hexdigest()
    strided = torch.stack([weight, weight], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert checkpoint.sha256_of_parameters({"a.step": step, "b.weight": strided}) == digest
    others = [{"b.weight": weight.t(), "a.step": step}, {"b.weight": weight.double(), "a.step": step}]
    others += [{"b.weight": weight.reshape(4), "a.step": step}, {"c.weight": weight, "a.step": step}]
    assert len({digest, *map(checkpoint.sha256_of_parameters, others)}) == 5
