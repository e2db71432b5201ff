"""A continuation of a prompt by a trained causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manyhands.core.errors import UsageError


def continuation(
    model: Any,
    tokenizer_dir: Path,
    prompt: str,
    *,
    new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
) -> str:
    """Sample up to `new_tokens` tokens after `prompt`; returns the new text without the prompt.

    Args:
        model: a Transformers model with ``generate``.
        temperature: 0 takes the likeliest token each time.

    Raises:
        UsageError: the directory holds no tokenizer, or the prompt is too long for the model.
    """
    import torch
    from transformers import AutoTokenizer

    from manyhands.models.store import quiet

    if not any((tokenizer_dir / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise UsageError(
            f"{tokenizer_dir} holds no tokenizer",
            "a prompt is read in the tokens that the model was trained on",
            "save the model with them: hands.save(replica, directory, tokenizer=…)",
        )
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if ids.numel() == 0:
        if tokenizer.eos_token_id is None:
            raise UsageError(
                "an empty prompt", "this tokenizer has no end-of-text token to begin with", "give a prompt"
            )
        ids = torch.tensor([[tokenizer.eos_token_id]])
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    if ids.shape[1] >= limit:
        raise UsageError(
            f"a prompt of {ids.shape[1]} tokens",
            f"the model sees at most {limit} positions",
            "shorten the prompt",
        )
    new_tokens = min(new_tokens, limit - ids.shape[1])
    ids = ids.to(next(model.parameters()).device)
    sampling = (
        {
            "do_sample": True,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": 0,  # all: Transformers' own default is 50
        }
        if temperature > 0
        else {"do_sample": False}
    )
    was_training = model.training
    model.eval()
    with torch.no_grad(), quiet():  # it advises an attention mask, which it is given
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            synced_gpus=False,  # one worker alone: else a divided model's generation waits for all
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            **sampling,
        )
    model.train(was_training)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
