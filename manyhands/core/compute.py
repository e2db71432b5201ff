"""The CPU's passes over activations that are worth a kernel of our own (``compute.cpp``), and where they replace PyTorch's.

Measured on one core with AMX, bf16, 2,048 tokens (docs/log.md): attention's backward 16 ms against 30, GELU with tanh forward and
backward 8 against 19 to 28, cross entropy 27 against 47. Where they cannot be had (no compiler, another type, another
device, a mask) PyTorch's own are used: the same function, another rounding.

`enable` puts attention's backward in the place of PyTorch's kernel for the whole process, under torch.compile too, and is
for processes that are ours. `gelu_tanh` and the two parts of cross entropy are called where they are needed.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core import native

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
SHARES_BYTES = 1 << 24  # of P and dS of the heads that attention's backward takes at a time
WIDEST_HEAD = 256

_enabled: list[Any] = []
_gelu: Any = None  # not behind functools.cache, which torch.compile traces through
_complaint: list[str] = []


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The kernels, built if need be; None where they cannot be had."""
    try:
        found = native.kernels(SOURCE, "-fopenmp", "-mprefer-vector-width=512")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _complaint.append(str(error))
        return None
    p, n, i, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    for kind in ("f32", "bf16"):
        getattr(found, f"gelu_{kind}").argtypes = (p, p, n, i)
        getattr(found, f"gelu_backward_{kind}").argtypes = (p, p, p, n, i)
        getattr(found, f"norms_{kind}").argtypes = (p, n, n, p, i)
        getattr(found, f"cross_entropy_backward_{kind}").argtypes = (p, p, p, p, p, n, n, i)
    if hasattr(found, "attention_shares"):
        found.attention_shares.argtypes = (p, p, p, p, p, p, f, i, n, n, n, p, p, p, i)
    return found


def kind_of(*tensors: Tensor) -> str | None:
    """The suffix of the kernels for these tensors, or None where there are none."""
    import torch

    first = tensors[0]
    kind = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(first.dtype)
    if kind is None or library() is None:
        return None
    fits = all(t.device.type == "cpu" and t.dtype == first.dtype and t.is_contiguous() for t in tensors)
    return kind if fits else None


def log_norms(logits: Tensor, kind: str) -> Tensor:
    """log Σ exp of each row of logits [rows, classes], float32 [rows]."""
    import torch

    rows, classes = logits.shape
    norm = torch.empty(rows, dtype=torch.float32)
    _call(f"norms_{kind}", logits.data_ptr(), rows, classes, norm.data_ptr())
    return norm


def cross_entropy_gradient(logits: Tensor, index: Tensor, weight: Tensor, norm: Tensor, kind: str) -> Tensor:
    """(softmax − onehot(index)) · weight of each row, in the type of logits [rows, classes]; 0 where the weight is 0.

    Args:
        index: [rows] int64. weight, norm: [rows] float32.
    """
    import torch

    grad = torch.empty_like(logits)
    pointers = [t.data_ptr() for t in (logits, index, weight, norm, grad)]
    _call(f"cross_entropy_backward_{kind}", *pointers, *logits.shape)
    return grad


def gelu_tanh(x: Tensor) -> Tensor:
    """x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), as ``F.gelu(x, approximate="tanh")``."""
    if x.device.type != "cpu":  # nothing of ours there, and torch.compile fuses PyTorch's with its neighbours
        import torch.nn.functional as F

        return F.gelu(x, approximate="tanh")
    result: Tensor = gelu_operator()(x)
    return result


def gelu_operator() -> Any:
    """The operator ``manyhands::gelu_tanh``: torch.compile takes it as it is, where it was asked for before."""
    global _gelu
    if _gelu is None:
        _gelu = _make_gelu()
    return _gelu


def _make_gelu() -> Any:
    import torch
    import torch.nn.functional as F

    library_of: Any = torch.library.Library  # untyped in torch
    ours = library_of("manyhands", "FRAGMENT")
    ours.define("gelu_tanh(Tensor x) -> Tensor")
    ours.define("gelu_tanh_backward(Tensor grad, Tensor x) -> Tensor")

    def forward(x: Tensor) -> Tensor:
        kind = kind_of(x)
        if kind is None:
            return F.gelu(x, approximate="tanh")
        y = torch.empty_like(x)
        _call(f"gelu_{kind}", x.data_ptr(), y.data_ptr(), x.numel())
        return y

    def backward(grad: Tensor, x: Tensor) -> Tensor:
        grad = grad.contiguous()
        kind = kind_of(grad, x)
        if kind is None:
            return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")  # type: ignore[no-any-return]
        out = torch.empty_like(x)
        _call(f"gelu_backward_{kind}", grad.data_ptr(), x.data_ptr(), out.data_ptr(), x.numel())
        return out

    ours.impl("gelu_tanh", forward, "CPU")
    ours.impl("gelu_tanh_backward", backward, "CPU")
    ours.impl("gelu_tanh", lambda x: torch.empty_like(x), "Meta")
    ours.impl("gelu_tanh_backward", lambda grad, x: torch.empty_like(x), "Meta")
    torch.library.register_autograd(
        "manyhands::gelu_tanh",
        lambda context, grad: torch.ops.manyhands.gelu_tanh_backward(grad, *context.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
        lib=ours,
    )
    _enabled.append(ours)  # an operator lives as long as its library
    return torch.ops.manyhands.gelu_tanh.default


def enable() -> bool:
    """Attention's backward by our kernel from now on in this process, where it fits; whether it can be had here."""
    import torch

    found = library()
    if found is None or not hasattr(found, "attention_shares") or not hasattr(torch.library, "get_kernel"):
        return False
    from manyhands.core import hardware

    return "avx512_bf16" in hardware.cpu_flags() and _enable_attention()


def about() -> str:
    """What the plan says of them: which are ours, and why not where they are not."""
    if library() is None:
        return f"PyTorch's ({_complaint[0] if _complaint else 'ours cannot be had'}: a slower run)"
    return (
        f"ours for {'attention, ' if _enabled_attention() else ''}GELU with tanh and cross entropy on a CPU"
    )


def _enabled_attention() -> bool:
    return bool(_enable_attention.cache_info().currsize) and _enable_attention()


@functools.lru_cache(maxsize=1)
def _enable_attention() -> bool:
    import warnings

    import torch

    name = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    try:
        original = torch.library.get_kernel(name, "CPU")
    except RuntimeError:  # this torch has no such kernel
        return False

    def backward(
        keys: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dropout: float,
        causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> Any:  # fmt: skip
        if attn_mask is not None or dropout or not _fits(q, k, v, grad, out):
            return original.call_boxed(
                keys, grad, q, k, v, out, lse, dropout, causal, attn_mask=attn_mask, scale=scale
            )
        return attention_backward(grad, q, k, v, out, lse, causal, scale)

    library_of: Any = torch.library.Library  # untyped in torch
    ours = library_of("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that a kernel is replaced
        ours.impl(name.removeprefix("aten::"), backward, "CPU", with_keyset=True)
    _enabled.append(ours)
    return True


def _fits(*tensors: Tensor) -> bool:
    import torch

    shape = tensors[0].shape
    return shape[-1] % 2 == 0 and 0 < shape[-1] <= WIDEST_HEAD and 0 < shape[-2] <= 1 << 12 and all(
        t.shape == shape and t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors
    )  # fmt: skip


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, [batch, heads, length, width] in bfloat16.

    P = exp(scale · qkᵀ − lse), dV = Pᵀ dO, dS = scale · P ∘ (dO vᵀ − rowsum(dO ∘ O)), dQ = dS k, dK = dSᵀ q: what
    FlashAttention's backward computes (arXiv:2205.14135, algorithm 4), with scores in float32 and P and dS rounded to bfloat16
    for the matrix units.

    Args:
        lse: [batch, heads, length] log Σ exp of the scaled scores.
    """
    import torch

    batch, heads, length, width = q.shape
    n = batch * heads
    scale = width**-0.5 if scale is None else scale
    flat = [t.reshape(n, length, width).contiguous() for t in (grad, q, k, v, out)]
    lse = lse.reshape(n, length).float().contiguous()
    # memory in the order [batch, length, heads, width], as PyTorch's kernel gives them
    found = tuple(torch.empty_permuted(q.shape, (0, 2, 1, 3), dtype=q.dtype) for _ in range(3))
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * (width + 1) * (length + 31), dtype=torch.int32)
    each = max(1, min(n, SHARES_BYTES // (2 * length * length)))
    shares = torch.empty(2, each, length, length, dtype=q.dtype)
    parts: list[list[Tensor]] = [[], [], []]
    for begin in range(0, n, each):
        g, qs, ks, vs, o = (t[begin : begin + each] for t in flat)
        p, ds = shares[:, : len(g)]
        pointers = [t.data_ptr() for t in (qs, ks, vs, g, o, lse[begin:])]
        buffers = [t.data_ptr() for t in (p, ds, scratch)]
        _call("attention_shares", *pointers, scale, int(causal), len(g), length, width // 2, *buffers)
        parts[0].append(torch.bmm(ds, ks))
        parts[1].append(torch.bmm(ds.transpose(1, 2), qs))
        parts[2].append(torch.bmm(p.transpose(1, 2), g))
    for target, pieces in zip(found, parts, strict=True):
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        target.copy_(whole.view(q.shape))
    return found[0], found[1], found[2]


def _call(name: str, *arguments: Any) -> None:
    """A kernel over this process's threads; it lets go of the interpreter's lock meanwhile."""
    import torch

    found = library()
    assert found is not None, "whoever calls has asked whether there is one"
    getattr(found, name)(*arguments, torch.get_num_threads())
