"""Whether a model fits its tokenizer, rows and task: checked when it is built, not met as an index error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.core.errors import ModelError, UsageError, nearest
from manyhands.core.needs import Needs
from manyhands.models import store

PADDING_ROWS = 1024  # a vocabulary may be padded by this much for speed


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a model must fit: a task, by its name, and what that needs."""

    task: str
    needs: Needs
    vocab_size: int
    seq_len: int
    n_labels: int | None
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None


def check_keys(config: Any, changes: Mapping[str, Any], name: str) -> None:
    known = {*config.to_dict(), *getattr(config, "attribute_map", {}), "rope_theta", "rope_scaling"}
    known -= {"model_type", "transformers_version", "architectures"}
    for key in changes:
        if key not in known:
            raise UsageError(
                f"{name} has no option {key!r}",
                "changes are fields of its configuration",
                nearest(key, known),
            )


def check_fit(config: Any, fit: Fit, name: str) -> None:
    """Vocabulary and context against tokenizer and rows."""
    vocab = getattr(config, "vocab_size", None)
    if isinstance(vocab, int) and not fit.vocab_size <= vocab <= fit.vocab_size + PADDING_ROWS:
        raise ModelError(
            f"{name} has a vocabulary of {vocab:,}, the tokenizer has {fit.vocab_size:,}",
            f"the model's is the tokenizer's, or up to {PADDING_ROWS:,} rows more",
            "use the model's own tokenizer (--tokenizer DIRECTORY), or a fresh model of the tokenizer's size",
        )
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and "roberta" in str(config.model_type):
        positions -= 2  # counts from the padding token's id + 1
    if isinstance(positions, int) and 0 < positions < fit.seq_len:
        raise ModelError(
            f"{name} has {positions:,} positions, rows have {fit.seq_len:,} tokens",
            "each token needs a position",
            f"give --seq-len {positions} or less, or more positions",
        )


def check_recipe(arguments: Mapping[str, Any], fit: Fit, name: str) -> None:
    """The same of a saved model of another kind, as far as what it was made with tells."""
    vocab, labels = arguments.get("vocab_size"), arguments.get("n_labels")
    if isinstance(vocab, int) and vocab < fit.vocab_size:
        raise ModelError(
            f"{name} was made for {vocab:,} tokens, the tokenizer has {fit.vocab_size:,}",
            "each token needs a row of the embedding",
            f"use its own tokenizer (--tokenizer {name}), or a fresh model",
        )
    if isinstance(labels, int) and fit.n_labels is not None and labels != fit.n_labels:
        raise ModelError(
            f"{name} was made for {labels} classes, the data have {fit.n_labels}",
            "a saved model is loaded as it was made",
            "correct the label column, or train a fresh model",
        )


def check_loaded(model: Any, loading: Mapping[str, Any], path: Path, fit: Fit) -> None:
    """Only a classifier's head (and a pooler) may be fresh in a loaded model."""
    missing = sorted(loading.get("missing_keys", ()))
    if fit.needs.labelled:
        body = f"{model.base_model_prefix}."
        missing = [key for key in missing if key.startswith(body) and ".pooler." not in key]
    mismatched = sorted(str(m[0] if isinstance(m, tuple) else m) for m in loading.get("mismatched_keys", ()))
    if missing or mismatched:
        keys = [*missing, *mismatched]
        raise ModelError(
            f"{path} lacks {len(keys)} weights of a {type(model).__name__}, the first {keys[0]}",
            f"a model for {fit.task} is whole",
            "give a directory that was saved for this task",
        )


def check_padding(model: Any, fit: Fit, name: str) -> None:
    """A decoder classifies by its last token that is not padding, so it must know padding."""
    if fit.needs.labelled and hasattr(model, "score") and model.config.pad_token_id is None:
        raise ModelError(
            f"{name} without a padding token",
            f"a {type(model).__name__} reads its answer at the last token before padding",
            "use a tokenizer with a pad_token, or an encoder such as bert-tiny",
        )


def special_tokens(tokenizer_dir: str | Path | None) -> dict[str, int | None]:
    """bos, eos and pad ids of a saved tokenizer."""
    if tokenizer_dir is None:
        return {}
    if (told := _told_tokens(Path(tokenizer_dir))) is not None:
        return told
    from transformers import AutoTokenizer

    try:
        with store.quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{tokenizer_dir} holds no tokenizer: {str(error).splitlines()[0]}",
            "AutoTokenizer loads it",
            "check the path",
        ) from None
    return {f"{kind}_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}


def _told_tokens(directory: Path) -> dict[str, int | None] | None:
    """What `special_tokens` answers, read from the files where they say all: then Transformers, whose import takes longer than
    many a step, may not be needed at all. None: they leave something to Transformers.
    """
    from tokenizers import Tokenizer

    try:
        told = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        if told.get("tokenizer_class") != "PreTrainedTokenizerFast" or "auto_map" in told:
            return None
        if (directory / "config.json").exists():  # some kinds of model have a class of their own
            return None
        names = ("bos_token", "eos_token", "pad_token")
        older = directory / "special_tokens_map.json"
        mapped = json.loads(older.read_text(encoding="utf-8")) if older.exists() else {}
        if any(mapped.get(name, told.get(name)) != told.get(name) for name in names):
            return None
        words = [told.get(name) for name in names]
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        ids = [None if word is None else tokenizer.token_to_id(word) for word in words]
    except Exception:  # of `tokenizers`, too, which raises plain ones: Transformers says what is wrong
        return None
    if any(word is not None and found is None for word, found in zip(words, ids, strict=True)):
        return None
    return dict(zip(("bos_id", "eos_id", "pad_id"), ids, strict=True))
