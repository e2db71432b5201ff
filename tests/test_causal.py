"""Compiled models attend without masks where these say nothing, and with them where they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from manyhands.models import causal
from manyhands.models.build import build
from manyhands.tasks.classify import Classify
from manyhands.train import forward

ROWS, LENGTH, WORDS = 2, 48, 300


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each attention that is traced, whether it is given a mask; what is compiled runs as it was traced."""
    seen: list[bool] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            if "scaled_dot_product" in str(node.target):
                seen.append(node.kwargs.get("attn_mask") is not None)
                assert seen[-1] != node.kwargs["is_causal"]
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **more: compile(model, backend=look, **more))
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def _model(name: str, **changes: Any) -> nn.Module:
    return build(name, task="pretrain", vocab_size=WORDS, seq_len=LENGTH, overrides=changes)


def _ids() -> torch.Tensor:
    return torch.randint(0, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["gpt2-nano", "llama-nano"])
def test_packed_rows_need_no_mask(name: str, masks: list[bool]) -> None:
    model, ids = _model(name), _ids()
    assert causal.needs_no_mask(model)
    assert model.training
    faster = forward.compiled(model)
    ours, usual = (f(input_ids=ids, use_cache=False).logits for f in (faster, model))
    assert masks
    assert not any(masks)
    torch.testing.assert_close(ours, usual, rtol=1e-5, atol=1e-6)
    usual.square().mean().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    ours.square().mean().backward()
    after = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert model.config._attn_implementation == "sdpa"


def test_padded_rows_keep_their_mask(masks: list[bool]) -> None:
    model, ids = _model("gpt2-nano"), _ids()
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    faster = forward.compiled(model)
    ours, usual = (f(input_ids=ids, attention_mask=mask, use_cache=False).logits for f in (faster, model))
    assert masks
    assert all(masks)
    torch.testing.assert_close(ours[mask > 0], usual[mask > 0], rtol=1e-5, atol=1e-6)


def test_a_window_keeps_its_mask() -> None:
    from transformers import AutoModelForCausalLM, MistralConfig

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": WORDS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    made = [
        AutoModelForCausalLM.from_config(MistralConfig(**shape, **heads, sliding_window=window))
        for window in (None, 4096)
    ]
    assert [causal.needs_no_mask(model) for model in made] == [True, False]


def test_a_window_in_a_nested_configuration_keeps_its_mask() -> None:
    from transformers import AutoModelForCausalLM, Gemma3Config

    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "vocab_size": WORDS,
        "head_dim": 8,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 40}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(
        Gemma3Config(
            text_config={**text, **heads}, vision_config={**vision, "image_size": 28, "patch_size": 14}
        )
    )
    assert not causal.needs_no_mask(model)


def test_the_trial_leaves_modes_alone_and_fits_into_short_models() -> None:
    model: Any = build("gpt2-nano", task="pretrain", vocab_size=WORDS, seq_len=16)
    model.transformer.drop.eval()
    assert causal.needs_no_mask(model)
    assert not model.transformer.drop.training
    assert model.transformer.h[0].training
    assert not causal.needs_no_mask(build("gpt2-nano", task="pretrain", vocab_size=WORDS, seq_len=2))


def test_what_attends_otherwise_is_left_alone() -> None:
    class Looking(nn.Module):
        """Sees what comes after a token as well: the mask of its configuration does not tell all."""

        config: Any = type("Config", (), {"_attn_implementation": "sdpa", "vocab_size": WORDS})()

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            masked = self.config._attn_implementation == "sdpa"
            return type("Out", (), {"logits": input_ids.float() * self.weight * (1 + masked)})()

    model = Looking()
    assert not causal.needs_no_mask(model)
    assert model.config._attn_implementation == "sdpa"
    assert not causal.needs_no_mask(nn.Linear(2, 2))
    eager: Any = _model("gpt2-nano")
    eager.config._attn_implementation = "eager"
    assert not causal.needs_no_mask(eager)


@pytest.mark.parametrize("name", ["bert-tiny", "tutorial"])
def test_a_compiled_classifier_is_told_of_its_padding(name: str, masks: list[bool]) -> None:
    """A task asks the signature for what a model takes: the compiled one has its model's."""
    model = build(name, task="classify", vocab_size=WORDS, seq_len=LENGTH, n_labels=3).eval()
    mask = torch.ones_like(_ids())
    mask[1, 20:] = 0
    batch = {"input_ids": _ids(), "attention_mask": mask, "label": torch.tensor([0, 2])}
    ours, usual = (Classify().loss(f, batch).loss_sum for f in (forward.compiled(model), model))
    torch.testing.assert_close(ours, usual, rtol=1e-5, atol=1e-6)
    assert all(masks)
