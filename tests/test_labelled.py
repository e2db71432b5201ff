"""Labelled rows are what a tokenizer itself makes of a text: a saved classifier is asked by its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyhands.data.prepare import prepare
from manyhands.data.rows import LabelledRows
from manyhands.data.source import DataSpec

TEXTS = ["many hands make light work", "too many cooks", "hands"]
TEMPLATES = {
    "both": "[CLS] $A [SEP]",
    "before": "[CLS] $A",
    "behind": "$A [SEP]",
    "none": None,
}


def _tokenizer(directory: Path, template: str | None) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*special, *sorted({word for text in TEXTS for word in text.split()})]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("max_len", [3, 5, 16])
@pytest.mark.parametrize("template", TEMPLATES)
def test_rows_have_their_tokenizers_special_tokens(template: str, max_len: int, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": str(i % 2)}) + "\n" for i, text in enumerate(TEXTS))
    )
    directory = _tokenizer(tmp_path / "tokenizer", TEMPLATES[template])
    spec = DataSpec(data=(str(tmp_path / "a.jsonl"),), label="label", tokenizer=str(directory))
    rows = LabelledRows(prepare(spec, cache=tmp_path / "cache"), max_len, np.arange(len(TEXTS)))
    theirs: Any = AutoTokenizer.from_pretrained(directory)
    expected = [theirs(text, truncation=True, max_length=max_len)["input_ids"] for text in TEXTS]
    batch = rows.take(np.arange(len(TEXTS)))
    kept = [
        ids[mask > 0].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert kept == expected
    assert rows.lengths.tolist() == list(map(len, expected))
