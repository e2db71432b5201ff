"""What `manyhands generate` refuses: it would print the prompt, as if nothing came after it, or a stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from manyhands.cli.main import main
from manyhands.data import tokenize
from manyhands.models import build
from manyhands.train import checkpoint
from manyhands.train.generate import continuation


class Own(nn.Module):
    def generate(self, idx: Any, max_new_tokens: int) -> Any:
        raise AssertionError("its arguments are its own")


def test_a_model_that_continues_no_text_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was saved without its tokenizer, and one whose `generate` is its own."""
    model = build.build("gpt2-nano", task="pretrain", vocab_size=257, seq_len=32)
    taken = checkpoint.snapshot(model, step=1, state={}, optimizer={}, exchange={}, tokenizer_dir=None)
    checkpoint.save(taken, tmp_path, keep=1)
    command = ["generate", str(tmp_path), "--prompt", "many", "--max-new-tokens", "4"]
    assert main(command) == 2
    assert "checkpoint-1 holds no tokenizer. a prompt is read in the tokens" in capsys.readouterr().err
    monkeypatch.setattr(build, "load_model", lambda path, trust: Own())
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert "holds a Own. it does not continue text" in err
    assert out == ""


def test_what_is_drawn_is_drawn_from_all_that_is_asked_for(tmp_path: Path) -> None:
    """Not from the fifty likeliest, which is Transformers' own default."""
    tokenize.train("byte", [], tmp_path / "byte")
    model: Any = build.build("gpt2-nano", task="pretrain", vocab_size=257, seq_len=32)
    given: list[Any] = []
    inner = model._get_logits_processor
    model._get_logits_processor = lambda *args, **options: given.append(inner(*args, **options)) or given[-1]
    continuation(model, tmp_path / "byte", "a", new_tokens=1, temperature=0.5, top_p=0.5)
    assert [type(each).__name__ for each in given[0]] == ["TemperatureLogitsWarper", "TopPLogitsWarper"]
