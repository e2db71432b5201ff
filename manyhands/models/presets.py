"""Named model shapes, built by Transformers from configuration with fresh weights.

All have dropout 0: language models are trained for about one epoch, where dropout costs speed (a third of it
on a CPU) and quality; ask for it as in ``gpt2-nano(resid_pdrop=0.1)``. Vocabulary, special tokens and context
length come from the tokenizer and the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A shape.

    Attributes:
        model_type: the architecture's name in Transformers.
        config: fields of the architecture's configuration.
        causal: whether it can model language; an encoder sees the words to come.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = True


def _gpt2(layers: int, heads: int, width: int) -> Preset:
    """GPT-2 (Radford et al. 2019): learned positions, tied embeddings, GELU, biases."""
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
    return Preset("gpt2", {"n_layer": layers, "n_head": heads, "n_embd": width, **off})


def _llama(layers: int, heads: int, kv_heads: int, width: int, inner: int, **more: Any) -> Preset:
    """Llama (arXiv:2302.13971, 2407.21783): rotary positions, RMS norm, SwiGLU, tied embeddings."""
    shape = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": width,
        "intermediate_size": inner,
        "head_dim": width // heads,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    }
    return Preset("llama", {**shape, **more})


def _bert(layers: int, heads: int, width: int) -> Preset:
    """BERT (arXiv:1810.04805) in the small shapes of arXiv:1908.08962."""
    shape = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return Preset("bert", shape, causal=False)


GPT2_NANO = _gpt2(2, 2, 64)
GPT2_MICRO = _gpt2(4, 4, 128)  # nanoGPT's setting for a CPU
GPT2_MINI = _gpt2(6, 6, 384)  # nanoGPT's setting for tinyshakespeare on a GPU
GPT2_SMALL = _gpt2(12, 12, 768)  # 124M at vocabulary 50,257 and context 1,024
GPT2_MEDIUM = _gpt2(24, 16, 1024)

LLAMA_NANO = _llama(2, 2, 1, 64, 192)
LLAMA_MICRO = _llama(4, 4, 2, 128, 384)
LLAMA_MINI = _llama(6, 6, 2, 384, 1024)
LLAMA_SMALL = _llama(12, 12, 4, 768, 2048)
# Llama 3.2 1B without its stretching of the rotary frequencies to 131,072 positions
LLAMA_1B = _llama(16, 32, 8, 2048, 8192, rope_theta=500_000.0)

BERT_TINY = _bert(2, 2, 128)
BERT_MINI = _bert(4, 4, 256)
