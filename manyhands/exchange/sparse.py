"""Some entries of a long vector as bytes, at the theoretical size: where they are and what they are.

*Where.* A sorted set of ``count`` positions among ``numel`` is coded after Elias and Fano (Elias 1974, "Efficient storage
and retrieval by content and address of static files"): with ``l = ⌊log₂(numel / count)⌋`` the low ``l`` bits of each
position are stored as they are, the rest as a bitmap in which the i-th one is at place ``high_i + i``. That takes at most
``2 + log₂(numel / count)`` bits a position, half a bit above the entropy of a random set, and its size is known beforehand:
8 bits for 64 of each 4,096 (DeMo and SparseLoCo count 12 of them; int64 takes 64).

*What.* Values as fp32, bf16, or 8, 4 or 2 bits: a sign and a level between the smallest and the largest magnitude of a
group of `GROUP` values (with 2 bits: the mean of the group's smaller and of its larger magnitudes). Non-finite values
stay non-finite. Little-endian machines only, as all that torch supports.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from manyhands.core.request import Gather
from manyhands.exchange.codec import wide

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from manyhands.core.request import Request

Values = Literal["fp32", "bf16", "int8", "int4", "int2"]
VALUE_BITS: dict[str, int] = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "int2": 2}
GROUP = 128  # values that share a range
RANGE_BYTES = 4  # of a group: two bf16

Average = Literal["all", "senders"]


class Entries(NamedTuple):
    """Some entries of a vector: ``where`` int64 [count], ascending, and ``values`` [count]."""

    where: Tensor
    values: Tensor


# --------------------------------------------------------------------------------------------------- bits


def bits_bytes(count: int, width: int) -> int:
    """Bytes that `pack_bits` makes of `count` codes of `width` bits."""
    return count * (width // 8) + -(-count * (width % 8) // 8)


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Codes int64 [n] in [0, 2^width) as uint8 [bits_bytes(n, width)]: whole low bytes first, then the rest of the bits."""
    import torch

    parts = [((codes >> shift) & 255).to(torch.uint8) for shift in range(0, width - 7, 8)]
    rest = width % 8
    if rest:
        count = codes.numel()
        groups = codes.new_zeros(-(-count // 8) * 8)
        groups[:count] = codes >> (width - rest)
        groups = groups.view(-1, 8)
        words = groups[:, 0].clone(memory_format=torch.contiguous_format)  # [n / 8]: eight codes in one
        for i in range(1, 8):
            words |= groups[:, i] << (rest * i)
        packed = words.view(torch.uint8).view(-1, 8)[:, :rest].reshape(-1)
        parts.append(packed[: bits_bytes(count, rest)])
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8, device=codes.device)


def unpack_bits(payload: Tensor, count: int, width: int) -> Tensor:
    """The inverse of `pack_bits`: int64 [count]."""
    import torch

    codes = torch.zeros(count, dtype=torch.int64, device=payload.device)
    at = 0
    for shift in range(0, width - 7, 8):
        codes |= payload[at : at + count].to(torch.int64) << shift
        at += count
    rest = width % 8
    if rest and count:
        groups = -(-count // 8)
        padded = payload.new_zeros(groups * rest)
        padded[: payload.numel() - at] = payload[at:]
        words = payload.new_zeros(groups, 8)
        words[:, :rest] = padded.view(groups, rest)
        shifts = torch.arange(0, 8 * rest, rest, device=payload.device)
        high = (words.view(torch.int64) >> shifts) & ((1 << rest) - 1)  # [n / 8, 8]
        codes |= high.reshape(-1)[:count] << (width - rest)
    return codes


def pack_flags(places: Tensor, length: int) -> Tensor:
    """A bitmap uint8 [⌈length / 8⌉] with ones at `places` int64."""
    import torch

    flags = torch.zeros(-(-length // 8) * 8, dtype=torch.uint8, device=places.device)
    flags[places] = 1
    # eight bytes of 0 or 1 times this word: their bits side by side in the topmost byte
    words = (flags.view(torch.int64) * 0x0102040810204080) >> 56
    return words.to(torch.uint8)


def unpack_flags(payload: Tensor) -> Tensor:
    """The places of the ones of a bitmap, ascending: int64."""
    import torch

    byte = torch.arange(256, dtype=torch.uint8, device=payload.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=payload.device)
    table = ((byte.unsqueeze(1) >> shifts) & 1).view(torch.int64).view(-1)  # [256]: eight flags in a word
    return table[payload.to(torch.int64)].view(torch.uint8).nonzero().view(-1)


# ------------------------------------------------------------------------------------------------- where


def _low_bits(numel: int, count: int) -> int:
    return max(0, (numel // count).bit_length() - 1)


def where_bytes(numel: int, count: int) -> int:
    """Bytes of `count` positions among `numel`."""
    if count in (0, numel):
        return 0
    low = _low_bits(numel, count)
    return bits_bytes(count, low) + -(-(count + ((numel - 1) >> low) + 1) // 8)


def pack_where(where: Tensor, numel: int) -> Tensor:
    """Positions int64 [count], ascending, as uint8 [where_bytes(numel, count)]."""
    import torch

    count = where.numel()
    if count in (0, numel):
        return torch.zeros(0, dtype=torch.uint8, device=where.device)
    low = _low_bits(numel, count)
    places = (where >> low) + torch.arange(count, device=where.device)
    flags = pack_flags(places, count + ((numel - 1) >> low) + 1)
    return torch.cat([pack_bits(where & ((1 << low) - 1), low), flags])


def unpack_where(payload: Tensor, numel: int, count: int) -> Tensor:
    """The inverse of `pack_where`: int64 [count]."""
    import torch

    if count in (0, numel):
        return torch.arange(count, device=payload.device)
    low = _low_bits(numel, count)
    cut = bits_bytes(count, low)
    high = unpack_flags(payload[cut:]) - torch.arange(count, device=payload.device)
    return (high << low) | unpack_bits(payload[:cut], count, low)


# ------------------------------------------------------------------------------------------------ values


def values_bytes(count: int, kind: Values) -> int:
    """Bytes of `count` values."""
    bits = VALUE_BITS[kind]
    return bits_bytes(count, bits) + (RANGE_BYTES * -(-count // GROUP) if bits <= 8 else 0)


def pack_values(values: Tensor, kind: Values) -> Tensor:
    """Values [count] as uint8 [values_bytes(count, kind)], rounded to the nearest that `kind` has."""
    import torch

    count, bits = values.numel(), VALUE_BITS[kind]
    if count == 0:
        return torch.zeros(0, dtype=torch.uint8, device=values.device)
    if bits > 8:
        return values.to(torch.float32 if bits == 32 else torch.bfloat16).view(torch.uint8)
    groups = values.new_empty(-(-count // GROUP) * GROUP, dtype=torch.float32)
    groups[:count] = values
    groups[count:] = groups[count - 1]  # the last value fills the last group
    groups = groups.view(-1, GROUP)
    size = groups.abs()
    levels = (1 << (bits - 1)) - 1  # 1, 7, 127
    if levels == 1:
        centre = size.mean(1, keepdim=True)
        code = (size > centre).to(torch.float32)
        upper = code.sum(1, keepdim=True)
        ends = torch.cat([size * (1 - code), size * code], 1).view(-1, 2, GROUP).sum(2)
        ends /= torch.cat([GROUP - upper, upper], 1).clamp_(min=1)
        ends = ends.to(torch.bfloat16)  # [groups, 2]
    else:
        ends = torch.stack([size.amin(1), size.amax(1)], 1).to(torch.bfloat16)
        low, high = ends.float().unsqueeze(2).unbind(1)  # [groups, 1]
        # finite also where the range is denormal: else all would come out as the largest, and what is held back would grow
        per_level = (levels / (high - low)).clamp_(max=torch.finfo(torch.float32).max)
        code = ((size - low) * per_level).nan_to_num(0.0).round_().clamp_(0, levels)
    codes = code.to(torch.int64) | (groups < 0).to(torch.int64) << (bits - 1)
    return torch.cat([ends.view(torch.uint8).view(-1), pack_bits(codes.view(-1)[:count], bits)])


def unpack_values(payload: Tensor, count: int, kind: Values, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack_values`: [count] of type `dtype`."""
    import torch

    bits = VALUE_BITS[kind]
    if count == 0:
        return torch.zeros(0, dtype=dtype, device=payload.device)
    if bits > 8:
        # a copy: a payload's values need not be where a float may be
        return payload.clone().view(torch.float32 if bits == 32 else torch.bfloat16).to(dtype)
    groups = -(-count // GROUP)
    cut, levels = RANGE_BYTES * groups, (1 << (bits - 1)) - 1
    low, high = payload[:cut].clone().view(torch.bfloat16).float().view(groups, 2, 1).unbind(1)  # [groups, 1]
    codes = unpack_bits(payload[cut:], count, bits)
    padded = codes.new_zeros(groups * GROUP)
    padded[:count] = codes
    padded = padded.view(groups, GROUP)
    size = low + (padded & levels) * ((high - low) / levels)
    return torch.where(padded > levels, -size, size).view(-1)[:count].to(dtype)


# ----------------------------------------------------------------------------------------------- together


def pack(entries: Entries, numel: int, kind: Values) -> Tensor:
    """Entries of a vector [numel] as uint8: positions, then values."""
    import torch

    return torch.cat([pack_where(entries.where, numel), pack_values(entries.values, kind)])


def unpack(payload: Tensor, numel: int, count: int, kind: Values, dtype: torch.dtype) -> Entries:
    """The inverse of `pack`."""
    cut = where_bytes(numel, count)
    return Entries(
        unpack_where(payload[:cut], numel, count), unpack_values(payload[cut:], count, kind, dtype)
    )


def packed_bytes(numel: int, count: int, kind: Values) -> int:
    """Bytes of `count` entries of a vector [numel]."""
    return where_bytes(numel, count) + values_bytes(count, kind)


def dense(entries: Entries, numel: int) -> Tensor:
    """The vector [numel]: the entries, zero elsewhere."""
    result = entries.values.new_zeros(numel)
    result[entries.where] = entries.values
    return result


def total(parts: Sequence[Entries], numel: int, dtype: torch.dtype, average: Average) -> Tensor:
    """What the workers' entries come to, added in their order in `wide(dtype)`: [numel] of type `dtype`.

    Contributions are weighted to add up to the mean over all workers, so ``average = "all"`` is their plain sum, and
    the mean over those who sent a coordinate is that sum times workers / senders: exact where all have as many targets.
    Weights do not travel, so whoever had twice as many pulls such a mean twice as far, and a worker without any counts
    as a sender of what it sends.
    """
    import torch

    if average == "senders" and len(parts) > 1:
        parts = by_senders(parts, numel)
    result = torch.zeros(numel, dtype=wide(dtype), device=parts[0].where.device)
    for where, values in parts:
        result[where] += values.to(result.dtype)
    return result.to(dtype)


def by_senders(parts: Sequence[Entries], numel: int) -> list[Entries]:
    """Entries of a vector [numel] times workers / senders of each, in their wide type."""
    import torch

    senders = torch.zeros(numel, dtype=torch.int16, device=parts[0].where.device)
    for where, _ in parts:
        senders[where] += 1
    return [
        Entries(where, values.to(wide(values.dtype)) * (len(parts) / senders[where]))
        for where, values in parts
    ]


class Sparse(Protocol):
    """A codec whose payloads stand for entries."""

    @property
    def average(self) -> Average: ...

    def encode(self, tensor: Tensor, key: int) -> Tensor: ...

    def entries(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Entries: ...


def agree(
    codec: Sparse, tensor: Tensor, key: int, size: int, *, even: bool
) -> Generator[Request, Any, tuple[Tensor, Tensor]]:
    """(mean, sent) of one tensor: everybody's payload is gathered and its entries are added in rank order.

    Where a generic codec decodes N dense vectors, this adds N sets of entries to one.
    """
    flat = tensor.detach().reshape(-1)
    payload = codec.encode(flat, key)
    payloads = [payload] if size == 1 else (yield Gather(payload, even=even))
    own = codec.entries(payload, flat.numel(), tensor.dtype)
    sent = dense(own, flat.numel()).view(tensor.shape)
    if size == 1:
        return sent, sent
    parts = [codec.entries(p, flat.numel(), tensor.dtype) for p in payloads]
    return total(parts, flat.numel(), tensor.dtype, codec.average).view(tensor.shape), sent
